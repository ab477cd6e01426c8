"""Weights in 8 and 4 bits, for onnxruntime's CPU provider.

The usual recipe leaves the tied decoder in fp32 and makes the runtime expand whole embedding tables at each
run. Here every product with a large constant matrix is quantised, the decoder among them, and of a table only
the rows that a text needs are taken out and expanded.

In 8 bits a product is ``DynamicQuantizeMatMul``: weights symmetric with a scale for each column, activations
quantised at each run with one scale for all. Where that misses its gate it is ``MatMulNBits`` of 8 bits: a
scale for each block of a row, of weights and of activations. In 4 bits it is ``MatMulNBits`` too. A tied
decoder reads the rows of the table, which stand in the file once.

Left in fp32: the plug-in and CLIP's text projection, which are small and decide what is retrieved and how it
is read; the bank, which ``bank_search`` sees to; CLIP's table of positions, of which a slice is read;
vectors and small matrices.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from onnx_ir.passes.common import RemoveUnusedNodesPass

from xadapter_export.bundle.manifest import Precision
from xadapter_export.errors import ParityError
from xadapter_export.exporters.fuse import CONTRIB

_KEPT = ("adapters.", "bank", "clip.text_projection", "candidate_decoder.")
_MIN_SIDE = 32  # rows and columns; below, it is no matrix to speak of (scales, token types)
_BLOCK_SIZES = {
    4: (64, 32, 16),
    8: (128, 64, 32, 16),
}  # weights that share a scale: the first that divides a row
_FLOAT = np.float32


@dataclass(frozen=True)
class Recipe:
    """How many bits the weights get; 32 leaves them as they are.

    Attributes:
        name: Name in the manifest.
        tables: Bits of embedding tables, and of a decoder that is tied to one.
        clip: Bits of CLIP's products, and 32 for its table too.
        rest: Bits of the PLM's and the head's products.
        blocks: Whether 8-bit products have a scale for each block of a row, of weights and of activations.
    """

    name: str
    tables: int
    clip: int
    rest: int
    blocks: bool = False

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
        Recipe("int8_blocks", 8, 8, 8, blocks=True),
    ),
    "int4": (
        Recipe("int4_weights", 4, 4, 4),
        Recipe("int4_weights_tables_int8", 8, 4, 4),
        Recipe("int4_weights_tables_and_clip_int8", 8, 8, 4),
    ),
}


@dataclass(frozen=True)
class _Rows:
    """A quantised table: rows, and their scales."""

    bits: int
    rows: ir.Value
    scales: ir.Value


@dataclass(frozen=True)
class _Product:
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


def quantise(model: ir.Model, recipe: Recipe) -> None:
    """Quantises in place.

    Raises:
        ParityError: If a large matrix is still read in fp32 that should not be.
    """
    tables: dict[ir.Value, _Rows] = {}
    for gather in [node for node in model.graph if node.op_type == "Gather" and is_large(node.inputs[0])]:
        table = gather.inputs[0]
        assert table is not None  # it is large
        if (bits := recipe.bits(str(table.name), is_table=True)) == 32:
            continue
        if table not in tables:
            tables[table] = _quantise_rows(model.graph, table, bits)
        _replace(model.graph, gather, _gather(tables[table], gather.inputs[1], _array(table).shape[1]))
    for found in list(_products(model)):
        shared = tables.get(found.weight) if found.table is not None else None
        bits = recipe.bits(str(found.weight.name), is_table=False) if shared is None else shared.bits
        if bits != 32:
            has_blocks = recipe.blocks and found.matrix.shape[0] % _BLOCK_SIZES[8][-1] == 0
            if bits == 8 and (shared is not None or not has_blocks):
                nodes = _multiply_int8(model.graph, found, shared)
            else:
                nodes = _multiply_blocks(model.graph, found, shared, bits)
            _replace(model.graph, found.last, nodes)
    RemoveUnusedNodesPass()(model)
    model.opset_imports[CONTRIB] = 1
    left = [
        str(value.name)
        for value in model.graph.initializers.values()
        if is_large(value)
        and any(use.node.op_type in {"Gather", "MatMul", "Transpose"} for use in value.uses())
        and recipe.bits(str(value.name), is_table=False) != 32
    ]
    if left:
        raise ParityError(
            "quantisation left large matrices in fp32", got=", ".join(left), mend="please report this"
        )


def _products(model: ir.Model) -> Iterator[_Product]:
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
        yield _Product(node, add or node, bias, weight, table)


def _multiply_int8(graph: ir.Graph, found: _Product, shared: _Rows | None) -> list[ir.Node]:
    before: list[ir.Node] = []
    if shared is not None:
        before = [ir.node("Transpose", [shared.rows], {"perm": [1, 0]})]
        weights = before[0].outputs[0]
        scales = _initializer(graph, f"{found.weight.name}.columns", _array(shared.scales).ravel())
    else:
        numbers, column_scales = _symmetric(found.matrix, axis=0)
        weights = _initializer(graph, f"{found.weight.name}.int8", numbers)
        scales = _initializer(graph, f"{found.weight.name}.scales", column_scales.ravel())
    inputs = [found.node.inputs[0], weights, scales, None, found.bias]
    used = len(inputs) if found.bias is not None else 3
    return [*before, ir.node("DynamicQuantizeMatMul", inputs[:used], domain=CONTRIB)]


def _multiply_blocks(graph: ir.Graph, found: _Product, shared: _Rows | None, bits: int) -> list[ir.Node]:
    k, n = found.matrix.shape
    size = _block_size(k, bits)
    if shared is None:
        rows, scales = _blocks(np.ascontiguousarray(found.matrix.T), bits)
        name = str(found.weight.name)
        shared = _Rows(
            bits,
            _initializer(graph, f"{name}.int{bits}", rows),
            _initializer(graph, f"{name}.scales", scales),
        )
    shape = _initializer(graph, f"shape{bits}.{n}.{k}", np.array([n, k // size, size * bits // 8], np.int64))
    blocks = ir.node("Reshape", [shared.rows, shape])
    attributes = {"K": k, "N": n, "bits": bits, "block_size": size, "accuracy_level": 4}
    inputs = [found.node.inputs[0], blocks.outputs[0], shared.scales, None, None, found.bias]
    used = len(inputs) if found.bias is not None else 3
    return [blocks, ir.node("MatMulNBits", inputs[:used], attributes, domain=CONTRIB)]


def _quantise_rows(graph: ir.Graph, table: ir.Value, bits: int) -> _Rows:
    rows, scales = _symmetric(_array(table), axis=1) if bits == 8 else _blocks(_array(table), 4)
    return _Rows(
        bits,
        _initializer(graph, f"{table.name}.int{bits}", rows),
        _initializer(graph, f"{table.name}.scales", scales),
    )


def _gather(table: _Rows, ids: ir.Value | None, width: int) -> list[ir.Node]:
    if table.bits == 4:
        attributes = {"bits": 4, "block_size": _block_size(width, 4), "gather_axis": 0, "quantize_axis": 1}
        return [ir.node("GatherBlockQuantized", [table.rows, ids, table.scales], attributes, domain=CONTRIB)]
    rows = ir.node("Gather", [table.rows, ids])
    scales = ir.node("Gather", [table.scales, ids])
    cast = ir.node("Cast", rows.outputs, {"to": ir.DataType.FLOAT})
    return [rows, scales, cast, ir.node("Mul", [cast.outputs[0], scales.outputs[0]])]


def is_large(value: ir.Value | None) -> bool:
    """Whether a value is a matrix that is quantised where its product or table is."""
    if value is None or value.const_value is None or str(value.name).startswith(_KEPT):
        return False
    constant = value.const_value
    if constant.dtype != ir.DataType.FLOAT or len(constant.shape) != 2:
        return False
    return min(constant.shape.numpy()) >= _MIN_SIDE and str(value.name).rpartition(".")[2] != "scales"


def _array(value: ir.Value | None) -> NDArray[np.float32]:
    assert value is not None  # callers look at constants only
    assert value.const_value is not None  # same
    return value.const_value.numpy()


def _symmetric(matrix: NDArray[np.float32], axis: int) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """int8 numbers and their scales along ``axis``, kept as an axis of size 1."""
    scales = np.abs(matrix).max(axis=axis, keepdims=True) / _FLOAT(127)
    scales = np.where(scales > 0, scales, _FLOAT(1))  # zeros, and what is too small to have a scale
    return np.rint(matrix / scales).astype(np.int8), scales


def _block_size(row: int, bits: int) -> int:
    return next((size for size in _BLOCK_SIZES[bits] if row % size == 0), row)


def _blocks(matrix: NDArray[np.float32], bits: int) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """Numbers of 4 or 8 bits, of which 8 or 128 means 0; two of 4 bits are a byte, the first in its low half.

    Returns:
        ``(N, K bits / 8) uint8`` of ``(N, K)``, and scales ``(N, K / block)``.

    Raises:
        ParityError: If a row does not divide into blocks.
    """
    size = _block_size(matrix.shape[1], bits)
    if size not in _BLOCK_SIZES[bits]:
        raise ParityError(f"{bits} bits need rows of a multiple of 16", got=matrix.shape, mend="choose int8")
    blocks, zero = matrix.reshape(len(matrix), -1, size), 1 << (bits - 1)
    largest = np.take_along_axis(blocks, np.abs(blocks).argmax(-1)[..., None], -1)
    scales = largest / -zero  # the largest number of a block is exact: they reach further below 0 than above
    scales = np.where(scales == 0, 1, scales)
    numbers = np.clip(np.rint(blocks / scales), -zero, zero - 1) + zero
    numbers = numbers.astype(np.uint8).reshape(len(matrix), -1)
    if bits == 4:
        numbers = numbers[:, 0::2] | (numbers[:, 1::2] << np.uint8(4))
    return numbers, scales[..., 0].astype(_FLOAT)


def _initializer(graph: ir.Graph, name: str, array: np.ndarray) -> ir.Value:
    if name in graph.initializers:
        return graph.initializers[name]
    tensor = ir.tensor(np.ascontiguousarray(array), name=name)
    value = ir.Value(
        name=name, const_value=tensor, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype)
    )
    graph.register_initializer(value)
    return value


def _replace(graph: ir.Graph, old: ir.Node, new: list[ir.Node]) -> None:
    graph.insert_before(old, new)
    new[-1].outputs[0].name = old.outputs[0].name
    ir.convenience.replace_all_uses_with(old.outputs[0], new[-1].outputs[0], replace_graph_outputs=True)
    graph.remove(old, safe=True)
