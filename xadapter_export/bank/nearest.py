"""Exact search: the rows of a bank that are nearest to a query, read piece by piece.

Dimensions: N pictures, D CLIP embedding size, Q queries, K rows wanted.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from xadapter_export.bank.reader import BankReader
from xadapter_export.bank.rows import Float32
from xadapter_export.bundle.bank_rows import search_blocks
from xadapter_export.errors import ConfigError


class Nearest(NamedTuple):
    """The best rows, best first; of equal ones the first in the bank.

    Attributes:
        rows: ``(Q, K) int64``.
        scores: ``(Q, K) float32`` cosines.
    """

    rows: NDArray[np.int64]
    scores: Float32


def find_nearest(bank: BankReader, queries: Float32, k: int) -> Nearest:
    """Search a bank.

    Args:
        bank: The bank.
        queries: ``(Q, D) float32`` of length 1.
        k: K.

    Raises:
        ConfigError: If the bank has fewer than ``k`` rows, or rows of another width.
    """
    check_k(bank, k)
    if queries.shape[1] != bank.dim:
        raise ConfigError(
            "the query and the bank's features have different widths",
            where=bank.folder,
            expected=bank.dim,
            got=queries.shape[1],
            hint="use the CLIP that made the bank",
        )
    scores, rows = search_blocks(bank.row_blocks(), queries, k)
    return Nearest(rows, scores)


def check_k(bank: BankReader, k: int) -> None:
    """Check that a bank has ``k`` rows.

    Raises:
        ConfigError: If it does not.
    """
    if k > bank.num_pictures:
        raise ConfigError(
            "k is larger than the number of images in the bank",
            where=bank.folder,
            expected=f"at most {bank.num_pictures}",
            got=k,
        )


def recall(expected: Nearest, got: Nearest, k: int) -> float:
    """Return the share of the first ``k`` expected rows that are among the first ``k`` found."""
    pairs = zip(expected.rows[:, :k], got.rows[:, :k], strict=True)
    return float(np.mean([len(np.intersect1d(a, b)) / k for a, b in pairs]))
