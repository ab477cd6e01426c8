"""A bank of CLIP image features with a caption for every picture; no torch needed.

Dimensions: N pictures, D CLIP embedding size.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from xadapter_export.bundle.folder import BANK_NAME
from xadapter_export.bundle.pictures import Picture, read_pictures
from xadapter_export.errors import BundleError, CheckpointError, ShapeError

FEATURES_NAME = "bank.safetensors"


@dataclass(frozen=True, eq=False)
class FeatureBank:
    """Image features and their captions.

    Attributes:
        features: ``(N, D) float16 or float32``. Rows of length 1.
        pictures: N rows, in the order of the features.
    """

    features: NDArray[np.float16] | NDArray[np.float32]
    pictures: tuple[Picture, ...]

    def __post_init__(self) -> None:
        if (
            self.features.ndim != 2
            or self.features.dtype not in (np.float16, np.float32)
            or not len(self.features)
        ):
            raise ShapeError(
                "bank features: expected (N, D) float16 or float32 with N > 0, "
                f"got {self.features.shape} {self.features.dtype}"
            )
        if len(self.pictures) != len(self.features):
            raise ShapeError(
                f"bank: {len(self.features)} feature rows but {len(self.pictures)} captions; they must match"
            )
        lengths = np.linalg.norm(self.features.astype(np.float32), axis=1)
        if not np.all(np.isfinite(lengths)) or np.abs(lengths - 1).max() > 0.01:
            row = int(np.nanargmax(np.abs(np.where(np.isfinite(lengths), lengths, np.inf) - 1)))
            raise ShapeError(
                f"bank row {row}: expected a feature of length 1, got {lengths[row]:.4g}; normalise the rows"
            )

    @property
    def sha256(self) -> str:
        """Hash of the rows as float32, and of what each is called."""
        digest = hashlib.sha256(np.ascontiguousarray(self.features, dtype=np.float32).data)
        for picture in self.pictures:
            digest.update(f"{picture.id}\0{picture.caption}\0".encode())
        return digest.hexdigest()

    def save(self, folder: str | Path) -> None:
        """Writes ``bank.safetensors`` and ``bank.jsonl`` into an existing folder."""
        folder = Path(folder)
        save_file({"features": np.ascontiguousarray(self.features)}, folder / FEATURES_NAME)
        self.save_rows(folder / BANK_NAME)

    def save_rows(self, path: Path) -> None:
        """Writes one JSON line per picture."""
        path.write_text(
            "".join(picture.model_dump_json() + "\n" for picture in self.pictures), encoding="utf-8"
        )

    @classmethod
    def load(cls, folder: str | Path) -> "FeatureBank":
        """Reads a bank.

        Raises:
            CheckpointError: If a file is missing or broken.
            ShapeError: If features and captions do not match.
        """
        features_path, rows_path = Path(folder) / FEATURES_NAME, Path(folder) / BANK_NAME
        for path in (features_path, rows_path):
            if not path.is_file():
                raise CheckpointError(
                    f"bank: {path} is missing; a V-expert needs {FEATURES_NAME} and {BANK_NAME}"
                )
        try:
            features = load_file(features_path)["features"]
            pictures = read_pictures(rows_path, num_pictures=len(features))
        except (OSError, SafetensorError, KeyError, BundleError) as error:
            raise CheckpointError(f"bank in {folder} cannot be read ({error}); build it again") from error
        return cls(features, pictures)
