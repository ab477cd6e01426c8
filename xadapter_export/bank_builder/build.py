"""Builds a bank: lists a source, encodes it shard by shard, and puts the shards together.

Dimensions: N pictures, D CLIP embedding size.
"""

import json
import os
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from xadapter_export.bank.output import check_output, staged_bank
from xadapter_export.bank.record import SKIPPED_NAME, BankDtype, BankRecord, package_versions
from xadapter_export.bank.rows import Float32
from xadapter_export.bank.thumbnails import write_thumbnails
from xadapter_export.bank.writer import BankWriter
from xadapter_export.bank_builder.encode import ShardBatches, Skipped, encode_batches
from xadapter_export.bank_builder.image_tower import ImageTower, Precision, choose_device, load_image_tower
from xadapter_export.bank_builder.processes import Processes, join_processes
from xadapter_export.bank_builder.sources import DatasetColumns, Source, open_source
from xadapter_export.bank_builder.work_folder import EncodedShard, WorkFolder
from xadapter_export.bundle.pictures import Picture
from xadapter_export.errors import ConfigError

SHARD_ROWS = 2048
_PACKAGES = ("xadapter-export", "open_clip_torch", "torch", "torchvision", "pillow")

OnNote = Callable[[str], None]
OnPictures = Callable[[int, int], None]


@dataclass(frozen=True)
class BuildSettings:
    """How a bank is built.

    Attributes:
        clip: Folder, ``model:tag`` or hub id; None for the built-in CLIP.
        device: ``auto``, ``cpu``, ``cuda``, ``cuda:1`` and so on.
        workers: Processes that decode; None for a sensible number.
        batch_size: Pictures at a time; None for a sensible number.
        threads: CPU threads of the tower; None for PyTorch's.
        dtype: How features are stored.
        precision: What the tower computes in.
        strict: Whether a picture that cannot be decoded is an error.
        thumbnail_px: Size of thumbnails; None for none.
        shard_rows: Pictures that are encoded between two moments at which a stop loses nothing.
    """

    clip: str | None = None
    device: str = "auto"
    workers: int | None = None
    batch_size: int | None = None
    threads: int | None = None
    dtype: BankDtype = "fp16"
    precision: Precision = "fp32"
    strict: bool = False
    thumbnail_px: int | None = None
    shard_rows: int = SHARD_ROWS


@dataclass(frozen=True)
class BuildResult:
    """A bank that was built.

    Attributes:
        folder: Where it is.
        record: What it says about itself.
        num_listed: Pictures in the source.
        num_resumed_shards: Shards that an earlier run had done.
        first_skipped: The first picture that could not be decoded, and why; None if all could.
    """

    folder: Path
    record: BankRecord
    num_listed: int
    num_resumed_shards: int
    first_skipped: str | None


def work_folder_of(output: Path) -> Path:
    """Return where a build keeps what it has done."""
    return output.with_name(f"{output.name}.build")


def build_bank(
    sources: Sequence[str],
    output: Path,
    settings: BuildSettings | None = None,
    *,
    dataset: str | None = None,
    columns: DatasetColumns | None = None,
    force: bool = False,
    on_note: OnNote | None = None,
    on_pictures: OnPictures | None = None,
) -> BuildResult | None:
    """Build a bank; several processes that a launcher started share the work.

    A build that was stopped goes on when it is called again with the same source and settings; the result
    is the same, bit for bit, as without the stop and whatever the number of processes.

    Args:
        sources: See ``open_source``.
        output: Where the bank goes.
        settings: How.
        dataset: Hub name of a dataset, instead of ``sources``.
        columns: Split and columns of a dataset.
        force: Whether a bank at ``output``, and work begun otherwise, may be replaced.
        on_note: Is told what happens, in the main process.
        on_pictures: Is told how many pictures are done, of how many, in the main process.

    Returns:
        The bank; None in processes that are not the main one.

    Raises:
        ConfigError: If source or settings make no sense, or with ``strict`` a picture cannot be decoded.
        CheckpointError: If the CLIP cannot be loaded, or gives features that are not finite.
        OutputExistsError: If something is at ``output``.
        OutputWriteError: If it cannot be written.
    """
    settings = settings or BuildSettings()
    output = output.resolve()
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    with join_processes() as processes:
        note: OnNote = on_note if on_note is not None and processes.is_main else _say_nothing
        if processes.is_main:
            check_output(output, force=force)
        exclude = (output, work_folder_of(output))
        source = open_source(sources, dataset=dataset, columns=columns or DatasetColumns(), exclude=exclude)
        note(f"loading CLIP {settings.clip or 'of the built-in checkpoint'}")
        device = choose_device(settings.device, local_rank=processes.local_rank)
        tower = load_image_tower(settings.clip, device=device, precision=settings.precision)
        work, num_done = _prepare(output, source, tower, settings, processes, force=force, note=note)
        encode_shards(work, source, tower, settings, processes, on_pictures)
        processes.wait_for_all()
        if not processes.is_main:
            return None
        note(f"merging {_shards(work.num_shards)}")
        record, first_skipped = _assemble(work, output, tower, settings, force=force)
        work.remove()
        return BuildResult(output, record, work.num_rows, num_done, first_skipped)


def _prepare(
    output: Path,
    source: Source,
    tower: ImageTower,
    settings: BuildSettings,
    processes: Processes,
    *,
    force: bool,
    note: OnNote,
) -> tuple[WorkFolder, int]:
    folder = work_folder_of(output)
    if processes.is_main:
        note("listing pictures")
        key = {
            "CLIP": tower.clip.sha256,
            "image tower": tower.clip.image_sha256,
            "device": tower.device.type,
            "precision": settings.precision,
            "batch size": _batch_size(settings, tower),
            "thumbnail size": settings.thumbnail_px,
        }
        WorkFolder.prepare(folder, source, key, shard_rows=settings.shard_rows, force=force)
    processes.wait_for_all()
    work = WorkFolder.open(folder)
    num_done = sum(work.is_done(shard) for shard in range(work.num_shards))
    note(
        f"{work.num_rows} images in {_shards(work.num_shards)}"
        + (f"; resuming: {_shards(num_done)} done" if num_done else "")
    )
    processes.wait_for_all()  # before the first new shard, which another would count as an old one
    return work, num_done


def encode_shards(
    work: WorkFolder,
    source: Source,
    tower: ImageTower,
    settings: BuildSettings,
    processes: Processes,
    on_pictures: OnPictures | None = None,
) -> None:
    """Encode this process's shards that are not done: every P-th, so that each has its own.

    Args:
        work: The listing, and where shards are written.
        source: What was listed.
        tower: What encodes.
        settings: Batch size, workers and thumbnails; the rest was settled before.
        processes: P of them.
        on_pictures: Is told how many pictures are done, of how many, in the main process.

    Raises:
        CheckpointError: If the tower gives a feature that is not finite.
        ConfigError: If a process that decodes died.
        OutputWriteError: If a shard cannot be written.
    """
    mine = range(processes.rank, work.num_shards, processes.count)
    pending = [shard for shard in mine if not work.is_done(shard)]
    if not pending:
        return
    side = max(np.atleast_1d(tower.model.visual.preprocess_cfg["size"]).tolist())  # type: ignore[union-attr, index]  # open_clip
    batches = ShardBatches(
        work,
        pending,
        source,
        tower.preprocess,
        side=side,
        batch_size=_batch_size(settings, tower),
        thumbnail_px=settings.thumbnail_px,
    )
    workers = _num_workers(settings, tower, processes)
    total = sum(map(work.num_rows_of, mine))
    done = total - sum(map(work.num_rows_of, pending))
    features: list[Float32] = []
    shard = EncodedShard(np.zeros((0, 0), dtype=np.float32), [], [], [])
    for batch, encoded in encode_batches(tower, batches, workers=workers):
        if encoded is not None:
            features.append(encoded)
        shard.pictures.extend(Picture(id=row.id, caption=row.caption) for row in batch.rows)
        shard.skipped.extend(map(_describe, batch.skipped))
        shard.thumbnails.extend(batch.thumbnails)
        done += len(batch.rows) + len(batch.skipped)
        if batch.is_last:
            rows = np.concatenate(features) if features else shard.features
            work.write_shard(batch.shard, EncodedShard(rows, shard.pictures, shard.skipped, shard.thumbnails))
            features, shard = [], EncodedShard(shard.features, [], [], [])
        if on_pictures is not None and processes.is_main:
            on_pictures(done, total)


def _assemble(
    work: WorkFolder, output: Path, tower: ImageTower, settings: BuildSettings, *, force: bool
) -> tuple[BankRecord, str | None]:
    """Put the shards together; return the record and the first picture that was skipped."""
    num_skipped, first_skipped = 0, None
    writer: BankWriter | None = None
    with staged_bank(output, force=force) as staged, ExitStack() as opened:
        thumbnails = opened.enter_context(write_thumbnails(staged.path)) if settings.thumbnail_px else None
        skipped_lines = opened.enter_context((staged / SKIPPED_NAME).open("w", encoding="utf-8"))
        for number in range(work.num_shards):
            shard = work.read_shard(number)
            for skipped in shard.skipped:
                first_skipped = first_skipped or f"{skipped['id']} ({skipped['reason']})"
                skipped_lines.write(json.dumps(skipped, ensure_ascii=False) + "\n")
            num_skipped += len(shard.skipped)
            if not shard.pictures:
                continue
            if writer is None:
                dim = shard.features.shape[1]
                writer = opened.enter_context(BankWriter(staged.path, dtype=settings.dtype, dim=dim))
            if thumbnails is not None:
                thumbnails.add_all(work.shard_folder(number), first_row=writer.num_pictures)
            writer.append(shard.features, shard.pictures)
        if writer is None or (settings.strict and first_skipped is not None):
            raise ConfigError(
                f"{num_skipped} of {work.num_rows} images cannot be decoded; the first is",
                where=first_skipped,
                hint=f"fix or remove them; finished work is kept in {work.folder}",
            )
        skipped_lines.close()
        if first_skipped is None:
            (staged / SKIPPED_NAME).unlink()
        record = writer.finish(
            clip=tower.clip, num_skipped=num_skipped, created_with=package_versions(_PACKAGES)
        )
    return record, first_skipped


def _describe(skipped: Skipped) -> dict[str, str]:
    return {"id": skipped.row.id, "reason": skipped.reason}


def _batch_size(settings: BuildSettings, tower: ImageTower) -> int:
    return settings.batch_size or (64 if tower.device.type == "cpu" else 256)


def _num_workers(settings: BuildSettings, tower: ImageTower, processes: Processes) -> int:
    """Return how many processes decode: few beside a tower on the same CPU, more for an accelerator."""
    if settings.workers is not None:
        return settings.workers
    spare = (os.cpu_count() or 1) // processes.count - 1
    return max(0, min(2 if tower.device.type == "cpu" else 8, spare))


def _say_nothing(_note: str) -> None:
    pass


def _shards(count: int) -> str:
    return f"{count} shard{'' if count == 1 else 's'}"
