from pathlib import Path

import pytest
import torch
from pydantic import ValidationError

from tests.tiny_checkpoint import FAMILIES, TEXTS, make_bank, make_clip, make_model, make_plm, write_parts
from xadapter_export.errors import CheckpointError, ConfigError, UnsupportedError
from xadapter_export.model.config import XAdapterConfig
from xadapter_export.model.plm import NoMlmHeadError, family_of, load_plm
from xadapter_export.model.x_adapter_model import XAdapterModel

from transformers import AutoModel, GPT2Config, MPNetConfig  # isort: skip  # cured by model.plm

CONFIG = XAdapterConfig(experts="vt", layers=(1, 2), adapter_width=16, num_heads=2)


def plain_inputs(model: XAdapterModel, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    names = ["input_ids", "attention_mask"] + (["token_type_ids"] if model.plm.has_token_type_ids else [])
    return {name: inputs[name] for name in names}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_fresh_plugin_leaves_every_family_exactly_as_it_was(family: str, tmp_path: Path) -> None:
    plm = make_plm(family, tmp_path)
    model = XAdapterModel.create(plm, make_clip_model(tmp_path), CONFIG, make_bank())
    inputs = model.encode(TEXTS)
    with torch.no_grad():
        expected = plm(**plain_inputs(model, inputs)).logits  # (B, T, V)
        for experts in ("none", "v", "t", "vt"):
            output = model(**{**inputs, "mask_positions": None}, experts=experts)
            assert torch.equal(output.logits, expected), experts
        at_masks = model(**inputs).logits
    rows = torch.arange(len(TEXTS))[:, None]
    torch.testing.assert_close(at_masks, expected[rows, inputs["mask_positions"]])


def make_clip_model(folder: Path) -> Path:

    make_clip().save(folder / "clip")
    return folder / "clip"


@pytest.mark.parametrize("family", FAMILIES)
def test_experts_add_and_each_one_matters(family: str, tmp_path: Path) -> None:
    model = make_model(tmp_path, family)
    inputs = model.encode(TEXTS)
    with torch.no_grad():
        outputs = {experts: model(**inputs, experts=experts) for experts in ("none", "v", "t", "vt")}
    assert not outputs["none"].contributions
    assert set(outputs["vt"].contributions) == {(1, "v"), (1, "t"), (2, "v"), (2, "t")}
    # At the first adapted layer the hidden states are the same, so each expert adds what it adds alone.
    for expert in ("v", "t"):
        torch.testing.assert_close(
            outputs["vt"].contributions[1, expert], outputs[expert].contributions[1, expert]
        )
    for a, b in (("none", "v"), ("none", "t"), ("v", "vt"), ("t", "vt")):
        assert (outputs[a].logits - outputs[b].logits).abs().max() > 0.05


def test_padding_changes_nothing(tmp_path: Path) -> None:
    model = make_model(tmp_path)
    with torch.no_grad():
        batch = model(**model.encode(TEXTS)).logits
        for row, text in enumerate(TEXTS):
            alone = model(**model.encode([text])).logits
            torch.testing.assert_close(batch[row, : alone.shape[1]], alone[0], rtol=1e-4, atol=1e-5)


def test_cached_memory_and_lower_layers_give_the_same(tmp_path: Path) -> None:
    model = make_model(tmp_path)
    inputs = model.encode(TEXTS)
    with torch.no_grad():
        expected = model(**inputs).logits
        memory = model.memory(inputs["clip_input_ids"])
        hidden = model.hidden_before(1, *plain_inputs(model, inputs).values())
        cached = model(**inputs, memory=memory, first_layer_input=hidden).logits
    assert torch.equal(cached, expected)


def test_retrieval_is_the_nearest_by_cosine(tmp_path: Path) -> None:
    model = make_model(tmp_path)
    ids = model.encode(TEXTS)["clip_input_ids"]
    memory = model.memory(ids, "v")
    assert model.clip is not None
    assert memory.retrieved is not None
    assert memory.retrieved_scores is not None
    query = model.clip.pool(model.clip.token_states(ids), ids)
    cosines = torch.nn.functional.cosine_similarity(
        query[:, None], torch.from_numpy(make_bank().features)[None], dim=-1
    )
    expected = cosines.sort(descending=True)
    assert memory.retrieved.tolist() == expected.indices[:, :4].tolist()
    torch.testing.assert_close(memory.retrieved_scores, expected.values[:, :4])


def test_static_retrieval_needs_no_clip(tmp_path: Path) -> None:
    settings = {"retrieval": {"mode": "static"}, "experts": "v", "layers": [1]}
    config = XAdapterConfig.model_validate({**settings, "layers": (1,)})
    model = XAdapterModel.create(make_plm("bert", tmp_path), None, config, make_bank())
    inputs = model.encode(TEXTS)
    assert "clip_input_ids" not in inputs
    output = model(**inputs)
    assert output.memory.v is not None
    assert output.memory.v.shape == (1, 30, 24)
    assert output.memory.retrieved is None


def test_only_the_plugin_is_trained(tmp_path: Path) -> None:
    model = make_model(tmp_path).train()
    before = model.frozen_parts()
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained
    assert all(name.startswith("adapters.") for name in trained)
    assert not model.plm.training
    assert model.clip is not None
    assert not model.clip.training
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    model(**model.encode(TEXTS)).logits.sum().backward()
    assert all(p.grad is not None for p in model.adapters.parameters())
    optimizer.step()
    assert model.frozen_parts() == before


def test_a_forward_pass_changes_no_state(tmp_path: Path) -> None:
    model = make_model(tmp_path)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model(**model.encode(TEXTS))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_what_does_not_fit_together(tmp_path: Path) -> None:
    plm, clip, bank = write_parts(tmp_path)
    for settings, parts, message in [
        ({"layers": (3,)}, (clip, bank), "layer 3: PLM .* has layers 0 to 2"),
        ({"layers": (1,)}, (clip, None), "V-expert needs a feature bank"),
        ({"layers": (1,)}, (None, bank), "need a CLIP text tower"),
        ({"layers": (1,), "retrieval": {"k": 31}}, (clip, bank), "k=31, but the bank has 30 pictures"),
        ({"layers": (1,)}, (clip, make_bank(dim=8)), "bank features have width 8"),
    ]:
        config = XAdapterConfig.model_validate(settings)
        with pytest.raises(ConfigError, match=message):
            XAdapterModel.create(plm, parts[0], config, parts[1])
    for settings, message in [
        ({"layers": (1,), "adapter_width": 10, "num_heads": 4}, "must be a multiple of num_heads"),
        ({"layers": (2, 1)}, "must be in ascending order"),
        ({"layers": (1,), "labels": ("a", "b")}, "fill-mask has no labels"),
        ({"layers": (1,), "adaptor_width": 8}, "Extra inputs are not permitted"),
    ]:
        with pytest.raises(ValidationError, match=message):
            XAdapterConfig.model_validate(settings)


def test_unknown_families_are_listed() -> None:
    for config in (GPT2Config(), MPNetConfig()):
        with pytest.raises(
            UnsupportedError,
            match=rf"PLM family '{config.model_type}' is not supported; known families: bert, rob",
        ):
            family_of(config)


def test_plm_folders_that_cannot_be_used(tmp_path: Path) -> None:
    plm, _, _ = write_parts(tmp_path)
    with pytest.raises(CheckpointError, match="could not be loaded"):
        load_plm(tmp_path / "nowhere", "fill-mask")
    bare = tmp_path / "bare"
    AutoModel.from_pretrained(plm).save_pretrained(bare)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (bare / name).write_bytes((plm / name).read_bytes())
    assert load_plm(bare, "feature-extraction").hidden_size == 32
    with pytest.raises(NoMlmHeadError, match="has no MLM head, which fill-mask needs"):
        load_plm(bare, "fill-mask")
    (bare / "model.safetensors").rename(bare / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"found the pickle pytorch_model\.bin, which is refused"):
        load_plm(bare, "feature-extraction")
    (plm / "model.safetensors").write_bytes((plm / "model.safetensors").read_bytes()[:1000])
    with pytest.raises(CheckpointError, match="could not be loaded"):
        load_plm(plm, "fill-mask")
