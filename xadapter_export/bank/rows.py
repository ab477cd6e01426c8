"""Rows of a bank as numbers: how a feature is stored in each dtype, and what every row must be.

Dimensions: N rows, D CLIP embedding size.
"""

from collections.abc import Callable
from typing import Any, Final

import numpy as np

from xadapter_export.bank.record import BankDtype
from xadapter_export.bundle.bank_rows import Float32 as Float32
from xadapter_export.bundle.bank_rows import Raw
from xadapter_export.bundle.bank_rows import to_float32 as to_float32
from xadapter_export.errors import ShapeError

OnRows = Callable[[int, int], None]  # rows that are done, and all

NUMPY_DTYPES: Final[dict[BankDtype, np.dtype[Any]]] = {
    "fp32": np.dtype(np.float32),
    "fp16": np.dtype(np.float16),
    "int8": np.dtype(np.int8),
}
_BLOCK_VALUES = 2**17  # half a MiB as float32: large enough to be quick, small enough to be nothing
_LENGTH_TOLERANCE = 0.01  # float16 rounding moves a length by 0.0005


def ignore_rows(_done: int, _total: int) -> None:
    """The default of ``on_rows``."""


def block_rows(dim: int) -> int:
    """Return how many rows of width ``dim`` are read and written at a time."""
    return max(64, _BLOCK_VALUES // dim)


def dtype_of(features: Raw) -> BankDtype:
    """Return how ``(N, D)`` features are stored."""
    return next(name for name, dtype in NUMPY_DTYPES.items() if dtype == features.dtype)


def to_dtype(rows: Float32, dtype: BankDtype) -> tuple[Raw, Float32 | None]:
    """Return ``(N, D) float32`` rows of length 1 as they are stored, and the ``(N,) float32`` scales of int8.

    The largest value of an int8 row becomes 127, and its scale gives the row its length of 1 back.
    """
    if dtype != "int8":
        return rows.astype(NUMPY_DTYPES[dtype], copy=False), None
    largest = np.abs(rows).max(axis=1, keepdims=True)
    whole = np.rint(rows * (127 / largest)).astype(np.int8)
    lengths = np.linalg.norm(whole.astype(np.float32), axis=1)
    return whole, (1 / lengths).astype(np.float32)


def check_lengths(rows: Float32, *, first_row: int = 0) -> None:
    """Check that ``(N, D) float32`` rows are finite and of length 1.

    Args:
        rows: The rows.
        first_row: Number of the first of them in its bank.

    Raises:
        ShapeError: If one is not.
    """
    lengths = np.linalg.norm(rows, axis=1)
    wrong = ~(np.abs(lengths - 1) <= _LENGTH_TOLERANCE)  # so that NaN is wrong too
    if wrong.any():
        row = int(np.argmax(wrong))
        raise ShapeError(
            f"bank row {first_row + row}: expected a feature of length 1, got {lengths[row]:.4g}; "
            "normalize the rows"
        )
