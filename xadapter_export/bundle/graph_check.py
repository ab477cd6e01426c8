"""Says whether a graph may be given to its library: before that, nothing of the file is believed.

A bundle comes from somebody else. What a library would load from another file, run as code, or run without
end is refused here, from the bytes alone: ONNX without the onnx package, OpenVINO's XML with expat.
"""

import mmap
import posixpath
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Final
from xml.parsers import expat

from xadapter_export.bundle.graph_file import messages
from xadapter_export.errors import BundleError, XAdapterError

# Every operator of ONNX but those that have graphs of their own: these can run for ever.
_ENDLESS: Final = frozenset({"If", "Loop", "Scan", "SequenceMap"})
# Of onnxruntime's own operators, those that compute on numbers alone. EPContext, for one, loads a program.
_CONTRIB: Final = frozenset(
    {
        *("Attention", "BiasGelu", "BiasSoftmax", "DequantizeLinear"),
        *("DynamicQuantizeMatMul", "EmbedLayerNormalization", "FastGelu", "FusedMatMul"),
        *("GatherBlockQuantized", "Gelu", "MatMulIntegerToFloat", "MatMulNBits"),
        *("MultiHeadAttention", "QAttention", "QuantizeLinear", "QuickGelu"),
        *("SkipLayerNormalization",),
    }
)
_DOMAINS: Final = {"": None, "ai.onnx": None, "com.microsoft": _CONTRIB}  # None: all but the endless ones
_OPENVINO_REFUSED: Final = frozenset({"If", "Loop", "TensorIterator"})
_OPENVINO_OPSET: Final = (
    "opset"  # of OpenVINO's own operators: opset1, opset13; anything else is an extension
)

# Numbers of fields from onnx.proto (onnx 1.23).
_MODEL_GRAPH, _MODEL_FUNCTIONS = 7, 25
_GRAPH_NODE, _GRAPH_INITIALIZER, _GRAPH_SPARSE = 1, 5, 15
_NODE_OP_TYPE, _NODE_ATTRIBUTE, _NODE_DOMAIN = 4, 5, 7
_ATTRIBUTE_TENSOR, _ATTRIBUTE_TENSORS = 5, 10
_ATTRIBUTE_REFUSED: Final = {6: "a graph", 11: "graphs", 22: "a sparse tensor", 23: "sparse tensors"}
_TENSOR_EXTERNAL, _ENTRY_KEY, _ENTRY_VALUE = 13, 1, 2


def check_onnx(file: Path, weight_files: Collection[str] | None) -> None:
    """Refuse an ONNX file that onnxruntime should not open.

    Args:
        file: The ``.onnx`` file.
        weight_files: The files that may hold its weights, relative to its folder: those with a hash. None
            where the file was made here, and any will do.

    Raises:
        BundleError: If it is not a serialized model; has an operator that nests graphs, is of another library
            or is not known to be harmless; defines functions; or has weights in a file that is not listed.
    """
    _require_suffix(file, ".onnx")
    try:
        with file.open("rb") as stream:
            mapped = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
        _check_model(memoryview(mapped), file, weight_files)
    except XAdapterError:
        raise
    except (OSError, ValueError, IndexError) as error:
        raise BundleError("the graph cannot be read", where=file, got=error) from error


def check_openvino(file: Path) -> None:
    """Refuse a graph of OpenVINO that nests graphs or needs an extension.

    Args:
        file: The ``.xml`` file; its weights are in the ``.bin`` file of the same name.

    Raises:
        BundleError: If it is not XML, has a document type, or has such a layer.
    """
    _require_suffix(file, ".xml")
    problems: list[str] = []

    def see_element(name: str, attributes: dict[str, str]) -> None:
        if name != "layer":
            return
        kind, version = attributes.get("type", ""), attributes.get("version", "")
        if kind in _OPENVINO_REFUSED or not version.startswith(_OPENVINO_OPSET):
            problems.append(f"{kind} of {version}")

    parser = expat.ParserCreate()
    parser.StartElementHandler = see_element
    parser.StartDoctypeDeclHandler = lambda *_: problems.append(
        "a document type"
    )  # entities, which may explode
    try:
        with file.open("rb") as stream:
            parser.ParseFile(stream)
    except (OSError, expat.ExpatError) as error:
        raise BundleError("the graph cannot be read", where=file, got=error) from error
    if problems:
        raise _refused(file, problems[0])


def _require_suffix(file: Path, suffix: str) -> None:
    if file.suffix != suffix:  # by it the library chooses the format, and with it other rules
        raise BundleError("the graph has the wrong file name", where=file, expected=f"a name with {suffix}")


def _check_model(view: memoryview, file: Path, weight_files: Collection[str] | None) -> None:
    tensors: list[memoryview] = []
    for number, payload in messages(view):
        if number == _MODEL_FUNCTIONS:
            raise _refused(file, "a function of its own")
        if number != _MODEL_GRAPH:
            continue
        for part, content in messages(payload):
            if part == _GRAPH_SPARSE:
                raise _refused(file, "a sparse tensor")
            if part == _GRAPH_INITIALIZER:
                tensors.append(content)
            elif part == _GRAPH_NODE:
                tensors += _check_node(content, file)
    for tensor in tensors if weight_files is not None else ():
        for location in _locations(tensor):
            if location not in (weight_files or ()):
                raise BundleError(
                    "the graph has weights in a file that its manifest does not list",
                    where=f"{file}, {location}",
                    hint="copy or export the bundle again",
                )


def _check_node(node: memoryview, file: Path) -> Iterator[memoryview]:
    """Yield the tensors of a node's attributes; refuse a node that is not harmless."""
    op_type = domain = ""
    for number, payload in messages(node):
        if number == _NODE_OP_TYPE:
            op_type = str(payload, "utf-8")
        elif number == _NODE_DOMAIN:
            domain = str(payload, "utf-8")
        elif number == _NODE_ATTRIBUTE:
            for part, content in messages(payload):
                if part in _ATTRIBUTE_REFUSED:
                    raise _refused(file, f"{_ATTRIBUTE_REFUSED[part]} in a node")
                if part in {_ATTRIBUTE_TENSOR, _ATTRIBUTE_TENSORS}:
                    yield content
    known = _DOMAINS.get(domain, frozenset())
    if op_type in _ENDLESS or (known is not None and op_type not in known):
        raise _refused(file, f"the operator {domain or 'ai.onnx'}::{op_type}")


def _locations(tensor: memoryview) -> Iterator[str]:
    """Yield where the bytes of a tensor are, if they are in another file."""
    for number, payload in messages(tensor):
        if number == _TENSOR_EXTERNAL:
            entry = {part: str(content, "utf-8") for part, content in messages(payload)}
            if entry.get(_ENTRY_KEY) == "location":
                yield entry.get(_ENTRY_VALUE, "")


def _refused(file: Path, what: str) -> BundleError:
    return BundleError(
        "the graph holds what no bundle needs and could harm whoever opens it",
        where=file,
        got=what,
        hint="get the bundle from whoever made the checkpoint, or export it again",
    )


def beside(graph: str, files: Collection[str]) -> frozenset[str]:
    """Return files of a bundle as a graph names them: relative to its own folder."""
    return frozenset(posixpath.relpath(file, posixpath.dirname(graph) or ".") for file in files)
