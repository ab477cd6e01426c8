"""Reads and changes the weights that an ``.onnx`` file declares, without the onnx package.

A serialized model is nested protobuf messages: fields of a number, a wire type and a payload. Only what leads
to the weights is taken apart here; all else stays the bytes that it was, in its order, so that a change that
is undone gives the same file again.

Source:
    onnx/onnx.proto (onnx 1.23) for the numbers of the fields; protobuf's encoding.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from xadapter_export.errors import BundleError

# Numbers of fields from onnx.proto.
_MODEL_GRAPH = 7
_GRAPH_NODE, _GRAPH_INITIALIZER, _GRAPH_OUTPUT = 1, 5, 12
_VALUE_INFO_NAME = 1
_NODE_INPUT, _NODE_OUTPUT, _NODE_OP_TYPE, _NODE_ATTRIBUTE = 1, 2, 4, 5
_ATTRIBUTE_NAME, _ATTRIBUTE_INT = 1, 3
_TENSOR_DIMS, _TENSOR_DTYPE, _TENSOR_NAME, _TENSOR_RAW = 1, 2, 8, 9
_TENSOR_EXTERNAL, _TENSOR_LOCATION = 13, 14
_ENTRY_KEY, _ENTRY_VALUE = 1, 2

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5  # wire types
_FIXED_SIZES = {_FIXED64: 8, _FIXED32: 4}
_DTYPES = {1: "float32", 2: "uint8", 3: "int8", 7: "int64", 10: "float16"}  # TensorProto.DataType

Array = NDArray[np.generic]


@dataclass(frozen=True)
class Field:
    """One field of a message: an integer where it is a varint, and else bytes."""

    number: int
    wire: int
    payload: int | bytes

    @property
    def data(self) -> bytes:
        """The payload of a field that is not a varint."""
        assert isinstance(self.payload, bytes)  # callers know the field's type
        return self.payload


@dataclass(frozen=True)
class Weight:
    """A weight as the graph declares it.

    Attributes:
        dtype: Name of the numpy dtype; empty for one that is not known here.
        location: File with its bytes, relative to the graph's; None where they are in the graph.
        offset: Where they begin there.
        size_bytes: How many they are.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    location: str | None
    offset: int
    size_bytes: int


@dataclass(frozen=True)
class Node:
    """What a node reads and gives."""

    op_type: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


class GraphFile:
    """A serialized ``ModelProto`` whose weights can be replaced.

    Args:
        data: The file.
        where: Its path, for errors.

    Raises:
        BundleError: If it is not a serialized model with one graph.
    """

    def __init__(self, data: bytes, where: object) -> None:
        self._where = where
        try:
            self._model = parse(data)
            graphs = [i for i, field in enumerate(self._model) if field.number == _MODEL_GRAPH]
            (self._place,) = graphs
            self._graph = parse(self._model[self._place].data)
            self._places: dict[str, int] = {}
            self.weights: dict[str, Weight] = {}
            for i, field in enumerate(self._graph):
                if field.number == _GRAPH_INITIALIZER:
                    weight = _read_weight(parse(field.data))
                    self._places[weight.name] = i
                    self.weights[weight.name] = weight
        except (ValueError, IndexError, AssertionError, UnicodeDecodeError) as error:
            raise BundleError("the graph cannot be read", where=where, got=error) from error

    def nodes(self) -> list[Node]:
        """Return every node of the graph, in order."""
        return [_read_node(parse(field.data)) for field in self._graph if field.number == _GRAPH_NODE]

    def array(self, name: str) -> Array:
        """Return a weight whose bytes are in the graph.

        Raises:
            BundleError: If they are elsewhere, or written in another way.
        """
        weight = self.weights[name]
        for field in self._fields(name):
            if field.number == _TENSOR_RAW and weight.dtype:
                return np.frombuffer(field.data, weight.dtype).reshape(weight.shape)
        raise BundleError("the graph does not store a weight as raw bytes", where=f"{self._where}, {name}")

    def query_of_bank(self) -> str:
        """Return the name of the value ``(B, D)`` that the bank is searched with.

        Raises:
            BundleError: If the graph searches no bank.
        """
        searched = {"bank", "bank_search"}
        for node in self.nodes():
            if node.op_type in {"Transpose", "Cast"} and searched & set(node.inputs):
                searched |= set(node.outputs)
            if node.op_type in {"MatMul", "Gemm", "MatMulNBits"} and searched & set(node.inputs[1:2]):
                return node.inputs[0]
        raise BundleError("the graph does not search its bank", where=self._where)

    def put_inside(self, name: str, array: Array) -> None:
        """Replace a weight; the bytes of the new one are in the graph."""
        raw = np.ascontiguousarray(array).tobytes()
        kept = [
            field
            for field in self._fields(name)
            if field.number not in {_TENSOR_DIMS, _TENSOR_RAW, _TENSOR_EXTERNAL, _TENSOR_LOCATION}
        ]
        place = 1 + max(i for i, field in enumerate(kept) if field.number in {_TENSOR_NAME, _TENSOR_DTYPE})
        kept.insert(place, Field(_TENSOR_RAW, _BYTES, raw))
        self._store(name, [*_dims(array.shape), *kept])

    def put_outside(self, name: str, shape: tuple[int, ...], offset: int, size_bytes: int) -> None:
        """Say that a weight in another file has another shape, or is at another place of it."""
        changed = {b"offset": str(offset).encode(), b"length": str(size_bytes).encode()}
        fields = [_with_entry(field, changed) for field in self._fields(name) if field.number != _TENSOR_DIMS]
        self._store(name, [*_dims(shape), *fields])

    def relocate(self, files: Mapping[str, str]) -> None:
        """Say that files with weights have other names."""
        for name, weight in self.weights.items():
            if weight.location is not None and weight.location in files:
                changed = {b"location": files[weight.location].encode()}
                fields = [_with_entry(field, changed) for field in self._fields(name)]
                self._graph[self._places[name]] = Field(_GRAPH_INITIALIZER, _BYTES, serialize(fields))

    def set_attribute(self, reads: str, attribute: str, value: int) -> None:
        """Set an integer attribute of every node that reads a value and has that attribute."""
        for i, field in enumerate(self._graph):
            if field.number != _GRAPH_NODE:
                continue
            node = parse(field.data)
            if reads not in _read_node(node).inputs:
                continue
            for j, part in enumerate(node):
                if part.number == _NODE_ATTRIBUTE:
                    node[j] = Field(part.number, _BYTES, _with_int(part.data, attribute, value))
            self._graph[i] = Field(field.number, _BYTES, serialize(node))

    def to_bytes(self) -> bytes:
        """Return the file as it is now."""
        model = list(self._model)
        model[self._place] = Field(_MODEL_GRAPH, _BYTES, serialize(self._graph))
        return serialize(model)

    def _fields(self, name: str) -> list[Field]:
        return parse(self._graph[self._places[name]].data)

    def _store(self, name: str, fields: list[Field]) -> None:
        self._graph[self._places[name]] = Field(_GRAPH_INITIALIZER, _BYTES, serialize(fields))
        self.weights[name] = _read_weight(fields)


def with_weights(data: bytes, where: object, arrays: Mapping[str, Array]) -> bytes:
    """Return a serialized model with those of its weights replaced that are named; the new ones are in it."""
    graph = GraphFile(data, where)
    for name in arrays.keys() & graph.weights.keys():
        graph.put_inside(name, arrays[name])
    return graph.to_bytes()


def read_linked(file: Path) -> tuple[bytes, Path]:
    """Return a graph that is a link, with its weights named as in the folder that they are in.

    In the Hub's cache all files are links into one folder, where they have hashes for names. onnxruntime
    reads no weights from outside of the folder that it is told.

    Returns:
        The serialized model, and the folder of its weights.

    Raises:
        BundleError: If it is not a serialized model with one graph.
    """
    graph = GraphFile(file.read_bytes(), file)
    names = {weight.location for weight in graph.weights.values() if weight.location is not None}
    graph.relocate({name: (file.parent / name).resolve().name for name in names})
    return graph.to_bytes(), file.resolve().parent


def extra_outputs(names: Iterable[str]) -> bytes:
    """Return the bytes that, appended to a serialized ``ModelProto``, make the named values outputs.

    Protobuf merges two messages that are put one after the other: repeated fields are joined, and fields that
    are messages are merged in turn. Only names are written; onnxruntime infers their types.

    Source:
        onnx/onnx.proto (onnx 1.23); protobuf encoding, "Last One Wins" and merging of embedded messages.
    """
    named = [serialize([Field(_VALUE_INFO_NAME, _BYTES, name.encode())]) for name in names]
    outputs = serialize([Field(_GRAPH_OUTPUT, _BYTES, value) for value in named])
    return serialize([Field(_MODEL_GRAPH, _BYTES, outputs)])


def parse(data: bytes) -> list[Field]:
    """Split a message into its fields.

    Raises:
        ValueError: If it is no message.
    """
    return [
        Field(number, wire, payload if isinstance(payload, int) else bytes(payload))
        for number, wire, payload in _split(memoryview(data))
    ]


def messages(data: memoryview) -> Iterator[tuple[int, memoryview]]:
    """Yield number and bytes of the fields of a message that have bytes, without a copy.

    Raises:
        ValueError: If it is no message.
    """
    for number, wire, payload in _split(data):
        if wire == _BYTES and not isinstance(payload, int):
            yield number, payload


def _split(data: memoryview) -> Iterator[tuple[int, int, int | memoryview]]:
    at = 0
    while at < len(data):
        tag, at = _read_varint(data, at)
        if tag >= 1 << 32:  # other readers drop the upper bits, and find another field
            raise ValueError("a field's number is too large")
        number, wire = tag >> 3, tag & 7
        if wire == _VARINT:
            value, at = _read_varint(data, at)
            yield number, wire, value
            continue
        if wire == _BYTES:
            size, at = _read_varint(data, at)
        elif wire in _FIXED_SIZES:
            size = _FIXED_SIZES[wire]
        else:
            raise ValueError(f"wire type {wire}")
        if at + size > len(data):
            raise ValueError("a field that is cut short")
        yield number, wire, data[at : at + size]
        at += size


def serialize(fields: list[Field]) -> bytes:
    """Return the message of some fields; the reverse of ``parse``."""
    parts = []
    for field in fields:
        parts.append(varint(field.number << 3 | field.wire))
        if isinstance(field.payload, int):
            parts.append(varint(field.payload))
        else:
            parts += [varint(len(field.payload))] if field.wire == _BYTES else []
            parts.append(field.payload)
    return b"".join(parts)


def varint(value: int) -> bytes:
    """Return protobuf's variable-length integer: seven bits a byte, the least significant first."""
    encoded = bytearray()
    while value > 0x7F:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)


def _read_varint(data: memoryview, at: int) -> tuple[int, int]:
    if at < len(data) and data[at] < 0x80:  # as nearly all are
        return data[at], at + 1
    value = 0
    for shift, byte in zip(range(0, 70, 7), data[at : at + 10], strict=False):
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at + shift // 7 + 1
    raise ValueError("a number that is cut short or too long")


def _read_weight(fields: list[Field]) -> Weight:
    name = dtype = ""
    shape: list[int] = []
    external: dict[str, str] = {}
    size_bytes = 0
    for field in fields:
        if field.number == _TENSOR_NAME:
            name = field.data.decode()
        elif field.number == _TENSOR_DTYPE:
            dtype = _DTYPES.get(int(field.payload), "")
        elif field.number == _TENSOR_DIMS and isinstance(field.payload, int):
            shape.append(field.payload)
        elif field.number == _TENSOR_RAW:
            size_bytes = len(field.data)
        elif field.number == _TENSOR_EXTERNAL:
            entry = {part.number: part.data.decode() for part in parse(field.data)}
            external[entry[_ENTRY_KEY]] = entry[_ENTRY_VALUE]
    if not external:
        return Weight(name, dtype, tuple(shape), None, 0, size_bytes)
    offset, length = int(external.get("offset", "0")), int(external["length"])
    return Weight(name, dtype, tuple(shape), external["location"], offset, length)


def _read_node(fields: list[Field]) -> Node:
    text = {number: [f.data.decode() for f in fields if f.number == number] for number in (1, 2, 4)}
    return Node("".join(text[_NODE_OP_TYPE]), tuple(text[_NODE_INPUT]), tuple(text[_NODE_OUTPUT]))


def _with_int(attribute: bytes, name: str, value: int) -> bytes:
    fields = parse(attribute)
    if Field(_ATTRIBUTE_NAME, _BYTES, name.encode()) not in fields:
        return attribute
    return serialize([Field(f.number, f.wire, value) if f.number == _ATTRIBUTE_INT else f for f in fields])


def _with_entry(field: Field, changed: Mapping[bytes, bytes]) -> Field:
    """Return a field of a tensor, with another value where it is a fact about the weight's place."""
    if field.number != _TENSOR_EXTERNAL:
        return field
    entry = {part.number: part.data for part in parse(field.data)}
    value = changed.get(entry[_ENTRY_KEY], entry[_ENTRY_VALUE])
    parts = [Field(_ENTRY_KEY, _BYTES, entry[_ENTRY_KEY]), Field(_ENTRY_VALUE, _BYTES, value)]
    return Field(field.number, _BYTES, serialize(parts))


def _dims(shape: tuple[int, ...]) -> list[Field]:
    return [Field(_TENSOR_DIMS, _VARINT, size) for size in shape]
