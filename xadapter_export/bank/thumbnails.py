"""``thumbnails.zip`` of a bank: ``<row>.webp``, a small picture of each row."""

import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from xadapter_export.bank.record import THUMBNAILS_NAME
from xadapter_export.errors import CheckpointError, import_extra

_LARGEST_BYTES = 1 << 22  # of one thumbnail, which has 1024 x 1024 pixels at most
_MOST_PIXELS = 1 << 26  # of any picture that is shown; as many take 256 MiB
# What the library raises for a damaged file, one with a password, and one in a compression that it lacks.
_UNREADABLE = (OSError, ValueError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error)
_DATE = (1980, 1, 1, 0, 0, 0)  # so that equal pictures make equal files


class ThumbnailWriter:
    """Adds thumbnails to a zip; see ``write_thumbnails``."""

    def __init__(self, archive: zipfile.ZipFile) -> None:
        self._archive = archive

    def add(self, row: int, webp: bytes) -> None:
        """Add the thumbnail of a row."""
        self._archive.writestr(zipfile.ZipInfo(f"{row}.webp", _DATE), webp)

    def add_all(self, folder: Path, *, first_row: int) -> None:
        """Add the thumbnails of another folder, counted from ``first_row``; none if it has none."""
        for row, webp in read_thumbnails(folder):
            self.add(first_row + row, webp)


@contextmanager
def write_thumbnails(folder: Path) -> Iterator[ThumbnailWriter]:
    """Open ``thumbnails.zip`` of a folder for writing; WebP is stored as it is."""
    with zipfile.ZipFile(folder / THUMBNAILS_NAME, "w", zipfile.ZIP_STORED) as archive:
        yield ThumbnailWriter(archive)


def read_thumbnails(folder: Path, rows: set[int] | None = None) -> Iterator[tuple[int, bytes]]:
    """Give row and WebP bytes of every thumbnail, or of some rows; nothing where there is no file.

    Raises:
        CheckpointError: If the file is broken.
    """
    path = folder / THUMBNAILS_NAME
    if not path.is_file():
        return
    try:
        with zipfile.ZipFile(path) as archive:
            for info in archive.infolist():
                stem, _, suffix = info.filename.partition(".")
                if suffix != "webp" or not stem.isdecimal() or (rows is not None and int(stem) not in rows):
                    continue
                if info.file_size > _LARGEST_BYTES:
                    raise zipfile.BadZipFile(f"{info.filename} of {info.file_size} bytes")
                yield int(stem), archive.read(info)
    except _UNREADABLE as error:
        raise CheckpointError("the thumbnails cannot be read", where=path, got=error) from error


def inside_or_none(folder: Path, name: str) -> Path | None:
    """Return the file of a picture in a folder; None if there is none or it leads elsewhere, as ids may."""
    try:
        path = (folder / name).resolve()
        return path if path.is_relative_to(folder.resolve()) and path.is_file() else None
    except (OSError, RuntimeError, ValueError):  # a loop of links; a NUL
        return None


def small_picture(source: Any, side: int, extra: str) -> Any | None:
    """Return a picture upright in RGBA, as Pillow's image; None if it cannot be read or is far too large.

    Args:
        source: A path, or a stream of bytes.
        side: Pixels that the longer side has at most.
        extra: The extra that brings Pillow to who asks.

    Raises:
        MissingExtraError: If it is not installed.
    """
    image_module, image_ops = import_extra("PIL.Image", extra), import_extra("PIL.ImageOps", extra)
    try:
        with image_module.open(source) as image:
            if image.width * image.height > _MOST_PIXELS:
                return None
            small = image_ops.exif_transpose(image).convert("RGBA")
    except (OSError, ValueError, SyntaxError, image_module.DecompressionBombError):  # no picture, or a bomb
        return None
    small.thumbnail((side, side))
    return small
