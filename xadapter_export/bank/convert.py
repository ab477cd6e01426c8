"""Stores a bank in another dtype, and measures what that costs.

Dimensions: N pictures, D CLIP embedding size, Q queries.
"""

from pathlib import Path

import numpy as np

from xadapter_export.bank.merge import write_rows
from xadapter_export.bank.nearest import find_nearest, recall
from xadapter_export.bank.reader import BankReader
from xadapter_export.bank.record import BankDtype, BankRecord
from xadapter_export.bank.rows import Float32, OnRows, ignore_rows

RECALL_AT = (1, 5, 10)
_NOISE = 0.5  # length of what is added to a row of length 1, so that a query is near rows and equals none


def convert_bank(
    folder: Path,
    output: Path,
    dtype: BankDtype,
    *,
    force: bool = False,
    on_rows: OnRows = ignore_rows,
) -> BankRecord:
    """Write a bank's rows in another dtype; ``on_rows`` is told after each block of them.

    Raises:
        CheckpointError: If the bank cannot be read.
        ShapeError: If a row is not of length 1.
        OutputExistsError: If something is at ``output``.
        OutputWriteError: If it cannot be written.
    """
    return write_rows([BankReader(folder)], output, dtype, force=force, on_rows=on_rows)


def sample_rows(bank: BankReader, count: int, seed: int = 0) -> list[int]:
    """Return up to ``count`` rows of a bank, drawn at random, in order."""
    rng = np.random.default_rng(seed)
    count = min(count, bank.num_pictures)
    return sorted(rng.choice(bank.num_pictures, count, replace=False, shuffle=False).tolist())


def noisy_queries(bank: BankReader, count: int, seed: int = 0) -> Float32:
    """Return ``(Q, D) float32`` queries of length 1: rows of the bank with noise added."""
    rows = np.concatenate([bank.rows(row, row + 1) for row in sample_rows(bank, count, seed)])
    noise = np.random.default_rng(seed + 1).standard_normal(rows.shape, dtype=np.float32)
    queries = rows + noise * (_NOISE / np.sqrt(bank.dim))
    normalized: Float32 = (queries / np.linalg.norm(queries, axis=1, keepdims=True)).astype(np.float32)
    return normalized


def measure_recall(expected: BankReader, got: BankReader, queries: Float32) -> dict[int, float]:
    """Return recall@k of one bank's rows among another's, for each k of ``RECALL_AT`` that fits.

    Args:
        expected: The bank that is right.
        got: The same rows in another dtype.
        queries: ``(Q, D) float32`` of length 1.
    """
    ks = [k for k in RECALL_AT if k <= expected.num_pictures]
    right, found = (find_nearest(bank, queries, ks[-1]) for bank in (expected, got))
    return {k: recall(right, found, k) for k in ks}
