"""One rule for every comparison with PyTorch, and the table of tolerances.

An element passes when ``|got - ref| <= atol + rtol * |ref|``, in float64. Dtype, shape and finiteness are
checked before anything is subtracted: ``(2, 1)`` against ``(2, 8)`` would broadcast to a small difference,
and ``nan > tolerance`` is False.
"""

from dataclasses import dataclass
from typing import Annotated

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from xadapter_export.errors import ParityError
from xadapter_export.sessions.session import Array

FloatArray = NDArray[np.float64]

TIE = 1e-5
"""Two cosines closer than this may swap places: their order is rounding, not retrieval."""


@dataclass(frozen=True)
class Tolerance:
    """How far an element may be from PyTorch's: ``atol + rtol * |ref|``."""

    atol: float
    rtol: float


TOLERANCES: dict[str, Tolerance] = {
    # Measured: 3e-6 on logits of size 3, at shapes that were not traced (torch 2.13, onnxruntime 1.32, CPU).
    "fp32": Tolerance(atol=1e-4, rtol=1e-4),
}


class Cell(BaseModel):
    """One array of one case, compared.

    Attributes:
        variant: Name of the variant, ``cpu-fp32``.
        output: Name of the graph output, or of the tap.
        max_rel: Largest ``|got - ref| / |ref|`` where the reference is not zero.
        cosine: Between the two arrays, flattened.
        smallest_atol: The smallest ``atol`` that would pass with this ``rtol``.
        argmax_agreement: For logits, the share of rows whose largest entry is the same one.
        num_ties: For retrieved rows, how many differ but tie. The float measures are then null.
        problem: Why the arrays could not be compared, or None.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    expert_set: str
    variant: str
    case: str
    output: str
    num_elements: Annotated[int, Field(ge=1)]
    max_abs: float | None = None
    max_rel: float | None = None
    cosine: float | None = None
    smallest_atol: float | None = None
    argmax_agreement: float | None = None
    num_ties: int | None = None
    problem: str | None = None
    passed: bool


@dataclass(frozen=True)
class Place:
    """Where an array comes from, for the report."""

    expert_set: str
    variant: str
    case: str
    output: str


def compare(got: Array, ref: Array, tolerance: Tolerance, place: Place) -> Cell:
    """Compare an array with its reference.

    Args:
        got: Float array from the graph.
        ref: The same from PyTorch; same dtype and shape.
        tolerance: The tolerance of the graph's precision.
        place: What is compared. Rows of ``logits`` are compared by their largest entry too.

    Returns:
        A cell. Arrays that cannot be subtracted give one that failed, with its problem.

    Raises:
        ParityError: If there is nothing to compare.
    """
    if problem := _find_problem(got, ref, place):
        return Cell(**vars(place), num_elements=ref.size, problem=problem, passed=False)
    got64, ref64 = got.astype(np.float64), ref.astype(np.float64)
    error = np.abs(got64 - ref64)
    size = np.abs(ref64)
    needed_atol = float(np.max(error - tolerance.rtol * size))
    is_logits = place.output == "logits"
    return Cell(
        **vars(place),
        num_elements=ref.size,
        max_abs=float(error.max()),
        max_rel=float(np.max(error[size > 0] / size[size > 0], initial=0.0)),
        cosine=_cosine(got64.ravel(), ref64.ravel()),
        smallest_atol=max(0.0, needed_atol),
        argmax_agreement=float(np.mean(got64.argmax(-1) == ref64.argmax(-1))) if is_logits else None,
        passed=bool(np.all(error <= tolerance.atol + tolerance.rtol * size)),
    )


def compare_retrieved(
    got: NDArray[np.int64],
    ref: NDArray[np.int64],
    got_scores: NDArray[np.float32],
    ref_scores: NDArray[np.float32],
    place: Place,
    *,
    tie: float = TIE,
) -> Cell:
    """Compare retrieved bank rows, ``(B, K) int64``, with the cosines ``(B, K) float32`` they were chosen by.

    A place agrees when it holds the same row, or one that ties with it: the scores there are within ``tie``,
    and so are the reference's own scores here and where it holds that row; a row that it does not hold must
    tie with its last place, below which it fell. No row may come twice.

    Raises:
        ParityError: If there is nothing to compare.
    """
    problem = _find_problem(got, ref, place) or _find_problem(got_scores, ref_scores, place)
    if problem is None and got.shape != got_scores.shape:
        problem = f"retrieved is {got.shape} but retrieved_scores is {got_scores.shape}"
    if problem:
        return Cell(**vars(place), num_elements=ref.size, problem=problem, passed=False)
    num_ties = 0
    passed = all(len(set(row)) == len(row) for row in got.tolist())
    for b, k in np.argwhere(got != ref):
        places = np.flatnonzero(ref[b] == got[b, k])
        place_of_row = int(places[0]) if places.size else -1
        rivals = np.array([got_scores[b, k], ref_scores[b, place_of_row]], np.float64)
        is_tie = bool(np.all(np.abs(rivals - np.float64(ref_scores[b, k])) <= tie))
        num_ties += is_tie
        passed &= is_tie
    return Cell(**vars(place), num_elements=ref.size, num_ties=num_ties, passed=passed)


def _find_problem(got: Array, ref: Array, place: Place) -> str | None:
    """Return why two arrays cannot be subtracted, or None."""
    if ref.size == 0:
        raise ParityError(
            "there was nothing to compare",
            where=f"{place.expert_set}/{place.case}/{place.output}",
            got=f"a reference of shape {ref.shape}",
        )
    if got.dtype != ref.dtype:
        return f"dtype {got.dtype}, expected {ref.dtype}"
    if got.shape != ref.shape:
        return f"shape {got.shape}, expected {ref.shape}"
    if not np.isfinite(ref).all():
        return "the reference is not finite"
    if not np.isfinite(got).all():
        return "NaN or infinity"
    return None


def _cosine(a: FloatArray, b: FloatArray) -> float:
    """Return the cosine of two vectors: 1 for two zero vectors, 0 for a zero and another."""
    norms = float(np.linalg.norm(a)), float(np.linalg.norm(b))
    if 0.0 in norms:
        return float(norms[0] == norms[1])
    return float(np.clip(a / norms[0] @ (b / norms[1]), -1.0, 1.0))
