"""Turns a portable graph into one for onnxruntime's CPU provider: attention and GELU fused.

Each pass has a count that it must reach, known from the model, so that a change upstream which makes a
pattern miss is an error and not a slower graph. The portable graph stays the master: these work on a copy.
"""

from collections.abc import Callable
from itertools import pairwise

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass
from onnxscript.rewriter.ort_fusions.bias_gelu import fuse_bias_gelu
from onnxscript.rewriter.ort_fusions.erfgelu import fuse_erfgelu

from xadapter_export.bundle.manifest import Optimization
from xadapter_export.errors import ParityError

CONTRIB = "com.microsoft"
_HEADS = [0, 2, 1, 3]  # (B, T, A, H/A) to (B, A, T, H/A), and back
_HEADS_TRANSPOSED = [0, 2, 3, 1]


def fuse_attention(model: ir.Model) -> int:
    """Makes one ``MultiHeadAttention`` of each attention.

    Precondition: attention as ``export_layers.attend`` writes it. Postcondition: as many nodes fewer with
    ``Softmax``. A memory that the whole batch shares, as a static bank is, stays: the operator takes none; so
    does attention that is written in another way, or whose mask is neither causal nor an ``additive_mask``.

    Returns:
        How many were fused.
    """
    masks: dict[ir.Value, ir.Value] = {}
    softmaxes = [node for node in model.graph if node.op_type == "Softmax"]
    return sum(_fuse_one_attention(model.graph, softmax, masks) for softmax in softmaxes)


def _fuse_one_attention(graph: ir.Graph, softmax: ir.Node, masks: dict[ir.Value, ir.Value]) -> bool:
    scores, mask = _producer(softmax.inputs[0], "Add"), None
    product = _producer(softmax.inputs[0], "MatMul")
    if scores is not None:
        product, mask = _producer(scores.inputs[0], "MatMul"), scores.inputs[1]
    weighted = only_user(softmax.outputs[0], "MatMul")
    back = None if weighted is None else only_user(weighted.outputs[0], "Transpose")
    merged = None if back is None else only_user(back.outputs[0], "Reshape")
    if product is None or weighted is None or merged is None:
        return False
    query = _split_heads(product.inputs[0], _HEADS)
    key = _split_heads(product.inputs[1], _HEADS_TRANSPOSED)
    value = _split_heads(weighted.inputs[1], _HEADS)
    if query is None or key is None or value is None or (key[0].shape is not None and key[0].shape[0] == 1):
        return False
    inputs: list[ir.Value | None] = [query[0], key[0], value[0]]
    attributes: dict[str, int | float] = {"num_heads": query[1], "scale": 1.0}
    if mask is not None and _is_causal(mask):
        attributes["unidirectional"] = 1
    elif mask is not None:
        if mask not in masks:
            padding = _key_padding(graph, mask, softmax)
            if padding is None:
                return False
            masks[mask] = padding
        inputs += [None, masks[mask]]
    fused = ir.node("MultiHeadAttention", inputs, attributes, domain=CONTRIB)
    replace_node(graph, merged, [fused])
    return True


def _split_heads(value: ir.Value | None, perm: list[int]) -> tuple[ir.Value, int] | None:
    """The value ``(B, T, H)`` before its heads were split and transposed, and how many heads."""
    transpose = _producer(value, "Transpose")
    reshape = None if transpose is None else _producer(transpose.inputs[0], "Reshape")
    if transpose is None or reshape is None or list(transpose.attributes["perm"].as_ints()) != perm:
        return None
    sizes = _producer(reshape.inputs[1], "Concat")
    heads = None if sizes is None else _constant(sizes.inputs[-2])
    whole, source = _constant(reshape.inputs[1]), reshape.inputs[0]
    heads = whole[-2:-1] if whole is not None else heads
    return None if heads is None or source is None else (source, int(heads.item()))


def _is_causal(mask: ir.Value) -> bool:
    """Whether a mask hides from each token those after it: where one position is greater than another."""
    chosen = _producer(mask, "Where")
    later = None if chosen is None else _producer(chosen.inputs[0], "Greater")
    if chosen is None or later is None:
        return False
    there, here = (_producer(side, "Unsqueeze") for side in later.inputs)
    if there is None or here is None or _producer(there.inputs[0], "Range") is None:
        return False
    axes = [_constant(side.inputs[1]) for side in (there, here)]
    values = [_constant(value) for value in chosen.inputs[1:]]
    if any(constant is None or constant.size != 1 for constant in (*axes, *values)):
        return False
    found = [float(constant.item()) for constant in (*axes, *values) if constant is not None]
    return there.inputs[0] is here.inputs[0] and found == [0, 1, -np.inf, 0]


def _key_padding(graph: ir.Graph, mask: ir.Value, before: ir.Node) -> ir.Value | None:
    """``(B, M) int32``, 1 at keys that are seen, from a mask ``(B, 1, 1, M)``, or None.

    The mask must be an ``additive_mask``, which zeros may follow, for keys that every text sees.
    """
    joined = _producer(mask, "Concat")
    parts = [mask] if joined is None else list(joined.inputs)
    product = _producer(parts[0], "Mul")
    difference = None if product is None else _producer(product.inputs[0], "Sub")
    cast = None if difference is None else _producer(difference.inputs[1], "Cast")
    unsqueeze = None if cast is None else _producer(cast.inputs[0], "Unsqueeze")
    if unsqueeze is None or not all(map(_is_zero, parts[1:])):
        return None
    if joined is None:
        nodes = [ir.node("Cast", [unsqueeze.inputs[0]], {"to": ir.DataType.INT32})]
    else:
        axes = ir.node("Constant", [], {"value": ir.tensor(np.array([1, 2], np.int64))})
        flat = ir.node("Squeeze", [mask, axes.outputs[0]])
        hidden = ir.node("Cast", [flat.outputs[0]], {"to": ir.DataType.BOOL})
        seen = ir.node("Not", [hidden.outputs[0]])
        nodes = [axes, flat, hidden, seen, ir.node("Cast", [seen.outputs[0]], {"to": ir.DataType.INT32})]
    graph.insert_before(before, nodes)
    return nodes[-1].outputs[0]


def _is_zero(value: ir.Value | None) -> bool:
    """Whether a value is zeros, of whatever shape."""
    filled = _producer(value, "ConstantOfShape")
    number = None if filled is None else filled.attributes.get("value")
    return filled is not None and (number is None or not number.as_tensor().numpy().any())


def split_projections(model: ir.Model) -> int:
    """Makes one ``Split`` of the slices that take query, key and value out of one product.

    Returns:
        How many products.
    """
    count = 0
    for node in list(model.graph):
        for output in node.outputs:
            slices = [use.node for use in output.uses() if use.node.op_type == "Slice" and use.idx == 0]
            bounds = [bound for bound in map(_slice_bounds, slices) if bound is not None]
            if len(bounds) < 2 or len(bounds) != len(output.uses()) or not _covers(bounds, output):
                continue
            sizes = ir.node(
                "Constant",
                [],
                {"value": ir.tensor(np.array([end - start for start, end, _ in bounds], np.int64))},
            )
            split = ir.node(
                "Split", [output, sizes.outputs[0]], {"axis": bounds[0][2]}, num_outputs=len(slices)
            )
            model.graph.insert_after(node, [sizes, split])
            for user, value in zip(slices, split.outputs, strict=True):
                ir.convenience.replace_all_uses_with(user.outputs[0], value)
            model.graph.remove(slices, safe=True)
            count += 1
    return count


def _slice_bounds(node: ir.Node) -> tuple[int, int, int] | None:
    """Start, end and axis of a ``Slice`` of one axis, in steps of 1."""
    constants = [_constant(value) for value in node.inputs[1:]]
    numbers = [int(c.item()) for c in constants if c is not None and c.size == 1]
    if len(numbers) != len(constants) or len(numbers) < 3 or numbers[3:] not in ([], [1]):
        return None
    return numbers[0], numbers[1], numbers[2]


def _covers(bounds: list[tuple[int, int, int]], value: ir.Value) -> bool:
    """Whether slices are all of a value, one behind the other."""
    axis = bounds[0][2]
    whole = bounds[-1][1] if value.shape is None else value.shape[axis]
    behind = all(one[1:] == (other[0], axis) for one, other in pairwise(bounds))
    return behind and (bounds[0][0], bounds[-1][1:]) == (0, (whole, axis))


def fuse_quick_gelu(model: ir.Model) -> int:
    """Makes one ``QuickGelu`` of ``x * sigmoid(a x)``, which OpenAI's CLIPs have.

    Returns:
        How many were fused.
    """
    count = 0
    for node in list(model.graph):
        sigmoid = _producer(node.inputs[1], "Sigmoid") if node.op_type == "Mul" else None
        scaled = None if sigmoid is None else _producer(sigmoid.inputs[0], "Mul")
        if scaled is None or node.inputs[0] not in scaled.inputs:
            continue
        factor = next((c for c in map(_constant, scaled.inputs) if c is not None), None)
        if factor is None:
            continue
        fused = ir.node("QuickGelu", [node.inputs[0]], {"alpha": float(factor.item())}, domain=CONTRIB)
        replace_node(model.graph, node, [fused])
        count += 1
    return count


CPU_PASSES: dict[str, Callable[[ir.Model], int]] = {
    "fused_attention": fuse_attention,
    "split_projections": split_projections,
    "fused_gelu": fuse_erfgelu,
    "fused_quick_gelu": fuse_quick_gelu,
    "fused_bias_gelu": fuse_bias_gelu,
}


def run_pass(name: str, model: ir.Model, expected: int, *, or_more: bool = False) -> Optimization | None:
    """Runs one of ``CPU_PASSES`` in place.

    Args:
        name: The pass.
        model: The graph.
        expected: How many patterns it must find.
        or_more: Whether it may find more, in parts of the graph that are not ours.

    Returns:
        What it saved, or None where the model has nothing for it.

    Raises:
        ParityError: If it did not find its pattern as often as the model is known to have it.
    """
    model.opset_imports[CONTRIB] = 1
    before = len(model.graph)
    got = CPU_PASSES[name](model)
    RemoveUnusedNodesPass()(model)
    if got < expected or (got > expected and not or_more):
        raise ParityError(f"pass {name}", expected=f"{expected} patterns", got=got, hint="please report this")
    if not got:
        return None
    return Optimization(name=name, lossless=True, unit="nodes", before=before, after=len(model.graph))


def _producer(value: ir.Value | None, op_type: str) -> ir.Node | None:
    node = None if value is None else value.producer()
    return node if node is not None and node.op_type == op_type else None


def only_user(value: ir.Value, op_type: str) -> ir.Node | None:
    """Return the node that alone reads a value, if it is of this type."""
    users = [use.node for use in value.uses()]
    return users[0] if len(users) == 1 and users[0].op_type == op_type else None


def _constant(value: ir.Value | None) -> np.ndarray | None:
    constant = None if value is None else ir.convenience.get_const_tensor(value)
    return None if constant is None or constant.size > 64 else constant.numpy()


def replace_node(graph: ir.Graph, old: ir.Node, new: list[ir.Node]) -> None:
    """Put nodes, of which the last has one output, in the place of one that has one."""
    graph.insert_before(old, new)
    new[-1].outputs[0].name = old.outputs[0].name
    ir.convenience.replace_all_uses_with(old.outputs[0], new[-1].outputs[0], replace_graph_outputs=True)
    graph.remove(old, safe=True)
