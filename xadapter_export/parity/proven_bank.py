"""What the proof needs of a bank that is no longer in the bundle.

A swapped bundle still holds the graphs that were proven, with other numbers in the place of the bank. Its
proof puts the old ones back: of a searched bank the rows that the reference retrieved, which are few; of a
static one all keys and values. Where the app searches the bank, those rows are what it searches. So every
operator and every other weight is compared with PyTorch as before.

Dimensions: R rows that the reference retrieved, D CLIP embedding size.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import numpy as np
from numpy.typing import NDArray

from xadapter_export.bundle.bank_rows import Float32, Int64, search_blocks
from xadapter_export.bundle.folder import PROVEN_BANK_NAME, Bundle
from xadapter_export.bundle.graph_file import GraphFile
from xadapter_export.bundle.manifest import Variant
from xadapter_export.errors import BundleError
from xadapter_export.parity.reference import read_arrays
from xadapter_export.sessions.retrieval import Retriever
from xadapter_export.sessions.session import Array

_ROWS = "rows"
_BANK = "bank"
_SEARCHED = (_BANK, "bank_search")  # the same rows, under both names in a graph for the CPU


@dataclass(frozen=True)
class ProvenBank:
    """Numbers of the bank that a bundle was proven with.

    Attributes:
        weights: By name in the graph: ``bank (R, D) float32``, or keys and values of a static bank.
        rows: ``(R,) int64``, the rows' numbers in that bank; None of a static one, which is whole.
    """

    weights: Mapping[str, Array]
    rows: NDArray[np.int64] | None

    def weights_of(self, bundle: Bundle, variant: Variant) -> dict[str, Array]:
        """Return what stands for the bank in an fp32 variant; nothing where it has none.

        Raises:
            BundleError: If the variant has a bank of another kind.
        """
        declared = [
            name
            for file in variant.graph_files
            for name in GraphFile(bundle.file(file).read_bytes(), file).weights
        ]
        wanted = [
            name for name in declared if name in _SEARCHED or name.startswith(("bank_keys", "bank_values"))
        ]
        try:
            return {name: self.weights[_BANK if name in _SEARCHED else name] for name in wanted}
        except KeyError as error:
            raise BundleError(
                "the bank used for the parity check belongs to another graph",
                where=bundle.folder / PROVEN_BANK_NAME,
                expected=", ".join(wanted),
                got=", ".join(self.weights),
            ) from error

    def retriever(self, bundle: Bundle) -> Retriever | None:
        """Return what searches the rows; None where a graph does, or nothing is searched."""
        bank = bundle.manifest.bank
        if bank is None or bank.features is None or self.rows is None:
            return None
        spec = bank.model_copy(update={"num_pictures": len(self.rows)})
        return Retriever(spec, None, _RowIndex(cast(Float32, self.weights[_BANK])))

    def number(self, places: Array) -> Array:
        """Return the numbers that retrieved rows had in the bank that the bundle was proven with."""
        return places if self.rows is None else self.rows[places]

    def save(self, folder: Path) -> None:
        """Write ``reference_bank.npz``."""
        rows = {} if self.rows is None else {_ROWS: self.rows}
        np.savez_compressed(folder / PROVEN_BANK_NAME, **self.weights, **rows)  # type: ignore[arg-type]  # keywords are arrays, not flags


class _RowIndex:
    """An exact search of ``(R, D) float32`` rows in memory."""

    def __init__(self, rows: Float32) -> None:
        self._rows = rows

    def search(self, queries: Float32, k: int) -> tuple[Float32, Int64, Float32]:
        scores, found = search_blocks([(0, self._rows)], queries, k)
        return scores, found, self._rows[found]


def read_proven_bank(bundle: Bundle) -> ProvenBank | None:
    """Read the bank of the proof; None where the bundle has the bank that it was proven with.

    Raises:
        BundleError: If it is missing or cannot be read.
    """
    if bundle.manifest.bank is None or bundle.manifest.bank.swapped_from is None:
        return None
    arrays = read_arrays(bundle.file(PROVEN_BANK_NAME))
    rows = arrays.pop(_ROWS, None)
    return ProvenBank(arrays, None if rows is None else rows.astype(np.int64))
