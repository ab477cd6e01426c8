"""Where pictures come from: folders, lists, WebDataset shards, Hugging Face datasets.

A source is listed once, row by row, and read in any order later: each row says where its bytes are.
"""

import csv
import glob
import hashlib
import itertools
import json
import os
import re
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Protocol

from xadapter_export.errors import ConfigError, XAdapterError, import_extra

_TEXT_SUFFIXES = {".csv": ",", ".tsv": "\t"}
_JSON_LINES = {".jsonl", ".ndjson"}
_PICTURE_SUFFIXES = {
    ".jpg",
    ".jpeg",
    ".png",
    ".webp",
    ".gif",
    ".bmp",
    ".tif",
    ".tiff",
    ".ppm",
    ".avif",
    ".jp2",
}
_BATCH = 1000  # captions read from a dataset at a time


@dataclass(frozen=True)
class SourceRow:
    """One listed picture.

    Attributes:
        id: Its name in the bank; tells nothing of the machine.
        caption: What it shows.
        path: The file that holds it; empty for a row of a dataset.
        offset: Where it starts in that file, in bytes.
        size: How long it is, in bytes; -1 where the file was not there.
        number: Row of the dataset.
    """

    id: str
    caption: str
    path: str = ""
    offset: int = 0
    size: int = -1
    number: int = -1


class Source(Protocol):
    """Something that lists pictures and reads one."""

    @property
    def identity(self) -> str:
        """What changes when rows mean other pictures and the listing does not show it."""

    def rows(self) -> Iterator[SourceRow]:
        """List the pictures, always in the same order."""

    def read(self, row: SourceRow) -> bytes:
        """Return the bytes of a picture.

        Raises:
            OSError: If they cannot be read.
        """


@dataclass(frozen=True)
class DatasetColumns:
    """Which split and columns of a dataset to read."""

    split: str | None = None
    image: str = "image"
    caption: str = "caption"


def open_source(
    paths: Sequence[str], *, dataset: str | None, columns: DatasetColumns, exclude: Sequence[Path] = ()
) -> Source:
    """Find out what kind of source this is.

    Args:
        paths: A folder; a list (text, CSV, JSONL); one or more tar shards or patterns of them; or a folder
            that ``datasets`` saved.
        dataset: Hub name of a dataset, instead of ``paths``.
        columns: Split and columns of a dataset.
        exclude: Folders in which no picture is looked for.

    Raises:
        ConfigError: If there is nothing there, or it is of no known kind.
        MissingExtraError: If ``datasets`` is needed and not installed.
    """
    if (dataset is None) == (not paths):
        raise ConfigError("give either SOURCE or --dataset")
    if dataset is not None:
        return _load_hub_dataset(dataset, columns)
    found = [path for pattern in paths for path in _expand(pattern)]
    if all(path.suffix == ".tar" for path in found):
        return TarSource(found)
    if len(found) > 1:
        raise ConfigError(
            "several sources must all be .tar shards",
            where=next(path for path in found if path.suffix != ".tar"),
            hint="build one bank from each and merge them with: xad-bank merge",
        )
    path = found[0]
    if path.is_dir():
        if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
            return _load_saved_dataset(path, columns)
        return FolderSource(path, tuple(folder.resolve() for folder in exclude))
    if path.name.endswith((".tar.gz", ".tgz", ".zip")):
        raise ConfigError(
            "compressed shards are not supported, because they cannot be read at random",
            where=path,
            hint="decompress them to .tar",
        )
    return ListSource(path)


class _Files:
    """Reading for sources whose rows are files, or pieces of files."""

    identity = ""

    def read(self, row: SourceRow) -> bytes:
        with Path(row.path).open("rb") as stream:
            if row.offset == 0 and not row.path.endswith(".tar"):
                return stream.read()
            stream.seek(row.offset)
            return stream.read(row.size)


class FolderSource(_Files):
    """Every file under a folder but hidden ones, sorted by the parts of its relative path."""

    def __init__(self, folder: Path, exclude: tuple[Path, ...] = ()) -> None:
        self._folder = folder
        self._exclude = set(exclude)

    def rows(self) -> Iterator[SourceRow]:
        """List the pictures."""
        for path in self._walk(self._folder, (self._folder.resolve(),)):
            relative = path.relative_to(self._folder)
            yield SourceRow(
                _text(relative.as_posix()), caption_of(path), str(path.absolute()), size=_size_of(path)
            )

    def _walk(self, folder: Path, above: tuple[Path, ...]) -> Iterator[Path]:
        try:
            with os.scandir(folder) as found:
                entries = sorted((entry.name, entry.is_dir()) for entry in found)
        except OSError as error:
            raise ConfigError("the folder cannot be read", where=folder, got=error.strerror) from error
        for name, is_folder in entries:
            path = folder / name
            if name.startswith("."):
                continue
            if not is_folder:
                yield path
                continue
            resolved = path.resolve()
            if resolved not in self._exclude and resolved not in above:  # a link to a folder above has no end
                yield from self._walk(path, (*above, resolved))


class ListSource(_Files):
    """A text file with a path on each line, or CSV, TSV or JSONL with the columns path and caption.

    Paths are relative to the list.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._folder = path.parent

    def rows(self) -> Iterator[SourceRow]:
        """List the pictures.

        Raises:
            ConfigError: If a column is missing or a line cannot be read.
        """
        try:
            for name, caption in self._lines():
                path = Path(os.path.normpath(self._folder / name))
                yield SourceRow(
                    self._id(name, path), caption_of(path) if caption is None else caption,
                    str(path.absolute()), size=_size_of(path),
                )  # fmt: skip
        except (OSError, UnicodeDecodeError, csv.Error) as error:
            if isinstance(error, XAdapterError):
                raise
            raise ConfigError("the list of images cannot be read", where=self._path, got=error) from error

    def _lines(self) -> Iterator[tuple[str, str | None]]:
        suffix = self._path.suffix.lower()
        with self._path.open(
            encoding="utf-8-sig", newline="" if suffix in _TEXT_SUFFIXES else None
        ) as stream:
            if suffix in _TEXT_SUFFIXES:
                reader = csv.DictReader(stream, delimiter=_TEXT_SUFFIXES[suffix])
                self._check_columns(reader.fieldnames or (), 1)
                for record in reader:
                    yield self._named(record, reader.line_num)
            elif suffix in _JSON_LINES:
                for number, line in enumerate(stream, start=1):
                    if line.strip():
                        yield self._named(self._parsed(line, number), number)
            else:
                for number, line in enumerate(stream, start=1):
                    if "\0" in line:
                        raise ConfigError(
                            "the list of images is not a text file", where=f"{self._path}, line {number}",
                            hint="give a folder, a text file with one path per line, CSV, JSONL or .tar",
                        )  # fmt: skip
                    if line.strip():
                        yield line.strip(), None

    def _parsed(self, line: str, number: int) -> dict[str, Any]:
        try:
            record = json.loads(line)
        except ValueError as error:
            raise ConfigError("not JSON", where=f"{self._path}, line {number}", got=error) from error
        if not isinstance(record, dict):
            raise ConfigError("not a JSON object", where=f"{self._path}, line {number}")
        self._check_columns(record, number)
        return record

    def _check_columns(self, names: Any, number: int) -> None:
        for column in ("path", "caption"):
            if column not in names:
                raise ConfigError(
                    f"column {column!r} is missing",
                    where=f"{self._path}, line {number}",
                    expected="path and caption",
                    got=", ".join(map(str, names)) or "nothing",
                )

    def _named(self, record: dict[str, Any], number: int) -> tuple[str, str]:
        path, caption = record["path"], record["caption"]
        if not isinstance(path, str) or not path.strip() or not isinstance(caption, str) or "\0" in path:
            raise ConfigError(
                "path and caption must be strings", where=f"{self._path}, line {number}", got=[path, caption]
            )
        return path.strip(), caption

    def _id(self, name: str, path: Path) -> str:
        if path.is_relative_to(self._folder):
            return _text(path.relative_to(self._folder).as_posix())
        if Path(name).is_absolute():  # where it lies is nobody's business, and two may have one name
            digest = hashlib.sha256(os.fsencode(path)).hexdigest()[:8]
            return _text(f"elsewhere/{digest}/{path.name}")
        return _text(os.path.normpath(name).replace(os.sep, "/"))


class TarSource(_Files):
    """WebDataset shards: members with one name but for their endings are one sample.

    The picture is the member with a picture's ending; the caption the one that ends in ``.txt``, or
    ``caption`` in ``.json``.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        self._paths = paths

    def rows(self) -> Iterator[SourceRow]:
        """List the pictures.

        Raises:
            ConfigError: If a shard is damaged.
        """
        for path in self._paths:
            for key, members in itertools.groupby(self._members(path), key=lambda member: member[0]):
                row = self._sample(path, key, [(member, data) for _, member, data in members])
                if row is not None:
                    yield row

    def _members(self, path: Path) -> Iterator[tuple[str, tarfile.TarInfo, bytes]]:
        """Give key, member, and the contents of those that may hold a caption."""
        try:
            with tarfile.open(path, "r:") as archive:
                while (member := archive.next()) is not None:
                    archive.members = []  # type: ignore[attr-defined]  # or it would remember all of them
                    if not member.isfile():
                        continue
                    name = PurePosixPath(member.name)
                    key = str(name.with_name(name.name.partition(".")[0] or name.name))
                    small = name.suffix.lower() in {".txt", ".json"}
                    opened = archive.extractfile(member) if small else None
                    yield key, member, opened.read() if opened else b""
        except (OSError, tarfile.TarError) as error:
            raise ConfigError(
                "the shard cannot be read", where=path, got=error, hint="download it again"
            ) from error

    @staticmethod
    def _sample(path: Path, key: str, members: list[tuple[tarfile.TarInfo, bytes]]) -> SourceRow | None:
        picture, caption = None, None
        for member, data in members:
            suffix = PurePosixPath(member.name).suffix.lower()
            if suffix in _PICTURE_SUFFIXES and picture is None:
                picture = member
            elif suffix == ".txt":
                caption = data.decode("utf-8", "replace").strip()
            elif suffix == ".json" and caption is None:
                try:
                    caption = json.loads(data).get("caption")
                except (ValueError, AttributeError):
                    caption = None
        if picture is None:
            return None
        if not isinstance(caption, str):
            caption = caption_of(Path(path.stem) / key)
        return SourceRow(
            _text(f"{path.stem}/{picture.name}"), caption, str(path.absolute()),
            offset=picture.offset_data, size=picture.size,
        )  # fmt: skip


class DatasetSource:
    """A Hugging Face dataset with a column of pictures and one of captions."""

    def __init__(self, data: Any, columns: DatasetColumns, name: str) -> None:
        for column in (columns.image, columns.caption):
            if column not in data.column_names:
                raise ConfigError(
                    f"column {column!r} is missing",
                    where=f"dataset {name}",
                    got=", ".join(data.column_names),
                    hint="name the columns with --image-column and --caption-column",
                )
        datasets: Any = import_extra("datasets", "bank")
        self._columns = columns
        self._names = getattr(data.features[columns.caption], "names", None)  # of classes, where it has them
        self._captions = data.select_columns([columns.caption])
        self._split = columns.split or "row"
        self.identity = str(data._fingerprint)
        try:
            self._images = data.select_columns([columns.image]).cast_column(
                columns.image, datasets.Image(decode=False)
            )
        except Exception as error:  # pyarrow and datasets raise many kinds
            raise ConfigError(
                f"column {columns.image!r} holds no images", where=f"dataset {name}",
                got=data.features[columns.image],
            ) from error  # fmt: skip

    def rows(self) -> Iterator[SourceRow]:
        """List the pictures.

        Raises:
            ConfigError: If a caption is no text.
        """
        numbers = itertools.count()
        for batch in self._captions.iter(batch_size=_BATCH):
            for caption in batch[self._columns.caption]:
                number = next(numbers)
                yield SourceRow(f"{self._split}/{number:08}", self._caption(caption, number), number=number)

    def _caption(self, caption: object, number: int) -> str:
        if self._names is not None and isinstance(caption, int):
            return str(self._names[caption]).replace("_", " ")
        if isinstance(caption, list) and caption:  # several of one picture
            caption = caption[0]
        if not isinstance(caption, str):
            raise ConfigError(
                "a caption is not a string",
                where=f"column {self._columns.caption!r}, row {number}",
                got=caption,
            )
        return caption

    def read(self, row: SourceRow) -> bytes:
        """Return the bytes of a picture.

        Raises:
            OSError: If they cannot be read.
        """
        image = self._images[row.number][self._columns.image]
        if image is None:
            raise FileNotFoundError("the dataset has no image there")
        if image["bytes"] is not None:
            return bytes(image["bytes"])
        return Path(image["path"]).read_bytes()


def caption_of(path: Path) -> str:
    """Return a file's stem with spaces for _ and -; its folder's name if the stem is only digits."""
    stem = path.stem
    if stem.isdigit():
        stem = path.absolute().parent.name or stem
    return " ".join(_text(stem).replace("_", " ").replace("-", " ").split())


def _load_saved_dataset(path: Path, columns: DatasetColumns) -> DatasetSource:
    datasets: Any = import_extra("datasets", "bank")
    try:
        data = datasets.load_from_disk(str(path))
    except Exception as error:  # pyarrow and datasets raise many kinds
        raise ConfigError("the dataset cannot be read", where=path, got=error) from error
    if isinstance(data, dict):
        if columns.split not in data:
            raise ConfigError(
                "the dataset has several splits", where=path, expected=", ".join(data),
                got=columns.split or "none", hint="choose one with --split",
            )  # fmt: skip
        data = data[columns.split]
    return DatasetSource(data, columns, path.name)


def _load_hub_dataset(name: str, columns: DatasetColumns) -> DatasetSource:
    datasets: Any = import_extra("datasets", "bank")
    try:
        data = datasets.load_dataset(name, split=columns.split or "train")
    except Exception as error:  # the hub client, pyarrow and datasets raise many kinds
        raise ConfigError(
            "the dataset cannot be loaded", where=name, got=f"{type(error).__name__}: {str(error)[:200]}",
            hint="check its name and --split; give a folder from save_to_disk as SOURCE",
        ) from error  # fmt: skip
    return DatasetSource(data, columns, name)


def _expand(pattern: str) -> list[Path]:
    """Return the paths that a path or a pattern such as ``shards-{000..009}.tar`` stands for."""
    found: list[Path] = []
    for name in _expand_braces(pattern):
        if Path(name).exists():
            found.append(Path(name))
        else:
            matches = [Path(match) for match in sorted(glob.glob(name))]  # noqa: PTH207  # also absolute
            if not matches:
                raise ConfigError("no such source", where=name)
            found += matches
    return found


def _expand_braces(pattern: str) -> list[str]:
    match = re.search(r"\{(\d+)\.\.(\d+)\}", pattern)
    if match is None or Path(pattern).exists():
        return [pattern]
    first, last = match.group(1), match.group(2)
    numbers = [f"{number:0{len(first)}}" for number in range(int(first), int(last) + 1)]
    return [name for number in numbers for name in _expand_braces(pattern.replace(match.group(0), number, 1))]


def _size_of(path: Path) -> int:
    try:
        return path.stat().st_size
    except (OSError, ValueError):
        return -1


def _text(name: str) -> str:
    """Return a file name as valid Unicode; the system allows any bytes."""
    return os.fsencode(name).decode("utf-8", "replace")
