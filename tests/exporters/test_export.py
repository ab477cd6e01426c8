import gc
import json
import re
import shutil
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from tests.perturbed import prove_with_each_matrix_off
from tests.tiny_checkpoint import TEXTS, VOCAB_SIZE, make_model
from xadapter_export import XAdapterSession, export
from xadapter_export.bundle.folder import read_bundle
from xadapter_export.bundle.manifest import ExpertSet
from xadapter_export.errors import (
    CheckpointError,
    ConfigError,
    OutputExistsError,
    OutputWriteError,
    ParityError,
    UnsupportedError,
)
from xadapter_export.exporters import onnx_files, pack, pipeline
from xadapter_export.exporters.pipeline import ExportResult
from xadapter_export.exporters.portable.merge import MergedModel
from xadapter_export.model.pooling import mean_pool
from xadapter_export.model.x_adapter_model import XAdapterModel
from xadapter_export.parity import prove_bundle

SETS: tuple[ExpertSet, ...] = ("vt", "v", "t", "none")


@pytest.fixture
def model(tiny_model: XAdapterModel) -> XAdapterModel:
    return tiny_model


@pytest.fixture
def result(tiny_export: ExportResult) -> ExportResult:
    """One bundle with every expert set, at opset 17; not to be changed."""
    return tiny_export


def graphs(folder: Path, name: str = "onnx-fp32") -> Iterator[tuple[ExpertSet, onnx.ModelProto]]:
    """The graphs of one variant, the portable one unless told otherwise, by their expert set."""
    for variant in read_bundle(folder).manifest.variants:
        if variant.name == name:
            yield variant.expert_set, onnx.load(folder / variant.file, load_external_data=False)


def size_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def test_every_graph_is_standard_onnx_of_the_asked_opset(result: ExportResult) -> None:
    for expert_set, graph in graphs(result.folder):
        assert [(entry.domain, entry.version) for entry in graph.opset_import] == [("", 17)], expert_set
        assert {node.domain for node in graph.graph.node} == {""}
        onnx.checker.check_model(result.folder / result.manifest.variant(expert_set).file, full_check=True)


def test_axes_are_named(result: ExportResult) -> None:
    for _, graph in graphs(result.folder):
        axes = {
            v.name: [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim]
            for v in graph.graph.input
        }
        assert axes["input_ids"] == axes["attention_mask"] == axes["token_type_ids"] == ["batch", "seq"]
        assert axes["mask_positions"] == ["batch", "masks"]
        assert axes.get("clip_input_ids", ["batch", "clip_seq"]) == ["batch", "clip_seq"]
        assert [d.dim_param or d.dim_value for d in graph.graph.output[0].type.tensor_type.shape.dim] == [
            "batch",
            "masks",
            40,
        ]


def test_parity_in_every_cell(result: ExportResult) -> None:
    assert result.parity.passed
    assert all(cell.max_abs is None or cell.max_abs < 1e-4 for cell in result.parity.cells)
    compared = {(cell.expert_set, cell.output) for cell in result.parity.cells}
    assert compared >= {
        ("none", "logits"),
        ("vt", "x_adapter.1.v"),
        ("vt", "x_adapter.2.t"),
        ("v", "retrieved"),
    }
    assert len({cell.case for cell in result.parity.cells}) == 5
    again = prove_bundle(result.folder)
    assert again.passed
    assert len(again.cells) == len(result.parity.cells)


def test_switching_an_expert_off_changes_the_answer_by_far_more_than_the_tolerance(
    result: ExportResult, model: XAdapterModel
) -> None:
    session = XAdapterSession.load(result.folder)
    inputs = {name: tensor.numpy() for name, tensor in model.encode(TEXTS).items()}
    logits = {
        experts: session.run({k: inputs[k] for k in names(result, experts)}, experts=experts)["logits"]
        for experts in SETS
    }
    pairs: list[tuple[ExpertSet, ExpertSet]] = [("vt", "v"), ("vt", "t"), ("v", "none"), ("t", "none")]
    for a, b in pairs:
        difference = np.abs(logits[a] - logits[b])
        assert (difference > 100 * (1e-4 + 1e-4 * np.abs(logits[b]))).any()


def names(result: ExportResult, experts: ExpertSet) -> list[str]:
    return [spec.name for spec in result.manifest.expert_sets[experts].inputs]


def test_any_adapter_matrix_that_is_5_percent_off_fails(result: ExportResult, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(result.folder, tmp_path / "bundle"))
    outcomes = prove_with_each_matrix_off(folder)
    assert len(outcomes) == 2 * 2 * 4  # layers x experts x (query, key, value, out)
    assert not any(outcomes.values()), outcomes
    assert prove_bundle(folder).passed


def test_inactive_parts_are_not_in_the_graph(
    model: XAdapterModel, result: ExportResult, tmp_path: Path
) -> None:
    found = {
        expert_set: {t.name for t in graph.graph.initializer} for expert_set, graph in graphs(result.folder)
    }
    assert any(name.startswith("bank") for name in found["v"])
    assert not any(re.match(r"bank|adapters\.\d+\.v", name) for name in found["t"])
    assert not any(re.match(r"adapters\.\d+\.t", name) for name in found["v"])
    assert not any(re.match(r"bank|adapters|clip", name) for name in found["none"])
    assert set(result.manifest.expert_sets["none"].component_parameters) == {"plm", "head"}
    alone = export(model, tmp_path / "none", "none").folder
    assert not (alone / "clip_tokenizer.json").exists()
    assert not (alone / "bank.jsonl").exists()
    assert size_bytes(alone / "onnx") < size_bytes(result.folder / "onnx") / 2


def test_weights_of_all_sets_stand_once(result: ExportResult) -> None:
    places: set[tuple[int, int]] = set()
    found = [graph for name in ("onnx-fp32", "cpu-fp32") for _, graph in graphs(result.folder, name)]
    assert len(found) == 2 * len(SETS)
    for graph in found:
        for tensor in graph.graph.initializer:
            if tensor.external_data:
                entry = {item.key: item.value for item in tensor.external_data}
                places.add((int(entry["offset"]), int(entry["length"])))
    assert all(offset + length <= start for (offset, length), (start, _) in pairwise(sorted(places)))
    data = (result.folder / "onnx/model.onnx_data").read_bytes()
    assert len({data[offset : offset + length] for offset, length in places}) == len(places)
    assert sum(length for _, length in places) > 0.9 * len(data)
    shapes = [tuple(t.dims) for graph in found for t in graph.graph.initializer]
    assert (40, 32) in shapes
    assert (32, 40) not in shapes  # the decoder is the embedding table


def test_nothing_tells_where_it_was_made(result: ExportResult, model: XAdapterModel) -> None:
    places = [str(Path(model.plm.source).parent), str(Path.home()), str(Path(pack.__file__).parents[2])]
    for path in result.folder.rglob("*"):
        if path.is_file():
            data = path.read_bytes()
            assert not any(place.encode() in data for place in places), path.name


def test_no_copy_of_the_weights_outlives_the_export(model: XAdapterModel, tmp_path: Path) -> None:
    packed = (3 * model.plm.hidden_size, model.plm.hidden_size)  # query, key and value in one

    def alive() -> int:
        gc.collect()
        kinds = (torch.Tensor, torch.nn.Parameter)
        tensors = [value for value in gc.get_objects() if type(value) in kinds]
        return sum(tuple(tensor.shape) == packed and not tensor.is_meta for tensor in tensors)

    before = alive()
    merged = MergedModel(model, "none", "fill-mask")
    assert alive() > before
    del merged
    assert alive() == before
    export(model, tmp_path / "bundle", "none")
    assert alive() == before


@pytest.mark.parametrize(
    ("opset", "experts"), [(18, "t"), pytest.param(19, "v", marks=pytest.mark.slow), (21, "vt")]
)
def test_other_opsets(opset: int, experts: ExpertSet, model: XAdapterModel, tmp_path: Path) -> None:
    result = export(model, tmp_path / "bundle", experts, opset=opset)
    ((_, graph),) = graphs(result.folder)
    assert [(entry.domain, entry.version) for entry in graph.opset_import] == [("", opset)]
    assert result.parity.passed


@pytest.mark.parametrize("opset", [11, 16, 22, 0])
def test_opsets_that_cannot_be_written(opset: int, model: XAdapterModel, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match=f"opset {opset} is not supported: expected 17 to 21"):
        export(model, tmp_path / "bundle", "t", opset=opset)
    assert not list(tmp_path.iterdir())


def test_candidates_slice_the_head(model: XAdapterModel, result: ExportResult, tmp_path: Path) -> None:
    words = ["yellow", "green", "red"]
    sliced = export(model, tmp_path / "bundle", "vt", candidates=words)
    assert [candidate.word for candidate in sliced.manifest.candidates or ()] == words
    few = XAdapterSession.load(sliced.folder).fill_mask(TEXTS[0])
    full = XAdapterSession.load(result.folder).fill_mask(TEXTS[0], candidates=words)
    assert [answer.token for answer in few] == [answer.token for answer in full]
    np.testing.assert_allclose([a.score for a in few], [a.score for a in full], rtol=1e-4)
    heads = [bundle.manifest.expert_sets["vt"].component_parameters["head"] for bundle in (sliced, result)]
    assert heads[0] == heads[1] - VOCAB_SIZE + 3 * (
        32 + 1
    )  # the whole decoder is the embedding table and a bias
    with pytest.raises(ConfigError, match="not one token of the language model: 'mauve'"):
        export(model, tmp_path / "other", "vt", candidates=["yellow", "mauve"])
    assert not (tmp_path / "other").exists()


def test_feature_extraction_from_a_fill_mask_checkpoint(model: XAdapterModel, tmp_path: Path) -> None:
    result = export(model, tmp_path / "bundle", "vt", task="feature-extraction")
    assert "head" not in result.manifest.expert_sets["vt"].component_parameters
    texts = ["a banana is yellow.", "the color of a cherry"]
    got = XAdapterSession.load(result.folder).embed(texts)
    inputs = {k: torch.from_numpy(v) for k, v in model.text_encoder.encode(texts).items()}
    with torch.no_grad():
        expected = mean_pool(model(**inputs).last_hidden_state, inputs["attention_mask"])
    np.testing.assert_allclose(got, expected.numpy(), atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(got, axis=1), 1, atol=1e-5)
    with pytest.raises(ConfigError, match="feature-extraction does not use candidates"):
        export(model, tmp_path / "other", "vt", task="feature-extraction", candidates=["red"])


def test_text_classification(tmp_path: Path) -> None:
    model = make_model(tmp_path, task="text-classification", labels=("bad", "good"))
    result = export(model, tmp_path / "bundle", ("t", "none"))
    assert result.manifest.labels == ("bad", "good")
    got = XAdapterSession.load(result.folder).classify(["a banana is green."], ["a cherry is red."])
    with torch.no_grad():
        logits = model(**model.encode(["a banana is green."], ["a cherry is red."]), experts="t").logits
    expected = dict(zip(("bad", "good"), logits.softmax(-1)[0].tolist(), strict=True))
    assert {answer.label: pytest.approx(answer.score, abs=1e-5) for answer in got[0]} == expected
    with pytest.raises(UnsupportedError, match="was trained for text-classification and can be exported for"):
        export(model, tmp_path / "other", "t", task="fill-mask")


def test_static_retrieval_is_folded_and_needs_no_clip(tmp_path: Path) -> None:
    model = make_model(tmp_path, experts="v", retrieval={"mode": "static"})
    result = export(model, tmp_path / "bundle", "v")
    assert result.parity.passed
    spec = result.manifest.expert_sets["v"]
    assert "clip_input_ids" not in [tensor.name for tensor in spec.inputs]
    assert "clip" not in spec.component_parameters
    ((_, graph),) = graphs(result.folder)
    found = {t.name for t in graph.graph.initializer}
    assert {"bank_keys_1", "bank_values_2"} <= found
    assert not any(re.match(r"adapters\.\d+\.v\.(key|value|memory_norm)", name) for name in found)


def test_max_seq_is_kept_and_checked(model: XAdapterModel, tmp_path: Path) -> None:
    result = export(model, tmp_path / "bundle", "none", max_seq=12)
    assert result.manifest.plm.max_seq == 12
    assert {cell.case for cell in result.parity.cells} >= {"single_longest"}
    for wrong in (4, 41):
        with pytest.raises(ConfigError, match=f"max_seq {wrong}: PLM .* takes 8 to 40 tokens"):
            export(model, tmp_path / "other", "t", max_seq=wrong)


def test_the_card_and_the_manifest_agree(result: ExportResult) -> None:
    card = (result.folder / "README.md").read_text()
    assert all(f"`{variant.file}`" in card for variant in result.manifest.variants)
    parity = json.loads((result.folder / "parity.json").read_text())
    assert parity["passed"] is True
    assert len(parity["cells"]) == len(result.parity.cells)
    assert result.manifest.created_with["torch"] == torch.__version__


def test_onnxruntime_is_named_whatever_package_brings_it(
    model: XAdapterModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """onnxruntime-directml and others bring the module under a name of their own."""

    def find(name: str) -> str:
        if name.startswith("onnxruntime"):
            raise PackageNotFoundError(name)
        return version(name)

    monkeypatch.setattr("xadapter_export.registry.version", find)
    manifest = export(model, tmp_path / "bundle", "none").manifest
    assert manifest.created_with["onnxruntime"] == onnxruntime.__version__


def test_what_stands_in_the_way_is_not_touched(
    model: XAdapterModel, result: ExportResult, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(result.folder, tmp_path / "bundle"))
    before = (folder / "manifest.json").read_bytes()
    with pytest.raises(OutputExistsError, match="output path already exists"):
        export(model, folder, "none")
    assert (folder / "manifest.json").read_bytes() == before
    assert export(model, folder, "none", force=True).manifest.default_expert_set == "none"


def test_expert_that_the_checkpoint_does_not_hold(tmp_path: Path) -> None:
    model = make_model(tmp_path, experts="t")
    with pytest.raises(CheckpointError, match="expert 'v' is not in this checkpoint, which holds 't'"):
        export(model, tmp_path / "bundle", "vt")
    assert not (tmp_path / "bundle").exists()


@pytest.mark.parametrize(
    ("error", "expected"),
    [(KeyboardInterrupt(), KeyboardInterrupt), (OSError(28, "No space left on device"), OutputWriteError)],
)
def test_ctrl_c_and_a_full_disk_leave_nothing(
    error: BaseException,
    expected: type[BaseException],
    model: XAdapterModel,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*_: object) -> int:
        raise error

    monkeypatch.setattr(onnx_files.SharedWeights, "take", fail)
    with pytest.raises(expected, match="No space left" if expected is OutputWriteError else None):
        export(model, tmp_path / "deep" / "bundle", "none")
    assert not list(tmp_path.iterdir())


def test_unwritable_place(model: XAdapterModel, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OutputWriteError, match="cannot be written"):
        export(model, tmp_path / "file" / "bundle", "t")


def test_a_graph_that_is_wrong_is_rejected(
    model: XAdapterModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class OffByFivePercent(MergedModel):
        def _contribution(self, *arguments: Any) -> tuple[torch.Tensor, Any]:
            added, lengths = super()._contribution(*arguments)
            return 1.05 * added, lengths

    monkeypatch.setattr(pipeline, "MergedModel", OffByFivePercent)
    with pytest.raises(ParityError, match=r"outputs differ from PyTorch's .* kept in .*bundle\.rejected"):
        export(model, tmp_path / "bundle", "t")
    assert not (tmp_path / "bundle").exists()
    assert not prove_bundle(tmp_path / "bundle.rejected").passed
