"""Writes a bank folder piece by piece, when the number of pictures is known only at the end.

Dimensions: N pictures, D CLIP embedding size.
"""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np

from xadapter_export.bank.reader import BankReader
from xadapter_export.bank.record import (
    FEATURES_NAME,
    BankClip,
    BankDtype,
    BankKind,
    BankRecord,
    package_versions,
    write_bank_record,
)
from xadapter_export.bank.rows import NUMPY_DTYPES, Float32, check_lengths, to_dtype
from xadapter_export.bundle.folder import BANK_NAME
from xadapter_export.bundle.pictures import Picture
from xadapter_export.errors import ConfigError

_HEADER_BYTES = 256  # length and JSON header; the format allows spaces after the JSON
_NAMES: dict[BankDtype, str] = {"fp32": "F32", "fp16": "F16", "int8": "I8"}


class BankWriter:
    """A bank that grows at its end; use it in a ``with`` block and call ``finish`` last.

    A safetensors file names its sizes before its data, so the header's place is kept free. Scales stand
    before int8 features, which keeps them aligned; the features wait in a file of their own.

    Args:
        folder: Existing folder, staged: what is in it is no bank before ``finish``.
        dtype: How features are stored.
        dim: D.

    Source:
        The safetensors format: eight bytes of header length (little endian), JSON, data without gaps.
    """

    def __init__(self, folder: Path, *, dtype: BankDtype, dim: int) -> None:
        self.num_pictures = 0
        self._folder, self._dtype, self._dim = folder, dtype, dim
        self._file = (folder / FEATURES_NAME).open("wb")
        self._file.write(b" " * _HEADER_BYTES)
        self._int8_path = folder / f"{FEATURES_NAME}.int8"
        self._int8 = self._int8_path.open("wb+") if dtype == "int8" else None
        self._lines = (folder / BANK_NAME).open("w", encoding="utf-8")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, _type: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        for stream in (self._file, self._int8, self._lines):
            if stream is not None and not stream.closed:
                stream.close()

    def append(self, features: Float32, pictures: Sequence[Picture]) -> None:
        """Add rows.

        Args:
            features: ``(rows, D) float32`` of length 1.
            pictures: One for each row.

        Raises:
            ShapeError: If a row is not of length 1.
        """
        assert features.shape == (len(pictures), self._dim)
        check_lengths(features, first_row=self.num_pictures)
        raw, scales = to_dtype(features, self._dtype)
        if self._int8 is not None and scales is not None:
            self._file.write(scales.tobytes())
            self._int8.write(np.ascontiguousarray(raw).data)
        else:
            self._file.write(np.ascontiguousarray(raw).data)
        self._lines.writelines(picture.model_dump_json() + "\n" for picture in pictures)
        self.num_pictures += len(pictures)

    def finish(
        self,
        *,
        clip: BankClip | None,
        kind: BankKind = "pictures",
        num_skipped: int = 0,
        created_with: dict[str, str] | None = None,
    ) -> BankRecord:
        """Write header and record; the bank is complete.

        Raises:
            ConfigError: If no row was added.
        """
        if not self.num_pictures:
            raise ConfigError("the bank would be empty", hint="give at least one image that can be decoded")
        if self._int8 is not None:
            self._int8.seek(0)
            shutil.copyfileobj(self._int8, self._file)
            self._int8.close()
            self._int8_path.unlink()
        self._file.seek(0)
        self._file.write(features_header(self._dtype, self.num_pictures, self._dim))
        self._file.close()
        self._lines.close()
        record = BankRecord(
            kind=kind,
            dtype=self._dtype,
            num_pictures=self.num_pictures,
            dim=self._dim,
            num_skipped=num_skipped,
            clip=clip,
            created_with=created_with or package_versions(),
            sha256=BankReader(self._folder).sha256(),
        )
        write_bank_record(self._folder, record)
        return record


def features_header(dtype: BankDtype, num_rows: int, dim: int) -> bytes:
    """Return what stands before the data of ``bank.safetensors``: the scales of int8, then features."""
    tensors: dict[str, object] = {}
    start = 0
    if dtype == "int8":
        start = 4 * num_rows
        tensors["scales"] = {"dtype": "F32", "shape": [num_rows], "data_offsets": [0, start]}
    tensors["features"] = {
        "dtype": _NAMES[dtype],
        "shape": [num_rows, dim],
        "data_offsets": [start, start + num_rows * dim * NUMPY_DTYPES[dtype].itemsize],
    }
    text = json.dumps(tensors, separators=(",", ":")).encode().ljust(_HEADER_BYTES - 8)
    return len(text).to_bytes(8, "little") + text
