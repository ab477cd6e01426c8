"""Reads the pictures that a chart shows, from files named as their ids or from a bank's thumbnails."""

import io
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from xadapter_export.bank.record import THUMBNAILS_NAME
from xadapter_export.bank.thumbnails import inside_or_none, read_thumbnails, small_picture
from xadapter_export.errors import ConfigError
from xadapter_export.runtime.answers import RetrievedPicture

Image = NDArray[np.uint8]
_SUFFIXES = ("", ".png", ".jpg", ".jpeg", ".webp", ".gif")


def load_thumbnails(
    source: Path | None, pictures: Iterable[RetrievedPicture], *, side: int = 64
) -> dict[int, Image]:
    """Return pictures by their bank row, ``(height, width, 4) uint8``, but those that cannot be read.

    Args:
        source: A folder with files named as picture ids, with or without an extension; or
            ``thumbnails.zip``, or a folder with one. None for no pictures at all.
        pictures: What is wanted.
        side: Pixels that the longer side has at most.

    Raises:
        ConfigError: If the source is none of these.
        CheckpointError: If ``thumbnails.zip`` is broken.
        MissingExtraError: If there is a picture to read and pillow is not installed.
    """
    if source is None:
        return {}
    id_of_row = {picture.row: picture.id for picture in pictures}
    streams: dict[int, Any] = {}
    bank = source.parent if source.name == THUMBNAILS_NAME else source
    if (bank / THUMBNAILS_NAME).is_file():
        thumbnails = read_thumbnails(bank, set(id_of_row))
        streams = {row: io.BytesIO(webp) for row, webp in thumbnails}
    elif source.is_dir():
        for row, name in id_of_row.items():
            found = (inside_or_none(source, f"{name}{suffix}") for suffix in _SUFFIXES)
            if (path := next(filter(None, found), None)) is not None:
                streams[row] = path
    else:
        raise ConfigError(
            "no images found",
            where=source,
            expected=f"a folder with one file per image id, or {THUMBNAILS_NAME}",
        )
    images = {row: small_picture(stream, side, "report") for row, stream in streams.items()}
    return {row: np.asarray(image, dtype=np.uint8) for row, image in images.items() if image is not None}
