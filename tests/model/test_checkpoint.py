import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file

from tests.tiny_checkpoint import TEXTS, make_bank, make_model, randomize_plugin, write_parts
from xadapter_export.bundle.manifest import Task
from xadapter_export.errors import (
    CheckpointError,
    HashMismatchError,
    OutputExistsError,
    ShapeError,
    UnsupportedError,
)
from xadapter_export.model.config import XAdapterConfig
from xadapter_export.model.plm import NoMlmHeadError
from xadapter_export.model.x_adapter_model import XAdapterModel

import open_clip  # isort: skip  # cured by model.plm
from transformers import AutoModel, AutoModelForMaskedLM  # isort: skip  # same

CONFIG = XAdapterConfig(experts="vt", layers=(1, 2), adapter_width=16, num_heads=2)


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    return write_parts(tmp_path_factory.mktemp("parts"))


@pytest.fixture(scope="module")
def model(parts: tuple[Path, Path, Path]) -> XAdapterModel:
    plm, clip, bank = parts
    return randomize_plugin(XAdapterModel.create(plm, clip, CONFIG, bank)).eval()


@pytest.fixture
def saved(model: XAdapterModel, tmp_path: Path) -> Path:
    """A self-contained checkpoint that a test may break."""
    model.save_pretrained(tmp_path / "checkpoint", self_contained=True, training={"steps": 3})
    return tmp_path / "checkpoint"


@pytest.mark.parametrize("self_contained", [True, False])
def test_round_trip(model: XAdapterModel, tmp_path: Path, *, self_contained: bool) -> None:
    model.save_pretrained(tmp_path / "checkpoint", self_contained=self_contained)
    assert (tmp_path / "checkpoint" / "plm").is_dir() == self_contained
    again = XAdapterModel.from_pretrained(tmp_path / "checkpoint")
    inputs = model.encode(TEXTS)
    with torch.no_grad():
        assert torch.equal(again(**inputs).logits, model(**inputs).logits)
    assert again.frozen_parts()[0].sha256 == model.frozen_parts()[0].sha256


CALIBRATION = '{"sentence": "caf\u00e9 \u2028 in one line"}\r\n{"sentence": "another"}\n'


@pytest.mark.parametrize("task", ["fill-mask", "text-classification"])
def test_texts_for_the_export_outlive_loading_training_and_saving(tmp_path: Path, task: str) -> None:
    labels = ("no", "yes") if task == "text-classification" else ()
    made = make_model(tmp_path / "parts", task=task, labels=labels)
    made.save_pretrained(
        tmp_path / "first", self_contained=True, more_files={"calibration.jsonl": CALIBRATION}
    )
    loaded = XAdapterModel.from_pretrained(tmp_path / "first")
    shutil.rmtree(tmp_path / "first")
    loaded.train()
    with torch.no_grad():
        next(loaded.adapters.parameters()).add_(1.0)
    loaded.save_pretrained(tmp_path / "second", self_contained=True)
    assert (tmp_path / "second/calibration.jsonl").read_text("utf-8").splitlines() == CALIBRATION.splitlines()
    again = XAdapterModel.from_pretrained(tmp_path / "second")
    assert again.calibration == loaded.calibration
    again.calibration = None
    again.save_pretrained(tmp_path / "second", self_contained=True)
    assert not (tmp_path / "second/calibration.jsonl").exists()


def test_a_checkpoint_holds_only_what_was_trained(saved: Path) -> None:
    assert all(name.startswith("adapters.") for name in load_file(saved / "xadapter.safetensors"))
    record = json.loads((saved / "xadapter.json").read_text())
    assert record["training"] == {"steps": 3}
    assert record["config"]["layers"] == [1, 2]
    card = ModelCard.load(saved / "README.md")
    assert [card.data.get(key) for key in ("library_name", "pipeline_tag")] == [
        "xadapter-export",
        "fill-mask",
    ]
    assert "- steps: 3" in card.text


def test_half_precision_is_stored_only_where_it_loses_nothing(model: XAdapterModel, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"storing as torch\.float16 would change its weights"):
        model.save_pretrained(tmp_path / "checkpoint", self_contained=True, dtype=torch.float16)
    assert not (tmp_path / "checkpoint").exists()


def test_saving_does_not_replace_what_is_no_checkpoint(model: XAdapterModel, tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").touch()
    with pytest.raises(OutputExistsError, match=r"expected a folder with xadapter\.json"):
        model.save_pretrained(tmp_path / "photos")
    assert (tmp_path / "photos" / "cat.jpg").exists()


def _remove(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def _write(name: str, text: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_text(text)


def _flip_bit(name: str) -> Callable[[Path], object]:
    """Flip the lowest bit of the last number, which is little endian."""

    def apply(folder: Path) -> None:
        data = bytearray((folder / name).read_bytes())
        data[-4] ^= 1
        (folder / name).write_bytes(data)

    return apply


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _change_plugin(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        tensors = load_file(folder / "xadapter.safetensors")
        change(tensors)
        save_file(tensors, folder / "xadapter.safetensors")

    return apply


def _change_record(change: Callable[[dict[str, object]], None]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        record = json.loads((folder / "xadapter.json").read_text())
        change(record)
        (folder / "xadapter.json").write_text(json.dumps(record))

    return apply


def _change_weight(path: str) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        tensors = load_file(folder / path)
        name = max(tensors, key=lambda key: tensors[key].numel())
        tensors[name].view(-1)[0] += 1
        save_file(tensors, folder / path, metadata={"format": "pt"})

    return apply


def _change_settings(path: str, *keys: str, value: object) -> Callable[[Path], None]:
    """Sets ``keys`` deep inside a JSON file: something that no weight says."""

    def apply(folder: Path) -> None:
        settings = json.loads((folder / path).read_text())
        inner = settings
        for key in keys[:-1]:
            inner = inner[key]
        assert inner[keys[-1]] != value
        inner[keys[-1]] = value
        (folder / path).write_text(json.dumps(settings))

    return apply


def _reverse_captions(folder: Path) -> None:
    lines = (folder / "bank.jsonl").read_text().splitlines(keepends=True)
    (folder / "bank.jsonl").write_text("".join(reversed(lines)))


def _remove_tokenizer(folder: Path) -> None:
    for path in (folder / "plm").glob("tokenizer*"):
        path.unlink()


def _change_bank(folder: Path) -> None:
    features = load_file(folder / "bank.safetensors")["features"]
    save_file({"features": features.flip(0).contiguous()}, folder / "bank.safetensors")
    (folder / "bank.json").unlink()  # as of another bank that says nothing of itself


_PLM, _CLIP = "plm/config.json", "clip/open_clip_config.json"
BROKEN: dict[str, tuple[Callable[[Path], object], type[Exception], str]] = {
    "other heads": (
        _change_settings(_PLM, "num_attention_heads", value=2),
        HashMismatchError,
        "PLM of checkp",
    ),
    "other activation": (
        _change_settings(_PLM, "hidden_act", value="relu"),
        HashMismatchError,
        "PLM of checkp",
    ),
    "other norm": (
        _change_settings(_PLM, "layer_norm_eps", value=0.1),
        HashMismatchError,
        "PLM of checkpoint",
    ),
    "other CLIP activation": (
        _change_settings(_CLIP, "model_cfg", "quick_gelu", value=True),
        HashMismatchError,
        "CLIP of checkpoint",
    ),
    "other CLIP heads": (
        _change_settings(_CLIP, "model_cfg", "text_cfg", "heads", value=4),
        HashMismatchError,
        "CLIP of checkp",
    ),
    "impossible CLIP heads": (
        _change_settings(_CLIP, "model_cfg", "text_cfg", "heads", value=5),
        CheckpointError,
        "not a multiple of heads",
    ),
    "CLIP width no number": (
        _change_settings(_CLIP, "model_cfg", "text_cfg", "width", value="a"),
        UnsupportedError,
        "width: .*integer",
    ),
    "CLIP config no object": (
        _write(_CLIP, '{"model_cfg": []}'),
        CheckpointError,
        "needs embed_dim and text_cfg",
    ),
    "CLIP tokenizer broken": (
        _write("clip/tokenizer.json", "{"),
        CheckpointError,
        r"tokenizer\.json cannot be read",
    ),
    "other captions": (_reverse_captions, HashMismatchError, "the bank is not the one that was written"),
    "no tokenizer": (_remove_tokenizer, CheckpointError, r"has no tokenizer; expected tokenizer\.json"),
    "no record": (_remove("xadapter.json"), CheckpointError, r"xadapter\.json is missing"),
    "record no json": (_write("xadapter.json", "{"), CheckpointError, r"not a JSON object: .*xadapter\.json"),
    "unknown key": (
        _change_record(lambda r: r.update(color=1)),
        CheckpointError,
        "color: Extra inputs are not permitted",
    ),
    "other version": (
        _change_record(lambda r: r.update(format_version=2)),
        CheckpointError,
        "format_version",
    ),
    "no plug-in": (
        _remove("xadapter.safetensors"),
        CheckpointError,
        r"xadapter\.safetensors is missing; it holds the trained plug-in",
    ),
    "truncated": (
        lambda f: _truncate(f / "xadapter.safetensors"),
        CheckpointError,
        "truncated or not safetensors",
    ),
    "tensor missing": (
        _change_plugin(lambda t: t.pop("adapters.1.v.out.weight")),
        CheckpointError,
        r"adapters\.1\.v\.out\.weight expected \(32, 16\), got none",
    ),
    "tensor too many": (
        _change_plugin(lambda t: t.update(extra=torch.zeros(1))),
        CheckpointError,
        "extra expected no such tensor",
    ),
    "not finite": (
        _change_plugin(lambda t: t["adapters.1.v.out.weight"].fill_(float("nan"))),
        CheckpointError,
        "not finite",
    ),
    "one bit": (
        _flip_bit("xadapter.safetensors"),
        HashMismatchError,
        r"not the one that was saved: .*xadapter\.safetensors \(expected SHA-256",
    ),
    "other setting": (
        _change_record(lambda r: r["config"]["retrieval"].update(k=1)),  # type: ignore[index]
        HashMismatchError,
        r"not the one that was saved: .*xadapter\.safetensors",
    ),
    "other texts": (
        _write("calibration.jsonl", '{"sentence": "x"}\n'),
        HashMismatchError,
        r"not the one that was saved: .*calibration\.jsonl",
    ),
    "one bit of the bank": (
        _flip_bit("bank.safetensors"),
        HashMismatchError,
        "the bank is not the one that was written",
    ),
    "a device": (
        lambda f: (f / "plm" / "vocab.txt").symlink_to("/dev/zero"),
        CheckpointError,
        r"a file of the checkpoint cannot be read: .*vocab\.txt \(expected a regular file",
    ),
    "deep": (
        _write("xadapter.json", "[" * 10**5),
        CheckpointError,
        "not a JSON object",
    ),
    "pickle": (
        lambda f: (f / "optimizer.pt").touch(),
        CheckpointError,
        r"optimizer\.pt is a pickle, which is refused",
    ),
    "no bank": (_remove("bank.safetensors"), CheckpointError, r"bank\.safetensors is missing"),
    "captions short": (
        _write("bank.jsonl", '{"id": "1", "caption": "a"}\n'),
        CheckpointError,
        "wrong number of images",
    ),
    "other bank": (
        _change_bank,
        HashMismatchError,
        "bank of checkpoint .* is not the one it was trained with",
    ),
    "other PLM": (
        _change_weight("plm/model.safetensors"),
        HashMismatchError,
        "PLM of checkpoint .* is not the one",
    ),
    "other CLIP": (
        _change_weight("clip/open_clip_model.safetensors"),
        HashMismatchError,
        "CLIP of checkpoint .* is not the one",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_checkpoints_are_one_clear_line(case: str, saved: Path) -> None:
    break_it, error, message = BROKEN[case]
    break_it(saved)
    with pytest.raises(error, match=message) as caught:
        XAdapterModel.from_pretrained(saved)
    assert "\n" not in str(caught.value)


def test_no_code_of_a_checkpoint_is_run(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    proof = saved / "ran"
    (saved / "plm" / "evil.py").write_text(f"open({str(proof)!r}, 'w').close()\nclass EvilConfig: pass\n")
    evil = {"model_type": "evil", "auto_map": {"AutoConfig": "evil.EvilConfig"}}
    (saved / "plm" / "config.json").write_text(json.dumps(evil))
    monkeypatch.setattr("builtins.input", lambda *_: "y")  # transformers would ask, and be told yes
    with pytest.raises(CheckpointError, match=r"PLM .* could not be loaded"):
        XAdapterModel.from_pretrained(saved)
    assert not proof.exists()


def test_unknown_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="neither a folder nor a reachable hub id"):
        XAdapterModel.from_pretrained(tmp_path / "nowhere")


def test_a_plm_elsewhere_is_taken_if_it_is_the_same(
    saved: Path, parts: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    shutil.rmtree(saved / "plm")
    assert XAdapterModel.from_pretrained(saved, plm=parts[0]).plm.vocab_size == 40
    other = Path(shutil.copytree(parts[0], tmp_path / "other"))
    _change_weight("model.safetensors")(other)
    with pytest.raises(HashMismatchError, match="PLM of checkpoint"):
        XAdapterModel.from_pretrained(saved, plm=other)


@pytest.mark.parametrize("task", ["fill-mask", "feature-extraction"])
@pytest.mark.parametrize("auto", [AutoModel, AutoModelForMaskedLM])
def test_a_plm_that_is_given_as_a_model(
    parts: tuple[Path, Path, Path], tmp_path: Path, task: Task, auto: type[AutoModel]
) -> None:
    """It is what its folder would be, and stays as it is: with its pooler, and open to training."""
    path, clip, bank = parts
    given = auto.from_pretrained(path)
    before = {name: tensor.clone() for name, tensor in given.state_dict().items()}
    config = CONFIG.model_copy(update={"task": task})
    if task == "fill-mask" and auto is AutoModel:
        with pytest.raises(NoMlmHeadError, match="has no MLM head"):
            XAdapterModel.create(given, clip, config, bank)
        return
    model = randomize_plugin(XAdapterModel.create(given, clip, config, bank))
    assert all(parameter.requires_grad for parameter in given.parameters())
    assert given.state_dict().keys() == before.keys()
    with torch.no_grad():
        next(given.parameters()).add_(1.0)
    model.save_pretrained(tmp_path / "checkpoint")
    assert not (tmp_path / "checkpoint" / "plm").exists()
    again = XAdapterModel.from_pretrained(tmp_path / "checkpoint")
    inputs = model.encode(TEXTS)
    inputs.pop("mask_positions" if task != "fill-mask" else "", None)
    with torch.no_grad():
        assert torch.equal(again(**inputs).last_hidden_state, model(**inputs).last_hidden_state)


def test_parts_that_no_source_gives_back_go_with_the_checkpoint(
    parts: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    plm, _, _ = parts
    torch.manual_seed(0)
    text = {"width": 32, "heads": 2, "layers": 1, "vocab_size": 49408, "context_length": 16}
    given = open_clip.CLIP(
        24, {"image_size": 32, "patch_size": 32, "width": 16, "layers": 1, "head_width": 8}, text
    )
    config = CONFIG.model_copy(update={"experts": "t"})
    model = XAdapterModel.create(plm, given, config)
    model.save_pretrained(tmp_path / "first")
    assert not (tmp_path / "first" / "plm").exists()
    again = XAdapterModel.from_pretrained(tmp_path / "first")
    again.save_pretrained(tmp_path / "second")
    last = XAdapterModel.from_pretrained(tmp_path / "second")
    assert last.frozen_parts() == again.frozen_parts() == model.frozen_parts()


def test_expert_that_is_not_in_the_checkpoint(parts: tuple[Path, Path, Path], tmp_path: Path) -> None:
    plm, clip, _ = parts
    config = XAdapterConfig(experts="t", layers=(1,), adapter_width=16, num_heads=2)
    XAdapterModel.create(plm, clip, config).save_pretrained(tmp_path / "checkpoint")
    model = XAdapterModel.from_pretrained(tmp_path / "checkpoint")
    with pytest.raises(CheckpointError, match="expert 'v' is not in this checkpoint, which holds 't'"):
        model(**model.encode(TEXTS), experts="vt")


def test_banks_that_are_not_banks() -> None:
    bank = make_bank()
    for features, message in [
        (bank.features * 2, "expected a feature of length 1, got 2"),
        (bank.features[:3], "3 feature rows but 30 captions"),
        (bank.features[:0], "expected .* with N > 0"),
        (bank.features.astype("float64"), "float16 or float32"),
    ]:
        with pytest.raises(ShapeError, match=message):
            type(bank)(features, bank.pictures)
