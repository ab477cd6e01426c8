import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray

from xadapter_export.errors import ParityError
from xadapter_export.parity.compare import TIE, Place, Tolerance, compare, compare_retrieved

TOLERANCE = Tolerance(atol=1e-4, rtol=1e-4)
LOGITS = Place("t", "fp32", "case", "logits")
floats = hnp.arrays(
    np.float32,
    hnp.array_shapes(min_dims=2, max_dims=3, max_side=4),
    elements=st.floats(-100, 100, width=32),
)


def f32(values: object) -> NDArray[np.float32]:
    return np.array(values, np.float32)


@given(floats)
def test_an_array_equals_itself(array: NDArray[np.float32]) -> None:
    cell = compare(array, array, TOLERANCE, LOGITS)
    assert cell.passed
    assert (cell.max_abs, cell.max_rel, cell.smallest_atol, cell.argmax_agreement) == (0, 0, 0, 1)
    assert cell.cosine == pytest.approx(1)


@given(floats, st.data())
def test_the_rule_element_by_element_and_the_smallest_atol_that_passes(
    ref: NDArray[np.float32], data: st.DataObject
) -> None:
    noise = data.draw(hnp.arrays(np.float32, ref.shape, elements=st.floats(-1 / 64, 1 / 64, width=32)))
    got = ref + noise
    cell = compare(got, ref, TOLERANCE, LOGITS)
    pairs = zip(got.astype(float).ravel(), ref.astype(float).ravel(), strict=True)
    assert cell.passed == all(abs(g - r) <= 1e-4 + 1e-4 * abs(r) for g, r in pairs)
    assert cell.smallest_atol is not None
    assert compare(got, ref, Tolerance(cell.smallest_atol + 1e-12, 1e-4), LOGITS).passed
    if cell.smallest_atol > 1e-9:
        assert not compare(got, ref, Tolerance(cell.smallest_atol * 0.999, 1e-4), LOGITS).passed


def test_the_relative_part_is_of_the_reference() -> None:
    assert compare(f32([[1000.09]]), f32([[1000.0]]), TOLERANCE, LOGITS).passed
    assert not compare(f32([[1000.2]]), f32([[1000.0]]), TOLERANCE, LOGITS).passed


@pytest.mark.parametrize(
    ("got", "ref", "problem"),
    [
        (np.zeros((2, 1), np.float32), np.zeros((2, 8), np.float32), r"shape \(2, 1\), expected \(2, 8\)"),
        (np.zeros((2, 8), np.float64), np.zeros((2, 8), np.float32), "dtype float64, expected float32"),
        (f32([[np.nan]]), f32([[0]]), "NaN or infinity"),
        (f32([[np.nan]]), f32([[np.nan]]), "the reference is not finite"),
        (f32([[np.inf]]), f32([[np.inf]]), "the reference is not finite"),
    ],
)
def test_what_cannot_be_subtracted_fails(
    got: NDArray[np.float32], ref: NDArray[np.float32], problem: str
) -> None:
    cell = compare(got, ref, TOLERANCE, LOGITS)
    assert not cell.passed
    assert cell.problem is not None
    assert cell.problem == problem.replace("\\", "")


def test_nothing_compared_proves_nothing() -> None:
    with pytest.raises(ParityError, match=r"nothing to compare.*t/case/logits.*shape \(0, 8\)"):
        compare(np.zeros((0, 8), np.float32), np.zeros((0, 8), np.float32), TOLERANCE, LOGITS)


def test_argmax_agreement_is_the_share_of_rows_and_only_for_logits() -> None:
    got, ref = f32([[1, 2], [2, 1]]), f32([[1, 2], [1, 2]])
    assert compare(got, ref, TOLERANCE, LOGITS).argmax_agreement == 0.5
    assert compare(got, ref, TOLERANCE, Place("t", "fp32", "case", "x")).argmax_agreement is None


@pytest.mark.parametrize(
    ("a", "b", "cosine"), [([0, 0], [0, 0], 1), ([0, 1], [0, 0], 0), ([1, 0], [-1, 0], -1)]
)
def test_cosine(a: list[float], b: list[float], cosine: float) -> None:
    assert compare(f32([a]), f32([b]), TOLERANCE, LOGITS).cosine == cosine


RETRIEVED = Place("v", "fp32", "case", "retrieved")
SCORES = f32([[0.9, 0.5, 0.1]])


Scores = NDArray[np.float32]


def retrieved(got: list[int], got_scores: Scores = SCORES, ref_scores: Scores = SCORES) -> tuple[bool, int]:
    cell = compare_retrieved(np.array([got]), np.array([[7, 8, 9]]), got_scores, ref_scores, RETRIEVED)
    assert cell.num_ties is not None
    return cell.passed, cell.num_ties


def test_the_same_rows_pass() -> None:
    assert retrieved([7, 8, 9]) == (True, 0)


def test_another_row_fails_unless_it_ties() -> None:
    assert retrieved([7, 9, 8]) == (False, 0)
    tied = f32([[0.9, 0.1 + TIE / 2, 0.1]])
    assert retrieved([7, 9, 8], tied, tied) == (True, 2)
    assert retrieved([7, 8, 5]) == (True, 1)  # a row just below the last place, with the same score
    assert retrieved([7, 8, 5], f32([[0.9, 0.5, 0.2]])) == (False, 0)


def test_a_row_with_the_right_score_but_from_another_place_fails() -> None:
    assert not retrieved([8, 7, 9])[0]
    assert not retrieved([7, 7, 7])[0]
    assert not retrieved([5, 8, 9])[0]  # row 7 cannot have left the list


def test_retrieved_of_another_shape_fails() -> None:
    cell = compare_retrieved(np.array([[7]]), np.array([[7, 8]]), SCORES[:, :1], SCORES[:, :2], RETRIEVED)
    assert cell.problem == "shape (1, 1), expected (1, 2)"
    cell = compare_retrieved(np.array([[7, 8]]), np.array([[7, 8]]), SCORES, SCORES, RETRIEVED)
    assert cell.problem == "retrieved is (1, 2) but retrieved_scores is (1, 3)"
