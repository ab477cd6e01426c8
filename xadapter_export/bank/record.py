"""What a bank says about itself: ``bank.json``, and the names of its files.

Dimensions: N pictures, D CLIP embedding size.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from xadapter_export.bundle.folder import FEATURES_NAME as FEATURES_NAME
from xadapter_export.bundle.manifest import Count, Sha256, Size
from xadapter_export.bundle.small_files import read_model
from xadapter_export.errors import CheckpointError
from xadapter_export.registry import installed_version

RECORD_NAME = "bank.json"
SKIPPED_NAME = "skipped.jsonl"
THUMBNAILS_NAME = "thumbnails.zip"
CHECKPOINT_RECORD_NAME = "xadapter.json"  # of a checkpoint, which holds a bank and more

# Of a repository on the Hub: a bank, and the CLIP of a checkpoint that its bank is searched with.
FILE_PATTERNS = ("bank.*", SKIPPED_NAME, THUMBNAILS_NAME, CHECKPOINT_RECORD_NAME, "clip/*")

BankKind = Literal["pictures", "prototypes"]
BankDtype = Literal["fp32", "fp16", "int8"]
DTYPES: tuple[BankDtype, ...] = ("fp32", "fp16", "int8")  # most exact first


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class BankClip(_Strict):
    """The CLIP whose image tower made the features.

    Attributes:
        source: Hub id, open_clip ``model:tag`` or name of a folder; never a path.
        sha256: Hash of the text tower, by which a model knows that it searches with the same CLIP.
        image_sha256: Hash of the image tower with its preprocessing, where it is known.
    """

    source: Annotated[str, Field(min_length=1)]
    sha256: Sha256
    image_sha256: Sha256 | None = None

    def __str__(self) -> str:
        return f"{self.source} ({self.sha256[:12]})"


class BankRecord(_Strict):
    """The contents of ``bank.json``.

    Attributes:
        kind: ``pictures``, a row for each; ``prototypes``, a row for the middle of many.
        dtype: How the features are stored.
        num_pictures: N.
        dim: D.
        num_skipped: Pictures that were listed and could not be decoded.
        clip: What made the features; None where nobody said.
        created_with: Versions of the packages that wrote the bank.
        sha256: Hash of rows and captions, as ``BankReader.sha256`` gives it; None where nobody said.
    """

    format_version: Literal[1] = 1
    kind: BankKind = "pictures"
    dtype: BankDtype
    num_pictures: Size
    dim: Size
    num_skipped: Count = 0
    clip: BankClip | None = None
    created_with: dict[str, str] = {}
    sha256: Sha256 | None = None


def read_bank_record(folder: Path) -> BankRecord | None:
    """Read ``bank.json``; None for a bank that has none.

    Raises:
        CheckpointError: If it cannot be read, or has a key that is not known.
    """
    path = folder / RECORD_NAME
    if not path.exists():
        return None
    return read_model(path, BankRecord, "the bank's record", CheckpointError)


def write_bank_record(folder: Path, record: BankRecord) -> None:
    """Write ``bank.json`` into an existing folder."""
    (folder / RECORD_NAME).write_text(record.model_dump_json(indent=2) + "\n", encoding="utf-8")


def package_versions(packages: Sequence[str] = ("xadapter-export",)) -> dict[str, str]:
    """Return the versions of those packages that are installed."""
    versions = {package: installed_version(package) for package in packages}
    return {package: found for package, found in versions.items() if found}
