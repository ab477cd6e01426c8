"""The weights of a graph that hold a bank, made for another bank.

Dimensions: N bank size, D CLIP embedding size.
"""

from functools import cached_property
from typing import cast

import numpy as np
from numpy.typing import NDArray

from xadapter_export.bank.feature_bank import FeatureBank
from xadapter_export.bank.graph_rows import Projections, num_candidates, quantize_rows, to_half
from xadapter_export.bank.rows import Float32
from xadapter_export.bundle.folder import PROJECTIONS_NAME, Bundle
from xadapter_export.bundle.graph_file import Weight
from xadapter_export.errors import UnsupportedError

AnyArray = NDArray[np.generic]

_INT8_WEIGHTS = {
    ("bank_search", "uint8"): "codes",
    ("bank_codes", "uint8"): "codes",
    ("bank_rest", "int8"): "rest",
    ("bank_scales", "float32"): "scales",
}


class BankWeights:
    """Makes the weights of a graph that hold the bank, each once.

    Args:
        new: The bank.
        old: The bundle, with its projections where the bank is static.
    """

    def __init__(self, new: FeatureBank, old: Bundle) -> None:
        self._new = new
        self._made: dict[tuple[str, str], AnyArray] = {}
        self._codes: dict[str, AnyArray] = {}
        self._folded: dict[str, AnyArray] = {}
        bank = old.manifest.bank
        assert bank is not None  # checked before
        self._k = bank.k
        if bank.retrieval == "static":
            projections = Projections.load(old.file(PROJECTIONS_NAME))
            for layer, state in projections.states.items():
                keys, values = projections.kind.fold(state, self._rows)
                self._folded |= {f"bank_keys_{layer}": keys, f"bank_values_{layer}": values}

    @property
    def num_parameters(self) -> int:
        """How many numbers a portable graph holds of the bank."""
        if self._folded:
            return sum(array.size for array in self._folded.values())
        return int(self._new.features.size)

    @cached_property
    def _rows(self) -> Float32:
        """Rows at length 1, which are not made where no graph holds them."""
        return self._new.unit_rows()

    def __call__(self, weight: Weight) -> AnyArray | None:
        """Return what takes the place of a weight; None for one that does not depend on the bank.

        Raises:
            UnsupportedError: If a graph holds the bank in a form that is not known here.
        """
        if not weight.name.startswith("bank"):
            return None
        key = weight.name, weight.dtype
        if key not in self._made:
            made = self._make(weight)
            if made is None:
                return None
            self._made[key] = made
        return self._made[key]

    def _make(self, weight: Weight) -> AnyArray | None:
        name, n = weight.name, len(self._new.features)
        if name == "bank_candidates":
            return np.array([num_candidates(n, self._k)], np.int64)
        if name in {"bank", "bank_search"} and weight.dtype in {"float32", "float16"}:
            return self._rows if weight.dtype == "float32" else to_half(self._rows)
        if name in self._folded and weight.dtype in {"float32", "float16"}:
            folded = cast(Float32, self._folded[name])
            return folded if weight.dtype == "float32" else to_half(folded)
        if (name, weight.dtype) in _INT8_WEIGHTS:
            if not self._codes:
                codes, rest, scales = quantize_rows(self._rows)
                self._codes = {"codes": codes, "rest": rest, "scales": scales}
            return self._codes[_INT8_WEIGHTS[name, weight.dtype]]
        if len(weight.shape) < 2:
            return None  # k, steps and shapes, which hold for any bank
        raise UnsupportedError(
            "a graph stores its bank in a form that cannot be swapped",
            where=f"{name} {weight.dtype} {weight.shape}",
            hint="export again",
        )
