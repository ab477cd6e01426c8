"""What a build has done so far, on disk, so that it can be stopped at any moment and go on.

The source is listed once; shards of listed rows are then encoded one by one, each written whole or not at
all.
"""

import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from xadapter_export.bank.record import SKIPPED_NAME
from xadapter_export.bank.rows import Float32
from xadapter_export.bank.thumbnails import write_thumbnails
from xadapter_export.bank_builder.sources import Source, SourceRow
from xadapter_export.bundle.folder import BANK_NAME
from xadapter_export.bundle.pictures import Picture
from xadapter_export.bundle.small_files import LARGEST_TEXT, read_object
from xadapter_export.bundle.staging import staged_folder, write_whole
from xadapter_export.errors import ConfigError, OutputExistsError, OutputWriteError

_PLAN_NAME = "build.json"
_ROWS_NAME = "rows.jsonl"
_FEATURES_NAME = "features.safetensors"
_FORMAT_VERSION = 1


@dataclass(frozen=True)
class EncodedShard:
    """What became of one shard.

    Attributes:
        features: ``(rows, D) float32`` of length 1.
        pictures: One for each row.
        skipped: Id and reason of the others.
        thumbnails: WebP of each row, or none.
    """

    features: Float32
    pictures: list[Picture]
    skipped: list[dict[str, str]]
    thumbnails: list[bytes]


@dataclass(frozen=True)
class WorkFolder:
    """The listing, and the shards that are done.

    Attributes:
        folder: Where it is.
        num_rows: Pictures listed.
        shard_rows: Pictures in each shard but the last.
        offsets: Where each shard starts in the listing, in bytes.
    """

    folder: Path
    num_rows: int
    shard_rows: int
    offsets: tuple[int, ...]

    @classmethod
    def prepare(
        cls, folder: Path, source: Source, settings: Mapping[str, Any], *, shard_rows: int, force: bool
    ) -> Self:
        """List the source, and go on with what is there if it was begun with the same listing and settings.

        Args:
            folder: The work folder; made if it is not there.
            source: What to list.
            settings: Everything else that features depend on.
            shard_rows: Pictures in a shard.
            force: Whether work that was begun otherwise may be thrown away.

        Raises:
            ConfigError: If the source lists nothing, or the folder holds other work.
            OutputExistsError: If the folder is not of a build.
            OutputWriteError: If it cannot be written.
        """
        plan_path = folder / _PLAN_NAME
        _check_ours(folder)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            fresh = folder / f"{_ROWS_NAME}.new"
            offsets, count, digest = _list(source, fresh, shard_rows)
            if not count:
                shutil.rmtree(folder) if not plan_path.exists() else fresh.unlink()
                raise ConfigError("the source has no images", hint="check the path; hidden files are ignored")
            key = {**settings, "listing": digest, "source": source.identity, "shard_rows": shard_rows}
            if plan_path.exists():
                other = _differing(_read_plan(plan_path).get("key", {}), key)
                if other and not force:
                    fresh.unlink()
                    raise ConfigError(
                        "this folder has an unfinished build with other settings",
                        where=folder,
                        got=f"different {', '.join(other)}",
                        hint=f"finish that build, remove {folder}, or start over with --force",
                    )
                if other:
                    _remove_work(folder, keep=fresh)
            fresh.replace(folder / _ROWS_NAME)
            plan = {"format_version": _FORMAT_VERSION, "key": key, "num_rows": count, "offsets": offsets}
            write_whole(plan_path, json.dumps(plan, indent=1) + "\n")
        except OSError as error:
            raise _unwritable(folder, error) from error
        return cls(folder, count, shard_rows, tuple(offsets))

    @classmethod
    def open(cls, folder: Path) -> Self:
        """Open what another process prepared."""
        plan = _read_plan(folder / _PLAN_NAME)
        return cls(folder, plan["num_rows"], plan["key"]["shard_rows"], tuple(plan["offsets"]))

    @property
    def num_shards(self) -> int:
        """How many shards the listing makes."""
        return len(self.offsets)

    def num_rows_of(self, shard: int) -> int:
        """Return how many pictures are listed in a shard."""
        return min(self.shard_rows, self.num_rows - shard * self.shard_rows)

    def read_rows(self, shard: int) -> list[SourceRow]:
        """Return the pictures that are listed in a shard."""
        with (self.folder / _ROWS_NAME).open("rb") as stream:
            stream.seek(self.offsets[shard])
            return [SourceRow(**json.loads(stream.readline())) for _ in range(self.num_rows_of(shard))]

    def shard_folder(self, shard: int) -> Path:
        """Return where a shard is, or will be."""
        return self.folder / "shards" / f"{shard:06}"

    def is_done(self, shard: int) -> bool:
        """Whether a shard is complete; it is there only if it is."""
        return self.shard_folder(shard).is_dir()

    def write_shard(self, shard: int, encoded: EncodedShard) -> None:
        """Write a shard whole.

        Raises:
            OutputWriteError: If it cannot be written; those before are kept.
        """
        try:
            with staged_folder(self.shard_folder(shard)) as staged:
                save_file({"features": encoded.features}, staged / _FEATURES_NAME)
                _write_lines(staged / BANK_NAME, (p.model_dump_json() for p in encoded.pictures))
                _write_lines(
                    staged / SKIPPED_NAME, (json.dumps(s, ensure_ascii=False) for s in encoded.skipped)
                )
                if encoded.thumbnails:
                    with write_thumbnails(staged.path) as archive:
                        for row, webp in enumerate(encoded.thumbnails):
                            archive.add(row, webp)
        except OSError as error:
            raise _unwritable(self.folder, error) from error

    def read_shard(self, shard: int) -> EncodedShard:
        """Read a shard that is done; its thumbnails stay where they are.

        Raises:
            ConfigError: If it cannot be read, or does not hold every listed picture once.
        """
        folder = self.shard_folder(shard)
        hint = "remove it and run the same command again"
        try:
            features = load_file(folder / _FEATURES_NAME)["features"]
            pictures = [Picture.model_validate_json(line) for line in _read_lines(folder / BANK_NAME)]
            skipped = [json.loads(line) for line in _read_lines(folder / SKIPPED_NAME)]
        except (OSError, ValueError, KeyError, SafetensorError) as error:
            raise ConfigError("a shard is damaged", where=folder, got=error, hint=hint) from error
        if len(features) != len(pictures) or len(pictures) + len(skipped) != self.num_rows_of(shard):
            raise ConfigError(
                "a shard is damaged", where=folder, expected=f"{self.num_rows_of(shard)} pictures",
                got=f"{len(features)} features, {len(pictures)} names and {len(skipped)} skipped",
                hint=hint,
            )  # fmt: skip
        return EncodedShard(features, pictures, skipped, [])

    def remove(self) -> None:
        """Remove everything; the bank is in its place."""
        shutil.rmtree(self.folder, ignore_errors=True)


def _list(source: Source, path: Path, shard_rows: int) -> tuple[list[int], int, str]:
    """Write the listing; return where each shard starts, how many rows there are, and the hash of them."""
    digest, offsets, position, count = hashlib.sha256(), [], 0, 0
    with path.open("wb") as stream:
        for row in source.rows():
            if count % shard_rows == 0:
                offsets.append(position)
            line = json.dumps(asdict(row)).encode() + b"\n"
            stream.write(line)
            digest.update(line)
            position += len(line)
            count += 1
    return offsets, count, digest.hexdigest()


def _differing(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    return [name for name in sorted({*old, *new}) if old.get(name) != new.get(name)]


def _check_ours(folder: Path) -> None:
    if not folder.exists() or (folder / _PLAN_NAME).is_file():
        return
    if not folder.is_dir() or any(not path.name.startswith(_ROWS_NAME) for path in folder.iterdir()):
        raise OutputExistsError(
            "the path of the work folder holds something else",
            where=folder,
            hint="choose another output, or remove it yourself",
        )


def _remove_work(folder: Path, *, keep: Path) -> None:
    (folder / _PLAN_NAME).unlink()
    for path in folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path != keep:
            path.unlink()


def _read_plan(path: Path) -> dict[str, Any]:
    try:
        plan = read_object(path, "the plan of the build", ConfigError, largest=LARGEST_TEXT)
        if plan["format_version"] != _FORMAT_VERSION:
            raise ValueError(f"format version {plan['format_version']}")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            "the plan of the build cannot be read", where=path, got=error, hint=f"remove {path.parent}"
        ) from error
    return dict(plan)


def _write_lines(path: Path, lines: Iterator[str]) -> None:
    with path.open("w", encoding="utf-8") as stream:
        stream.writelines(line + "\n" for line in lines)


def _read_lines(path: Path) -> Iterator[str]:
    with path.open(encoding="utf-8") as stream:
        yield from stream


def _unwritable(folder: Path, error: OSError) -> OutputWriteError:
    cause = error.__cause__ if isinstance(error, OutputWriteError) else error
    return OutputWriteError(
        "the work folder cannot be written",
        where=folder,
        got=getattr(cause, "strerror", None) or error,
        hint="free some space and run the same command again: finished shards are kept",
    )
