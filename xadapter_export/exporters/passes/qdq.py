"""Q/DQ int8: standard operators with calibrated scales, for engines that plan with them (TensorRT, NPUs).

The weights are those of ``cpu-int8``. Activations are symmetric, as TensorRT wants them. What ``quantize``
leaves in fp32 stays so here, and so does a tied decoder, whose table is int8.
"""

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from xadapter_export.errors import ParityError
from xadapter_export.exporters.passes.fuse import replace_node
from xadapter_export.exporters.passes.quantize import (
    Product,
    Ranges,
    Rounding,
    add_initializer,
    find_products,
    is_large,
    quantize_rows,
    round_product,
)
from xadapter_export.exporters.passes.rounding import Range


def quantize_qdq(portable: ir.Model, ranges: Ranges, rounding: Rounding) -> ir.Model:
    """Make an int8 graph of standard operators.

    Args:
        portable: The portable graph; it is not changed.
        ranges: What goes into its products, as ``measure_products`` found.
        rounding: What graphs with the same weights have in common; it is added to.

    Returns:
        The graph, its weights in memory.

    Raises:
        ParityError: If there is nothing to quantize.
    """
    model = ir.external_data.load_to_model(portable.clone())
    lookups = [node for node in model.graph if node.op_type == "Gather" and is_large(node.inputs[0])]
    for table in dict.fromkeys(node.inputs[0] for node in lookups):
        assert table is not None  # it is large
        rows, scales = quantize_rows(table)
        expanded = _dequantize(model.graph, str(table.name), rows, scales.ravel(), axis=0)
        model.graph.insert_before(lookups[0], expanded)
        ir.convenience.replace_all_uses_with(table, expanded.outputs[0])
    products = [found for found in find_products(model) if found.table is None]
    if not products:
        raise ParityError("there is no matrix product to quantize", hint="please report this")
    for found in products:
        nodes = _multiply(model.graph, found, ranges[str(found.weight.name)], rounding)
        replace_node(model.graph, found.node, nodes)
    RemoveUnusedNodesPass()(model)
    model.graph.sort()
    return model


def _multiply(graph: ir.Graph, found: Product, inputs: Range, rounding: Rounding) -> list[ir.Node]:
    name = str(found.weight.name)
    value, nodes, inputs, rounded = round_product(graph, found, inputs, rounding)
    step = np.array(float(inputs.largest.max()) / 127 or 1.0, np.float32)
    scale = add_initializer(graph, f"{name}.inputs.scale", step)
    zero = add_initializer(graph, f"{name}.inputs.zero", np.array(0, np.int8))
    numbers = ir.node("QuantizeLinear", [value, scale, zero])
    back = ir.node("DequantizeLinear", [numbers.outputs[0], scale, zero])
    weights = _dequantize(graph, name, rounded.numbers.T, rounded.scales.ravel(), axis=1)
    product = ir.node("MatMul", [back.outputs[0], weights.outputs[0]])
    return [*nodes, numbers, back, weights, product]


def _dequantize(graph: ir.Graph, name: str, numbers: np.ndarray, scales: np.ndarray, axis: int) -> ir.Node:
    operands = [
        add_initializer(graph, f"{name}.int8", numbers),
        add_initializer(graph, f"{name}.scales", scales),
    ]
    return ir.node("DequantizeLinear", operands, {"axis": axis})
