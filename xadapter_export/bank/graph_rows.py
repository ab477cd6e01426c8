"""A bank as the weights of a graph: what the exporter writes into one, and what a swap puts in its place.

A bundle with a swapped bank holds the numbers that an export would have written.

Dimensions: N bank size, D CLIP embedding size, G groups of numbers of a row that share a scale, S numbers of
a group.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from xadapter_export.bank.rows import Float32
from xadapter_export.bundle.folder import PROJECTIONS_NAME
from xadapter_export.errors import BundleError
from xadapter_export.layers import LAYERS, LayerKind

REST_STEPS = 254  # of a code: what rounding leaves over is at most half of one, and int8 has 127 steps

_CANDIDATES = 16  # at least: of 1,000,000 rows, random or clustered, they held the best 4 of all 400 queries
_GROUP_SIZES = (128, 64, 32, 16)  # what MatMulNBits takes; 256 is slower by a seventh on AVX-512
_CHUNK_ROWS = 16384  # rows that are quantized at a time
_SMALLEST_HALF, _LARGEST_HALF = 5.96e-8, 65504.0  # what onnxruntime moves numbers to, from 0 and beyond


def num_candidates(num_rows: int, k: int) -> int:
    """Return how many rows the int8 search rescores."""
    return min(num_rows, max(_CANDIDATES, 4 * k))


def quantize_rows(rows: Float32) -> tuple[NDArray[np.uint8], NDArray[np.int8], Float32]:
    """Split rows into codes, what they leave over, and scales.

    A number is ``scale * (code - 128 + rest / 254)``; a group of numbers of a row shares a scale.

    Args:
        rows: ``(N, D) float32``.

    Returns:
        ``(N, G, S) uint8``, ``(N, G, S) int8`` and ``(N, G) float32``; where D is not G x S, what fills the
        last group stands for 0.
    """
    n, d = rows.shape
    s = min(_GROUP_SIZES, key=lambda size: -(-d // size) * (2 * size + 4))  # fewest bytes
    g = -(-d // s)
    codes = np.empty((n, g, s), np.uint8)
    rest = np.empty((n, g, s), np.int8)
    scales = np.empty((n, g), np.float32)
    for start in range(0, n, _CHUNK_ROWS):
        chunk = slice(start, start + _CHUNK_ROWS)
        numbers = np.zeros((len(rows[chunk]), g * s), np.float32)
        numbers[:, :d] = rows[chunk]
        numbers = numbers.reshape(-1, g, s)
        largest = np.abs(numbers).max(2)
        scales[chunk] = np.where(largest > 0, largest, 1) / 127
        numbers /= scales[chunk, :, None]
        whole = np.rint(numbers)
        codes[chunk] = whole + 128
        rest[chunk] = np.rint((numbers - whole) * REST_STEPS)
    return codes, rest, scales


def to_half(values: Float32) -> NDArray[np.float16]:
    """Return float32 numbers as float16, the smallest moved away from 0.

    Source:
        onnxruntime 1.32, transformers/float16.py, ``convert_np_to_float16``, which makes fp16 variants.
    """
    sizes = np.abs(values)
    moved = np.where(sizes < _SMALLEST_HALF, np.float32(_SMALLEST_HALF), np.minimum(sizes, _LARGEST_HALF))
    return np.where(values == 0, values, np.copysign(moved, values)).astype(np.float16)


@dataclass(frozen=True)
class Projections:
    """What a swap folds a static bank with.

    Attributes:
        kind: The kind of the layers.
        states: The tensors that ``LayerKind.fold`` reads, of each layer, by the PLM layer's number.
    """

    kind: LayerKind
    states: Mapping[str, Mapping[str, Float32]]

    def save(self, folder: Path) -> None:
        """Write them into a bundle."""
        tensors = {
            f"{layer}.{name}": np.ascontiguousarray(array)
            for layer, state in self.states.items()
            for name, array in state.items()
        }
        save_file(tensors, folder / PROJECTIONS_NAME, {"layer": self.kind.name})

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read what ``save`` wrote.

        Raises:
            BundleError: If it is not that.
            UnsupportedError: If the kind of layer is not known here.
        """
        states: dict[str, dict[str, Float32]] = {}
        try:
            with safe_open(path, "numpy") as file:
                kind = LAYERS[(file.metadata() or {})["layer"]]
                for key in file.keys():  # noqa: SIM118  # it is no dict
                    layer, _, name = key.partition(".")
                    states.setdefault(layer, {})[name] = file.get_tensor(key)
        except (OSError, SafetensorError, KeyError) as error:
            raise BundleError("the projections of the bank cannot be read", where=path, got=error) from error
        for state in states.values():
            if set(state) != set(kind.fold_reads):
                raise BundleError(
                    "the projections of the bank are incomplete",
                    where=path,
                    expected=", ".join(kind.fold_reads),
                    got=", ".join(sorted(state)),
                )
        return cls(kind, states)
