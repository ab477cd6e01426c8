import numpy as np
import onnx_ir as ir
import pytest
from onnx_ir.tape import Tape

from xadapter_export.exporters.rounding import measure_curvatures, round_weights

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
    found = measure_curvatures(ir.Model(graph, ir_version=10), inputs, [*feeds, {"x": feeds[0]["x"]}])
    rows = np.concatenate([feed["x"].reshape(-1, 4) for feed in (*feeds, feeds[0])]).astype(np.float64)
    np.testing.assert_allclose(found["first"], rows.T @ rows, rtol=1e-6)
    np.testing.assert_allclose(found["second"], 4 * rows.T @ rows, rtol=1e-6)
    assert np.shares_memory(found["third"], found["second"])
