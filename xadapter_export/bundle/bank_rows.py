"""Rows of a feature bank on disk, memory-mapped: what is read is what is asked for.

Dimensions: N pictures, D CLIP embedding size, Q queries, C candidates.
"""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Final, cast

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from xadapter_export.errors import BundleError

Float32 = NDArray[np.float32]
Int64 = NDArray[np.int64]
Raw = NDArray[np.float32] | NDArray[np.float16] | NDArray[np.int8]

_DTYPES: Final[dict[str, np.dtype[Any]]] = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "I8": np.dtype(np.int8),
}
_BLOCK_VALUES = 2**21  # 8 MiB as float32
_LENGTH_BYTES = 8  # of the header's length, at the start of a safetensors file


def to_float32(raw: Raw, scales: Float32 | None) -> Float32:
    """Return ``(N, D) float32``: the stored rows, those of int8 times their ``(N,) float32`` scales."""
    rows = raw.astype(np.float32, copy=False)
    return rows if scales is None else rows * scales[:, None]


def float32_blocks(
    features: Raw, scales: Float32 | None, size: int | None = None
) -> Iterator[tuple[int, Float32]]:
    """Give the first row and ``(rows, D) float32``, as they are stored, of one piece after the other."""
    size = size or max(64, _BLOCK_VALUES // features.shape[1])
    for start in range(0, len(features), size):
        block = slice(start, start + size)
        yield start, to_float32(features[block], None if scales is None else scales[block])


def unit_rows(rows: Float32) -> Float32:
    """Return ``(N, D) float32`` rows at length 1, the same bits however many rows there are."""
    scaled: Float32 = rows / np.sqrt((rows * rows).sum(axis=1, keepdims=True))
    return scaled


class BankRows:
    """The features of a bank, of which nothing is in memory but what the system caches.

    Args:
        path: ``bank.safetensors``.

    Attributes:
        num_pictures: N.
        dim: D.
        features: ``(N, D) float32, float16 or int8``, memory-mapped and not writable.
        scales: ``(N,) float32``, likewise; what an int8 row is multiplied by, None for the others.

    Raises:
        BundleError: If the file cannot be read or holds no bank.

    Source:
        The safetensors format: eight bytes of header length (little endian), JSON, data without gaps.
    """

    def __init__(self, path: Path) -> None:
        try:
            with cast(Any, safe_open(path, framework="numpy")):  # it checks the whole header
                header, start = _read_header(path)
        except (OSError, MemoryError, SafetensorError) as error:  # MemoryError: larger than may be mapped
            raise BundleError("the features of the bank cannot be read", where=path, got=error) from error
        found = {name: (tensor["dtype"], tuple(tensor["shape"])) for name, tensor in header.items()}
        dtype, shape = found.get("features", ("", ()))
        scales = ("F32", shape[:1]) if dtype == "I8" else None
        if dtype not in _DTYPES or len(shape) != 2 or 0 in shape or found.get("scales") != scales:
            raise BundleError("this is not a bank", where=path, got=found)

        def map_tensor(name: str) -> NDArray[Any]:
            offset = start + header[name]["data_offsets"][0]
            return np.memmap(path, _DTYPES[found[name][0]], "r", offset, found[name][1])

        self.num_pictures, self.dim = shape
        self.features: Raw = map_tensor("features")
        self.scales: Float32 | None = map_tensor("scales") if scales else None

    def take(self, rows: Int64) -> Float32:
        """Return some rows at length 1: ``(..., ) int64`` to ``(..., D) float32``."""
        flat = rows.ravel()
        scales = None if self.scales is None else self.scales[flat]
        found = unit_rows(to_float32(self.features[flat], scales))
        return found.reshape(*rows.shape, self.dim)

    def search(self, queries: Float32, k: int) -> tuple[Float32, Int64]:
        """Find the nearest rows exactly, reading all of them.

        Args:
            queries: ``(Q, D) float32`` of length 1.
            k: How many; at most N.

        Returns:
            ``(Q, k) float32`` cosines, the largest first, and ``(Q, k) int64`` rows.
        """
        return search_blocks(self.unit_blocks(), queries, k)

    def unit_blocks(self) -> Iterator[tuple[int, Float32]]:
        """Give blocks at length 1: a bank in fewer bits has rows that are off by 0.0005."""
        for start, block in float32_blocks(self.features, self.scales):
            yield start, unit_rows(block)


def _read_header(path: Path) -> tuple[dict[str, Any], int]:
    """Return the tensors of a safetensors file, and where its data begins."""
    with path.open("rb") as stream:
        size = int.from_bytes(stream.read(_LENGTH_BYTES), "little")
        header = json.loads(stream.read(size))
    header.pop("__metadata__", None)
    return header, _LENGTH_BYTES + size


def search_blocks(blocks: Iterable[tuple[int, Float32]], queries: Float32, k: int) -> tuple[Float32, Int64]:
    """Find the rows with the largest products with each query, reading one block after the other.

    Args:
        blocks: First row and ``(rows, D) float32`` of each; together k rows or more.
        queries: ``(Q, D) float32``.
        k: How many.

    Returns:
        ``(Q, k) float32`` products, the largest first and of equal ones the first row, and ``(Q, k) int64``.
    """
    scores = np.full((len(queries), k), -np.inf, dtype=np.float32)
    rows = np.zeros((len(queries), k), dtype=np.int64)
    for start, block in blocks:
        found = queries @ block.T  # (Q, rows)
        for q in np.flatnonzero(found.max(axis=1) > scores[:, -1]):
            better = np.flatnonzero(found[q] > scores[q, -1])
            candidates = np.concatenate([scores[q], found[q, better]])
            numbers = np.concatenate([rows[q], better + start])
            best = np.argsort(-candidates, kind="stable")[:k]
            scores[q], rows[q] = candidates[best], numbers[best]
    return scores, rows
