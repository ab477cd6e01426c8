"""A bank of CLIP image features with a caption for every picture; no torch needed.

Dimensions: N pictures, D CLIP embedding size.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryFile

import numpy as np
from numpy.typing import NDArray

from xadapter_export.bank.reader import BankReader, bank_sha256
from xadapter_export.bank.record import (
    FEATURES_NAME,
    BankClip,
    BankKind,
    BankRecord,
    package_versions,
    write_bank_record,
)
from xadapter_export.bank.rows import NUMPY_DTYPES, Float32, block_rows, check_lengths, dtype_of, to_float32
from xadapter_export.bank.writer import features_header
from xadapter_export.bundle.bank_rows import float32_blocks, unit_rows
from xadapter_export.bundle.folder import BANK_NAME
from xadapter_export.bundle.pictures import Picture, read_pictures
from xadapter_export.errors import BundleError, CheckpointError, ShapeError

_MOST_VALUES_IN_MEMORY = 2**27  # half a GiB as float32


@dataclass(frozen=True, eq=False)
class FeatureBank:
    """Image features and their captions.

    Attributes:
        features: ``(N, D) float32, float16 or int8``. Rows of length 1, as they are stored; see ``rows``.
        pictures: N rows, in the order of the features.
        scales: ``(N,) float32``. What an int8 row is multiplied by; None for the others.
        clip: The CLIP that made the features; None where nobody said.
        kind: Whether a row is a picture, or a prototype of many.
        num_skipped: Pictures that were listed and could not be decoded.
    """

    features: NDArray[np.float32] | NDArray[np.float16] | NDArray[np.int8]
    pictures: Sequence[Picture]
    scales: Float32 | None = None
    clip: BankClip | None = None
    kind: BankKind = "pictures"
    num_skipped: int = 0

    def __post_init__(self) -> None:
        features, scales = self.features, self.scales
        if features.ndim != 2 or features.dtype not in NUMPY_DTYPES.values() or not features.size:
            raise ShapeError(
                "bank features: expected (N, D) int8, float16 or float32 with N > 0, "
                f"got {features.shape} {features.dtype}"
            )
        if len(self.pictures) != len(features):
            raise ShapeError(
                f"bank: {len(features)} feature rows but {len(self.pictures)} captions; they must match"
            )
        if (scales is not None) != (features.dtype == np.int8):
            raise ShapeError(f"bank scales: int8 needs them and nothing else, features are {features.dtype}")
        if scales is not None and (scales.shape != (len(features),) or scales.dtype != np.float32):
            raise ShapeError(
                f"bank scales: expected ({len(features)},) float32, got {scales.shape} {scales.dtype}"
            )
        for start, block in self._blocks():
            check_lengths(block, first_row=start)

    def rows(self) -> Float32:
        """Return a new array of the features as ``(N, D) float32``, whatever they are stored as."""
        return np.array(to_float32(self.features, self.scales))

    def unit_rows(self) -> Float32:
        """Return the features as ``(N, D) float32`` at length 1, as a search reads them.

        A large bank is written to a temporary file and memory-mapped, so that it never is in memory whole;
        the file needs its place on disk and goes with the array.
        """
        shape = self.features.shape
        found: Float32
        if shape[0] * shape[1] <= _MOST_VALUES_IN_MEMORY:
            found = np.empty(shape, np.float32)
        else:
            with TemporaryFile() as stream:  # the map holds it open
                found = np.memmap(stream, np.float32, "w+", shape=shape)
        for start, block in self._blocks():
            found[start : start + len(block)] = unit_rows(block)
        return found

    @property
    def sha256(self) -> str:
        """Hash of the rows as float32, and of what each is called."""
        return bank_sha256(self._blocks(), self.pictures)

    @property
    def record(self) -> BankRecord:
        """What ``bank.json`` says about the bank."""
        return BankRecord(
            kind=self.kind,
            dtype=dtype_of(self.features),
            num_pictures=len(self.features),
            dim=self.features.shape[1],
            num_skipped=self.num_skipped,
            clip=self.clip,
            created_with=package_versions(),
        )

    def save(self, folder: str | Path) -> None:
        """Writes ``bank.safetensors``, ``bank.jsonl`` and ``bank.json`` into an existing folder."""
        folder = Path(folder)
        self.save_features(folder / FEATURES_NAME)
        self.save_rows(folder / BANK_NAME)
        write_bank_record(folder, self.record.model_copy(update={"sha256": self.sha256}))

    def save_features(self, path: Path) -> None:
        """Writes ``bank.safetensors`` block by block."""
        num_rows, dim = self.features.shape
        with path.open("wb") as stream:
            stream.write(features_header(self.record.dtype, num_rows, dim))
            if self.scales is not None:
                stream.write(np.ascontiguousarray(self.scales).data)
            for start in range(0, num_rows, block_rows(dim)):
                stream.write(np.ascontiguousarray(self.features[start : start + block_rows(dim)]).data)

    def save_rows(self, path: Path) -> None:
        """Writes one JSON line per picture."""
        with path.open("w", encoding="utf-8") as stream:
            stream.writelines(picture.model_dump_json() + "\n" for picture in self.pictures)

    @classmethod
    def load(cls, folder: str | Path) -> "FeatureBank":
        """Reads a bank; its features stay on disk, memory-mapped.

        Raises:
            CheckpointError: If a file is missing or broken.
            HashMismatchError: If rows or captions are not those that were written.
            ShapeError: If features and captions do not match, or a feature is not of length 1.
        """
        folder = Path(folder)
        reader = BankReader(folder)
        try:
            pictures = read_pictures(folder / BANK_NAME, num_pictures=reader.num_pictures)
        except BundleError as error:
            raise CheckpointError(f"bank in {folder} cannot be read ({error}); build it again") from error
        bank = cls(
            reader.stored.features,
            pictures,
            reader.stored.scales,
            reader.record.clip if reader.record else None,
            reader.kind,
            reader.num_skipped,
        )
        reader.check_sha256(bank.sha256)
        return bank

    def _blocks(self) -> Iterator[tuple[int, Float32]]:
        return float32_blocks(self.features, self.scales, block_rows(self.features.shape[1]))
