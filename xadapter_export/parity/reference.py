"""How ``reference.npz`` stays small: of a large array only some columns of its last axis are kept.

The exporter proves every number; what a bundle carries is enough to repeat the proof anywhere. Beside the
kept columns of ``KEY`` stand ``KEY#columns``, their numbers, and ``KEY#shape``, the shape of the whole array.
"""

from collections.abc import Mapping
from typing import cast

import numpy as np

from xadapter_export.sessions.session import Array

_NUM_KEPT = 256  # numbers of an array, about
_MIN_COLUMNS = 4
_WHOLE = ("/out/retrieved", "/out/retrieved_scores")  # every row counts: a swap proves graphs with just these


def sample_reference(arrays: Mapping[str, Array]) -> dict[str, Array]:
    """Keeps some columns of every large output, the largest of each row of the logits among them.

    Args:
        arrays: Inputs and outputs by their keys; see ``prove_bundle``.

    Returns:
        The same with columns left out, and the keys that say which were kept.
    """
    sampled: dict[str, Array] = {}
    for key, array in arrays.items():
        num_columns = array.shape[-1]
        num_rows = max(1, array.size // num_columns)
        num_kept = max(_MIN_COLUMNS, _NUM_KEPT // num_rows)
        if "/in/" in key or key.endswith(_WHOLE) or num_kept >= num_columns:
            sampled[key] = array
            continue
        columns = np.linspace(0, num_columns - 1, num_kept).astype(np.int64)
        if key.endswith("/out/logits"):
            columns = np.append(columns, array.argmax(-1).ravel())
        columns = np.unique(columns)
        sampled[key] = cast(Array, np.ascontiguousarray(array[..., columns]))
        sampled[f"{key}#columns"] = columns
        sampled[f"{key}#shape"] = np.array(array.shape, dtype=np.int64)
    return sampled


def take_columns(got: Array, reference: Mapping[str, Array], key: str) -> Array:
    """Takes the columns that the reference kept of a graph's output; one of another shape stays whole."""
    if f"{key}#columns" not in reference or got.shape != tuple(reference[f"{key}#shape"]):
        return got
    return cast(Array, np.ascontiguousarray(got[..., reference[f"{key}#columns"]]))
