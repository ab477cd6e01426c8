import numpy as np
import onnx_ir as ir
import pytest
from onnx_ir.tape import Tape

from xadapter_export.exporters.passes.rounding import (
    Curvatures,
    Range,
    measure_inputs,
    round_rows,
    round_weights,
    smooth_rows,
)

N, K, SIZE = 24, 256, 32


def make_case(seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Weights, scales of 4 bits, and inputs whose numbers move together, as those of a PLM's states do."""
    rng = np.random.default_rng(seed)
    weights = rng.standard_normal((N, K), np.float32)
    scales = np.abs(weights.reshape(N, -1, SIZE)).max(-1) / np.float32(8)
    inputs = rng.standard_normal((4 * K, K // 8), np.float32) @ rng.standard_normal((K // 8, K), np.float32)
    return weights, scales, inputs + np.float32(0.1) * rng.standard_normal(inputs.shape, np.float32)


def lost(weights: np.ndarray, numbers: np.ndarray, scales: np.ndarray, inputs: np.ndarray) -> float:
    """Squared error of the products, beside the products."""
    rounded = numbers * np.repeat(scales, SIZE, axis=1)
    return float(np.square(inputs @ (weights - rounded).T).sum() / np.square(inputs @ weights.T).sum())


def test_inputs_that_do_not_move_together_leave_the_nearest_number() -> None:
    weights, scales, _ = make_case()
    numbers = round_weights(weights, scales, 3 * np.eye(K, dtype=np.float32), zero=8)
    nearest = np.clip(np.rint(weights / np.repeat(scales, SIZE, axis=1)), -8, 7)
    np.testing.assert_array_equal(numbers, nearest)


@pytest.mark.parametrize("seed", range(3))
def test_products_lose_less_than_by_the_nearest_number(seed: int) -> None:
    weights, scales, inputs = make_case(seed)
    numbers = round_weights(weights, scales, inputs.T @ inputs, zero=8)
    assert numbers.min() >= -8
    assert numbers.max() <= 7
    np.testing.assert_array_equal(numbers, np.rint(numbers))
    nearest = np.clip(np.rint(weights / np.repeat(scales, SIZE, axis=1)), -8, 7)
    unseen = make_case(seed)[2][::2] * np.float32(1.5)
    assert lost(weights, numbers, scales, unseen) < 0.5 * lost(weights, nearest, scales, unseen)


def test_inputs_that_are_always_zero_do_no_harm() -> None:
    weights, scales, inputs = make_case()
    inputs[:, 5:40] = 0
    assert np.isfinite(round_weights(weights, scales, inputs.T @ inputs, zero=128)).all()
    assert np.isfinite(round_weights(weights, scales, np.zeros((K, K), np.float32), zero=8)).all()


@pytest.mark.parametrize("width", [64, 97])
@pytest.mark.parametrize("kind", ["normal", "equal", "one large", "zeros", "tiny"])
@pytest.mark.parametrize("knows_inputs", [False, True])
def test_no_pair_of_products_can_leave_16_bits(width: int, kind: str, knows_inputs: bool) -> None:
    rng = np.random.default_rng(1)
    weights = rng.standard_normal((N, width), np.float32)
    weights = {"equal": np.ones_like(weights), "zeros": np.zeros_like(weights)}.get(kind, weights)
    if kind == "one large":
        weights[:, 1] = 30
    if kind == "tiny":
        weights *= np.float32(1e-30)
    inputs = rng.standard_normal((2 * width, width), np.float32)
    numbers, scales = round_rows(weights, inputs.T @ inputs if knows_inputs else None)
    assert numbers.dtype == np.int8
    assert np.isfinite(scales).all()
    pairs = np.pad(numbers, ((0, 0), (0, width % 2))).astype(np.int64).reshape(N, -1, 2)
    for first, second in ((255, 255), (255, 0), (0, 255)):  # uint8 inputs that push it furthest
        sums = first * pairs[..., 0] + second * pairs[..., 1]
        assert sums.max() <= 32767
        assert sums.min() >= -32768
    error = np.abs(numbers * scales - weights).max()
    assert error <= np.abs(weights).max() * (0.5 if knows_inputs else 0.3)


def test_rows_under_the_limit_lose_little_more_than_rows_without_it() -> None:
    weights, _, inputs = make_case()
    numbers, scales = round_rows(weights, inputs.T @ inputs)
    nearest = np.abs(weights).max(axis=1, keepdims=True) / np.float32(127)
    without = np.rint(weights / nearest)
    error, free = (
        np.square(inputs @ (weights - n * s).T).sum() for n, s in ((numbers, scales), (without, nearest))
    )
    assert error < free  # what the limit costs, rounding the columns together more than wins back


def test_a_large_column_is_divided_and_its_weights_are_multiplied() -> None:
    weights, _, inputs = make_case()
    inputs[:, 7] *= 100
    ranges = Range(inputs.min(0), inputs.max(0), len(inputs))
    found = smooth_rows(weights, ranges, inputs.T @ inputs)
    assert found.divisors is not None
    assert found.divisors.argmax() == 7

    def lost(divisors: np.ndarray, numbers: np.ndarray, scales: np.ndarray) -> float:
        step = np.abs(inputs / divisors).max() / 127
        products = (np.rint(inputs / divisors / step) * step) @ (numbers * scales).T
        return float(np.square(products - inputs @ weights.T).mean())

    plain = round_rows(weights, inputs.T @ inputs)
    assert lost(found.divisors, found.numbers, found.scales) < lost(np.ones(K), *plain) / 2


def test_even_columns_go_in_as_they_are() -> None:
    rng = np.random.default_rng(0)
    weights, inputs = rng.standard_normal((N, K), np.float32), rng.standard_normal((4 * K, K), np.float32)
    ranges = Range(inputs.min(0), inputs.max(0), len(inputs))
    assert smooth_rows(weights, ranges, inputs.T @ inputs).divisors is None


def test_curvatures_are_sums_over_the_rows_of_all_feeds() -> None:
    tape = Tape()
    x = ir.Value(name="x", shape=ir.Shape(("b", "t", 4)), type=ir.TensorType(ir.DataType.FLOAT))
    doubled = tape.op("Add", [x, x])
    output = tape.op("Neg", [doubled])
    output.name, output.type = "y", x.type
    graph = ir.Graph([x], [output], nodes=tape.nodes, opset_imports={"": 17}, name="g")
    rng = np.random.default_rng(0)
    feeds = [{"x": rng.standard_normal(shape, np.float32)} for shape in ((1, 3, 4), (2, 5, 4))]
    inputs = {"first": x, "second": doubled, "third": doubled}
    found: Curvatures = {"fourth": np.eye(4, dtype=np.float32)}
    ranges = measure_inputs(
        ir.Model(graph, ir_version=10), {**inputs, "fourth": x}, [*feeds, {"x": feeds[0]["x"]}], found
    )
    rows = np.concatenate([feed["x"].reshape(-1, 4) for feed in (*feeds, feeds[0])]).astype(np.float64)
    np.testing.assert_allclose(found["first"], rows.T @ rows, rtol=1e-6)
    np.testing.assert_allclose(found["second"], 4 * rows.T @ rows, rtol=1e-6)
    assert np.shares_memory(found["third"], found["second"])
    np.testing.assert_array_equal(found["fourth"], np.eye(4))  # what is known is not measured again
    np.testing.assert_array_equal(ranges["second"].low, 2 * rows.min(0).astype(np.float32))
    np.testing.assert_array_equal(ranges["fourth"].high, rows.max(0).astype(np.float32))
    assert ranges["first"].num_rows == len(rows)
