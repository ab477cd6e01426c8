"""Checks that a traced graph is what was promised, before anything of it is written."""

from collections import Counter
from collections.abc import Iterable

import onnx_ir as ir

from xadapter_export.bundle.manifest import Component
from xadapter_export.errors import ParityError
from xadapter_export.experts import reads_bank
from xadapter_export.exporters.portable.merge import MergedModel, tap_name

_CONSTANT_LIMIT = 4096  # elements; a constant larger than this is a weight whose name was lost


def check_graph(model: ir.Model, merged: MergedModel, opset: int) -> None:
    """Checks opset, operators, names, axes, and that no weight of an inactive part is in the graph.

    Raises:
        ParityError: If any of it is not as asked; the exporter is at fault, not the user.
    """
    got = dict(model.opset_imports)
    _require(got == {"": opset}, "opset", {"": opset}, got)
    domains = {node.domain for node in model.graph if node.domain}
    _require(not domains, "operator domains", "standard ONNX only", domains)
    _require(
        [v.name for v in model.graph.inputs] == merged.input_names,
        "inputs",
        merged.input_names,
        model.graph.inputs,
    )
    outputs = [*merged.output_names, *(tap_name(*tap) for tap in merged.taps)]
    _require([v.name for v in model.graph.outputs] == outputs, "outputs", outputs, model.graph.outputs)
    for value in model.graph.inputs:
        axes = tuple(getattr(dim, "value", dim) for dim in value.shape or ())
        wanted = merged.input_axes[str(value.name)]
        _require(axes == wanted, f"axes of {value.name}", wanted, axes)
    allowed = {"plm", "head", *(f"adapter_{expert}" for expert in merged.active)} if merged.answers else set()
    allowed |= {"clip"} if merged.clip is not None else set()
    allowed |= {"bank"} if merged.searches or (reads_bank(merged.active) and not merged.retrieves) else set()
    found = set(component_parameters(model, merged))
    _require(found <= allowed, "weights", sorted(allowed), sorted(found))
    lost = [
        v.name
        for v in _weights(model)
        if _component(str(v.name), merged) is None and _size(v) > _CONSTANT_LIMIT
    ]
    _require(not lost, "large constants that are no parameter", "none", lost)
    props = [*model.metadata_props, *(key for node in model.graph for key in node.metadata_props)]
    _require(not props, "metadata", "none", props)


def component_parameters(model: ir.Model, merged: MergedModel) -> dict[Component, int]:
    """Counts the numbers in the graph's weights for each component of what it was traced from."""
    counts: Counter[Component] = Counter()
    for value in _weights(model):
        if (component := _component(str(value.name), merged)) is not None:
            counts[component] += _size(value)
    return dict(counts)


def _component(name: str, merged: MergedModel) -> Component | None:
    part, _, rest = name.partition(".")
    if part == "adapters":
        return f"adapter_{rest.split('.')[1]}"
    if part.startswith("bank"):
        return "bank"
    if part in {"head", "candidate_decoder"}:
        return "head"
    if part == "plm":
        return "head" if merged.plm.in_head(rest.removeprefix("model.")) else "plm"
    if part == "plm_layers":
        return "plm"
    return "clip" if part in {"clip", "clip_layers"} else None


def _weights(model: ir.Model) -> Iterable[ir.Value]:
    return model.graph.initializers.values()


def _size(value: ir.Value) -> int:
    return value.const_value.size if value.const_value is not None else 0


def _require(condition: bool, what: str, expected: object, got: object) -> None:
    if not condition:
        raise ParityError(f"traced graph: {what}: expected {expected}, got {got}; please report this")
