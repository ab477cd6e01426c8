"""ONNX on disk: graphs without what can be inferred again, and weights of which equal ones stand once."""

import hashlib
from pathlib import Path

import onnx_ir as ir

from xadapter_export.exporters.portable.merge import MergedModel

_ALIGNMENT = 64  # bytes; vector loads from a memory map stay aligned
_INLINE_LIMIT = 256  # bytes; smaller tensors stay in the graph, where shape inference sees them


class SharedWeights:
    """One file of weights in which equal tensors of all graphs stand once."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._stream = path.open("wb")
        self._offsets: dict[bytes, int] = {}

    def take(self, model: ir.Model) -> int:
        """Moves the weights of a graph into the file; the graph then refers to them.

        The file is readable up to here afterwards.

        Returns:
            Bytes of the file that the graph refers to.
        """
        used: dict[int, int] = {}
        for value in model.graph.initializers.values():
            tensor = value.const_value
            if tensor is None or tensor.nbytes < _INLINE_LIMIT:
                continue
            data = tensor.tobytes()
            key = hashlib.sha256(data).digest()
            if key not in self._offsets:
                self._stream.write(b"\0" * (-self._stream.tell() % _ALIGNMENT))
                self._offsets[key] = self._stream.tell()
                self._stream.write(data)
            offset = self._offsets[key]
            used[offset] = len(data)
            value.const_value = ir.ExternalTensor(
                self.path.name,
                offset,
                len(data),
                tensor.dtype,
                shape=ir.Shape(tensor.shape.numpy()),
                name=str(value.name),
                base_dir=self.path.parent,
            )
        self._stream.flush()
        return sum(used.values())

    def close(self) -> None:
        """Ends the file."""
        self._stream.close()


def hide_taps(model: ir.Model, merged: MergedModel) -> None:
    """Takes the experts' contributions off the outputs; they stay in the graph under their names."""
    for _ in merged.taps:
        del model.graph.outputs[-1]


def write_graph(model: ir.Model, path: Path) -> None:
    """Writes a graph without what can be inferred again: node names, types of weights and inner values."""
    for weight in model.graph.initializers.values():
        weight.shape = weight.type = None  # the tensor says both
    outputs = set(model.graph.outputs)
    for number, node in enumerate(model.graph):
        node.name = None
        for i, value in enumerate(node.outputs):
            if value not in outputs:
                value.shape = value.type = None
                if value.name and not str(value.name).startswith("x_adapter."):
                    value.name = f"v{number}" if i == 0 else f"v{number}.{i}"
    path.write_bytes(ir.to_proto(model).SerializeToString())


def write_alone(model: ir.Model, path: Path) -> None:
    """Writes a graph, and beside it the weights of this graph alone, as ``<name>.onnx_data``."""
    weights = SharedWeights(path.with_suffix(".onnx_data"))
    weights.take(model)
    weights.close()
    write_graph(model, path)
