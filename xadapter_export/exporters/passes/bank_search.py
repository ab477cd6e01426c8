"""Rewrites the search of the bank for onnxruntime's CPU provider: the same answers in a fraction of the time.

The portable graph multiplies the query with the transposed bank, which onnxruntime copies twice while it
loads. What measured best instead:

- ``fp32``: Gemm over the bank as it is stored. onnxruntime keeps one packed copy; the rows that are read
  afterwards come from a second tensor of the same bytes, which stays memory-mapped and is touched only there.
- ``int8``: one byte a number is searched with integer products, the best candidates are rescored from two
  bytes a number: the codes again, and what they leave over, as int8 in steps of 1/254 of a code. Rounding to
  one byte moves a cosine by up to 2e-3, enough to swap neighbors; with the rest it is 1e-5, where float16
  rows, at the same two bytes, would be off by 7e-5. onnxruntime keeps a packed copy of the codes; what is
  rescored stays memory-mapped.

Dimensions: B batch, N bank size, D CLIP embedding size, K retrieved pictures, R candidates, G groups of
numbers of a row that share a scale, S numbers of a group.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from onnx_ir.tape import Tape

from xadapter_export.bank.graph_rows import REST_STEPS, num_candidates, quantize_rows
from xadapter_export.errors import ParityError
from xadapter_export.exporters.passes.fuse import CONTRIB, only_user

BankPrecision = Literal["fp32", "int8"]

_BANK = "bank"


@dataclass(frozen=True)
class _Search:
    """The traced pattern: ``scores, rows = (query @ bank.T).topk(k); pictures = bank[rows]``."""

    bank: ir.Value
    query: ir.Value
    nodes: tuple[ir.Node, ...]
    results: tuple[ir.Value, ir.Value, ir.Value]  # retrieved_scores, retrieved, the rows (B, K, D)
    k: int

    @property
    def matmul(self) -> ir.Node:
        return self.nodes[1]


def search_bank(model: ir.Model, precision: BankPrecision) -> None:
    """Rewrites the search of the bank in place; inputs and outputs stay as they are.

    The expert reads the rows that the scores were computed from: float32, or what codes and rest add up to.
    ``int8`` uses ``com.microsoft.MatMulNBits``, ``fp32`` standard operators.

    Args:
        model: A portable graph, its weights in memory or in an external file, that searches a bank
            ``bank (N, D) float32``. Its initializers named ``bank...`` are replaced by the new ones.
        precision: How the bank is stored and searched.

    Raises:
        ParityError: If the graph does not search its bank exactly once, as the tracer writes it, or an
            output is not what it was.
    """
    before = [(str(value.name), value.dtype) for value in model.graph.outputs]
    search = _find(model)
    tape = _Tape(model.graph)
    build = {"fp32": _search_fp32, "int8": _search_int8}[precision]
    results = build(tape, search, _rows(search.bank))
    inputs = {search.bank} | {value for node in search.nodes for value in node.inputs if value is not None}
    ir.convenience.replace_nodes_and_values(
        model.graph, search.matmul, search.nodes, tape.nodes, search.results, results
    )
    for value in inputs:
        if value.is_initializer() and not value.uses():
            del model.graph.initializers[str(value.name)]
    tape.register_initializers()
    if precision == "int8":
        model.opset_imports[CONTRIB] = 1
    after = [(str(value.name), value.dtype) for value in model.graph.outputs]
    if before != after or _match(model) is not None:
        raise ParityError("the search of the bank was not rewritten", expected=before, got=after)


class _Tape(Tape):
    """Records nodes, and weights that enter the graph only when the old ones have left it."""

    def __init__(self, graph: ir.Graph) -> None:
        super().__init__()
        self._graph = graph
        self._weights: list[ir.Value] = []

    def weight(self, name: str, array: NDArray[np.generic]) -> ir.Value:
        """Adds an initializer."""
        tensor = ir.Tensor(array, name=name)
        value = ir.Value(
            name=name, const_value=tensor, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype)
        )
        self._weights.append(value)
        return value

    def ints(self, name: str, *numbers: int) -> ir.Value:
        """Adds ``(len(numbers),) int64``."""
        return self.weight(name, np.array(numbers, np.int64))

    def top(self, scores: ir.Value, k: ir.Value) -> tuple[ir.Value, ir.Value]:
        """Returns the k best along the last axis, best first, and where they are."""
        best, where = self.op_multi_out("TopK", [scores, k], {"axis": -1}, num_outputs=2)
        return best, where

    def register_initializers(self) -> None:
        for value in self._weights:
            self._graph.register_initializer(value)


def _find(model: ir.Model) -> _Search:
    search = _match(model)
    if search is None:
        bank = model.graph.initializers.get(_BANK)
        users = "no bank" if bank is None else ", ".join(sorted(node.op_type for node, _ in bank.uses()))
        raise ParityError(
            "the graph does not search its bank exactly once",
            where=_BANK,
            expected="Transpose, MatMul, TopK and one Gather or GatherND of its rows",
            got=users,
        )
    return search


def _match(model: ir.Model) -> _Search | None:
    bank = model.graph.initializers.get(_BANK)
    if bank is None or bank.const_value is None or len(bank.shape or ()) != 2:
        return None
    by_type = {node.op_type: node for node, _ in bank.uses()}
    transpose, gather = by_type.get("Transpose"), by_type.get("GatherND") or by_type.get("Gather")
    if len(bank.uses()) != 2 or transpose is None or gather is None:
        return None
    matmul = only_user(transpose.outputs[0], "MatMul")
    topk = None if matmul is None else only_user(matmul.outputs[0], "TopK")
    if matmul is None or topk is None or topk.inputs[1] is None or topk.inputs[1].const_value is None:
        return None
    places, query, index = topk.outputs[1], matmul.inputs[0], gather.inputs[1]
    if query is None or index is None or matmul.inputs[1] is not transpose.outputs[0]:
        return None
    nodes: tuple[ir.Node, ...] = (transpose, matmul, topk, gather)
    if gather.op_type == "GatherND":
        unsqueeze = index.producer()
        if unsqueeze is None or unsqueeze.op_type != "Unsqueeze" or len(index.uses()) != 1:
            return None
        nodes, index = (*nodes[:3], unsqueeze, gather), unsqueeze.inputs[0]
    if index is not places:
        return None
    k = int(topk.inputs[1].const_value.numpy().item())
    return _Search(bank, query, nodes, (topk.outputs[0], places, gather.outputs[0]), k)


def _rows(bank: ir.Value) -> NDArray[np.float32]:
    """Returns the bank ``(N, D) float32``, memory-mapped where it is in an external file."""
    tensor = bank.const_value
    assert tensor is not None  # the pattern was matched
    rows: NDArray[np.float32] = tensor.numpy()
    return rows


def _search_fp32(tape: _Tape, search: _Search, rows: NDArray[np.float32]) -> Sequence[ir.Value]:
    k = tape.ints("bank_k", search.k)
    searched = tape.weight("bank_search", rows)
    scores = tape.op("Gemm", [search.query, searched], {"transB": 1})  # (B, N)
    best, places = tape.top(scores, k)
    return best, places, tape.op("Gather", [search.bank, places], {"axis": 0})


def _search_int8(tape: _Tape, search: _Search, rows: NDArray[np.float32]) -> Sequence[ir.Value]:
    n, d = rows.shape
    codes, rest, scales = quantize_rows(rows)
    g, s = codes.shape[1:]
    scale = tape.weight("bank_scales", scales)
    scores = tape.op(  # (B, N)
        "MatMulNBits",
        [search.query, tape.weight("bank_search", codes), scale],
        {"K": d, "N": n, "bits": 8, "block_size": s, "accuracy_level": 4},  # 4: int8 products
        domain=CONTRIB,
    )
    count = tape.ints("bank_candidates", num_candidates(n, search.k))
    _, candidates = tape.top(scores, count)  # (B, R)

    last = tape.ints("bank_last_axis", -1)
    parts = [
        tape.op("Gather", [part, candidates], {"axis": 0})
        for part in (tape.weight("bank_codes", codes), tape.weight("bank_rest", rest), scale)
    ]
    high, low = (tape.op("Cast", [part], {"to": ir.DataType.FLOAT}) for part in parts[:2])  # (B, R, G, S)
    low = tape.op("Mul", [low, tape.weight("bank_step", np.array(1 / REST_STEPS, np.float32))])
    high = tape.op("Sub", [high, tape.weight("bank_zero", np.array(128, np.float32))])
    fine = tape.op("Mul", [tape.op("Add", [high, low]), tape.op("Unsqueeze", [parts[2], last])])
    fine = tape.op("Reshape", [fine, tape.ints("bank_flat", 0, 0, g * s)])  # (B, R, D), or a little wider
    if g * s > d:
        ends = [tape.ints("bank_first", 0), tape.ints("bank_end", d), last]
        fine = tape.op("Slice", [fine, *ends])

    exact = tape.op("MatMul", [fine, tape.op("Unsqueeze", [search.query, last])])  # (B, R, 1)
    exact = tape.op("Squeeze", [exact, last])
    best, places = tape.top(exact, tape.ints("bank_k", search.k))  # places among the candidates
    retrieved = tape.op("GatherElements", [candidates, places], {"axis": 1})
    index = tape.op("Unsqueeze", [places, last])
    return best, retrieved, tape.op("GatherND", [fine, index], {"batch_dims": 1})
