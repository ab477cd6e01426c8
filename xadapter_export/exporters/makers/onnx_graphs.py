"""The targets that onnxruntime runs: ``onnx``, ``cpu`` and ``cuda``, from the portable graph."""

from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import onnx_ir as ir

from xadapter_export.bundle.manifest import Optimization
from xadapter_export.errors import ParityError
from xadapter_export.exporters.makers.maker import GraphJob, GraphMaker, Graphs, MadeGraph
from xadapter_export.exporters.passes.bank_search import search_bank
from xadapter_export.exporters.passes.fuse import run_pass
from xadapter_export.exporters.passes.half import FP32_ISLANDS, FP32_SEARCH, to_half
from xadapter_export.exporters.passes.qdq import quantize_qdq
from xadapter_export.exporters.passes.quantize import RECIPES, Ranges, Recipe, Rounding, quantize
from xadapter_export.exporters.portable.merge import MergedModel
from xadapter_export.targets import Precision


@dataclass(frozen=True)
class Source:
    """What one graph of a variant is made from.

    Attributes:
        portable: The portable graph; it is not changed.
        merged: What it was traced from.
        precision: One that the target takes.
        recipe: How many bits the weights get; None where there is no choice.
        ranges: What goes into the portable graph's products; below fp16.
        rounding: As ``quantize``.
    """

    portable: ir.Model
    merged: MergedModel
    precision: Precision
    recipe: Recipe | None = None
    ranges: Ranges = field(default_factory=dict)
    rounding: Rounding = field(default_factory=Rounding)


class _OnnxMaker(GraphMaker):
    """Makes ONNX graphs, each recipe in turn.

    Attributes:
        suffixes: What the files of each precision end with: those that transformers.js and optimum know, and
            one for what they have no name for.
        weights: The same of files of weights; fp32 graphs share theirs, and fp16 graphs.
    """

    suffixes: ClassVar[Mapping[Precision, str]]
    weights: ClassVar[Mapping[Precision, str]] = {"fp32": "", "fp16": "_fp16"}

    def recipes(self, precision: Precision) -> Sequence[Recipe | None]:
        """Return how many bits weights get, from the smallest to the most exact."""
        del precision
        return (None,)

    def tries(self, job: GraphJob) -> Iterator[MadeGraph]:
        """Yield a graph, or two, for each recipe."""
        material, precision = job.material, job.precision
        suffix = self.suffixes[precision]
        for recipe in self.recipes(precision):
            job.say(recipe.name if recipe else f"{self.target.name}-{precision}")
            graphs: Graphs = {}
            done: list[Optimization] = []
            for part, merged in material.merged.items():
                ranges = material.ranges[part] if precision in RECIPES else {}
                graph = material.graphs[part]
                source = Source(graph, merged, precision, recipe, ranges, material.rounding)
                graphs[part], steps = self.derive(source)
                done += steps
            weights = self.weights.get(precision, suffix)
            yield MadeGraph(add_up(done), graphs, suffix, weights)

    @abstractmethod
    def derive(self, source: Source) -> tuple[ir.Model, list[Optimization]]:
        """Make one graph.

        Returns:
            The graph, and what was done to it.

        Raises:
            ParityError: If a pass did not do what it must.
        """


class PortableMaker(_OnnxMaker):
    """The portable graph itself, in fp16, and in int8 with Q/DQ."""

    suffixes: ClassVar[Mapping[Precision, str]] = {"fp32": "", "fp16": "_fp16", "int8": "_int8"}

    def derive(self, source: Source) -> tuple[ir.Model, list[Optimization]]:
        """See ``_OnnxMaker``."""
        if source.precision == "int8":
            quantized = quantize_qdq(source.portable, source.ranges, source.rounding)
            return quantized, [_bytes_saved("int8_qdq", source, quantized)]
        half = to_half(source.portable, FP32_ISLANDS)
        return half, [_bytes_saved("fp16_weights", source, half)]


class CpuMaker(_OnnxMaker):
    """Fused for the CPU provider, and quantized by recipes."""

    suffixes: ClassVar[Mapping[Precision, str]] = {"fp32": "_cpu", "int8": "_quantized", "int4": "_q4"}

    def recipes(self, precision: Precision) -> Sequence[Recipe | None]:
        """See ``_OnnxMaker``."""
        return RECIPES.get(precision, (None,))

    def derive(self, source: Source) -> tuple[ir.Model, list[Optimization]]:
        """See ``_OnnxMaker``."""
        model, done = _fuse(source)
        recipe = source.recipe
        if source.merged.searches:
            search_bank(model, "fp32" if recipe is None else "int8")
        if recipe is None:
            done += _fuse_biases(model, source.merged)
        else:
            quantize(model, recipe, source.ranges, source.rounding)
            done.append(_bytes_saved(recipe.name, source, model))
        return model, done


class CudaMaker(_OnnxMaker):
    """Fused for the CUDA provider."""

    suffixes: ClassVar[Mapping[Precision, str]] = {"fp32": "_cuda", "fp16": "_cuda_fp16"}

    def derive(self, source: Source) -> tuple[ir.Model, list[Optimization]]:
        """See ``_OnnxMaker``."""
        model, done = _fuse(source)
        done += _fuse_biases(model, source.merged)
        if source.precision == "fp16":
            model = to_half(model, FP32_SEARCH, fp32_scores=True)
            done.append(_bytes_saved("fp16_weights", source, model))
        return model, done


def _fuse(source: Source) -> tuple[ir.Model, list[Optimization]]:
    """Returns the portable graph with attention and GELU fused, and what was done.

    Raises:
        ParityError: If a pass did not find what it must.
    """
    model, merged = source.portable.clone(), source.merged
    num_attentions, num_products = merged.projection_counts
    num_experts = sum(adapter.is_fused for adapter in merged.text_adapters)
    others = merged.has_other_layers  # they are fused where they happen to be written as ours
    expected = {
        "fused_attention": num_attentions + num_experts,
        "split_projections": num_attentions if num_products < 3 * num_attentions else 0,
        "fused_gelu": 0 if others else _count(model, "Erf"),
        "fused_quick_gelu": 0 if others else _num_quick_gelus(model),
    }
    steps = [run_pass(name, model, count, or_more=others) for name, count in expected.items()]
    return model, [step for step in steps if step is not None]


def _fuse_biases(model: ir.Model, merged: MergedModel) -> list[Optimization]:
    """Fuses the GELUs of a fused graph with the bias before them, and returns what was done."""
    others = merged.has_other_layers
    step = run_pass("fused_bias_gelu", model, 0 if others else _num_exact_gelus(model), or_more=others)
    return [] if step is None else [step]


def add_up(steps: Iterable[Optimization]) -> list[Optimization]:
    """What was done to several graphs, by the name of the step."""
    total: dict[str, Optimization] = {}
    for step in steps:
        if (seen := total.get(step.name)) is not None:
            counts = {"before": seen.before + step.before, "after": seen.after + step.after}
            step = seen.model_copy(update=counts)
        total[step.name] = step
    return list(total.values())


def weight_bytes(model: ir.Model) -> int:
    """Bytes of all weights of a graph."""
    return sum(v.const_value.nbytes for v in model.graph.initializers.values() if v.const_value is not None)


def _bytes_saved(name: str, source: Source, after: ir.Model) -> Optimization:
    before = weight_bytes(source.portable)
    saved = Optimization(name=name, lossless=False, unit="bytes", before=before, after=weight_bytes(after))
    if (
        saved.after >= saved.before and source.merged.answers
    ):  # a query graph has CLIP alone, which may stay fp32
        raise ParityError(
            f"{name} saved nothing", expected=f"fewer than {saved.before} bytes", got=saved.after
        )
    return saved


def _count(model: ir.Model, op_type: str) -> int:
    return sum((node.domain, node.op_type) == ("", op_type) for node in model.graph)


def _num_quick_gelus(model: ir.Model) -> int:
    """Sigmoids of something scaled; a kind of layer may have others, as a gate."""
    sigmoids = [node.inputs[0] for node in model.graph if node.op_type == "Sigmoid"]
    scaled = [value.producer() for value in sigmoids if value is not None]
    return sum(node is not None and node.op_type == "Mul" for node in scaled)


def _num_exact_gelus(model: ir.Model) -> int:
    """Fused ones, and from opset 20 the standard operator; that with tanh has no operator with a bias."""
    gelus = [node for node in model.graph if node.op_type == "Gelu"]
    return sum(node.attributes.get_string("approximate") != "tanh" for node in gelus)
