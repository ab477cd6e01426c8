"""Thumbnails of a bank's pictures as sheets of many each, which a page loads when one is first shown."""

import hashlib
import io
import json
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from xadapter_export.bank.reader import BankReader
from xadapter_export.bank.record import THUMBNAILS_NAME
from xadapter_export.bank.thumbnails import read_thumbnails
from xadapter_export.bundle.pictures import Picture
from xadapter_export.errors import CheckpointError, ConfigError

_RECIPE = Path(__file__).parents[2] / "train" / "demo" / "recipe.toml"  # which pictures, how large
COLUMNS = 16  # pictures in a row of a sheet, and rows in a sheet
_QUALITY = 70  # of WebP, 0 to 100
BUILTIN_CREDIT = (
    "Pictures: Noto Emoji (Google Inc., Apache-2.0), Firefox OS Emoji (Mozilla, Apache-2.0), Fluent UI Emoji "
    "(Microsoft Corporation, MIT), drawn at 64 x 64 pixels. Their licenses come with them."
)


def builtin_pictures(work: Path, pictures: Sequence[Picture]) -> Mapping[int, Image.Image]:
    """Draw the pictures of the built-in bank, as its recipe does.

    Args:
        work: Keeps npm's packages and what was drawn.
        pictures: The bank's.

    Returns:
        Pictures by bank row.

    Raises:
        ConfigError: If the bank is another one.
    """
    from rich.console import Console

    from material.pictures import gather_material
    from material.stages import Stages

    settings = tomllib.loads(_RECIPE.read_text(encoding="utf-8"))
    material = gather_material(Stages(work, settings["seed"], Console(stderr=True)), settings)
    row_of = {picture_id: row for row, picture_id in enumerate(material.picture_ids)}
    if unknown := [picture.id for picture in pictures if picture.id not in row_of]:
        raise ConfigError("the recipe does not draw a picture of the bank", where=unknown[0])
    return {n: Image.fromarray(material.images[row_of[p.id]]) for n, p in enumerate(pictures)}


def bank_pictures(bank: Path, sha256: str) -> Mapping[int, Image.Image]:
    """Read the thumbnails that ``xad-bank build --thumbnails`` wrote beside a bank, by bank row.

    Args:
        bank: Folder of the bank.
        sha256: Hash of the bank that the bundle looks at.

    Raises:
        CheckpointError: If there is no bank, or it has no thumbnails that can be read.
        ConfigError: If it is another bank.
    """
    if (found := BankReader(bank).sha256()) != sha256:
        raise ConfigError(
            "this is not the bank of the bundle, so its pictures are not those that are looked at",
            where=bank,
            expected=sha256[:12],
            got=found[:12],
            hint="give --pictures the bank that the bundle was made with",
        )
    if not (bank / THUMBNAILS_NAME).is_file():
        raise CheckpointError(
            f"the bank has no {THUMBNAILS_NAME}",
            where=bank,
            hint="build it with xad-bank build --thumbnails 64",
        )
    try:
        return {row: Image.open(io.BytesIO(webp)).convert("RGB") for row, webp in read_thumbnails(bank)}
    except OSError as error:
        raise CheckpointError(
            "a thumbnail is not a picture", where=bank / THUMBNAILS_NAME, got=error
        ) from error


def write_sheets(folder: Path, pictures: Mapping[int, Image.Image], num_rows: int, credit: str = "") -> None:
    """Write ``pictures.json`` and the sheets that it names; without pictures, an index that names none.

    Args:
        folder: Where to; made if it is not there.
        pictures: By bank row; rows may be missing.
        num_rows: Rows of the bank.
        credit: Whose pictures they are.
    """
    folder.mkdir(parents=True, exist_ok=True)
    sheets = []
    for number, sheet in enumerate(_sheets(pictures, num_rows)):
        stream = io.BytesIO()
        sheet.save(stream, "WEBP", quality=_QUALITY, method=6)
        file = f"sheet-{number}.webp"
        (folder / file).write_bytes(stream.getvalue())
        sheets.append({"file": file, "sha256": hashlib.sha256(stream.getvalue()).hexdigest()})
    index: dict[str, Any] = {
        "columns": COLUMNS,
        "missing": [row for row in range(num_rows) if row not in pictures],
        "sheets": sheets,
        "credit": credit,
    }
    (folder / "pictures.json").write_text(json.dumps(index), encoding="utf-8")


def _sheets(pictures: Mapping[int, Image.Image], num_rows: int) -> Iterator[Image.Image]:
    if not pictures:
        return
    size = max(max(picture.size) for picture in pictures.values())
    for first in range(0, num_rows, COLUMNS**2):
        sheet = Image.new("RGB", (COLUMNS * size, COLUMNS * size), "white")
        for place in range(COLUMNS**2):
            if (picture := pictures.get(first + place)) is None:
                continue
            fitted = picture if picture.size == (size, size) else _fit(picture, size)
            sheet.paste(fitted, (place % COLUMNS * size, place // COLUMNS * size))
        yield sheet


def _fit(picture: Image.Image, size: int) -> Image.Image:
    square = Image.new("RGB", (size, size), "white")
    square.paste(picture, ((size - picture.width) // 2, (size - picture.height) // 2))
    return square
