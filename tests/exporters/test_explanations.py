"""Graphs with explanations: what they take and give, that it is proven, and what cannot have them."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from tests.parity.test_prove import scale_weight
from tests.tiny_bundle import rehash
from tests.tiny_checkpoint import N, make_bank, make_model
from xadapter_export import XAdapterSession, export
from xadapter_export.errors import ConfigError, UnsupportedError
from xadapter_export.exporters.pipeline import ExportResult
from xadapter_export.exporters.request import ExportRequest
from xadapter_export.parity import prove_bundle
from xadapter_export.swap.swap import swap_bank

LENGTHS = ("lengths_v", "rest_v", "lengths_t", "rest_t")


def test_what_a_graph_takes_and_gives(explained_export: ExportResult, tiny_export: ExportResult) -> None:
    spec = explained_export.manifest.expert_sets["vt"]
    plain = tiny_export.manifest.expert_sets["vt"]
    k = explained_export.manifest.bank.k if explained_export.manifest.bank else 0
    assert {t.name: t.axes for t in spec.inputs[len(plain.inputs) :]} == {
        "keep_v": ("batch", k),
        "keep_t": ("batch", "clip_seq"),
    }
    assert {t.name: t.axes for t in spec.outputs[len(plain.outputs) :]} == {
        "lengths_v": ("batch", "masks", 2, k),
        "rest_v": ("batch", "masks", 2, 2),
        "lengths_t": ("batch", "masks", 2, "clip_seq"),
        "rest_t": ("batch", "masks", 2, 2),
    }
    assert spec.inputs[: len(plain.inputs)] == plain.inputs
    assert spec.outputs[: len(plain.outputs)] == plain.outputs
    assert spec.explains("v")
    assert not plain.explains("v")
    assert explained_export.manifest.expert_sets["none"] == tiny_export.manifest.expert_sets["none"]


def test_lengths_are_proven_in_every_case_and_fp32_variant(explained_export: ExportResult) -> None:
    cells = {
        (cell.variant, cell.case, cell.output): cell
        for cell in explained_export.parity.cells
        if cell.expert_set == "vt" and cell.output in LENGTHS
    }
    assert len(cells) == 2 * 5 * len(LENGTHS)
    assert all(cell.passed for cell in cells.values())


def test_the_reference_leaves_items_out(explained_export: ExportResult) -> None:
    with np.load(explained_export.folder / "reference.npz") as reference:
        assert reference["single_typical/in/keep_v"].all()
        assert (reference["batch_unpadded/in/keep_v"] == 0).sum() == 2
        assert not reference["batch_padded/in/keep_t"][-1].any()
        lengths, rest = (reference[f"batch_padded/vt/out/{name}"] for name in LENGTHS[:2])
        assert not lengths[-1].any()
        assert not rest[-1].any()
        assert lengths[0].any()


def test_the_fused_operator_is_still_there(explained_export: ExportResult, tiny_export: ExportResult) -> None:
    counts = []
    for result in (explained_export, tiny_export):
        file = result.folder / result.manifest.variant("vt", "cpu-fp32").file
        nodes = onnx.load(file, load_external_data=False).graph.node
        counts.append(sum(node.op_type == "MultiHeadAttention" for node in nodes))
    assert counts[0] == counts[1] > 4


@pytest.mark.parametrize("weight", ["value", "query", "out"])
def test_a_weight_that_is_off_is_noticed_in_the_lengths(
    explained_export: ExportResult, tmp_path: Path, weight: str
) -> None:
    folder = Path(shutil.copytree(explained_export.folder, tmp_path / "bundle"))
    file = folder / explained_export.manifest.variant("v").file
    graph = onnx.load(file, load_external_data=False).graph
    [name] = [t.name for t in graph.initializer if t.name.startswith(f"adapters.1.v.{weight}.weight")]
    scale_weight(file, name, 1.05)
    rehash(folder)
    report = prove_bundle(folder, ["v"], variants=["onnx-fp32"], verify=False)
    assert {"lengths_v", "x_adapter.1.v"} <= {cell.output for cell in report.failures}


@pytest.mark.parametrize(
    ("layer", "mode"),
    [
        ("token-query", "static"),
        ("null-rows", "topk"),
        pytest.param("token-query", "topk", marks=pytest.mark.slow),
        pytest.param("null-rows", "static", marks=pytest.mark.slow),
        pytest.param("sentence-query", "static", marks=pytest.mark.slow),
    ],
)
def test_every_kind_of_memory(tmp_path: Path, layer: str, mode: str) -> None:
    nulls: dict[str, Any] = {"null_rows": 2} if layer == "null-rows" else {}
    model = make_model(tmp_path, experts="v", layer=layer, retrieval={"mode": mode, "k": 3}, **nulls)
    result = export(model, tmp_path / "bundle", targets=("onnx", "cpu"), with_explanations=True)
    session = XAdapterSession.load(result.folder, num_threads=1)
    [answer] = session.explain("the color of a banana is [MASK].").answers
    [expert] = answer.experts
    assert len(expert.items) == (N if mode == "static" else 3)
    rest = expert.bias_share + expert.null_share
    assert sum(item.share for item in expert.items) + rest == pytest.approx(1, abs=1e-4)
    assert (expert.null_share != 0) == (layer == "null-rows")
    if mode == "static":
        assert [item.name for item in expert.items[:2]] == ["picture 0", "picture 1"]
        (tmp_path / "bank").mkdir()
        make_bank().save(tmp_path / "bank")
        with pytest.raises(UnsupportedError, match="explanations of a static bank"):
            swap_bank(result.folder, tmp_path / "bank", tmp_path / "swapped", assume_clip=True)


@pytest.mark.slow
@pytest.mark.parametrize("task", ["text-classification", "feature-extraction"])
def test_the_other_tasks(tmp_path: Path, task: str) -> None:
    settings: dict[str, Any] = {}
    if task == "text-classification":
        settings = {"task": task, "labels": ("sweet", "sour")}
    model = make_model(tmp_path, **settings)
    result = export(model, tmp_path / "bundle", "vt", task=task, with_explanations=True)
    [answer] = XAdapterSession.load(result.folder, num_threads=1).explain("a green banana").answers
    assert answer.mask is None
    for expert in answer.experts:
        shares = sum(item.share for item in expert.items) + expert.bias_share
        assert shares == pytest.approx(1, abs=1e-4)
        for item in expert.items:
            assert 0 < item.without.score <= 1 + 1e-6
            assert (item.without.answer is None) == (task == "feature-extraction")
    assert [a.label for a in answer.answers] in (["sweet", "sour"], ["sour", "sweet"], [])


def test_split_graphs_explain_as_whole_ones(explained_export: ExportResult, tmp_path: Path) -> None:
    model = make_model(tmp_path)
    result = export(model, tmp_path / "bundle", "vt", split=True, with_explanations=True)
    got, wanted = (
        XAdapterSession.load(folder, experts="vt", variant="onnx-fp32", num_threads=1).explain(
            "a [MASK] lime"
        )
        for folder in (result.folder, explained_export.folder)
    )
    for one, other in zip(got.answers[0].experts, wanted.answers[0].experts, strict=True):
        assert [i.name for i in one.items] == [i.name for i in other.items]
        assert [i.share for i in one.items] == pytest.approx([i.share for i in other.items], abs=1e-4)
        scores = [[item.without.score for item in expert.items] for expert in (one, other)]
        assert scores[0] == pytest.approx(scores[1], abs=1e-4)


def test_what_cannot_have_explanations(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="deployments cannot be made from graphs with explanations"):
        ExportRequest(targets=("triton",), with_explanations=True)
    with pytest.raises(ConfigError, match="there is nothing to explain without experts: experts none"):
        export(make_model(tmp_path), tmp_path / "bundle", "none", with_explanations=True)
    assert not (tmp_path / "bundle").exists()
