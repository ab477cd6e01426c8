"""PLM families: nothing outside their room knows one by its name, and others can be added from outside.

Both from here get transformers' own layers in the graph. MPNet adds position biases to its attention scores;
ModernBERT has norms before its parts and one after the last layer, turns queries and keys by their position,
and lets most layers see their neighbors only.
"""

from collections.abc import Sequence
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.tiny_checkpoint import TEXTS, make_bank, make_clip, randomize_plugin, write_tokenizer
from xadapter_export import XAdapterModel, XAdapterSession, export, registry
from xadapter_export.errors import UnsupportedError
from xadapter_export.model.config import XAdapterConfig
from xadapter_export.model.export_layers import Context, PlainLayer, additive_mask
from xadapter_export.model.plm import FAMILIES, load_plm
from xadapter_export.model.plm_family import PlmFamily

from transformers import (  # isort: skip  # cured by model.plm
    ModernBertConfig,
    ModernBertForMaskedLM,
    MPNetConfig,
    MPNetForMaskedLM,
    PreTrainedModel,
)

GROUP = "xadapter_export.plm_families"
SHAPE: dict[str, Any] = {
    "vocab_size": 40,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 48,
}
MODELS: dict[str, Any] = {
    "mpnet": lambda: MPNetForMaskedLM(MPNetConfig(**SHAPE, max_position_embeddings=42, pad_token_id=1)),
    "modernbert": lambda: ModernBertForMaskedLM(
        ModernBertConfig(
            **SHAPE,
            max_position_embeddings=40,
            local_attention=6,
            layer_types=["full_attention", "sliding_attention", "sliding_attention"],
            pad_token_id=0,
            bos_token_id=2,
            eos_token_id=3,
            cls_token_id=2,
            sep_token_id=3,
        )
    ),
}


class Mpnet(PlmFamily):
    """MPNet."""

    name = "mpnet"
    model_types = ("mpnet",)
    settings_names = (*PlmFamily.settings_names, "relative_attention_num_buckets")

    @property
    def max_seq(self) -> int:
        return super().max_seq - 2  # positions are counted from 2 on

    @property
    def layers(self) -> Sequence[nn.Module]:
        layers: Sequence[nn.Module] = self.encoder.encoder.layer
        return layers

    def embed(self, input_ids: Tensor, token_type_ids: Tensor | None = None) -> Tensor:
        hidden: Tensor = self.encoder.embeddings(input_ids)
        return hidden

    def prepare(self, hidden: Tensor, attention_mask: Tensor) -> Context:
        return additive_mask(attention_mask), self.encoder.encoder.compute_position_bias(hidden)

    def layer(self, index: int, hidden: Tensor, context: Context) -> Tensor:
        states: Tensor = self.layers[index](hidden, *context)[0]
        return states

    def mlm_transform(self, hidden: Tensor) -> Tensor:
        head: Any = self.model.get_submodule("lm_head")
        states: Tensor = head.layer_norm(nn.functional.gelu(head.dense(hidden)))
        return states


class ModernBert(PlmFamily):
    """ModernBERT."""

    name = "modernbert"
    model_types = ("modernbert",)
    settings_names = (
        "num_attention_heads",
        "hidden_activation",
        "norm_eps",
        "local_attention",
        "layer_types",
    )

    @property
    def layers(self) -> Sequence[nn.Module]:
        layers: Sequence[nn.Module] = self.encoder.layers
        return layers

    def embed(self, input_ids: Tensor, token_type_ids: Tensor | None = None) -> Tensor:
        hidden: Tensor = self.encoder.embeddings(input_ids=input_ids)
        return hidden

    def prepare(self, hidden: Tensor, attention_mask: Tensor) -> Context:
        positions = torch.arange(hidden.shape[1], device=hidden.device)
        far = (positions[:, None] - positions[None, :]).abs() > self.model.config.sliding_window
        mask = additive_mask(attention_mask)
        masks = {
            "full_attention": mask,
            "sliding_attention": mask.masked_fill(far, torch.finfo(mask.dtype).min),
        }
        return {kind: (masks[kind], self.encoder.rotary_emb(hidden, positions[None], kind)) for kind in masks}

    def layer(self, index: int, hidden: Tensor, context: Context) -> Tensor:
        layer: Any = self.layers[index]
        mask, rotation = context[layer.attention_type]
        states: Tensor = layer(hidden, attention_mask=mask, position_embeddings=rotation)
        return states

    def finish(self, hidden: Tensor) -> Tensor:
        states: Tensor = self.encoder.final_norm(hidden)
        return states

    def mlm_transform(self, hidden: Tensor) -> Tensor:
        states: Tensor = self.model.get_submodule("head")(hidden)
        return states


@pytest.fixture(autouse=True)
def _installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Installs the families above, as a package with these entry points would."""
    names = {"mpnet": "Mpnet", "modernbert": "ModernBert"}
    here = "tests.model.test_plm_families"
    points = [EntryPoint(name, f"{here}:{value}", GROUP) for name, value in names.items()]
    monkeypatch.setattr(registry, "entry_points", lambda group: points if group == GROUP else [])
    monkeypatch.setattr(FAMILIES, "_loaded", dict(FAMILIES._loaded))


def make_plm(name: str, folder: Path) -> PreTrainedModel:
    """A PLM with weights large enough that every part shows in the logits; its tokenizer is in ``folder``."""
    torch.manual_seed(0)
    model: PreTrainedModel = MODELS[name]().eval()
    with torch.no_grad():
        for weight_name, parameter in model.named_parameters():
            if "norm" in weight_name.lower():  # equal ones would be stored once
                parameter.add_(0.05 * torch.randn_like(parameter))
            else:
                parameter.normal_(std=0.2)
    model.name_or_path = str(folder)
    write_tokenizer(folder)
    return model


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name == "mpnet" else ()) for name in MODELS]
)
def test_a_family_from_outside_is_loaded_exported_and_proven(name: str, tmp_path: Path) -> None:
    plm = make_plm(name, tmp_path)
    config = XAdapterConfig(experts="vt", layers=(1, 2), adapter_width=16, num_heads=2)
    model = randomize_plugin(
        XAdapterModel(config, load_plm(plm, config.task), make_clip(), make_bank())
    ).eval()
    assert model.plm.name == name
    assert isinstance(model.plm.export_layer(0), PlainLayer)
    inputs = model.encode(TEXTS)
    with torch.no_grad():
        expected = plm(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits
        plain = model(**{**inputs, "mask_positions": None}, experts="none").logits
        changed = model(**inputs).logits
    real = inputs["attention_mask"] == 1
    torch.testing.assert_close(plain[real], expected[real], rtol=1e-5, atol=1e-5)

    result = export(model, tmp_path / "bundle", ("none", "vt"), variants=("onnx-fp32", "cpu-fp32"))
    assert result.parity.passed
    assert result.manifest.plm.family == name
    counts = result.manifest.expert_sets["none"].component_parameters
    rotations = [b for n, b in plm.named_buffers() if n.endswith("inv_freq") and "original" not in n]
    stored = [*plm.parameters(), *rotations]
    assert counts["plm"] + counts["head"] == sum(tensor.numel() for tensor in stored)
    assert counts["head"] == sum(
        p.numel() for n, p in plm.named_parameters() if not n.startswith(f"{plm.base_model_prefix}.")
    )
    session = XAdapterSession.load(result.folder)
    for answers, logits in zip(session.fill_mask(TEXTS, top_k=1, experts="vt"), changed, strict=True):
        assert answers[0].logit == pytest.approx(float(logits[0].max()), abs=1e-4)


def test_ours_are_not_replaced_and_others_are_loaded_when_asked() -> None:
    assert tuple(FAMILIES)[-2:] == ("mpnet", "modernbert")
    assert "mpnet" not in FAMILIES._loaded
    assert FAMILIES["mpnet"].__name__ == "Mpnet"
    with pytest.raises(UnsupportedError) as caught:
        FAMILIES["gpt2"]
    assert caught.value.got == "gpt2"
