"""Kinds of layers: one equation in every form, and others that are added from outside."""

import json
import shutil
from collections import Counter
from collections.abc import Mapping
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from click.testing import CliRunner
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file
from torch import Tensor, nn

from tests.perturbed import prove_with_each_matrix_off
from tests.tiny_checkpoint import TEXTS, D, N, make_bank, make_model
from xadapter_export import XAdapterModel, XAdapterSession, export, registry
from xadapter_export.bank import FeatureBank
from xadapter_export.bank.graph_rows import Projections
from xadapter_export.bundle.folder import PROJECTIONS_NAME
from xadapter_export.cli.inspect import inspect as inspect_command
from xadapter_export.errors import BundleError, ConfigError, UnsupportedError
from xadapter_export.exporters.pipeline import ExportResult
from xadapter_export.layers import LAYERS, NULL_ROWS, SENTENCE_QUERY, TOKEN_QUERY, LayerKind
from xadapter_export.model.config import XAdapterConfig
from xadapter_export.model.export_layers import additive_mask
from xadapter_export.model.x_adapter import LayerShape, Projected, TokenQueryLayer, XAdapterLayer, make_layer
from xadapter_export.parity import prove_bundle
from xadapter_export.swap.swap import swap_bank

GROUP = "xadapter_export.layers"
B, T, H, C, R, A = 2, 5, 12, D, 8, 2
NULLS = 3
Float32 = NDArray[np.float32]

# -------------------------------------------------------------------------------- what a package would have


class SinkLayer(TokenQueryLayer):
    """A last row with a key of its own and a value of zero: what looks there gets nothing."""

    is_fused = False  # with a mask it is no attention that onnxruntime has

    def __init__(self, shape: LayerShape) -> None:
        super().__init__(shape)
        self.sink_key = nn.Parameter(torch.randn(1, shape.adapter_width))

    def project_memory(self, memory: Tensor, mask: Tensor | None = None) -> Projected:
        keys, values, mask = super().project_memory(memory, mask)
        sink = self.sink_key.expand(memory.shape[0], -1, -1)
        if mask is not None:
            mask = torch.cat([mask, torch.zeros_like(mask[..., :1])], -1)
        return Projected(torch.cat([keys, sink], 1), torch.cat([values, 0 * sink], 1), mask)


class Sink(LayerKind):
    def fold(self, state: Mapping[str, Float32], rows: Float32) -> tuple[Float32, Float32]:
        keys, values = super().fold(state, rows)
        return np.concatenate([keys, state["sink_key"][None]], 1), np.pad(values, ((0, 0), (0, 1), (0, 0)))


SINK = Sink(
    name="sink",
    says="each token asks for itself, and may take nothing",
    torch_half="tests.layers.test_layers:SinkLayer",
    fold_reads=(*TOKEN_QUERY.fold_reads, "sink_key"),
)


@pytest.fixture(autouse=True)
def _installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Installs the kind above, as a package with this entry point would."""
    points = [EntryPoint("sink", "tests.layers.test_layers:SINK", GROUP)]
    monkeypatch.setattr(registry, "entry_points", lambda group: points if group == GROUP else [])
    monkeypatch.setattr(LAYERS, "_loaded", dict(LAYERS._loaded))


KINDS = (TOKEN_QUERY, SENTENCE_QUERY, NULL_ROWS, SINK)


def fresh(kind: LayerKind) -> XAdapterLayer:
    """A layer of which no weight is zero."""
    torch.manual_seed(0)
    layer = make_layer(kind, LayerShape(H, C, R, A, num_rows=N, num_null_rows=NULLS))
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return layer.eval()


def rows(seed: int = 0, num_rows: int = N) -> Tensor:
    return torch.randn(num_rows, C, generator=torch.Generator().manual_seed(seed))


# ------------------------------------------------------------------------------------------- the equation


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
@torch.no_grad()
def test_the_graph_form_is_the_trained_form(kind: LayerKind) -> None:
    layer = fresh(kind)
    hidden = torch.randn(B, T, H)
    tokens = additive_mask(torch.tensor([[1] * T, [1, 1, 0, 0, 0]]))
    memory_mask = (
        None if kind.learns_rows else additive_mask(torch.arange(N)[None] < torch.tensor([[N], [3]]))
    )
    memory = rows()[None] if kind.learns_rows else torch.stack([rows(1), rows(2)])
    trained = layer(hidden, memory, memory_mask, tokens)
    traced = layer.attend_in_graph(hidden, layer.project_memory(memory, memory_mask), tokens)
    assert trained.abs().max() > 0.1
    torch.testing.assert_close(traced, trained, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", [TOKEN_QUERY, NULL_ROWS, SINK], ids=lambda kind: kind.name)
@torch.no_grad()
def test_a_bank_is_folded_to_the_same_bits_without_pytorch(kind: LayerKind) -> None:
    layer, bank = fresh(kind), rows()
    state = layer.state_dict()
    folded = kind.fold({name: state[name].numpy() for name in kind.fold_reads}, bank.numpy())
    projected = layer.project_memory(bank[None])
    for ours, plain, trained in zip(layer.fold(bank), folded, projected[:2], strict=True):
        assert plain.dtype == np.float32
        assert np.array_equal(ours.numpy(), plain)
        torch.testing.assert_close(ours, trained, rtol=1e-4, atol=1e-5)


def without(kind: LayerKind) -> tuple[XAdapterLayer, TokenQueryLayer]:
    """A layer of a kind that adds rows, and one without them that has the same weights else."""
    layer, plain = fresh(kind), TokenQueryLayer(LayerShape(H, C, R, A))
    names = plain.state_dict().keys()
    plain.load_state_dict({name: tensor for name, tensor in layer.state_dict().items() if name in names})
    return layer, plain.eval()


@pytest.mark.parametrize("kind", [NULL_ROWS, SINK], ids=lambda kind: kind.name)
def test_kinds_that_add_rows_are_another_equation(kind: LayerKind) -> None:
    layer, plain = without(kind)
    hidden, memory = torch.randn(B, T, H), rows()[None]
    with torch.no_grad():
        assert (layer(hidden, memory) - plain(hidden, memory)).abs().max() > 1e-2


@torch.no_grad()
def test_null_rows_share_the_softmax_with_the_memory_and_are_never_masked() -> None:
    layer, plain = without(NULL_ROWS)
    hidden, memory = torch.randn(B, T, H), torch.stack([rows(1), rows(2)])
    seen = torch.arange(N)[None] < torch.tensor([[N], [1]])
    projected = layer.project_memory(memory, additive_mask(seen))
    keys, values = (
        torch.cat([items, layer.get_parameter(name).expand(B, NULLS, R)], 1)
        for items, name in zip(plain.project_memory(memory)[:2], ("null_keys", "null_values"), strict=True)
    )
    assert torch.equal(projected.keys, keys)
    assert torch.equal(projected.values, values)
    assert layer.num_null_rows == NULLS == projected.keys.shape[1] - N
    heads = (
        torch.unflatten(x, -1, (A, -1)).transpose(1, 2)
        for x in (layer.query(layer.norm(hidden)), keys, values)
    )
    query, key, value = (head.double() for head in heads)
    scores = (query @ key.mT / (R / A) ** 0.5).exp()
    scores[1, :, :, 1:N] = 0  # what the mask hides of the second text
    context = (scores / scores.sum(-1, keepdim=True)) @ value
    expected = layer.out(context.transpose(1, 2).flatten(2).float())
    torch.testing.assert_close(layer(hidden, memory, additive_mask(seen)), expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_distillation_teaches_where_to_look_among_the_pictures_alone() -> None:
    layer, plain = without(NULL_ROWS)
    hidden, tokens = torch.randn(B, T, H), additive_mask(torch.ones(B, T))
    taught = layer.log_attention(hidden, rows()[None], tokens)
    assert torch.equal(taught, plain.log_attention(hidden, rows()[None], tokens))
    torch.testing.assert_close(taught.exp().sum(-1), torch.ones(B, A, T))


def test_fresh_null_rows_are_as_large_as_fresh_keys_and_values_and_add_nothing() -> None:
    torch.manual_seed(0)
    layer = make_layer(NULL_ROWS, LayerShape(H, 64, 64, A, num_null_rows=500))
    assert not layer(torch.randn(B, T, H), torch.randn(B, N, 64)).any()
    projected = layer.project_memory(torch.randn(1, 500, 64))
    for part in (projected.keys, projected.values):
        memory, nulls = (part[:, some].std().item() for some in (slice(500), slice(500, None)))
        assert nulls == pytest.approx(memory, rel=0.05)


# ---------------------------------------------------------------------------------------------- the table


def test_ours_come_first_and_one_of_a_package_is_found() -> None:
    assert tuple(LAYERS) == ("token-query", "sentence-query", "null-rows", "sink")
    assert LAYERS["sink"] is SINK
    assert XAdapterConfig(layers=(1,)).layer == "token-query"


def test_a_kind_that_is_not_there_is_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"there is no such layer kind .*token-query.*got round"):
        XAdapterConfig(layers=(1,), layer="round")
    with pytest.raises(
        ConfigError, match=r"a table names what is not there: tests\.layers\.test_layers:Nothing"
    ):
        make_layer(LayerKind("gone", "nothing", "tests.layers.test_layers:Nothing"), LayerShape(H, C, R, A))


def test_a_kind_that_learns_rows_is_for_a_static_bank_and_its_expert_alone(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="layer sentence-query needs static retrieval"):
        XAdapterConfig(layers=(1,), layer="sentence-query")
    model = make_model(tmp_path, layer="sentence-query", retrieval={"mode": "static"})
    experts = dict(model.adapters["1"].items())  # type: ignore[operator]  # a ModuleDict of experts
    assert {name: type(layer).__name__ for name, layer in experts.items()} == {
        "v": "SentenceQueryLayer",
        "t": "TokenQueryLayer",
    }


def test_a_checkpoint_from_before_there_were_kinds_is_read(tmp_path: Path) -> None:
    model = make_model(tmp_path)
    model.save_pretrained(tmp_path / "checkpoint", self_contained=True)
    file = tmp_path / "checkpoint" / "xadapter.json"
    record = json.loads(file.read_text("utf-8"))
    assert record["config"].pop("layer") == "token-query"
    assert "null_rows" not in record["config"]
    file.write_text(json.dumps(record), encoding="utf-8")
    assert XAdapterModel.from_pretrained(tmp_path / "checkpoint").config == model.config


def test_a_checkpoint_says_how_many_null_rows_it_has(tmp_path: Path) -> None:
    model = make_model(tmp_path, layer="null-rows", null_rows=NULLS)
    model.save_pretrained(tmp_path / "checkpoint", self_contained=True)
    again = XAdapterModel.from_pretrained(tmp_path / "checkpoint")
    assert again.config.null_rows == NULLS
    assert torch.equal(
        again.trained_state()["adapters.1.t.null_keys"], model.trained_state()["adapters.1.t.null_keys"]
    )
    assert (
        f"16 wide, with {NULLS} null rows alongside each memory."
        in (tmp_path / "checkpoint/README.md").read_text()
    )
    with pytest.raises(
        ValueError, match="layer token-query has no null_rows; choose one that has, such as null-rows"
    ):
        XAdapterConfig(layers=(1,), null_rows=4)
    with pytest.raises(ValueError, match="layer null-rows needs null_rows of at least 1"):
        XAdapterConfig(layers=(1,), layer="null-rows")


# ----------------------------------------------------------------------------------- from export to answer


def answers_as_trained(model: XAdapterModel, folder: Path, variant: str) -> None:
    session = XAdapterSession.load(folder, variant=variant, num_threads=1)
    inputs = model.encode(TEXTS)
    with torch.no_grad():
        logits, plain = (model(**inputs, experts=experts).logits.numpy() for experts in (None, "none"))
    got = session.run({name: tensor.numpy() for name, tensor in inputs.items()})["logits"]
    np.testing.assert_allclose(got, logits, rtol=1e-4, atol=1e-4)
    assert np.abs(logits - plain).max() > 0.1


@pytest.mark.long
def test_rows_beside_the_memory_are_exported_and_proven(tmp_path: Path) -> None:
    model = make_model(tmp_path, layer="sink")
    result = export(model, tmp_path / "bundle", "vt", variants=("onnx-fp32", "cpu-fp32"))
    assert result.parity.passed
    assert {"x_adapter.1.v", "x_adapter.2.t"} <= {cell.output for cell in result.parity.cells}
    answers_as_trained(model, result.folder, "cpu-fp32")


@pytest.mark.long
@pytest.mark.parametrize(
    ("settings", "added"), [({"layer": "sink"}, 1), ({"layer": "null-rows", "null_rows": NULLS}, NULLS)]
)
def test_rows_beside_a_static_bank_stay_when_it_is_swapped(
    tmp_path: Path, settings: dict[str, Any], added: int
) -> None:
    model = make_model(tmp_path, experts="v", retrieval={"mode": "static"}, **settings)
    made = export(model, tmp_path / "bundle", "v")
    assert made.manifest.expert_sets["v"].component_parameters["bank"] == 2 * 2 * (N + added) * 16
    features = np.random.default_rng(5).standard_normal((47, D)).astype(np.float32)
    features /= np.linalg.norm(features, axis=1, keepdims=True)
    bank = FeatureBank(features, tuple(make_bank().pictures[n % N] for n in range(47)))
    (tmp_path / "bank").mkdir()
    bank.save(tmp_path / "bank")
    swapped = swap_bank(made.folder, tmp_path / "bank", tmp_path / "swapped", assume_clip=True)
    assert swapped.num_cells > 0
    assert swapped.manifest.expert_sets["v"].component_parameters["bank"] == 2 * 2 * (47 + added) * 16
    other = XAdapterModel(model.config, model.plm, None, bank)
    other.adapters.load_state_dict(model.adapters.state_dict())
    answers_as_trained(other, swapped.folder, "onnx-fp32")


@pytest.fixture(scope="module")
def nulls(tmp_path_factory: pytest.TempPathFactory) -> tuple[XAdapterModel, ExportResult]:
    """A plug-in with null rows, and its bundle: every expert set, fused and in int8."""
    folder = tmp_path_factory.mktemp("nulls")
    model = make_model(folder, layer="null-rows", null_rows=16)  # enough to be in the file of weights
    variants = ("onnx-fp32", "cpu-fp32", "cpu-int8")
    made = export(model, folder / "bundle", ("vt", "v", "t"), variants=variants, opset=17, min_agreement=0.9)
    return model, made


def test_null_rows_are_fused_like_any_memory(nulls: tuple[XAdapterModel, ExportResult]) -> None:
    model, result = nulls
    assert result.parity.passed
    for variant in result.manifest.variants:
        graph = onnx.load(result.folder / variant.file, load_external_data=False).graph
        operators = Counter(node.op_type for node in graph.node)
        attentions = 3 + 2 + 2 * len(variant.expert_set)  # of the PLM, of CLIP, of two layers with experts
        fused = 0 if variant.target == "onnx" else attentions
        assert (operators["MultiHeadAttention"], operators["Softmax"]) == (fused, attentions - fused)
    answers_as_trained(model, result.folder, "cpu-fp32")


def test_null_rows_that_are_5_percent_off_fail_the_proof(
    nulls: tuple[XAdapterModel, ExportResult], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(nulls[1].folder, tmp_path / "bundle"))
    outcomes = prove_with_each_matrix_off(folder, only="null_")
    assert len(outcomes) == 2 * 2 * 2  # layers x experts x (keys, values)
    assert not any(outcomes.values()), outcomes
    assert prove_bundle(folder).passed


def test_a_bundle_says_how_many_null_rows_it_has(
    nulls: tuple[XAdapterModel, ExportResult], tiny_export: ExportResult
) -> None:
    shown = CliRunner().invoke(inspect_command, [str(nulls[1].folder)])
    assert "null-rows, 16 null rows alongside each memory" in shown.stdout
    plain = json.loads(tiny_export.manifest.to_json())["checkpoint"]
    assert plain["layer"] == "token-query"
    assert "null_rows" not in plain


def test_null_rows_are_proven_where_the_bank_is_searched_outside(
    nulls: tuple[XAdapterModel, ExportResult], tmp_path: Path
) -> None:
    result = export(
        nulls[0], tmp_path / "bundle", "vt", retrieval="external", variants=("onnx-fp32", "cpu-fp32")
    )
    assert result.parity.passed
    answers_as_trained(nulls[0], result.folder, "cpu-fp32")


def test_projections_that_are_not_whole_are_refused(tmp_path: Path) -> None:
    state = {name: tensor.numpy() for name, tensor in fresh(SINK).state_dict().items()}
    whole = {name: state[name] for name in SINK.fold_reads}
    Projections(SINK, {"1": whole}).save(tmp_path)
    read = Projections.load(tmp_path / PROJECTIONS_NAME)
    assert read.kind is SINK
    assert all(np.array_equal(read.states["1"][name], whole[name]) for name in whole)
    stored = load_file(tmp_path / PROJECTIONS_NAME)
    del stored["1.sink_key"]
    save_file(stored, tmp_path / "some", {"layer": "sink"})
    with pytest.raises(BundleError, match="projections of the bank are incomplete"):
        Projections.load(tmp_path / "some")
    save_file(stored, tmp_path / "unnamed")
    with pytest.raises(BundleError, match="projections of the bank cannot be read"):
        Projections.load(tmp_path / "unnamed")
    save_file(stored, tmp_path / "unknown", {"layer": "round"})
    with pytest.raises(UnsupportedError, match=r"no such layer kind .*got round"):
        Projections.load(tmp_path / "unknown")
