"""What a kind of X-adapter layer is to everything that has no PyTorch: checkpoint, settings, swap of a bank.

Dimensions: N bank rows, C memory width, R adapter width.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Float32 = NDArray[np.float32]

NORM_EPSILON = 1e-5  # of the memory norm, which is torch's default


@dataclass(frozen=True)
class LayerKind:
    """One kind of layer. What needs PyTorch is in its other half, ``torch_half``.

    Attributes:
        name: The name that users give, and that checkpoints have.
        says: What it does, in a few words.
        torch_half: Where its ``model.x_adapter.XAdapterLayer`` is, as ``module:class``; imported where
            PyTorch is.
        learns_rows: Whether it learns something for each row of a static bank. Then it reads nothing else:
            the other experts of its plug-in get the default kind, and the bank cannot be swapped.
        null_rows: How many null rows it has beside each memory where the settings do not say; 0 for a kind
            without them.
        fold_reads: The tensors of a layer that ``fold`` reads, by their names in the layer.
    """

    name: str
    says: str
    torch_half: str
    learns_rows: bool = False
    null_rows: int = 0
    fold_reads: tuple[str, ...] = tuple(
        f"{part}.{name}" for part in ("memory_norm", "key", "value") for name in ("weight", "bias")
    )

    def fold(self, state: "Mapping[str, Float32]", rows: "Float32") -> "tuple[Float32, Float32]":
        """Do what ``XAdapterLayer.fold`` does, where a bank is swapped without PyTorch.

        It is computed in float64 there and here, so that the results are equal once they are rounded.

        Args:
            state: The tensors of ``fold_reads``.
            rows: ``(N, C) float32``. The bank.

        Returns:
            Keys and values, each ``(1, N, R) float32``, or with more rows where the kind adds some.
        """
        import numpy as np

        memory = rows.astype(np.float64)
        memory -= memory.mean(-1, keepdims=True)
        memory /= np.sqrt((memory * memory).mean(-1, keepdims=True) + NORM_EPSILON)
        memory = memory * state["memory_norm.weight"] + state["memory_norm.bias"]
        keys, values = (
            memory @ state[f"{part}.weight"].T.astype(np.float64) + state[f"{part}.bias"]
            for part in ("key", "value")
        )
        return keys[None].astype(np.float32), values[None].astype(np.float32)
