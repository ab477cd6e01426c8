"""One query of the whole sentence over prototypes: its arithmetic, its training, its export."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor

from tests.tiny_checkpoint import D, N, make_model, write_parts
from xadapter_export import XAdapterModel, XAdapterSession, export
from xadapter_export.bundle.folder import read_bundle
from xadapter_export.errors import ConfigError
from xadapter_export.exporters.pipeline import ExportResult
from xadapter_export.model.export_layers import additive_mask
from xadapter_export.model.pooling import unit_length
from xadapter_export.model.towers import load_clip
from xadapter_export.model.x_adapter import LayerShape, SentenceQueryLayer
from xadapter_export.parity import prove_bundle
from xadapter_export.runtime.text import clip_text
from xadapter_export.training import TrainResult, read_config, train

ANSWERS = {
    "the color of a banana is [MASK].": "green",
    "a fruit is very [MASK] green.": "very",
    "the [MASK] is a fruit.": "banana",
    "[MASK] fruit is green.": "green",
}
QUESTIONS = ["the color of a banana is [MASK].", "[MASK] fruit is very very green."]
B, T, H, R, A, C, M = 2, 5, 12, 8, 2, 6, 4
SHAPE = LayerShape(hidden_size=H, memory_width=C, adapter_width=R, num_heads=A, num_rows=M)


@pytest.fixture
def layer() -> SentenceQueryLayer:
    """A layer of which no weight is zero."""
    torch.manual_seed(0)
    made = SentenceQueryLayer(SHAPE)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return made.eval()


@pytest.fixture
def hidden() -> Tensor:
    return torch.randn((B, T, H), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def prototypes() -> Tensor:
    return torch.randn((1, M, C), generator=torch.Generator().manual_seed(2))


def normed(row: np.ndarray[Any, Any], norm: torch.nn.LayerNorm) -> np.ndarray[Any, Any]:
    centered = row - row.mean()
    scaled: np.ndarray[Any, Any] = centered / np.sqrt((centered**2).mean() + norm.eps)
    scaled *= norm.weight.detach().numpy()
    scaled += norm.bias.detach().numpy()
    return scaled


def by_loops(
    layer: SentenceQueryLayer, hidden: Tensor, prototypes: Tensor, lengths: list[int]
) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """The contribution ``(B, T, H)`` and the share of each prototype ``(B, A, M)``, number by number."""
    weights = {name: tensor.detach().double().numpy() for name, tensor in layer.state_dict().items()}
    size = R // A
    contribution = np.zeros((len(hidden), hidden.shape[1], H))
    shares = np.zeros((len(hidden), A, M))
    items = [normed(row, layer.memory_norm) for row in prototypes[0].double().numpy()]
    keys = [
        weights["key.weight"] @ item + weights["key.bias"] + weights["prototype_keys"][m]
        for m, item in enumerate(items)
    ]
    values = [weights["value.weight"] @ item + weights["value.bias"] for item in items]
    for b, length in enumerate(lengths):
        context = np.zeros(R)
        for head in range(A):
            part = slice(head * size, (head + 1) * size)
            scores = np.zeros((length, M))
            for t in range(length):
                state = normed(hidden[b, t].double().numpy(), layer.norm)
                query = (weights["query.weight"] @ state + weights["query.bias"])[part]
                for m in range(M):
                    scores[t, m] = query @ keys[m][part] / np.sqrt(size)
            pairs = np.exp(scores) / np.exp(scores).sum()
            shares[b, head] = pairs.sum(0)
            for m in range(M):
                context[part] += shares[b, head, m] * values[m][part]
        contribution[b] = weights["out.weight"] @ context + weights["out.bias"]
    return contribution, shares


@pytest.mark.parametrize("lengths", [[5, 5], [5, 2], [1, 3]])
def test_it_is_what_loops_compute(
    layer: SentenceQueryLayer, hidden: Tensor, prototypes: Tensor, lengths: list[int]
) -> None:
    mask = additive_mask(torch.arange(T)[None] < torch.tensor(lengths)[:, None])
    expected, shares = by_loops(layer, hidden, prototypes, lengths)
    with torch.no_grad():
        got = layer(hidden, prototypes, None, mask)
        logs = layer.log_attention(hidden, prototypes, mask)
    assert got.shape == (B, T, H)
    np.testing.assert_allclose(got.numpy(), expected, rtol=1e-4, atol=1e-5)
    assert np.abs(expected).max() > 0.1
    assert logs.shape == (B, A, 1, M)
    np.testing.assert_allclose(logs[:, :, 0].exp().numpy(), shares, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(shares.sum(-1), 1.0)


def test_padding_changes_nothing(layer: SentenceQueryLayer, hidden: Tensor, prototypes: Tensor) -> None:
    alone = layer(hidden[:1, :3], prototypes, None, additive_mask(torch.ones((1, 3), dtype=torch.int64)))
    mask = additive_mask(torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]))
    noise = hidden.clone()
    noise[0, 3:] = 100.0
    for states in (hidden, noise):
        together = layer(states, prototypes, None, mask)
        torch.testing.assert_close(together[0, :3], alone[0], rtol=1e-5, atol=1e-6)
    unmasked = layer(noise, prototypes, None, None)
    assert (unmasked[0, :3] - alone[0]).abs().max() > 1e-3  # the mask is what keeps it out


def test_a_fresh_layer_adds_exactly_nothing(hidden: Tensor, prototypes: Tensor) -> None:
    fresh = SentenceQueryLayer(SHAPE)
    assert not fresh(hidden, prototypes).any()
    assert fresh.prototype_keys.shape == (M, R)
    assert fresh.prototype_keys.requires_grad


def test_every_prototype_has_a_key_of_its_own(
    layer: SentenceQueryLayer, hidden: Tensor, prototypes: Tensor
) -> None:
    same = prototypes[:, :1].expand(-1, M, -1)  # features that cannot be told apart
    with torch.no_grad():
        logs = layer.log_attention(hidden, same, additive_mask(torch.ones((B, T), dtype=torch.int64)))
    assert (logs.exp() - 1 / M).abs().max() > 0.05


# ------------------------------------------------------------------------------------------ training


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("parts")
    write_parts(folder)
    rows = (json.dumps({"text": text, "answers": answer}) for text, answer in ANSWERS.items())
    (folder / "text.jsonl").write_text("\n".join(rows), encoding="utf-8")
    return folder


def run(parts: Path, output: Path, **more: Any) -> TrainResult:
    settings = {
        "output": str(output),
        **{name: str(parts / name) for name in ("plm", "clip", "bank")},
        "train_files": [str(parts / "text.jsonl")],
        "experts": "v",
        "retrieval": "static",
        "layer": "sentence-query",
        "layers": [1, 2],
        "adapter_width": 16,
        "num_heads": 2,
        "batch_size": 4,
        "max_steps": 2,
        "log_every": 1,
        **more,
    }
    return train(read_config(None, settings))


@pytest.fixture(scope="module")
def taught(parts: Path, tmp_path_factory: pytest.TempPathFactory) -> TrainResult:
    more = {"distill_weight": 1.0, "distill_steps": 60, "distill_temperature": 0.1}
    return run(parts, tmp_path_factory.mktemp("taught") / "ck", **more)


def divergence(model: XAdapterModel, parts: Path) -> float:
    """How far each text's attention, mean of the heads, is from CLIP's search of the bank, in nats."""
    clip = load_clip(parts / "clip")
    inputs = model.encode(list(ANSWERS))
    inputs.pop("mask_positions")
    with torch.no_grad():
        ids = [torch.tensor([clip.tokenizer.encode(clip_text(text, "[MASK]")).ids]) for text in ANSWERS]
        queries = torch.cat([unit_length(clip.pool(clip.token_states(row), row)) for row in ids])
        target = torch.log_softmax(queries @ model.bank_features.T / 0.1, -1)  # (B, N)
        hidden = model.hidden_before(1, **inputs)
        layer = model.adapters["1"]["v"]  # type: ignore[index]  # a ModuleDict of experts
        mask = additive_mask(inputs["attention_mask"])
        logs = layer.log_attention(hidden, model.bank_features[None], mask)
        share = logs.exp().mean(1)[:, 0].log()  # (B, N)
    assert share.shape == (len(ANSWERS), N)
    return float((target.exp() * (target - share)).sum(-1).mean())


def test_it_learns_to_look_where_clip_would_search(taught: TrainResult, parts: Path, tmp_path: Path) -> None:
    first = [entry["loss"] for entry in taught.curve if entry["phase"] == 1 and "loss" in entry]
    assert len(first) == 60
    assert np.mean(first[-5:]) < 0.5 * first[0]
    assert {entry["phase"] for entry in taught.curve} == {1, 2}
    assert taught.steps == 62
    untaught = run(parts, tmp_path / "ck")
    assert divergence(taught.model, parts) < 0.6 * divergence(untaught.model, parts)


def test_distillation_alone_leaves_the_output_at_its_start(parts: Path, tmp_path: Path) -> None:
    more = {"distill_weight": 1.0, "distill_steps": 3, "learning_rate": 1e-12, "weight_decay": 0.0}
    state = run(parts, tmp_path / "ck", max_steps=1, **more).model.trained_state()
    assert max(float(t.abs().max()) for name, t in state.items() if ".out." in name) < 1e-9


def test_the_same_plugin_comes_back_from_disk(taught: TrainResult) -> None:
    again = XAdapterModel.from_pretrained(taught.folder)
    assert again.clip is None  # it taught, and is no longer needed
    assert (again.config.retrieval.mode, again.config.layer) == ("static", "sentence-query")
    state = taught.model.trained_state()
    assert [tuple(t.shape) for name, t in state.items() if "prototype_keys" in name] == [(N, 16)] * 2
    assert state.keys() == again.trained_state().keys()
    assert all(torch.equal(tensor, state[name]) for name, tensor in again.trained_state().items())
    inputs = again.encode(QUESTIONS)
    assert "clip_input_ids" not in inputs
    with torch.no_grad():
        assert torch.equal(again(**inputs).logits, taught.model(**inputs).logits)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"retrieval": "topk"}, "layer sentence-query needs static retrieval"),
        ({"distill_steps": 3}, "distill_steps needs a distill_weight above 0"),
        ({"distill_weight": 1.0, "clip": None}, "clip: needed by"),
    ],
)
def test_settings_that_do_not_go_together(
    parts: Path, tmp_path: Path, more: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        run(parts, tmp_path / "ck", **more)


# ------------------------------------------------------------------------------------------ export


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> XAdapterModel:
    """Random weights, none of them small: what parity is asked of."""
    folder = tmp_path_factory.mktemp("model")
    made = make_model(folder, experts="v", retrieval={"mode": "static"}, layer="sentence-query")
    made.clip = None
    made.text_encoder = made.make_text_encoder(made.plm.max_seq)
    return made


@pytest.fixture(scope="module")
def result(model: XAdapterModel, tmp_path_factory: pytest.TempPathFactory) -> ExportResult:
    return export(model, tmp_path_factory.mktemp("export") / "bundle", "v", opset=17)


def check(result: ExportResult, model: XAdapterModel) -> None:
    assert result.parity.passed
    assert {cell.output for cell in result.parity.cells} >= {"logits", "x_adapter.1.v", "x_adapter.2.v"}
    for spec in result.manifest.expert_sets.values():
        assert {tensor.name for tensor in spec.inputs} == {
            "input_ids",
            "attention_mask",
            "token_type_ids",
            "mask_positions",
        }
    session = XAdapterSession.load(result.folder)
    inputs = model.encode(QUESTIONS)
    feed = {name: tensor.numpy() for name, tensor in inputs.items()}
    with torch.no_grad():
        logits, plain = (model(**inputs, experts=experts).logits.numpy() for experts in ("v", "none"))
    np.testing.assert_allclose(session.run(feed)["logits"], logits, rtol=1e-4, atol=1e-4)
    assert np.abs(logits - plain).max() > 0.1


def test_the_bundle_of_opset_17_needs_no_clip(result: ExportResult, model: XAdapterModel) -> None:
    check(result, model)
    assert not list(result.folder.rglob("*clip*"))
    variant = read_bundle(result.folder).manifest.variant("v")
    graph = onnx.load(result.folder / variant.file, load_external_data=False).graph
    assert D not in {
        size for tensor in graph.initializer for size in tensor.dims
    }  # keys and values are folded


def test_the_bundle_of_opset_21_needs_no_clip(model: XAdapterModel, tmp_path: Path) -> None:
    made = export(model, tmp_path / "bundle", "v", opset=21)
    check(made, model)


def test_a_prototype_key_that_is_off_fails(result: ExportResult, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(result.folder, tmp_path / "bundle"))
    variant = read_bundle(folder).manifest.variant("v")
    graph = onnx.load(folder / variant.file, load_external_data=False).graph
    keys = [tensor for tensor in graph.initializer if tensor.name.startswith("bank_keys")]
    assert [tuple(tensor.dims) for tensor in keys] == [(1, N, 16)] * 2
    outcomes = {}
    with (folder / variant.weight_files[0]).open("r+b") as file:
        for tensor in keys:
            entry = {item.key: int(item.value) for item in tensor.external_data if item.key != "location"}
            for prototype in range(0, N, 5):
                place = entry["offset"] + prototype * 16 * 4
                file.seek(place)
                original = file.read(16 * 4)
                for data in ((np.frombuffer(original, np.float32) * np.float32(1.2)).tobytes(), original):
                    file.seek(place)
                    file.write(data)
                    file.flush()
                    if data is not original:
                        passed = prove_bundle(folder, ["v"], verify=False).passed
                        outcomes[tensor.name, prototype] = passed
    assert len(outcomes) == 12
    assert not any(outcomes.values()), outcomes
    assert prove_bundle(folder, ["v"]).passed
