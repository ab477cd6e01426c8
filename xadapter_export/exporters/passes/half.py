"""A graph in fp16, by onnxruntime's converter."""

from collections.abc import Sequence

import onnx
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass
from onnxruntime.transformers.float16 import convert_float_to_float16

# Operators that stay fp32 in an fp16 graph: norms, attention's weights and masks, and the search of the bank.
# Of these CUDA's kernels compute the first two in fp32 whatever they are given.
FP32_SEARCH = ("TopK", "ReduceSum", "Sqrt", "Div", "Range", "Where")
_SCORES = "bank_scores"
_TO_FP16 = "_cast_to_fp16_node"  # how onnxruntime's converter names a cast of what stays fp32
FP32_ISLANDS = ("LayerNormalization", "Softmax", *FP32_SEARCH)


def to_half(model: ir.Model, islands: Sequence[str], *, fp32_scores: bool = False) -> ir.Model:
    """Returns a copy in fp16, but for operators of these names and, if ``fp32_scores``, the bank's product.

    The bank's rows are fp16 in either case; scores that are rounded to it too swap more neighbors. In the
    portable graph they are, because TensorRT has no fp32 products for Turing.
    """
    copy = ir.external_data.load_to_model(model.clone())
    for node in copy.graph if fp32_scores else ():
        scores = node.inputs[0].producer() if node.op_type == "TopK" and node.inputs[0] is not None else None
        if scores is not None:
            scores.name = _SCORES
    half = convert_float_to_float16(
        ir.to_proto(copy), keep_io_types=True, op_block_list=list(islands), node_block_list=[_SCORES]
    )
    _drop_repeated_casts(half.graph)
    converted: ir.Model = ir.from_proto(half)
    _drop_round_trips(converted)
    converted.graph.sort()
    return converted


def _drop_repeated_casts(graph: onnx.GraphProto) -> None:
    """Keeps one of the casts that give a value: onnxruntime below 1.32 writes one for every reader.

    1.31 is the newest onnxruntime-gpu.
    """
    written: set[str] = set()
    nodes = list(graph.node)
    del graph.node[:]
    for node in nodes:
        if node.op_type != "Cast" or written.isdisjoint(node.output):
            graph.node.append(node)
            written.update(node.output)


def _drop_round_trips(model: ir.Model) -> None:
    """Takes out casts from fp32 to fp16 and back, between two operators that stay fp32."""
    for node in model.graph:
        there = node.inputs[0].producer() if node.op_type == "Cast" and node.inputs[0] is not None else None
        if there is None or not str(there.name).endswith(_TO_FP16) or there.inputs[0] is None:
            continue
        if node.outputs[0].is_graph_output():  # its name is the output's
            node.replace_input_with(0, there.inputs[0])
        elif node.attributes.get_int("to") == ir.DataType.FLOAT:
            ir.convenience.replace_all_uses_with(node.outputs[0], there.inputs[0])
    RemoveUnusedNodesPass()(model)
