"""Weights in 8 and 4 bits, for onnxruntime's CPU provider.

The usual recipe leaves the tied decoder in fp32 and makes the runtime expand whole embedding tables at each
run. Here every product with a large constant matrix is quantized, the decoder among them, and of a table only
the rows that a text needs are taken out and expanded.

In 8 bits a product is ``MatMulIntegerToFloat``: activations are ``uint8`` with one scale and zero point that
were measured at export, weights are ``int8`` with a scale for each column, rounded so that no processor can
overflow (``rounding``). So a text's answer depends neither on the texts beside it nor on the processor. Where
that misses its gate a product is ``MatMulNBits`` of 8 bits: a scale for each block of a row, of weights and,
measured at each run, of activations; first only those that narrow, then all. At last activations stay as
they are, and the weights are expanded when the graph is loaded: as fast as fp32, in a third of the file;
``MatMulNBits`` would expand them at each run. In 4 bits it is ``MatMulNBits`` too. A tied decoder reads the
rows of the table, which are stored once.

Weights of products are rounded together (``rounding``), those of tables each by itself.

Left in fp32: the plug-in and CLIP's text projection, which are small and decide what is retrieved and how it
is read; the bank, which ``bank_search`` sees to; CLIP's table of positions, of which a slice is read;
vectors and small matrices.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from onnx_ir.passes.common import RemoveUnusedNodesPass

from xadapter_export.errors import ParityError
from xadapter_export.exporters.passes.fuse import CONTRIB, replace_node
from xadapter_export.exporters.passes.rounding import (
    Curvatures,
    Range,
    SmoothRows,
    measure_inputs,
    round_rows,
    round_weights,
    smooth_rows,
)
from xadapter_export.sessions.session import Array
from xadapter_export.targets import Precision

KEPT = ("adapters.", "bank", "clip.text.text_projection", "candidate_decoder.")
_MIN_SIDE = 32  # rows and columns; below, it is no matrix to speak of (scales, token types)
_SMALLEST_BLOCK = 16  # that ``MatMulNBits`` takes
_FLOAT = np.float32

Ranges = dict[str, Range]  # of what goes into each product, by the name of its weight


@dataclass(frozen=True)
class Recipe:
    """How many bits the weights get; 32 leaves them as they are.

    Attributes:
        name: Name in the manifest.
        tables: Bits of embedding tables, and of a decoder that is tied to one.
        clip: Bits of CLIP's products, and 32 for its table too.
        rest: Bits of the PLM's and the head's products.
        block: How many 8-bit weights of a row share a scale; 0 for all of them.
        narrowing_block: Likewise for products with fewer outputs than inputs, where that is smaller: what
            feed-forward layers close with, whose inputs are the hardest to round.
        int4_block: How many 4-bit weights do.
        rounds_activations: Whether what is multiplied with 8-bit weights is rounded to 8 bits too.
    """

    name: str
    tables: int
    clip: int
    rest: int
    block: int = 0
    narrowing_block: int = 0
    int4_block: int = 64
    rounds_activations: bool = True

    def block_size(self, row: int, bits: int, *, is_narrowing: bool = False) -> int:
        """How many weights of a row of so many share a scale; 0 for all of them.

        Raises:
            ParityError: If 4 bits are asked for and the row does not divide into blocks.
        """
        largest = self.int4_block if bits == 4 else self.block
        if bits == 8 and largest == 0 and is_narrowing:
            largest = self.narrowing_block
        while largest > _SMALLEST_BLOCK and row % largest:
            largest //= 2
        if largest == 0 or row % largest == 0:
            return largest
        if bits == 4:
            raise ParityError("4 bits need rows of a multiple of 16", got=row, hint="choose int8")
        return 0

    def bits(self, name: str, *, is_table: bool) -> int:
        """Bits of one weight."""
        if name.startswith("clip") and (self.clip == 32 or not is_table):
            return self.clip
        return self.tables if is_table else self.rest


# From the smallest to the most exact; the exporter takes the first that passes its gate.
RECIPES: dict[Precision, tuple[Recipe, ...]] = {
    "int8": (
        Recipe("int8_weights", 8, 8, 8),
        Recipe("int8_weights_clip_fp32", 8, 32, 8),
        Recipe("int8_weights_narrowing_blocks", 8, 8, 8, narrowing_block=32),
        Recipe("int8_blocks", 8, 8, 8, block=32),
        Recipe("int8_blocks_fp32_activations", 8, 8, 8, block=16, rounds_activations=False),
        Recipe("int8_plm_products_fp32_activations", 32, 32, 8, block=16, rounds_activations=False),
    ),
    "int4": (
        Recipe("int4_weights", 4, 4, 4),
        Recipe("int4_weights_tables_int8", 8, 4, 4),
        Recipe("int4_weights_tables_and_clip_int8", 8, 8, 4),
        Recipe("int4_small_blocks_tables_and_clip_int8", 8, 8, 4, int4_block=32),
        Recipe("int4_small_blocks_tables_int8_clip_fp32", 8, 32, 4, int4_block=32),
    ),
}


@dataclass(frozen=True)
class _Rows:
    """Quantized rows, and their scales: one for each ``block`` numbers, for each row if that is 0."""

    bits: int
    rows: ir.Value
    scales: ir.Value
    block: int


@dataclass(frozen=True)
class Product:
    """A product with a constant matrix, and the bias added to it; ``table`` if it is a table's transpose."""

    node: ir.Node
    last: ir.Node
    bias: ir.Value | None
    weight: ir.Value
    table: ir.Value | None

    @property
    def matrix(self) -> NDArray[np.float32]:
        """``(K, N) float32``."""
        return _array(self.weight) if self.table is None else _array(self.weight).T


@dataclass
class Rounding:
    """What graphs with the same weights have in common, so that these are rounded alike and stored once.

    Attributes:
        curvatures: Of what goes into each product, in the first graph that has it.
        rows: int8 weights with a scale for each row, rounded for that graph, by the name of the weight.
    """

    curvatures: Curvatures = field(default_factory=dict)
    rows: dict[str, SmoothRows] = field(default_factory=dict)


def quantize(model: ir.Model, recipe: Recipe, ranges: Ranges, rounding: Rounding) -> None:
    """Quantizes in place.

    Args:
        model: A graph in fp32.
        recipe: How many bits the weights get.
        ranges: What goes into the graph's products, as ``measure_products`` found.
        rounding: What graphs with the same weights have in common; it is added to.

    Raises:
        ParityError: If a large matrix is still read in fp32 that should not be.
    """
    tables: dict[ir.Value, _Rows] = {}
    kept: set[ir.Value] = set()
    for gather in [node for node in model.graph if node.op_type == "Gather" and is_large(node.inputs[0])]:
        table = gather.inputs[0]
        assert table is not None  # it is large
        if (bits := recipe.bits(str(table.name), is_table=True)) == 32:
            kept.add(table)
            continue
        if table not in tables:
            tables[table] = _quantize_table(model.graph, table, bits, recipe)
        replace_node(model.graph, gather, _gather(tables[table], gather.inputs[1]))
    for found in list(find_products(model)):
        shared = tables.get(found.weight) if found.table is not None else None
        bits = recipe.bits(str(found.weight.name), is_table=False) if shared is None else shared.bits
        if bits != 32 and found.weight not in kept:
            k, n = found.matrix.shape
            block = recipe.block_size(k, bits, is_narrowing=k > n) if shared is None else shared.block
            if block == 0:
                name = str(found.weight.name)
                nodes = _multiply_int8(model.graph, found, shared, ranges[name], rounding)
            else:
                if shared is None:
                    curvature = rounding.curvatures.get(str(found.weight.name))
                    rows = np.ascontiguousarray(found.matrix.T)
                    shared = _store_blocks(model.graph, found.weight, rows, bits, block, curvature)
                multiply = _multiply_blocks if bits == 4 or recipe.rounds_activations else _multiply_expanded
                nodes = multiply(model.graph, found, shared)
            replace_node(model.graph, found.last, nodes)
    RemoveUnusedNodesPass()(model)
    model.opset_imports[CONTRIB] = 1
    left = [
        str(value.name)
        for value in model.graph.initializers.values()
        if is_large(value)
        and value not in kept
        and any(use.node.op_type in {"Gather", "MatMul", "Transpose"} for use in value.uses())
        and recipe.bits(str(value.name), is_table=False) != 32
    ]
    if left:
        raise ParityError(
            "quantization left large matrices in fp32", got=", ".join(left), hint="please report this"
        )


def measure_products(model: ir.Model, feeds: Sequence[Mapping[str, Array]], rounding: Rounding) -> Ranges:
    """Return the ranges of what goes into a graph's products, which is not changed.

    Args:
        model: A graph in fp32.
        feeds: Inputs of texts.
        rounding: Gets the curvatures that it lacks.
    """
    probe = model.clone()
    inputs = {
        str(found.weight.name): found.node.inputs[0]
        for found in find_products(probe)
        if found.node.inputs[0] is not None
    }
    return measure_inputs(probe, inputs, feeds, rounding.curvatures)


def round_products(model: ir.Model, ranges: Ranges, rounding: Rounding) -> None:
    """Round the int8 weights of all products of a graph, which is not changed, but for those of tables."""
    for found in find_products(model):
        if found.table is None:
            _round(found, ranges[str(found.weight.name)], rounding)


def find_products(model: ir.Model) -> Iterator[Product]:
    """Yield the products with a large constant matrix."""
    for node in model.graph:
        if node.op_type != "MatMul" or node.inputs[1] is None:
            continue
        weight: ir.Value | None = node.inputs[1]
        transpose, table = node.inputs[1].producer(), None
        if transpose is not None and transpose.op_type == "Transpose":
            weight = table = transpose.inputs[0]
        if weight is None or not is_large(weight):
            continue
        uses = list(node.outputs[0].uses())
        add = uses[0].node if len(uses) == 1 and uses[0].node.op_type == "Add" else None
        bias = None if add is None else add.inputs[1 - uses[0].idx]
        if bias is None or bias.const_value is None or len(bias.const_value.shape) != 1:
            add = bias = None
        yield Product(node, add or node, bias, weight, table)


def _multiply_int8(
    graph: ir.Graph, found: Product, shared: _Rows | None, inputs: Range, rounding: Rounding
) -> list[ir.Node]:
    name = str(found.weight.name)
    if shared is None:
        value, before, inputs, rounded = round_product(graph, found, inputs, rounding)
        weights = add_initializer(graph, f"{name}.int8", rounded.numbers.T)
        scales = add_initializer(graph, f"{name}.scales", rounded.scales.ravel())
    else:
        transpose = ir.node("Transpose", [shared.rows], {"perm": [1, 0]})
        value, before, weights = found.node.inputs[0], [transpose], transpose.outputs[0]
        scales = add_initializer(graph, f"{name}.columns", _array(shared.scales).ravel())
    step, zero = _levels(inputs)
    step_value = add_initializer(graph, f"{name}.inputs.scale", step)
    zero_value = add_initializer(graph, f"{name}.inputs.zero", zero)
    numbers = ir.node("QuantizeLinear", [value, step_value, zero_value])
    operands = [numbers.outputs[0], weights, step_value, scales, zero_value, None, found.bias]
    used = len(operands) if found.bias is not None else 5
    return [*before, numbers, ir.node("MatMulIntegerToFloat", operands[:used], domain=CONTRIB)]


def round_product(
    graph: ir.Graph, found: Product, inputs: Range, rounding: Rounding
) -> tuple[ir.Value | None, list[ir.Node], Range, SmoothRows]:
    """Return what goes into an int8 product, the nodes that make it, its range, and the product's weights.

    Args:
        graph: The graph; it gets the factors of the columns, if there are any.
        found: A product whose weight is no table.
        inputs: Range of what goes into the product in fp32.
        rounding: As ``quantize``.
    """
    value, rounded = found.node.inputs[0], _round(found, inputs, rounding)
    if rounded.divisors is None:
        return value, [], inputs, rounded
    divide = ir.node(
        "Mul", [value, add_initializer(graph, f"{found.weight.name}.factors", 1 / rounded.divisors)]
    )
    smooth = Range(inputs.low / rounded.divisors, inputs.high / rounded.divisors, inputs.num_rows)
    return divide.outputs[0], [divide], smooth, rounded


def _round(found: Product, inputs: Range, rounding: Rounding) -> SmoothRows:
    name = str(found.weight.name)
    if name not in rounding.rows:
        rows = np.ascontiguousarray(found.matrix.T)
        rounding.rows[name] = smooth_rows(rows, inputs, rounding.curvatures[name])
    return rounding.rows[name]


def _levels(inputs: Range) -> tuple[NDArray[np.float32], NDArray[np.uint8]]:
    """Scale and zero point of ``uint8`` numbers for a range of which 0 is a part; both of shape ``()``."""
    lowest, highest = min(float(inputs.low.min()), 0.0), max(float(inputs.high.max()), 0.0)
    step = (highest - lowest) / 255 or 1.0
    return np.array(step, _FLOAT), np.array(np.rint(-lowest / step), np.uint8)


def _multiply_blocks(graph: ir.Graph, found: Product, weights: _Rows) -> list[ir.Node]:
    k, n = found.matrix.shape
    bits, size = weights.bits, weights.block
    blocks = ir.node("Reshape", [weights.rows, _shape(graph, n, k // size, size * bits // 8)])
    attributes = {"K": k, "N": n, "bits": bits, "block_size": size, "accuracy_level": 4}  # int8 products
    inputs = [found.node.inputs[0], blocks.outputs[0], weights.scales, None, None, found.bias]
    used = len(inputs) if found.bias is not None else 3
    return [blocks, ir.node("MatMulNBits", inputs[:used], attributes, domain=CONTRIB)]


def _multiply_expanded(graph: ir.Graph, found: Product, weights: _Rows) -> list[ir.Node]:
    """What onnxruntime folds, when it loads the graph, to the product with a float32 matrix."""
    k, n = found.matrix.shape
    zero = add_initializer(graph, "zero8", np.array(1 << 7, _FLOAT))
    last = add_initializer(graph, "last_axis", np.array([-1], np.int64))
    numbers = ir.node("Cast", [weights.rows], {"to": ir.DataType.FLOAT})
    centered = ir.node("Sub", [numbers.outputs[0], zero])
    blocks = ir.node("Reshape", [centered.outputs[0], _shape(graph, n, k // weights.block, weights.block)])
    scales = ir.node("Unsqueeze", [weights.scales, last])
    scaled = ir.node("Mul", [blocks.outputs[0], scales.outputs[0]])
    rows = ir.node("Reshape", [scaled.outputs[0], _shape(graph, n, k)])
    columns = ir.node("Transpose", rows.outputs, {"perm": [1, 0]})
    product = ir.node("MatMul", [found.node.inputs[0], columns.outputs[0]])
    nodes = [numbers, centered, blocks, scales, scaled, rows, columns, product]
    return nodes if found.bias is None else [*nodes, ir.node("Add", [product.outputs[0], found.bias])]


def _shape(graph: ir.Graph, *sizes: int) -> ir.Value:
    return add_initializer(graph, "shape" + ".".join(map(str, sizes)), np.array(sizes, np.int64))


def _quantize_table(graph: ir.Graph, table: ir.Value, bits: int, recipe: Recipe) -> _Rows:
    array = _array(table)
    block = recipe.block_size(array.shape[1], bits)
    if block:
        return _store_blocks(graph, table, array, bits, block)
    rows, scales = quantize_rows(table)
    return _Rows(
        bits,
        add_initializer(graph, f"{table.name}.int8", rows),
        add_initializer(graph, f"{table.name}.scales", scales),
        block,
    )


def quantize_rows(table: ir.Value) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """Return the int8 rows of a table, ``(N, K)``, and their scales ``(N, 1)``."""
    is_multiplied = any(use.node.op_type == "Transpose" for use in table.uses())  # by a tied decoder
    return round_rows(_array(table)) if is_multiplied else rowwise_int8(_array(table))


def _store_blocks(
    graph: ir.Graph,
    weight: ir.Value,
    matrix: NDArray[np.float32],
    bits: int,
    block: int,
    curvature: NDArray[np.float32] | None = None,
) -> _Rows:
    rows, scales = round_blocks(matrix, bits, block, curvature)
    return _Rows(
        bits,
        add_initializer(graph, f"{weight.name}.int{bits}", rows),
        add_initializer(graph, f"{weight.name}.scales", scales),
        block,
    )


def _gather(table: _Rows, ids: ir.Value | None) -> list[ir.Node]:
    if table.block:
        attributes = {"bits": table.bits, "block_size": table.block, "gather_axis": 0, "quantize_axis": 1}
        return [ir.node("GatherBlockQuantized", [table.rows, ids, table.scales], attributes, domain=CONTRIB)]
    rows = ir.node("Gather", [table.rows, ids])
    scales = ir.node("Gather", [table.scales, ids])
    cast = ir.node("Cast", rows.outputs, {"to": ir.DataType.FLOAT})
    return [rows, scales, cast, ir.node("Mul", [cast.outputs[0], scales.outputs[0]])]


def is_large(value: ir.Value | None) -> bool:
    """Whether a value is a matrix that is quantized where its product or table is."""
    if value is None or value.const_value is None or str(value.name).startswith(KEPT):
        return False
    constant = value.const_value
    if constant.dtype != ir.DataType.FLOAT or len(constant.shape) != 2:
        return False
    return min(constant.shape.numpy()) >= _MIN_SIDE and str(value.name).rpartition(".")[2] != "scales"


def _array(value: ir.Value | None) -> NDArray[np.float32]:
    assert value is not None  # callers look at constants only
    assert value.const_value is not None  # same
    return value.const_value.numpy()


def rowwise_int8(matrix: NDArray[np.float32]) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """Round ``(N, K) float32`` to int8; return it, and the scales ``(N, 1) float32``."""
    scales = np.maximum(matrix.max(axis=1, keepdims=True), -matrix.min(axis=1, keepdims=True)) / _FLOAT(127)
    scales = np.where(scales > 0, scales, _FLOAT(1))  # zeros, and what is too small to have a scale
    rows = np.empty(matrix.shape, np.int8)
    for start in range(0, len(matrix), 1024):  # a table of a large vocabulary is not copied whole
        part = slice(start, start + 1024)
        rows[part] = np.rint(matrix[part] / scales[part])
    return rows, scales


def round_blocks(
    matrix: NDArray[np.float32], bits: int, size: int, curvature: NDArray[np.float32] | None
) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """Numbers of 4 or 8 bits, of which 8 or 128 means 0; two of 4 bits are a byte, the first in its low half.

    Args:
        matrix: ``(N, K)``.
        bits: 4 or 8.
        size: How many numbers of a row share a scale.
        curvature: What ``rounding.round_weights`` rounds with; None for the nearest numbers.

    Returns:
        ``(N, K bits / 8) uint8`` of ``(N, K)``, and scales ``(N, K / size)``.
    """
    blocks, zero = matrix.reshape(len(matrix), -1, size), 1 << (bits - 1)
    largest = np.take_along_axis(blocks, np.abs(blocks).argmax(-1)[..., None], -1)
    # Rounded to the nearest, the largest number of a block is exact: they reach further below 0 than above.
    scales = largest / _FLOAT(-zero)
    scales = np.where(scales == 0, _FLOAT(1), scales)
    if curvature is None:
        numbers = np.clip(np.rint(blocks / scales), -zero, zero - 1).reshape(matrix.shape)
    else:
        numbers = round_weights(matrix, scales[..., 0], curvature, zero)
    numbers = (numbers + zero).astype(np.uint8)
    if bits == 4:
        numbers = numbers[:, 0::2] | (numbers[:, 1::2] << np.uint8(4))
    return numbers, scales[..., 0]


def add_initializer(graph: ir.Graph, name: str, array: np.ndarray) -> ir.Value:
    """Return the graph's initializer of a name; it is added where there is none yet."""
    if name in graph.initializers:
        return graph.initializers[name]
    tensor = ir.tensor(np.ascontiguousarray(array), name=name)
    value = ir.Value(
        name=name, const_value=tensor, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype)
    )
    graph.register_initializer(value)
    return value
