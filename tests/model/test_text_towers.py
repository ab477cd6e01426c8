"""Text towers: nothing outside their room knows a kind by its name, and others can be added from outside.

The one from here is like SigLIP's: every token sees every other, padding included, texts have no start token
and are padded to the context with a token that is not 0, and the last token is pooled. A graph gets its own
layers, which are PyTorch's.
"""

import json
from collections.abc import Sequence
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor, nn

from tests.tiny_checkpoint import TEXTS, D, make_bank, make_clip, make_plm, randomize_plugin
from xadapter_export import XAdapterModel, XAdapterSession, export, registry
from xadapter_export.errors import UnsupportedError
from xadapter_export.model.config import XAdapterConfig
from xadapter_export.model.export_layers import Context, PlainLayer
from xadapter_export.model.plm import load_plm
from xadapter_export.model.text_tower import TextTower
from xadapter_export.model.towers import TEXT_TOWERS, load_clip

GROUP = "xadapter_export.text_towers"
CONTEXT, WIDTH = 9, 16
VOCABULARY = {"<pad>": 0, "<unk>": 1, "banana": 2, "green": 3, "fruit": 4, "<pad after>": 5, "<end>": 6}


class WholeTower(TextTower):
    """A tower without a causal mask."""

    name = "whole"
    exact_at_true_length = False
    pad_token_id = 5

    def __init__(self, source: str) -> None:
        tokenizer = Tokenizer(models.WordLevel(VOCABULARY, unk_token="<unk>"))
        tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        tokenizer.post_processor = processors.TemplateProcessing(
            single="$A <end>", special_tokens=[("<end>", 6)]
        )
        super().__init__(tokenizer, source)
        self.context_length, self.width, self.feature_dim, self.end_token_id = CONTEXT, WIDTH, D, 6
        self.tokens = nn.Embedding(len(VOCABULARY), WIDTH)
        self.positions = nn.Embedding(CONTEXT, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.norm = nn.LayerNorm(WIDTH)
        self.projection = nn.Linear(WIDTH, D)
        self.eval().requires_grad_(False)

    @classmethod
    def load(cls, source: str | Path | nn.Module) -> "WholeTower":
        assert not isinstance(source, nn.Module)
        tower = cls(str(source))
        tower.load_state_dict(load_file(Path(source) / "whole.safetensors"))
        return tower

    def save(self, folder: Path, dtype: torch.dtype = torch.float32) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        weights = {name: tensor.to(dtype) for name, tensor in self.state_dict().items()}
        save_file(weights, folder / "whole.safetensors")

    @property
    def settings(self) -> dict[str, object]:
        return {"heads": 2}

    @property
    def layers(self) -> Sequence[nn.Module]:
        return [*self.blocks]

    def embed(self, clip_input_ids: Tensor) -> Tensor:
        positions = torch.arange(clip_input_ids.shape[1], device=clip_input_ids.device)
        states: Tensor = self.tokens(clip_input_ids) + self.positions(positions)
        return states

    def prepare(self, clip_input_ids: Tensor) -> Context:
        return None

    def layer(self, index: int, hidden: Tensor, context: Context) -> Tensor:
        states: Tensor = self.blocks[index](hidden)
        return states

    def finish(self, hidden: Tensor) -> Tensor:
        states: Tensor = self.norm(hidden)
        return states

    def token_mask(self, clip_input_ids: Tensor) -> Tensor:
        return clip_input_ids != self.pad_token_id

    def end_position(self, clip_input_ids: Tensor) -> Tensor:
        return torch.full_like(clip_input_ids[:, 0], clip_input_ids.shape[1] - 1)

    def project(self, pooled: Tensor) -> Tensor:
        feature: Tensor = self.projection(pooled)
        return feature


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.packed = nn.Linear(WIDTH, 3 * WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 24), nn.Linear(24, WIDTH)

    def forward(self, hidden: Tensor) -> Tensor:
        query, key, value = (
            x.unflatten(-1, (2, -1)).transpose(1, 2) for x in self.packed(self.norm(hidden)).chunk(3, -1)
        )
        attended = nn.functional.scaled_dot_product_attention(query, key, value)
        hidden = hidden + attended.transpose(1, 2).flatten(2)
        out: Tensor = hidden + self.down(nn.functional.silu(self.up(hidden)))
        return out


@pytest.fixture(autouse=True)
def _installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Installs the tower above, as a package with this entry point would."""
    points = [EntryPoint("whole", "tests.model.test_text_towers:WholeTower", GROUP)]
    monkeypatch.setattr(registry, "entry_points", lambda group: points if group == GROUP else [])
    monkeypatch.setattr(TEXT_TOWERS, "_loaded", dict(TEXT_TOWERS._loaded))


def make_tower() -> WholeTower:
    torch.manual_seed(5)
    tower = WholeTower("tiny-whole")
    with torch.no_grad():
        for name, parameter in tower.named_parameters():
            if "norm" not in name:
                parameter.normal_(std=0.3)
    return tower


def make_model(folder: Path) -> XAdapterModel:
    config = XAdapterConfig(experts="vt", layers=(1, 2), adapter_width=16, num_heads=2)
    plm = load_plm(make_plm("bert", folder / "plm"), config.task)
    return randomize_plugin(XAdapterModel(config, plm, make_tower(), make_bank())).eval()


def test_its_texts_are_padded_to_the_context(tmp_path: Path) -> None:
    model = make_model(tmp_path)
    ids = model.encode(["green banana [MASK]"])["clip_input_ids"]
    assert ids.tolist() == [[3, 2, 6, 5, 5, 5, 5, 5, 5]]


@pytest.mark.parametrize("split", [pytest.param(False, marks=pytest.mark.slow), True])
def test_a_tower_from_outside_is_saved_loaded_exported_and_proven(split: bool, tmp_path: Path) -> None:
    made = make_model(tmp_path)
    made.save_pretrained(tmp_path / "checkpoint", self_contained=True)
    record = json.loads((tmp_path / "checkpoint" / "xadapter.json").read_text())
    assert record["clip"]["family"] == "whole"
    model = XAdapterModel.from_pretrained(tmp_path / "checkpoint")
    assert isinstance(model.clip, WholeTower)
    assert isinstance(model.clip.export_layer(0), PlainLayer)
    with torch.no_grad():
        expected = model(**model.encode(TEXTS)).logits
        torch.testing.assert_close(made(**made.encode(TEXTS)).logits, expected)

    variants = ("onnx-fp32", "cpu-fp32")
    result = export(model, tmp_path / "bundle", ("vt", "v"), variants=variants, split=split)
    assert result.parity.passed
    clip = result.manifest.clip
    assert clip is not None
    assert (clip.pad_token_id, clip.exact_at_true_length) == (5, False)
    saved = {step.name for variant in result.manifest.variants for step in variant.optimizations}
    assert "clip_at_true_length" not in saved
    options: dict[str, Any] = {"cache_size": 8} if split else {}
    session = XAdapterSession.load(result.folder, experts="vt", **options)
    for _ in range(2):  # from the cache the second time
        for text, answers, logits in zip(TEXTS, session.fill_mask(TEXTS, top_k=1), expected, strict=True):
            assert answers[0].logit == pytest.approx(float(logits[0].max()), abs=1e-4), text


def test_a_source_names_its_kind(tmp_path: Path) -> None:
    make_tower().save(tmp_path / "whole")
    tower = load_clip(f"whole={tmp_path / 'whole'}")
    assert (type(tower), tower.source) == (WholeTower, str(tmp_path / "whole"))
    assert tower.sha256 == make_tower().sha256
    make_clip().save(tmp_path / "a=b")
    assert load_clip(str(tmp_path / "a=b")).name == "open_clip"  # a path with such a sign stays a path
    with pytest.raises(UnsupportedError) as caught:
        load_clip(tmp_path, "nothing")
    assert caught.value.got == "nothing"


def test_ours_comes_first_and_others_are_loaded_when_asked() -> None:
    assert tuple(TEXT_TOWERS) == ("open_clip", "whole")
    assert "whole" not in TEXT_TOWERS._loaded
    assert TEXT_TOWERS["whole"] is WholeTower
    assert np.isfinite(make_tower().token_states(torch.tensor([[2, 6]])).numpy()).all()
