"""Traces a merged model into the portable graph: standard ONNX operators, the opset that was asked for.

Whatever could leak or confuse is cleaned here: axes get their names, weights the names of their parameters,
and node metadata (which holds local paths and source lines) is dropped.
"""

import hashlib
import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import cast

import numpy as np
import onnx
import onnx_ir as ir
import onnxscript.optimizer
import torch
from onnx_ir.passes.common import ClearMetadataAndDocStringPass
from torch import Tensor

from xadapter_export.bundle.opsets import check_opset
from xadapter_export.errors import UnsupportedError
from xadapter_export.exporters.portable.merge import MergedModel, tap_name
from xadapter_export.targets import AXES

_LOWEST_TRACED = 18  # torch.onnx writes from here on; 17 is converted from it


def trace(
    merged: MergedModel, inputs: Mapping[str, Tensor], opset: int, longest: Mapping[str, int]
) -> ir.Model:
    """Traces with named dynamic axes.

    Args:
        merged: What to trace, in evaluation mode.
        inputs: Example inputs of ``merged.input_names``; two or more rows, all axes of different length.
        opset: 17 to 21.
        longest: The most tokens of ``seq`` and ``clip_seq`` that the graph promises to take, by axis.

    Returns:
        The graph in memory, with the contributions of the experts as its last outputs.

    Raises:
        UnsupportedError: If the graph cannot be written in this opset.
    """
    check_opset(opset)
    dims = {axis: torch.export.Dim(axis, max=longest.get(axis)) for axis in AXES}
    shapes = {
        name: {number: dims[axis] for number, axis in enumerate(axes) if isinstance(axis, str)}
        for name, axes in merged.input_axes.items()
    }
    example = {name: inputs[name] for name in merged.input_names}
    with _quiet(), torch.no_grad():
        exported = torch.export.export(merged, (example,), dynamic_shapes=(shapes,), strict=False)
        program = torch.onnx.export(
            exported,
            dynamo=True,
            optimize=False,
            opset_version=max(opset, _LOWEST_TRACED),
            input_names=merged.input_names,
            output_names=[*merged.output_names, *(tap_name(*tap) for tap in merged.taps)],
            verbose=False,
        )
    if program is None:
        raise UnsupportedError("torch.onnx returned no program")
    model = program.model
    traced = list(model.graph.initializers.values())
    kept = _kept_whole(model)
    with _quiet():
        onnxscript.optimizer.optimize_ir(
            model,
            should_fold=lambda node: False if kept.intersection(node.inputs) else None,
        )
        traced += model.graph.initializers.values()
        model = _convert(model, opset)
    final = set(model.graph.initializers.values())
    for value in traced:  # onnxscript's rules remember the last graph that they saw, and all its weights
        if value not in final:
            value.const_value = None
    ClearMetadataAndDocStringPass()(model)
    _name_axes(model, merged)
    _name_weights(model, merged)
    _free_bank_size(model)
    return model


def _kept_whole(model: ir.Model) -> set[ir.Value | None]:
    """Weights of which no changed copy may be made.

    These are the weights that more than one node reads, since a transposed copy of the embedding table would
    be a second decoder in the file, and the bank, whose size the manifest tells.
    """
    return {
        v for v in model.graph.initializers.values() if len(v.uses()) > 1 or str(v.name).startswith("bank")
    }


def _convert(model: ir.Model, opset: int) -> ir.Model:
    """Converts to the opset with the converter of the onnx package, which sees no large weights."""
    if model.opset_imports[""] == opset:
        return model
    if opset < _LOWEST_TRACED:
        _slice_splits(model.graph)
    initializers = dict(model.graph.initializers)
    large = {
        name: value
        for name, value in initializers.items()
        if value.const_value is not None and value.const_value.size > 16
    }
    for name in large:  # the converter copies the whole model several times; as inputs they cost nothing
        del model.graph.initializers[name]
        model.graph.inputs.append(large[name])
    try:
        converted = ir.from_proto(onnx.version_converter.convert_version(ir.to_proto(model), opset))
    except RuntimeError as error:
        raise UnsupportedError(
            f"the graph cannot be written in opset {opset} ({error}); try {_LOWEST_TRACED} or more"
        ) from error
    for value in [value for value in converted.graph.inputs if value.name in large]:
        converted.graph.inputs.remove(value)
        value.const_value = large[str(value.name)].const_value
        converted.graph.register_initializer(value)
    return converted


def _slice_splits(graph: ir.Graph) -> None:
    """Writes each ``Split`` as slices: the converter knows no way from that of opset 18 to that of 17."""
    for node in [node for node in graph if node.op_type == "Split"]:
        axis, start = node.attributes.get_int("axis", 0), 0
        sizes = [None if output.shape is None else output.shape[axis] for output in node.outputs]
        if not all(isinstance(size, int) for size in sizes):
            continue  # which the converter then refuses
        for output, size in zip(node.outputs, sizes, strict=True):
            end = start + cast(int, size)
            bounds = [
                ir.node("Constant", [], {"value": ir.tensor(np.array([number], np.int64))})
                for number in (start, end, axis)
            ]
            start = end
            part = ir.node("Slice", [node.inputs[0], *(bound.outputs[0] for bound in bounds)])
            part.outputs[0].shape, part.outputs[0].type = output.shape, output.type
            graph.insert_before(node, [*bounds, part])
            ir.convenience.replace_all_uses_with(output, part.outputs[0])
        graph.remove(node, safe=True)


def _name_axes(model: ir.Model, merged: MergedModel) -> None:
    """Replaces the tracer's symbols (``s66``) by the names of the axes, everywhere in the graph."""
    names: dict[str, str] = {}
    for value in model.graph.inputs:
        for axis, dim in zip(merged.input_axes[str(value.name)], value.shape or (), strict=True):
            names[str(dim)] = str(axis)
    values = [*model.graph.inputs, *(output for node in model.graph for output in node.outputs)]
    for value in values:
        if value.shape is not None:
            value.shape = ir.Shape([d if isinstance(d, int) else names.get(str(d)) for d in value.shape])


def _name_weights(model: ir.Model, merged: MergedModel) -> None:
    """Names weights after their parameters; a transposed copy, which the optimizer makes, ends in ``.T``."""
    names: dict[bytes, str] = {}
    for name, tensor in [*merged.named_parameters(), *merged.named_buffers()]:
        array = tensor.detach().numpy()
        names.setdefault(_content(array), name)
        if array.ndim == 2:
            names.setdefault(_content(array.T), f"{name}.T")
    taken: set[str] = set()
    for number, value in enumerate(list(model.graph.initializers.values())):
        constant = value.const_value
        assert constant is not None  # an initializer has a value
        name = (
            names.get(_content(constant.numpy()), f"constant_{number}")
            if constant.size > 1
            else f"constant_{number}"
        )
        value.name = name if name not in taken else f"{name}.{number}"
        taken.add(value.name)


def _free_bank_size(model: ir.Model) -> None:
    """Lets keys and values of a static bank be split into heads whatever their number, for a swap of it."""
    shapes: dict[str, ir.Value] = {}
    for node in model.graph:
        folded = node.op_type == "Reshape" and str(node.inputs[0] and node.inputs[0].name).startswith("bank_")
        if folded and node.inputs[1] is not None and node.inputs[1].is_initializer():
            shapes[str(node.inputs[1].name)] = node.inputs[1]
    for name, value in shapes.items():
        constant = value.const_value
        assert constant is not None  # an initializer has a value
        heads = constant.numpy()[2:]  # of (1, N, heads, width)
        value.const_value = ir.tensor(np.array([1, -1, *heads], np.int64), name=name)


def _content(array: np.ndarray) -> bytes:
    digest = hashlib.sha256(f"{array.dtype}{array.shape}".encode())
    digest.update(np.ascontiguousarray(array).data)
    return digest.digest()


@contextmanager
def _quiet() -> Iterator[None]:
    """Silences what the exporter says about its own insides; its errors are raised all the same."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
