"""Layers that can look away: beside each memory stand rows that are learned and come from no picture or text.

Dimensions: N bank rows, C memory width, R adapter width, M null rows.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from xadapter_export.layers.kind import LayerKind

if TYPE_CHECKING:
    from xadapter_export.layers.kind import Float32

NULL_KEYS, NULL_VALUES = "null_keys", "null_values"


@dataclass(frozen=True)
class NullRowsKind(LayerKind):
    """A kind with null rows: ``null_keys`` and ``null_values``, ``(M, R)``, in its layers."""

    null_rows: int = 16
    fold_reads: tuple[str, ...] = (*LayerKind.fold_reads, NULL_KEYS, NULL_VALUES)

    def fold(self, state: "Mapping[str, Float32]", rows: "Float32") -> "tuple[Float32, Float32]":
        """As ``LayerKind.fold``, with the null rows behind the bank's: each ``(1, N + M, R) float32``."""
        import numpy as np

        keys, values = super().fold(state, rows)
        return (
            np.concatenate([keys, state[NULL_KEYS][None]], axis=1),
            np.concatenate([values, state[NULL_VALUES][None]], axis=1),
        )
