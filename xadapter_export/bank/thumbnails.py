"""``thumbnails.zip`` of a bank: ``<row>.webp``, a small picture of each row."""

import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from xadapter_export.bank.record import THUMBNAILS_NAME
from xadapter_export.errors import CheckpointError

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
            for name in archive.namelist():
                stem, _, suffix = name.partition(".")
                if suffix == "webp" and stem.isdecimal() and (rows is None or int(stem) in rows):
                    yield int(stem), archive.read(name)
    except (OSError, zipfile.BadZipFile) as error:
        raise CheckpointError("the thumbnails cannot be read", where=path, got=error) from error
