"""The names of the pictures in a feature bank: ``bank.jsonl``, whose line i describes bank row i."""

from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from xadapter_export.bundle.manifest import describe
from xadapter_export.errors import BundleError


class Picture(BaseModel):
    """One picture of the bank, by its id and its caption."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    id: Annotated[str, Field(min_length=1)]
    caption: str


def read_pictures(path: Path, *, num_pictures: int) -> tuple[Picture, ...]:
    """Read the pictures of a bank, in the order of its rows.

    Raises:
        BundleError: If the file cannot be read, a line is not a picture, or there are not ``num_pictures``.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise BundleError("the list of pictures cannot be read", where=path, got=error) from error
    lines = text.removesuffix("\n").split("\n")
    if len(lines) != num_pictures:
        raise BundleError("wrong number of pictures", where=path, expected=num_pictures, got=len(lines))
    pictures = []
    for number, line in enumerate(lines, start=1):
        try:
            pictures.append(Picture.model_validate_json(line))
        except ValidationError as error:
            raise BundleError("not a picture", where=f"{path}, line {number}", got=describe(error)) from error
    return tuple(pictures)
