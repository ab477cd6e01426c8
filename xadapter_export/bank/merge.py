"""Puts banks of one CLIP behind each other."""

import hashlib
import shutil
import warnings
from array import array
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from xadapter_export.bank.output import staged_bank
from xadapter_export.bank.reader import BankReader
from xadapter_export.bank.record import DTYPES, SKIPPED_NAME, THUMBNAILS_NAME, BankClip, BankDtype, BankRecord
from xadapter_export.bank.rows import OnRows, ignore_rows
from xadapter_export.bank.thumbnails import write_thumbnails
from xadapter_export.bank.writer import BankWriter
from xadapter_export.errors import ConfigError


def merge_banks(
    folders: Sequence[Path],
    output: Path,
    *,
    dtype: BankDtype | None = None,
    keep_duplicates: bool = False,
    force: bool = False,
    on_rows: OnRows = ignore_rows,
) -> BankRecord:
    """Write the rows of several banks into one, in the order given.

    Args:
        folders: The banks.
        output: Where the new bank goes.
        dtype: How features are stored; the most exact of the banks' own for None.
        keep_duplicates: Whether a picture may be there twice.
        force: Whether a bank at ``output`` may be replaced.
        on_rows: Told after each block of rows.

    Raises:
        ConfigError: If the banks are of different CLIPs, widths or kinds, or share a picture.
        CheckpointError: If one cannot be read.
        OutputExistsError: If something is at ``output``.
        OutputWriteError: If it cannot be written.
    """
    banks = [BankReader(folder) for folder in folders]
    if len(banks) < 2:
        raise ConfigError("a merge needs at least two banks", got=len(banks))
    for other in banks[1:]:
        _check_alike(banks[0], other)
    if banks[0].clip is None:
        warnings.warn(
            "no bank records which CLIP made it, so nothing checks that the CLIPs are the same", stacklevel=2
        )
    if not keep_duplicates:
        _refuse_duplicates(banks)
    stored = min((bank.dtype for bank in banks), key=DTYPES.index) if dtype is None else dtype
    return write_rows(banks, output, stored, force=force, on_rows=on_rows)


def write_rows(
    banks: Sequence[BankReader],
    output: Path,
    dtype: BankDtype,
    *,
    force: bool,
    on_rows: OnRows = ignore_rows,
) -> BankRecord:
    """Write the rows of banks of a kind into one, with all that goes with them.

    Raises:
        ShapeError: If a row is not of length 1.
        As ``staged_bank``.
    """
    done, total = 0, sum(bank.num_pictures for bank in banks)
    with staged_bank(output, force=force) as staged:
        with BankWriter(staged.path, dtype=dtype, dim=banks[0].dim) as writer:
            for bank in banks:
                for block in bank.blocks():
                    writer.append(block.features, block.pictures)
                    done += len(block.pictures)
                    on_rows(done, total)
            record = writer.finish(
                clip=banks[0].clip, kind=banks[0].kind, num_skipped=sum(bank.num_skipped for bank in banks)
            )
        _copy_companions(banks, staged.path)
    return record


def _copy_companions(banks: Sequence[BankReader], folder: Path) -> None:
    """Copy thumbnails and the lists of what was skipped, of banks that are put behind each other."""
    skipped = [bank.folder / SKIPPED_NAME for bank in banks if (bank.folder / SKIPPED_NAME).is_file()]
    if skipped:
        with (folder / SKIPPED_NAME).open("wb") as target:
            for path in skipped:
                with path.open("rb") as stream:
                    shutil.copyfileobj(stream, target)
    if any((bank.folder / THUMBNAILS_NAME).is_file() for bank in banks):
        with write_thumbnails(folder) as thumbnails:
            first_row = 0
            for bank in banks:
                thumbnails.add_all(bank.folder, first_row=first_row)
                first_row += bank.num_pictures


def _check_alike(first: BankReader, other: BankReader) -> None:
    for what, expected, got in (
        ("width", first.dim, other.dim),
        ("kind", first.kind, other.kind),
        ("CLIP", first.clip, other.clip),
    ):
        same = _is_same_clip(first.clip, other.clip) if what == "CLIP" else expected == got
        if not same:
            raise ConfigError(
                f"the banks differ in {what}",
                where=other.folder,
                expected=f"{expected or 'one that nobody named'}, as {first.folder}",
                got=got or "one that nobody named",
                hint="build them with the same CLIP",
            )


def _is_same_clip(first: BankClip | None, other: BankClip | None) -> bool:
    if first is None or other is None:
        return first is other
    images = {first.image_sha256, other.image_sha256} - {None}  # one that is not known may be the same
    return first.sha256 == other.sha256 and len(images) <= 1


def _refuse_duplicates(banks: Sequence[BankReader]) -> None:
    """Compare 8-byte digests, which take little memory, and then the ids of those that are equal."""
    digests = array("Q")
    for bank in banks:
        digests.extend(_digest(picture.id) for picture in bank.pictures())
    numbers = np.frombuffer(digests, dtype=np.uint64)
    numbers.sort()
    twice = set(numbers[1:][numbers[1:] == numbers[:-1]].tolist())
    if not twice:
        return
    seen: dict[str, Path] = {}
    repeated: list[tuple[str, Path, Path]] = []
    for bank in banks:
        for picture in bank.pictures():
            if _digest(picture.id) in twice:
                if picture.id in seen:
                    repeated.append((picture.id, seen[picture.id], bank.folder))
                seen.setdefault(picture.id, bank.folder)
    if repeated:
        name, first, second = repeated[0]
        raise ConfigError(
            f"{len(repeated)} images are in more than one bank; the first is {name!r}",
            where=f"{first} and {second}",
            hint="merge other banks, or keep both copies with --keep-duplicates",
        )


def _digest(name: str) -> int:
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little")
