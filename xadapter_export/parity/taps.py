"""Read a value inside a graph without the onnx package: make it an output by appending a few bytes.

Protobuf merges two serialized messages that are put one after the other: repeated fields are joined, and
fields that are messages are merged in turn. So a model followed by a second ``ModelProto`` that holds
nothing but ``graph.output`` entries is the same model with more outputs.
"""

from collections.abc import Iterable

from xadapter_export.bundle.graph_file import varint

# Field numbers from onnx.proto: ModelProto.graph, GraphProto.output, ValueInfoProto.name.
_MODEL_GRAPH = 7
_GRAPH_OUTPUT = 12
_VALUE_INFO_NAME = 1

_LENGTH_DELIMITED = 2  # protobuf's wire type for strings and messages


def extra_outputs(names: Iterable[str]) -> bytes:
    """Return the bytes that, appended to a serialized ``ModelProto``, make the named values outputs.

    Only names are written; onnxruntime infers their types.

    Source:
        onnx/onnx.proto (onnx 1.23); protobuf encoding, "Last One Wins" and merging of embedded messages.
    """
    outputs = (_field(_GRAPH_OUTPUT, _field(_VALUE_INFO_NAME, name.encode())) for name in names)
    return _field(_MODEL_GRAPH, b"".join(outputs))


def _field(number: int, payload: bytes) -> bytes:
    return varint(number << 3 | _LENGTH_DELIMITED) + varint(len(payload)) + payload
