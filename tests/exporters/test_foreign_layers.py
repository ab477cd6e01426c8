"""Layers that are not ours: what they are written with is converted, and fused only where that is exact."""

from collections.abc import Sequence

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from numpy.typing import NDArray
from onnx_ir.passes.common import RemoveUnusedNodesPass

from xadapter_export.exporters.passes.fuse import _is_causal, split_projections
from xadapter_export.exporters.portable.trace import _convert


def typed(value: ir.Value, shape: Sequence[int | str]) -> ir.Value:
    value.shape, value.type = ir.Shape(shape), ir.TensorType(ir.DataType.FLOAT)
    return value


def model_that_splits(axis: int, shape: Sequence[int | str], part: Sequence[int | str]) -> ir.Model:
    """Splits ``x`` in three and computes ``third - first + second``, in opset 18."""
    x = typed(ir.val("x"), shape)
    relu = ir.node("Relu", [x])
    typed(relu.outputs[0], shape)
    split = ir.node("Split", [relu.outputs[0]], {"axis": axis, "num_outputs": 3}, num_outputs=3)
    first, second, third = (typed(value, part) for value in split.outputs)
    difference = ir.node("Sub", [third, first])
    total = ir.node("Add", [difference.outputs[0], second])
    typed(total.outputs[0], part).name = "y"
    nodes = [relu, split, difference, total]
    graph = ir.Graph([x], [total.outputs[0]], nodes=nodes, opset_imports={"": 18}, name="split")
    return ir.Model(graph, ir_version=8)


def run(model: ir.Model, x: NDArray[np.float32]) -> NDArray[np.float32]:
    proto = ir.to_proto(model)
    onnx.checker.check_model(proto)
    result: NDArray[np.float32] = ort.InferenceSession(proto.SerializeToString()).run(None, {"x": x})[0]
    return result


@pytest.mark.parametrize(
    ("axis", "shape", "part"),
    [(-1, ["b", 6], ["b", 2]), (1, ["b", 3, 4], ["b", 1, 4]), (-2, ["b", 3, 4], ["b", 1, 4])],
)
def test_a_split_is_written_in_opset_17_and_made_one_again(
    axis: int, shape: Sequence[int | str], part: Sequence[int | str]
) -> None:
    x = np.random.default_rng(0).random((2, *map(int, shape[1:])), np.float32)
    expected = run(model_that_splits(axis, shape, part), x)
    model = _convert(model_that_splits(axis, shape, part), 17)
    assert "Split" not in {node.op_type for node in model.graph}
    np.testing.assert_array_equal(run(model, x), expected)
    assert split_projections(model) == 1
    RemoveUnusedNodesPass()(model)
    assert [node.op_type for node in model.graph].count("Split") == 1
    np.testing.assert_array_equal(run(model, x), expected)


def test_slices_that_are_not_all_of_a_value_stay() -> None:
    model = _convert(model_that_splits(-1, ["b", 6], ["b", 2]), 17)
    last = [node for node in model.graph if node.op_type == "Slice"][-1]
    last.replace_input_with(2, last.inputs[1])  # it ends where it begins
    assert split_projections(model) == 0


@pytest.mark.parametrize(
    ("compared", "chosen", "is_causal"),
    [("Greater", (-np.inf, 0.0), True), ("Greater", (0.0, -np.inf), False), ("Less", (-np.inf, 0.0), False)],
)
def test_a_causal_mask_is_known_by_what_it_compares(
    compared: str, chosen: tuple[float, float], is_causal: bool
) -> None:
    def constant(value: NDArray[np.generic]) -> ir.Value:
        return ir.node("Constant", [], {"value": ir.tensor(value)}).outputs[0]

    zero, one = (constant(np.array(number, np.int64)) for number in (0, 1))
    positions = ir.node("Range", [zero, ir.val("length"), one]).outputs[0]
    sides = [
        ir.node("Unsqueeze", [positions, constant(np.array([axis], np.int64))]).outputs[0] for axis in (0, 1)
    ]
    values = [constant(np.array(value, np.float32)) for value in chosen]
    mask = ir.node("Where", [ir.node(compared, sides).outputs[0], *values]).outputs[0]
    assert _is_causal(mask) == is_causal
