"""Kinds of layers: one equation in every form, and others that are added from outside."""

import json
from collections.abc import Mapping
from importlib.metadata import EntryPoint
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file
from torch import Tensor, nn

from tests.tiny_checkpoint import TEXTS, D, N, make_bank, make_model
from xadapter_export import XAdapterModel, XAdapterSession, export, registry
from xadapter_export.bank import FeatureBank
from xadapter_export.bank.graph_rows import Projections
from xadapter_export.bundle.folder import PROJECTIONS_NAME
from xadapter_export.errors import BundleError, ConfigError, UnsupportedError
from xadapter_export.layers import LAYERS, SENTENCE_QUERY, TOKEN_QUERY, LayerKind
from xadapter_export.model.config import XAdapterConfig
from xadapter_export.model.export_layers import additive_mask
from xadapter_export.model.x_adapter import LayerShape, Projected, TokenQueryLayer, XAdapterLayer, make_layer
from xadapter_export.swap.swap import swap_bank

GROUP = "xadapter_export.layers"
B, T, H, C, R, A = 2, 5, 12, D, 8, 2
NULLS = 1
Float32 = NDArray[np.float32]

# -------------------------------------------------------------------------------- what a package would have


class NullRowsLayer(TokenQueryLayer):
    """Rows beside the memory, with keys and values of their own, for tokens that no memory item helps."""

    is_fused = False  # with a mask it is no attention that onnxruntime has

    def __init__(self, shape: LayerShape) -> None:
        super().__init__(shape)
        self.null_keys = nn.Parameter(torch.randn(NULLS, shape.adapter_width))
        self.null_values = nn.Parameter(torch.randn(NULLS, shape.adapter_width))

    def project_memory(self, memory: Tensor, mask: Tensor | None = None) -> Projected:
        keys, values, mask = super().project_memory(memory, mask)
        nulls = [null.expand(memory.shape[0], -1, -1) for null in (self.null_keys, self.null_values)]
        if mask is not None:
            mask = torch.cat([mask, torch.zeros_like(mask[..., :NULLS])], -1)
        return Projected(torch.cat([keys, nulls[0]], 1), torch.cat([values, nulls[1]], 1), mask)


class NullRows(LayerKind):
    def fold(self, state: Mapping[str, Float32], rows: Float32) -> tuple[Float32, Float32]:
        keys, values = super().fold(state, rows)
        return (
            np.concatenate([keys, state["null_keys"][None]], 1),
            np.concatenate([values, state["null_values"][None]], 1),
        )


NULL_ROWS = NullRows(
    name="null-rows",
    says="each token asks for itself, and may take nothing",
    torch_half="tests.layers.test_layers:NullRowsLayer",
    fold_reads=(*TOKEN_QUERY.fold_reads, "null_keys", "null_values"),
)


@pytest.fixture(autouse=True)
def _installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Installs the kind above, as a package with this entry point would."""
    points = [EntryPoint("null-rows", "tests.layers.test_layers:NULL_ROWS", GROUP)]
    monkeypatch.setattr(registry, "entry_points", lambda group: points if group == GROUP else [])
    monkeypatch.setattr(LAYERS, "_loaded", dict(LAYERS._loaded))


KINDS = (TOKEN_QUERY, SENTENCE_QUERY, NULL_ROWS)


def fresh(kind: LayerKind) -> XAdapterLayer:
    """A layer of which no weight is zero."""
    torch.manual_seed(0)
    layer = make_layer(kind, LayerShape(H, C, R, A, num_rows=N))
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


@pytest.mark.parametrize("kind", [TOKEN_QUERY, NULL_ROWS], ids=lambda kind: kind.name)
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


def test_the_kind_of_this_file_is_another_equation() -> None:
    layer, hidden, memory = fresh(NULL_ROWS), torch.randn(B, T, H), rows()[None]
    plain = TokenQueryLayer(LayerShape(H, C, R, A))
    plain.load_state_dict({k: v for k, v in layer.state_dict().items() if "null" not in k})
    with torch.no_grad():
        assert (layer(hidden, memory) - plain(hidden, memory)).abs().max() > 1e-2


# ---------------------------------------------------------------------------------------------- the table


def test_ours_come_first_and_one_of_a_package_is_found() -> None:
    assert tuple(LAYERS) == ("token-query", "sentence-query", "null-rows")
    assert LAYERS["null-rows"] is NULL_ROWS
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
    file.write_text(json.dumps(record), encoding="utf-8")
    assert XAdapterModel.from_pretrained(tmp_path / "checkpoint").config == model.config


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
    model = make_model(tmp_path, layer="null-rows")
    result = export(model, tmp_path / "bundle", "vt", variants=("onnx-fp32", "cpu-fp32"))
    assert result.parity.passed
    assert {"x_adapter.1.v", "x_adapter.2.t"} <= {cell.output for cell in result.parity.cells}
    answers_as_trained(model, result.folder, "cpu-fp32")


@pytest.mark.long
def test_rows_beside_a_static_bank_stay_when_it_is_swapped(tmp_path: Path) -> None:
    model = make_model(tmp_path, experts="v", layer="null-rows", retrieval={"mode": "static"})
    made = export(model, tmp_path / "bundle", "v")
    assert made.manifest.expert_sets["v"].component_parameters["bank"] == 2 * 2 * (N + NULLS) * 16
    features = np.random.default_rng(5).standard_normal((47, D)).astype(np.float32)
    features /= np.linalg.norm(features, axis=1, keepdims=True)
    bank = FeatureBank(features, tuple(make_bank().pictures[n % N] for n in range(47)))
    (tmp_path / "bank").mkdir()
    bank.save(tmp_path / "bank")
    swapped = swap_bank(made.folder, tmp_path / "bank", tmp_path / "swapped", assume_clip=True)
    assert swapped.num_cells > 0
    assert swapped.manifest.expert_sets["v"].component_parameters["bank"] == 2 * 2 * (47 + NULLS) * 16
    other = XAdapterModel(model.config, model.plm, None, bank)
    other.adapters.load_state_dict(model.adapters.state_dict())
    answers_as_trained(other, swapped.folder, "onnx-fp32")


def test_projections_that_are_not_whole_are_refused(tmp_path: Path) -> None:
    state = {name: tensor.numpy() for name, tensor in fresh(NULL_ROWS).state_dict().items()}
    whole = {name: state[name] for name in NULL_ROWS.fold_reads}
    Projections(NULL_ROWS, {"1": whole}).save(tmp_path)
    read = Projections.load(tmp_path / PROJECTIONS_NAME)
    assert read.kind is NULL_ROWS
    assert all(np.array_equal(read.states["1"][name], whole[name]) for name in whole)
    stored = load_file(tmp_path / PROJECTIONS_NAME)
    del stored["1.null_keys"]
    save_file(stored, tmp_path / "some", {"layer": "null-rows"})
    with pytest.raises(BundleError, match="projections of the bank are incomplete"):
        Projections.load(tmp_path / "some")
    save_file(stored, tmp_path / "unnamed")
    with pytest.raises(BundleError, match="projections of the bank cannot be read"):
        Projections.load(tmp_path / "unnamed")
    save_file(stored, tmp_path / "unknown", {"layer": "round"})
    with pytest.raises(UnsupportedError, match=r"no such layer kind .*got round"):
        Projections.load(tmp_path / "unknown")
