"""Reads a bank folder piece by piece: memory does not grow with the number of pictures.

Dimensions: N pictures, D CLIP embedding size.
"""

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from pydantic import ValidationError

from xadapter_export.bank.record import (
    CHECKPOINT_RECORD_NAME,
    FEATURES_NAME,
    RECORD_NAME,
    BankClip,
    BankDtype,
    BankKind,
    BankRecord,
    read_bank_record,
)
from xadapter_export.bank.rows import Float32, block_rows, check_lengths, dtype_of, to_float32
from xadapter_export.bundle.bank_rows import BankRows
from xadapter_export.bundle.folder import BANK_NAME
from xadapter_export.bundle.pictures import LONGEST_LINE, Picture
from xadapter_export.bundle.small_files import check_file, describe, read_object
from xadapter_export.errors import BundleError, CheckpointError, HashMismatchError


@dataclass(frozen=True)
class Block:
    """Some rows that follow each other.

    Attributes:
        start: Number of the first row.
        features: ``(rows, D) float32``.
        pictures: One for each row.
    """

    start: int
    features: Float32
    pictures: list[Picture]


class BankReader:
    """A bank on disk of which only the header was read.

    Args:
        folder: Folder with ``bank.safetensors`` and ``bank.jsonl``; a checkpoint folder is one too.

    Attributes:
        stored: Its features, memory-mapped.

    Raises:
        CheckpointError: If a file is missing or is not of a bank, or ``bank.json`` says something else.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        path = self.folder / FEATURES_NAME
        for needed in (path, self.folder / BANK_NAME):
            if not needed.is_file():
                raise CheckpointError(
                    f"bank: {needed} is missing; a V-expert needs {FEATURES_NAME} and {BANK_NAME}"
                )
        try:
            self.stored = BankRows(path)
        except BundleError as error:
            raise CheckpointError(f"bank in {folder} cannot be read ({error}); build it again") from error
        self.num_pictures, self.dim = self.stored.num_pictures, self.stored.dim
        self.dtype: BankDtype = dtype_of(self.stored.features)
        longest = self.num_pictures * LONGEST_LINE
        check_file(self.folder / BANK_NAME, "the list of images", CheckpointError, largest=longest)
        self.record = read_bank_record(self.folder)
        if self.record is not None:
            self._check_record(self.record)

    def _check_record(self, record: BankRecord) -> None:
        for name in ("dtype", "num_pictures", "dim"):
            said, found = getattr(record, name), getattr(self, name)
            if said != found:
                raise CheckpointError(
                    f"the bank's {name} differs from its record",
                    where=self.folder / RECORD_NAME,
                    expected=said,
                    got=found,
                    hint="copy or build the bank again",
                )

    @property
    def clip(self) -> BankClip | None:
        """The CLIP that made the features, or that searches them in a checkpoint; None if neither says."""
        if self.record is not None and self.record.clip is not None:
            return self.record.clip
        return _clip_of_checkpoint(self.folder)

    @property
    def kind(self) -> BankKind:
        """Pictures, which an old bank without a record holds too, or prototypes."""
        return self.record.kind if self.record else "pictures"

    @property
    def num_skipped(self) -> int:
        """How many pictures could not be decoded when the bank was built."""
        return self.record.num_skipped if self.record else 0

    def rows(self, start: int, stop: int) -> Float32:
        """Return rows ``start`` to ``stop`` as ``(rows, D) float32``, checked.

        Raises:
            ShapeError: If a row is not of length 1.
        """
        scales = None if self.stored.scales is None else self.stored.scales[start:stop]
        rows = to_float32(self.stored.features[start:stop], scales)
        check_lengths(rows, first_row=start)
        return rows

    def row_blocks(self, size: int | None = None) -> Iterator[tuple[int, Float32]]:
        """Give the first row and ``(rows, D) float32`` of one piece after the other.

        Raises:
            ShapeError: If a row is not of length 1.
        """
        size = size or block_rows(self.dim)
        for start in range(0, self.num_pictures, size):
            yield start, self.rows(start, min(start + size, self.num_pictures))

    def pictures(self) -> Iterator[Picture]:
        """Give id and caption of every row, in order.

        Raises:
            CheckpointError: If a line is not a picture, or there are more or fewer than rows.
        """
        number = 0
        for number, line in enumerate(self._lines(), start=1):
            yield self._picture(number, line)
        if number != self.num_pictures:
            raise self._miscounted(f"{number} lines")

    def pictures_of(self, rows: list[int]) -> list[Picture]:
        """Return the pictures of some rows, parsing no other line.

        Raises:
            CheckpointError: If a line is not a picture, or there are too few.
        """
        wanted = set(rows)
        found = {row: self._picture(row + 1, line) for row, line in enumerate(self._lines()) if row in wanted}
        if found.keys() != wanted:
            raise self._miscounted("fewer lines")
        return [found[row] for row in rows]

    def blocks(self, size: int | None = None) -> Iterator[Block]:
        """Give rows with their pictures, one piece after the other.

        Raises:
            CheckpointError: If rows and lines do not match.
            ShapeError: If a row is not of length 1.
        """
        pictures = self.pictures()
        for start, features in self.row_blocks(size):
            names = [picture for _, picture in zip(range(len(features)), pictures, strict=False)]
            if len(names) != len(features):
                raise self._miscounted("fewer lines")
            yield Block(start, features, names)
        if next(pictures, None) is not None:
            raise self._miscounted("more lines")

    def sha256(self) -> str:
        """Return the hash that ``FeatureBank.sha256`` gives for the same bank.

        Raises:
            HashMismatchError: If ``bank.json`` has another one.
        """
        found = bank_sha256(self.row_blocks(), self.pictures())
        self.check_sha256(found)
        return found

    def check_sha256(self, found: str) -> None:
        """Compare the hash of the bank with the one in ``bank.json``, where there is one.

        Raises:
            HashMismatchError: If it is another.
        """
        if self.record is not None and self.record.sha256 not in {None, found}:
            raise HashMismatchError(
                "the bank is not the one that was written",
                where=self.folder,
                expected=f"SHA-256 {self.record.sha256}",
                got=found,
                hint="copy or build the bank again",
            )

    def _lines(self) -> Iterator[str]:
        path = self.folder / BANK_NAME
        try:
            with path.open(encoding="utf-8") as stream:
                yield from stream
        except (OSError, UnicodeDecodeError) as error:
            raise CheckpointError("the list of images cannot be read", where=path, got=error) from error

    def _picture(self, number: int, line: str) -> Picture:
        try:
            return Picture.model_validate_json(line)
        except ValidationError as error:
            raise CheckpointError(
                "not a valid image entry",
                where=f"{self.folder / BANK_NAME}, line {number}",
                got=describe(error),
            ) from error

    def _miscounted(self, got: str) -> CheckpointError:
        return CheckpointError(
            "wrong number of images", where=self.folder / BANK_NAME, expected=self.num_pictures, got=got
        )


def bank_sha256(blocks: Iterable[tuple[int, Float32]], pictures: Iterable[Picture]) -> str:
    """Hash the rows of a bank as float32, and what each is called.

    Args:
        blocks: First row and ``(rows, D) float32`` of each piece, in order.
        pictures: Of all rows, in order.
    """
    digest = hashlib.sha256()
    for _, block in blocks:
        digest.update(np.ascontiguousarray(block).data)
    for picture in pictures:
        digest.update(f"{picture.id}\0{picture.caption}\0".encode())
    return digest.hexdigest()


def _clip_of_checkpoint(folder: Path) -> BankClip | None:
    """Return the CLIP of a checkpoint that searches its bank with it; None if this is none."""
    path = folder / CHECKPOINT_RECORD_NAME
    if not path.is_file():
        return None
    record = read_object(path, "the record of the checkpoint", CheckpointError)
    try:
        if record["clip"] is None or record["config"]["retrieval"]["mode"] != "topk":
            return None
        return BankClip(source=record["clip"]["source"], sha256=record["clip"]["sha256"])
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError("the record of the checkpoint cannot be read", where=path, got=error) from error
