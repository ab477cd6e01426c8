"""Every exact optimization: the answers with it are those without it, and what it saved is what is said."""

from collections import Counter
from collections.abc import Callable, Mapping
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import cast

import numpy as np
import onnx_ir as ir
import pytest
import torch

from tests.tiny_checkpoint import (
    FAMILIES,
    TEXTS,
    VOCAB_SIZE,
    D,
    N,
    make_bank,
    make_clip,
    make_model,
    make_plm,
    randomize_plugin,
)
from xadapter_export import XAdapterSession, export
from xadapter_export.bundle.folder import read_bundle
from xadapter_export.bundle.manifest import ExpertSet, Optimization, Task
from xadapter_export.errors import ParityError
from xadapter_export.exporters.makers.onnx_graphs import CpuMaker, Source
from xadapter_export.exporters.passes.fuse import CPU_PASSES
from xadapter_export.exporters.pipeline import ExportResult
from xadapter_export.exporters.portable.merge import MergedModel
from xadapter_export.exporters.portable.savings import count_savings
from xadapter_export.exporters.request import STEPS, Step
from xadapter_export.model.config import XAdapterConfig
from xadapter_export.model.plm import load_plm
from xadapter_export.model.x_adapter_model import XAdapterModel
from xadapter_export.parity.compare import TOLERANCES
from xadapter_export.sessions.onnx_session import open_onnx
from xadapter_export.sessions.session import Array
from xadapter_export.targets import TARGETS

SETS: tuple[ExpertSet, ...] = ("vt", "v", "t", "none")
T, P, H, F, HEADS = 32, 1, 32, 48, 4  # of the counts: tokens, masks, and the tiny PLM's sizes
S, W = 32, 16  # CLIP tokens and the tiny tower's width
WORDS = ("yellow", "green", "red")


_LIKE_ROBERTA = ("xlm-roberta", "camembert")  # other weights for the same code


@pytest.fixture(
    scope="module",
    params=[pytest.param(name, marks=pytest.mark.slow if name in _LIKE_ROBERTA else ()) for name in FAMILIES],
)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


BOTH = ("onnx", "cpu")
CPU = CpuMaker(TARGETS["cpu"])


@pytest.fixture(scope="module")
def models(family: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, XAdapterModel]:
    """One family as a masked language model, with a static bank, and as a classifier."""
    folder = tmp_path_factory.mktemp(family)
    return {
        "topk": make_model(folder / "topk", family),
        "static": make_model(folder / "static", family, retrieval={"mode": "static"}),
        "classifier": make_model(
            folder / "classifier", family, task="text-classification", labels=("bad", "good")
        ),
    }


@pytest.fixture(scope="module")
def exported(
    tiny_model: XAdapterModel, tiny_export: ExportResult, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], tuple[XAdapterModel, ExportResult]]:
    """A family's model, and its bundle, portable and for the CPU provider; not to be changed.

    BERT has every expert set. The others have T: tracing takes seconds, and the families differ in the layers
    of the PLM only, which are the same in every set.
    """

    @cache
    def run(name: str) -> tuple[XAdapterModel, ExportResult]:
        if name == "bert":
            return tiny_model, tiny_export
        folder = tmp_path_factory.mktemp(f"export-{name}")
        model = make_model(folder / "model", name)
        return model, export(model, folder / "bundle", "t", targets=BOTH)

    return run


@pytest.fixture(scope="module")
def bert(exported: Callable[[str], tuple[XAdapterModel, ExportResult]]) -> XAdapterModel:
    return exported("bert")[0]


@pytest.fixture(scope="module")
def bert_bundle(exported: Callable[[str], tuple[XAdapterModel, ExportResult]]) -> ExportResult:
    return exported("bert")[1]


def ask(merged: MergedModel, inputs: Mapping[str, torch.Tensor]) -> list[torch.Tensor]:
    with torch.no_grad():
        return list(merged.eval()({name: inputs[name] for name in merged.input_names}))


def has_step(merged: MergedModel, step: Step) -> bool:
    num_attentions, num_products = merged.projection_counts
    return {
        "packed_projections": num_products < 3 * num_attentions,
        "last_layer_at_positions": merged.last_at_positions,
        "clip_last_block_at_end": merged.clip is not None and merged.clip_at_end,
        "folded_bank": merged.folds_bank,
    }[step]


def assert_within_fp32_rule(got: Array, ref: Array) -> None:
    rule = TOLERANCES["fp32"]
    np.testing.assert_allclose(got, ref, atol=rule.atol, rtol=rule.rtol)


# ------------------------------------------------------------------------------------------ merge


CASES: list[tuple[str, Task]] = [
    ("topk", "fill-mask"),
    ("topk", "feature-extraction"),
    ("static", "fill-mask"),
    ("classifier", "text-classification"),
    ("classifier", "feature-extraction"),
]


def test_each_merge_step_changes_no_answer(models: dict[str, XAdapterModel]) -> None:
    used: Counter[Step] = Counter()
    for name, task in CASES:
        model = models[name]
        inputs = model.encode([text.replace("[MASK]", "red") for text in TEXTS] if "class" in name else TEXTS)
        for experts in SETS:
            merged = MergedModel(model, experts, task)
            expected = ask(merged, inputs)
            plain = MergedModel(model, experts, task, without=STEPS)
            assert not any(has_step(plain, step) for step in STEPS)
            for step in [step for step in STEPS if has_step(merged, step)]:
                without = MergedModel(model, experts, task, without={step})
                assert not has_step(without, step)
                used[step] += 1
                for got, ref in zip(ask(without, inputs), expected, strict=True):
                    torch.testing.assert_close(got, ref, atol=1e-5, rtol=1e-5)
            for got, ref in zip(ask(plain, inputs), expected, strict=True):
                torch.testing.assert_close(got, ref, atol=1e-5, rtol=1e-5)
    assert used == {
        "packed_projections": len(CASES) * len(SETS),
        "last_layer_at_positions": 3 * len(SETS),  # feature extraction reads every token
        "clip_last_block_at_end": 4,  # the V-expert alone, where it searches
        "folded_bank": 2,  # sets with the V-expert over a static bank
    }


def test_the_merged_model_says_what_the_trained_one_says(models: dict[str, XAdapterModel]) -> None:
    for name, task in CASES:
        model = models[name]
        inputs = model.encode(TEXTS)
        for experts in SETS:
            merged = MergedModel(model, experts, task)
            got = dict(zip(merged.output_names, ask(merged, inputs), strict=False))
            with torch.no_grad():
                output = model(**{k: inputs[k] for k in merged.input_names}, experts=experts)
            said = output.last_hidden_state if task == "feature-extraction" else output.logits
            torch.testing.assert_close(next(iter(got.values())), said, atol=1e-5, rtol=1e-5)


def test_the_head_at_positions_gives_the_full_logits_there(models: dict[str, XAdapterModel]) -> None:
    model = models["topk"]
    inputs = model.encode(TEXTS)
    for experts in SETS:
        everywhere = torch.arange(inputs["input_ids"].shape[1]).expand_as(inputs["input_ids"])
        merged = MergedModel(model, experts, "fill-mask")
        full = ask(merged, {**inputs, "mask_positions": everywhere})[0]  # (B, T, V)
        rows = torch.arange(len(TEXTS))[:, None]
        torch.testing.assert_close(
            ask(merged, inputs)[0], full[rows, inputs["mask_positions"]], atol=1e-5, rtol=1e-5
        )
        with torch.no_grad():
            plain = model(**{**inputs, "mask_positions": None}, experts=experts).logits
        torch.testing.assert_close(full, plain, atol=1e-5, rtol=1e-5)


def test_candidates_are_columns_of_the_full_logits(models: dict[str, XAdapterModel]) -> None:
    model = models["topk"]
    inputs, ids = model.encode(TEXTS), [7, 3, 21]
    for experts in SETS:
        few = ask(MergedModel(model, experts, "fill-mask", ids), inputs)[0]
        full = ask(MergedModel(model, experts, "fill-mask"), inputs)[0]
        torch.testing.assert_close(few, full[..., ids], atol=1e-5, rtol=1e-5)


def test_a_static_bank_that_the_sentence_asks_is_folded_too(tmp_path: Path) -> None:
    model = make_model(tmp_path, experts="v", retrieval={"mode": "static"}, layer="sentence-query")
    inputs = model.encode(TEXTS)
    folded = MergedModel(model, "v", "fill-mask")
    unfolded = MergedModel(model, "v", "fill-mask", without={"folded_bank"})
    assert folded.folds_bank
    assert not unfolded.folds_bank
    for got, ref in zip(ask(unfolded, inputs), ask(folded, inputs), strict=True):
        torch.testing.assert_close(got, ref, atol=1e-5, rtol=1e-5)


# ------------------------------------------------------------------------------------------ counts


def saved(
    model: XAdapterModel, experts: ExpertSet, task: Task = "fill-mask", without: tuple[Step, ...] = ()
) -> dict[str, tuple[int, int]]:
    merged = MergedModel(model, experts, task, without=without)
    steps = count_savings(model, merged)
    assert all(step.lossless for step in steps)
    return {step.name: (step.before, step.after) for step in steps}


LAYER = 4 * T * H * H + 2 * T * T * H + 2 * T * H * F  # query, key, value, out; scores, sum; up, down
LAST_LAYER = 2 * T * H * H + P * (2 * H * H + 2 * T * H + 2 * H * F)  # keys and values of all tokens
HEAD = H * H + H * VOCAB_SIZE  # of one position
BLOCK = 4 * S * W * W + 2 * S * S * W + 2 * S * W * 4 * W
LAST_BLOCK = 3 * S * W * W + W * W + 2 * S * W + 2 * W * 4 * W  # one packed product, as in other blocks


def test_multiply_adds_of_the_plain_plm_by_hand(bert: XAdapterModel) -> None:
    assert saved(bert, "none") == {
        "last_layer_at_positions": (3 * LAYER + P * HEAD, 2 * LAYER + LAST_LAYER + P * HEAD),
        "head_at_positions": (3 * LAYER + T * HEAD, 3 * LAYER + P * HEAD),
        "packed_projections": (9, 4),  # one product in two layers; query, and keys with values, in the last
    }
    assert saved(bert, "none", without=("last_layer_at_positions", "packed_projections")) == {}
    assert saved(bert, "none", "feature-extraction") == {"packed_projections": (9, 3)}


def test_multiply_adds_of_clip_by_hand(bert: XAdapterModel) -> None:
    found = saved(bert, "v")
    before, after = found["clip_last_block_at_end"]
    assert before - after == BLOCK - LAST_BLOCK
    assert found["packed_projections"] == (9 + 6, 4 + 2)
    assert "clip_last_block_at_end" not in saved(bert, "t")  # it reads every token
    assert "clip_at_true_length" not in found  # 32 tokens are all that this tower takes


def test_multiply_adds_of_a_padded_clip_by_hand(tmp_path: Path) -> None:
    config = XAdapterConfig(experts="t", layers=(1,), adapter_width=16, num_heads=2)
    plm = load_plm(make_plm("bert", tmp_path / "plm"), "fill-mask")
    model = randomize_plugin(XAdapterModel(config, plm, make_clip(context_length=77, layers=1), None))
    before, after = saved(model, "t")["clip_at_true_length"]
    more = 77 - S
    tower = more * (4 * W * W + 2 * W * 4 * W) + 2 * (77**2 - S**2) * W
    expert = more * (2 * W * 16 + 2 * T * 16)  # keys and values; scores and sum
    assert before - after == tower + expert


def test_multiply_adds_of_a_folded_bank_by_hand(models: dict[str, XAdapterModel]) -> None:
    before, after = saved(models["static"], "v")["folded_bank"]
    assert before - after == 2 * 2 * N * D * 16  # layers, keys and values


# ------------------------------------------------------------------------------------------ whole exports


def test_a_graph_without_a_step_gives_the_same_answers(
    bert: XAdapterModel, bert_bundle: ExportResult, tmp_path: Path
) -> None:
    inputs = {name: tensor.numpy() for name, tensor in bert.encode(TEXTS).items()}
    full = XAdapterSession.load(bert_bundle.folder, variant="onnx-fp32")
    for step in STEPS[:-1]:
        result = export(bert, tmp_path / step, "v", targets=BOTH, without=[step])
        assert step not in {s.name for v in result.manifest.variants for s in v.optimizations}
        assert result.parity.passed
        feed = {spec.name: inputs[spec.name] for spec in result.manifest.expert_sets["v"].inputs}
        for variant in ("onnx-fp32", "cpu-fp32"):
            got = XAdapterSession.load(result.folder, variant=variant).run(feed)
            for name, ref in full.run(feed, experts="v").items():
                assert_within_fp32_rule(got[name], ref)
    named = {s.name for s in bert_bundle.manifest.variant("v").optimizations}
    assert named == {*STEPS[:-1], "head_at_positions"}


def test_a_static_graph_with_the_bank_unfolded_gives_the_same_answers(tmp_path: Path) -> None:
    model = make_model(tmp_path, experts="v", retrieval={"mode": "static"})
    inputs = {name: tensor.numpy() for name, tensor in model.encode(TEXTS).items()}
    without: tuple[tuple[Step, ...], ...] = ((), ("folded_bank",))
    answers = []
    for number, steps in enumerate(without):
        result = export(model, tmp_path / f"bundle{number}", "v", targets=BOTH, without=steps)
        feed = {spec.name: inputs[spec.name] for spec in result.manifest.expert_sets["v"].inputs}
        for variant in result.manifest.variants:
            names = [step.name for step in variant.optimizations]
            assert ("folded_bank" in names) == (not steps)
            answers.append(XAdapterSession.load(result.folder, variant=variant.name).run(feed)["logits"])
    assert len(answers) == 4
    for other in answers[1:]:
        assert_within_fp32_rule(other, answers[0])


def test_clip_at_its_true_length_gives_what_a_padded_text_gives(
    bert: XAdapterModel, bert_bundle: ExportResult
) -> None:
    inputs = {name: tensor.numpy() for name, tensor in bert.encode(TEXTS).items()}
    ids = inputs["clip_input_ids"]
    padded = np.zeros((len(TEXTS), 32), np.int64)
    padded[:, : ids.shape[1]] = ids
    assert ids.shape[1] < 32
    for experts in SETS[:-1]:
        for variant in ("onnx-fp32", "cpu-fp32"):
            session = XAdapterSession.load(bert_bundle.folder, variant=variant)
            names = [spec.name for spec in bert_bundle.manifest.expert_sets[experts].inputs]
            got = session.run({**{k: inputs[k] for k in names}, "clip_input_ids": padded}, experts=experts)
            for name, ref in session.run({k: inputs[k] for k in names}, experts=experts).items():
                assert_within_fp32_rule(got[name], ref)


# ------------------------------------------------------------------------------------------ CPU passes


def ops(model: ir.Model) -> Counter[str]:
    return Counter(node.op_type for node in model.graph)


def test_every_family_is_exported_and_its_cpu_graph_says_what_the_portable_one_says(
    family: str, exported: Callable[[str], tuple[XAdapterModel, ExportResult]]
) -> None:
    model, result = exported(family)
    assert result.manifest.plm.family in {family, "roberta"}
    assert XAdapterSession.load(result.folder).fill_mask(TEXTS, top_k=1)
    inputs = {name: tensor.numpy() for name, tensor in model.encode(TEXTS).items()}
    for experts in result.manifest.expert_sets:
        proof = result.parity.variant_parity(experts, "cpu-fp32")
        assert proof.passed
        assert proof.num_cells >= 5 * len(result.manifest.expert_sets[experts].outputs)
        feed = {spec.name: inputs[spec.name] for spec in result.manifest.expert_sets[experts].inputs}
        portable, fused = (
            XAdapterSession.load(result.folder, variant=name).run(feed, experts=experts)
            for name in ("onnx-fp32", "cpu-fp32")
        )
        for name, ref in portable.items():
            assert_within_fp32_rule(fused[name], ref)


def test_the_cpu_graph_has_as_many_fused_operators_as_the_model_has_parts(
    family: str, exported: Callable[[str], tuple[XAdapterModel, ExportResult]]
) -> None:
    _, result = exported(family)
    for experts in result.manifest.expert_sets:
        graph = ir.load(result.folder / result.manifest.variant(experts, "cpu-fp32").file)
        found, uses_clip = ops(graph), experts != "none"
        num_taps = 2 * len(experts) if uses_clip else 0
        assert found["MultiHeadAttention"] == 3 + 2 * uses_clip + num_taps
        assert found["BiasGelu"] == 3 + 1 + 2 * uses_clip  # layers, head, blocks
        assert found["Split"] == 3 + 2 * uses_clip
        assert not {"Softmax", "Erf", "Sigmoid", "Gelu"} & set(found)
        done = result.manifest.variant(experts, "cpu-fp32").optimizations
        passes = [step for step in done if step.name in CPU_PASSES]
        assert [step.name for step in passes] == [name for name in CPU_PASSES if name != "fused_quick_gelu"]
        assert all(step.unit == "nodes" and step.lossless for step in passes)
        assert passes[-1].after == len(graph.graph) or experts in (
            "v",
            "vt",
        )  # the bank's search comes between


def test_a_clip_of_openai_with_layer_scale_is_fused(tmp_path: Path) -> None:
    config = XAdapterConfig(experts="vt", layers=(1,), adapter_width=16, num_heads=2)
    clip = make_clip(quick_gelu=True, ls_init_value=0.1)
    plm = load_plm(make_plm("bert", tmp_path / "plm"), "fill-mask")
    model = randomize_plugin(XAdapterModel(config, plm, clip, make_bank()))
    result = export(model, tmp_path / "bundle", "v", targets=BOTH)
    assert result.parity.passed
    found = ops(ir.load(result.folder / result.manifest.variant("v", "cpu-fp32").file))
    assert found["QuickGelu"] == 2
    assert found["BiasGelu"] == 3 + 1
    assert found["MultiHeadAttention"] == 3 + 2 + 1
    assert "Sigmoid" not in found


def test_from_opset_20_gelu_is_an_operator_and_the_one_with_tanh_stays(tmp_path: Path) -> None:
    config = XAdapterConfig(experts="t", layers=(1,), adapter_width=16, num_heads=2)
    plm = load_plm(make_plm("bert", tmp_path / "plm"), "fill-mask")
    model = randomize_plugin(XAdapterModel(config, plm, make_clip(gelu_approximate="tanh"), None))
    result = export(model, tmp_path / "bundle", "t", opset=20, targets=BOTH)
    assert result.parity.passed
    found = ops(ir.load(result.folder / result.manifest.variant("t", "cpu-fp32").file))
    assert (found["BiasGelu"], found["Gelu"]) == (3 + 1, 2)


def portable_graph(result: ExportResult, experts: ExpertSet) -> ir.Model:
    return ir.load(read_bundle(result.folder).folder / result.manifest.variant(experts).file)


def test_a_pass_that_misses_a_pattern_is_an_error(bert: XAdapterModel, bert_bundle: ExportResult) -> None:
    merged = MergedModel(bert, "vt", "fill-mask")
    expected = {
        "fused_attention": 3 + 2 + 4,
        "split_projections": 3 + 2,
        "fused_gelu": 3 + 1 + 2,
        "fused_bias_gelu": 3 + 1 + 2,
    }
    for name, count in expected.items():
        model = portable_graph(bert_bundle, "vt")
        break_one(model, name)
        message = rf"pass {name} \(expected {count} patterns, got {count - 1}\)"
        with pytest.raises(ParityError, match=message):
            CPU.derive(Source(model, merged, "fp32"))
    unbroken = Source(portable_graph(bert_bundle, "vt"), merged, "fp32")
    graph, done = CPU.derive(unbroken)
    assert {step.name for step in done} == set(expected)
    assert ops(graph)["MultiHeadAttention"] == 9


def break_one(model: ir.Model, name: str) -> None:
    """Changes one place in a graph so that a pass no longer finds its pattern there."""
    graph = model.graph

    def producer(value: ir.Value | None) -> str:
        node = None if value is None else value.producer()
        return "" if node is None else node.op_type

    def first(op_type: str) -> ir.Node:
        return next(node for node in graph if node.op_type == op_type)

    if name == "fused_attention":
        first("Softmax").op_type = "LogSoftmax"
    elif name == "split_projections":
        split = [node for node in graph if node.op_type == "Slice" and producer(node.inputs[0]) == "Add"]
        split[0].op_type = "SliceOfAnother"
    elif name == "fused_gelu":
        next(user for user, _ in first("Erf").outputs[0].uses()).op_type = "Sub"
    else:  # its bias becomes a product
        erf = first("Erf").inputs[0]
        assert erf is not None
        value = next(
            v for v in cast(ir.Node, erf.producer()).inputs if v is not None and v.producer() is not None
        )
        cast(ir.Node, value.producer()).op_type = "Mul"


def test_what_a_pass_saved_is_in_the_manifest(bert_bundle: ExportResult) -> None:
    manifest = bert_bundle.manifest
    steps = manifest.variant("t", "cpu-fp32").optimizations
    assert [type(step) for step in steps] == [Optimization] * len(steps)
    nodes = [step for step in steps if step.unit == "nodes"]
    portable = portable_graph(bert_bundle, "t")
    assert nodes[0].before == len(portable.graph)
    for one, two in pairwise(nodes):
        assert one.after == two.before
    for step in nodes:
        assert step.after < step.before
    session = open_onnx(bert_bundle.folder / manifest.variant("t", "cpu-fp32").file)
    assert {value.name for value in session.get_outputs()} == {"logits"}
