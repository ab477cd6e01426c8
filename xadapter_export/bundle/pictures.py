"""The names of the pictures in a feature bank: ``bank.jsonl``, whose line i describes bank row i."""

import mmap
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Final, overload

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from xadapter_export.bundle.small_files import check_file, describe, read_text
from xadapter_export.errors import BundleError


class Picture(BaseModel):
    """One picture of the bank, by its id and its caption."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    id: Annotated[str, Field(min_length=1)]
    caption: str


_MOST_IN_MEMORY: Final = 100_000  # pictures; a million of them would take a GiB
LONGEST_LINE: Final = 1 << 16  # bytes for each picture, on average


class PictureFile(Sequence[Picture]):
    """A long ``bank.jsonl`` that stays on disk: a line is read when its picture is asked for.

    Memory grows by 8 bytes for each picture.

    Raises:
        BundleError: If the file cannot be read, or there are not ``num_pictures`` lines; when a picture is
            asked for, if its line is not one.
    """

    def __init__(self, path: Path, *, num_pictures: int) -> None:
        self._path = path
        try:
            check_file(path, "the list of images", largest=num_pictures * LONGEST_LINE)
            with path.open("rb") as stream:
                self._bytes = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:  # ValueError: it is empty
            if isinstance(error, BundleError):
                raise
            raise BundleError("the list of images cannot be read", where=path, got=error) from error
        ends, block = [np.zeros(1, np.int64)], 1 << 24
        for start in range(0, len(self._bytes), block):
            found = np.flatnonzero(np.frombuffer(self._bytes[start : start + block], np.uint8) == ord("\n"))
            ends.append(found + start + 1)
        if self._bytes[-1:] != b"\n":
            ends.append(np.array([len(self._bytes)], np.int64))
        self._starts = np.concatenate(ends)
        if len(self) != num_pictures:
            raise BundleError("wrong number of images", where=path, expected=num_pictures, got=len(self))

    def __len__(self) -> int:
        return len(self._starts) - 1

    @overload
    def __getitem__(self, row: int) -> Picture: ...

    @overload
    def __getitem__(self, row: slice) -> tuple[Picture, ...]: ...

    def __getitem__(self, row: int | slice) -> Picture | tuple[Picture, ...]:
        if isinstance(row, slice):
            return tuple(self[i] for i in range(*row.indices(len(self))))
        row = range(len(self))[row]
        return _picture(self._bytes[self._starts[row] : self._starts[row + 1]], self._path, row + 1)


def read_pictures(path: Path, *, num_pictures: int) -> Sequence[Picture]:
    """Read the pictures of a bank, in the order of its rows: all of them, or of a long list when asked.

    Raises:
        BundleError: If the file cannot be read, a line is not a picture, or there are not ``num_pictures``.
    """
    if num_pictures > _MOST_IN_MEMORY:
        return PictureFile(path, num_pictures=num_pictures)
    text = read_text(path, "the list of images", largest=num_pictures * LONGEST_LINE)
    lines = text.removesuffix("\n").split("\n")
    if len(lines) != num_pictures:
        raise BundleError("wrong number of images", where=path, expected=num_pictures, got=len(lines))
    return tuple(_picture(line, path, number) for number, line in enumerate(lines, start=1))


def _picture(line: str | bytes, path: Path, number: int) -> Picture:
    try:
        return Picture.model_validate_json(line)
    except ValidationError as error:
        raise BundleError(
            "not a valid image entry", where=f"{path}, line {number}", got=describe(error)
        ) from error
