import json
from pathlib import Path

import ftfy
import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from tests.tiny_checkpoint import make_clip
from xadapter_export.errors import CheckpointError, UnsupportedError
from xadapter_export.model.clip_text import ClipTextConfig, OpenClipTower
from xadapter_export.model.clip_tokenizer import clip_tokenizer
from xadapter_export.torchvision_cure import cure_torchvision

cure_torchvision()

import open_clip  # noqa: E402  # torchvision must be cured first
from open_clip.tokenizer import SimpleTokenizer  # noqa: E402  # same

SIMPLE = SimpleTokenizer()
TEXT_CFG = {"width": 32, "heads": 2, "layers": 2, "vocab_size": 49408, "context_length": 77}
VISION_CFG = {"image_size": 32, "patch_size": 32, "width": 16, "layers": 1, "head_width": 8}
WORDS = ["a photo of a cat", "The quick, brown fox's 12 tails", "über ÉCOLE 日本語 😀", "", "x " * 100]


def build(*, quick_gelu: bool = False, custom: bool = False, **text_cfg: object) -> torch.nn.Module:
    """An open_clip model as open_clip builds it, with random weights that matter."""
    torch.manual_seed(0)
    kind = open_clip.CustomTextCLIP if custom else open_clip.CLIP
    model: torch.nn.Module = kind(24, VISION_CFG, {**TEXT_CFG, **text_cfg}, quick_gelu=quick_gelu).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "ln_" not in name:
                parameter.normal_(std=0.2)
    return model


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"quick_gelu": True},
        {"custom": True},
        {"custom": True, "proj_bias": True},
        {"ls_init_value": 0.1},
        {"mlp_ratio": 2.0},
        {"custom": True, "pool_type": "eos", "eos_id": 49407},
    ],
)
def test_features_and_token_states_are_those_of_open_clip(settings: dict[str, object]) -> None:
    model = build(**settings)  # type: ignore[arg-type]  # a row of the table
    tower = OpenClipTower.load(model)
    ids = SIMPLE(WORDS)
    with torch.no_grad():
        expected = model.encode_text(ids)  # type: ignore[operator]  # open_clip's method
        states = tower.token_states(ids)
        torch.testing.assert_close(tower.pool(states, ids), expected, rtol=1e-5, atol=1e-5)
        text = model.text if settings.get("custom") else model
        text.output_tokens = True  # type: ignore[union-attr]  # open_clip's switch
        tokens = model.text(ids)[1] if settings.get("custom") else None  # type: ignore[operator]  # same
    if tokens is not None:
        torch.testing.assert_close(states, tokens, rtol=1e-5, atol=1e-5)


def test_true_length_gives_what_77_gives() -> None:
    tower = OpenClipTower.load(build())
    ids = SIMPLE(WORDS[:3])
    length = int(tower.end_position(ids).max()) + 1
    short = ids[:, :length]
    with torch.no_grad():
        torch.testing.assert_close(
            tower.pool(tower.token_states(short), short),
            tower.pool(tower.token_states(ids), ids),
            rtol=1e-5,
            atol=1e-5,
        )
    assert tower.token_mask(short).sum(1).tolist() == (tower.end_position(ids) + 1).tolist()


SCRIPTS = "abcXYZ áüñçøÉ АБВгд αβγ 日本語 한국 العربية हिन्दी 😀🍌 0123 ’‘“”'\".,!?-_@#%()[]{}/\\~^*+=|:;\n\t"


@settings(max_examples=300, deadline=None)
@given(st.text(SCRIPTS, max_size=40))
@example("it’s a “red” banana")
@example("cafe\u0301 and ﬁne ﬂags")
@example("a\x07b\x1fc")
@example("  a\u00a0b  ")
def test_tokenizer_gives_the_ids_of_open_clip(text: str) -> None:
    assume(ftfy.fix_encoding(text) == text)  # it takes some quotes with a capital for a broken encoding
    assert clip_tokenizer().encode(text).ids == [49406, *SIMPLE.encode(text), 49407]


def test_folder_round_trip(tmp_path: Path) -> None:
    tower = make_clip(proj_bias=True, quick_gelu=True)
    tower.save(tmp_path / "clip")
    again = OpenClipTower.load(tmp_path / "clip")
    assert again.config == tower.config
    for name, tensor in tower.weights.items():
        assert torch.equal(again.weights[name], tensor)
    assert again.tokenizer.encode("a banana").ids == tower.tokenizer.encode("a banana").ids


@pytest.mark.parametrize("inner", [54, 64, 99, 202])
def test_the_inner_width_of_a_model_is_kept_though_its_ratio_is_rounded(inner: int, tmp_path: Path) -> None:
    width = 98  # 98 * (99 / 98) is a little less than 99
    OpenClipTower.load(build(width=width, layers=1, mlp_ratio=(inner + 0.5) / width)).save(tmp_path)
    assert OpenClipTower.load(tmp_path).weights["transformer.resblocks.0.mlp.c_fc.bias"].shape == (inner,)


def test_a_model_with_another_vocabulary_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever tokenizer.json is in the current folder is not its own."""
    make_clip().save(tmp_path)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError) as caught:
        OpenClipTower.load(build(vocab_size=600))
    assert (caught.value.where, caught.value.got) == ("CLIP", 600)


@pytest.mark.parametrize("mlp_ratio", [4.0, 1.77])  # 56.64 inside, of which open_clip takes 56
def test_a_folder_that_open_clip_writes_is_read(tmp_path: Path, mlp_ratio: float) -> None:
    model, text_cfg = build(mlp_ratio=mlp_ratio), {**TEXT_CFG, "mlp_ratio": mlp_ratio}
    config = {
        "model_cfg": {"embed_dim": 24, "vision_cfg": VISION_CFG, "text_cfg": text_cfg},
        "preprocess_cfg": {},
    }
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    save_file(
        {k: v.contiguous() for k, v in model.state_dict().items()}, tmp_path / "open_clip_model.safetensors"
    )
    ids = SIMPLE(WORDS[:2])
    tower = OpenClipTower.load(tmp_path)
    with torch.no_grad():
        expected = model.encode_text(ids)  # type: ignore[operator]  # open_clip's method
        torch.testing.assert_close(tower.pool(tower.token_states(ids), ids), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("text_cfg", "message"),
    [
        ({"hf_model_name": "roberta-base"}, "hf_model_name='roberta-base' is not supported"),
        ({"no_causal_mask": True}, "no_causal_mask=True is not supported"),
        ({"embed_cls": True}, "embed_cls=True is not supported"),
        ({"pool_type": "last"}, "pool_type='last' is not supported"),
        ({"tokenizer_kwargs": {"clean": "canonicalize"}}, "tokenizer_kwargs=.* is not supported"),
        ({"qk_norm": True}, "qk_norm=True is not supported"),
        ({"novel": 1}, "unknown setting"),
    ],
)
def test_other_text_towers_are_one_clear_error(text_cfg: dict[str, object], message: str) -> None:
    with pytest.raises(UnsupportedError, match=message):
        ClipTextConfig.from_open_clip({"embed_dim": 8, "text_cfg": text_cfg}, "some-clip")


def test_siglip_of_open_clip_is_one_clear_error() -> None:
    with pytest.raises(UnsupportedError, match="without causal attention"):
        OpenClipTower.load(build(custom=True, no_causal_mask=True))


def test_missing_and_mismatched_weights(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="neither a folder nor a reachable hub id"):
        OpenClipTower.load(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match=r"expected open_clip_config\.json"):
        OpenClipTower.load(tmp_path / "empty")
    (tmp_path / "empty" / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"got a model of transformers.*name a model of open_clip"):
        OpenClipTower.load(tmp_path / "empty")
    clip = tmp_path / "clip"
    make_clip().save(clip)
    weights = load_file(clip / "open_clip_model.safetensors")
    weights["text.ln_final.weight"] = torch.zeros(3)
    save_file(weights, clip / "open_clip_model.safetensors")
    with pytest.raises(CheckpointError, match=r"text\.ln_final\.weight expected \(16,\), found \(3,\)"):
        OpenClipTower.load(clip)
    (clip / "open_clip_model.safetensors").write_bytes(b"\0" * 100)
    with pytest.raises(CheckpointError, match="cannot be read"):
        OpenClipTower.load(clip)
    (clip / "open_clip_model.safetensors").unlink()
    (clip / "open_clip_pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(CheckpointError, match="a pickle is refused"):
        OpenClipTower.load(clip)
