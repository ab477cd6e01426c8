"""Every variant of an expert set, from its portable graph: their files, and how one is made."""

from collections.abc import Iterable, Sequence

import onnx
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass
from onnxruntime.transformers.float16 import convert_float_to_float16

from xadapter_export.bundle.manifest import ExpertSet, Optimisation, Precision, Target
from xadapter_export.errors import ParityError
from xadapter_export.experts import reads_text
from xadapter_export.exporters.bank_search import search_bank
from xadapter_export.exporters.fuse import run_pass
from xadapter_export.exporters.merge import MergedModel, Part
from xadapter_export.exporters.qdq import quantise_qdq
from xadapter_export.exporters.quantise import Ranges, Recipe, Rounding, quantise

# Suffixes that transformers.js and optimum know, and one for what they have no name for.
_SUFFIXES: dict[tuple[Target, Precision], str] = {
    ("onnx", "fp32"): "",
    ("onnx", "fp16"): "_fp16",
    ("onnx", "int8"): "_int8",
    ("cuda", "fp32"): "_cuda",
    ("cuda", "fp16"): "_cuda_fp16",
    ("cpu", "fp32"): "_cpu",
    ("cpu", "int8"): "_quantized",
    ("cpu", "int4"): "_q4",
}
# Operators that stay fp32 in an fp16 graph: norms, attention's weights and masks, and the search of the bank.
# Of these CUDA's kernels compute the first two in fp32 whatever they are given.
_FP32_SEARCH = ("TopK", "ReduceSum", "Sqrt", "Div", "Range", "Where")
_SCORES = "bank_scores"
_TO_FP16 = "_cast_to_fp16_node"  # how onnxruntime's converter names a cast of what stays fp32
_FP32_ISLANDS = ("LayerNormalization", "Softmax", *_FP32_SEARCH)


def variant_file(
    expert_set: ExpertSet, default: ExpertSet, target: Target, precision: Precision, part: Part = "whole"
) -> str:
    """Path of a variant's graph; the default set has the names that transformers.js and optimum look for."""
    stem = "query" if part == "query" else "model"
    stem = stem if expert_set == default else f"{stem}_{expert_set}"
    if target == "openvino":
        return f"openvino/{stem}_{precision}.xml"
    return f"onnx/{stem}{_SUFFIXES[target, precision]}.onnx"


def weights_file(target: Target, precision: Precision) -> str:
    """Path of the weights that the sets of a variant share; fp32 graphs share theirs, and fp16 graphs."""
    floats = {"fp32": "", "fp16": "_fp16"}
    return f"onnx/model{floats.get(precision, _SUFFIXES[target, precision])}.onnx_data"


def derive(
    portable: ir.Model,
    merged: MergedModel,
    target: Target,
    precision: Precision,
    recipe: Recipe | None = None,
    ranges: Ranges | None = None,
    rounding: Rounding | None = None,
) -> tuple[ir.Model, list[Optimisation]]:
    """Makes a variant that onnxruntime runs.

    Args:
        portable: The portable graph; it is not changed.
        merged: What it was traced from.
        target: ``onnx``, ``cpu`` or ``cuda``.
        precision: One that the target takes.
        recipe: How many bits the weights of a graph quantised for ``cpu`` get; None for another.
        ranges: What goes into the portable graph's products; below fp16.
        rounding: As ``quantise``.

    Returns:
        The graph, and what was done to it.

    Raises:
        ParityError: If a pass did not do what it must.
    """
    if target == "onnx":
        if precision == "fp32":
            return portable, []
        if precision == "int8":
            quantised = quantise_qdq(portable, ranges or {}, rounding or Rounding())
            return quantised, [_bytes_saved("int8_qdq", portable, quantised, merged)]
        half = _to_half(portable, _FP32_ISLANDS)
        return half, [_bytes_saved("fp16_weights", portable, half, merged)]
    model = portable.clone()
    num_attentions, num_products = merged.projection_counts
    done = [
        run_pass("fused_attention", model, num_attentions + _num_fused_experts(merged)),
        run_pass("split_projections", model, num_attentions if num_products < 3 * num_attentions else 0),
        run_pass("fused_gelu", model, _count(model, "Erf")),
        run_pass("fused_quick_gelu", model, _count(model, "Sigmoid")),
    ]
    if merged.searches and target == "cpu":
        search_bank(model, "fp32" if recipe is None else "int8")
    if recipe is None:
        done.append(run_pass("fused_bias_gelu", model, _num_exact_gelus(model)))
        if precision == "fp16":
            model = _to_half(model, _FP32_SEARCH, fp32_scores=True)
            done.append(_bytes_saved("fp16_weights", portable, model, merged))
    else:
        quantise(model, recipe, ranges or {}, rounding or Rounding())
        done.append(_bytes_saved(recipe.name, portable, model, merged))
    return model, [step for step in done if step is not None]


def _to_half(model: ir.Model, islands: Sequence[str], *, fp32_scores: bool = False) -> ir.Model:
    """A copy in fp16, but for operators of these names and, if ``fp32_scores``, the product with the bank.

    The bank's rows are fp16 in either case; scores that are rounded to it too swap more neighbours. In the
    portable graph they are, because TensorRT has no fp32 products for Turing.
    """
    copy = ir.external_data.load_to_model(model.clone())
    for node in copy.graph if fp32_scores else ():
        scores = node.inputs[0].producer() if node.op_type == "TopK" and node.inputs[0] is not None else None
        if scores is not None:
            scores.name = _SCORES
    half = convert_float_to_float16(
        ir.to_proto(copy), keep_io_types=True, op_block_list=list(islands), node_block_list=[_SCORES]
    )
    _drop_repeated_casts(half.graph)
    converted: ir.Model = ir.from_proto(half)
    _drop_round_trips(converted)
    converted.graph.sort()
    return converted


def _drop_repeated_casts(graph: onnx.GraphProto) -> None:
    """Keeps one of the casts that give a value: onnxruntime below 1.32 writes one for every reader.

    1.31 is the newest onnxruntime-gpu.
    """
    written: set[str] = set()
    nodes = list(graph.node)
    del graph.node[:]
    for node in nodes:
        if node.op_type != "Cast" or written.isdisjoint(node.output):
            graph.node.append(node)
            written.update(node.output)


def _drop_round_trips(model: ir.Model) -> None:
    """Takes out casts from fp32 to fp16 and back, between two operators that stay fp32."""
    for node in model.graph:
        there = node.inputs[0].producer() if node.op_type == "Cast" and node.inputs[0] is not None else None
        if there is None or not str(there.name).endswith(_TO_FP16) or there.inputs[0] is None:
            continue
        if node.outputs[0].is_graph_output():  # its name is the output's
            node.replace_input_with(0, there.inputs[0])
        elif node.attributes.get_int("to") == ir.DataType.FLOAT:
            ir.convenience.replace_all_uses_with(node.outputs[0], there.inputs[0])
    RemoveUnusedNodesPass()(model)


def add_up(steps: Iterable[Optimisation]) -> list[Optimisation]:
    """What was done to several graphs, by the name of the step."""
    total: dict[str, Optimisation] = {}
    for step in steps:
        if (seen := total.get(step.name)) is not None:
            counts = {"before": seen.before + step.before, "after": seen.after + step.after}
            step = seen.model_copy(update=counts)
        total[step.name] = step
    return list(total.values())


def weight_bytes(model: ir.Model) -> int:
    """Bytes of all weights of a graph."""
    return sum(v.const_value.nbytes for v in model.graph.initializers.values() if v.const_value is not None)


def _bytes_saved(name: str, before: ir.Model, after: ir.Model, merged: MergedModel) -> Optimisation:
    saved = Optimisation(
        name=name, lossless=False, unit="bytes", before=weight_bytes(before), after=weight_bytes(after)
    )
    if saved.after >= saved.before and merged.answers:  # a query graph has CLIP alone, which may stay fp32
        raise ParityError(
            f"{name} saved nothing", expected=f"fewer than {saved.before} bytes", got=saved.after
        )
    return saved


def _count(model: ir.Model, op_type: str) -> int:
    return sum((node.domain, node.op_type) == ("", op_type) for node in model.graph)


def _num_exact_gelus(model: ir.Model) -> int:
    """Fused ones, and from opset 20 the standard operator; that with tanh has no operator with a bias."""
    gelus = [node for node in model.graph if node.op_type == "Gelu"]
    return sum(node.attributes.get_string("approximate") != "tanh" for node in gelus)


def _num_fused_experts(merged: MergedModel) -> int:
    """Attentions of experts, but not those over a static bank, which the whole batch shares."""
    return sum(reads_text([expert]) or merged.retrieves for _, expert in merged.taps)
