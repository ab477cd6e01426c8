"""Reads and writes checkpoint folders: strict, safetensors only, every frozen part checked by its hash."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Unpack

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from xadapter_export.bank import FeatureBank
from xadapter_export.bundle.hub import HubRepo, PushOptions, push_files
from xadapter_export.bundle.small_files import LARGEST_TEXT, check_files, read_model, read_text
from xadapter_export.bundle.staging import staged_folder
from xadapter_export.errors import CheckpointError, HashMismatchError
from xadapter_export.model.builtin import BUILTIN, builtin_folder
from xadapter_export.model.checkpoint_card import checkpoint_card
from xadapter_export.model.config import BankPart, CheckpointRecord, FrozenPart
from xadapter_export.model.identity import public_name, weights_sha256
from xadapter_export.model.plm import load_plm
from xadapter_export.model.towers import load_clip
from xadapter_export.model.x_adapter_model import XAdapterModel

RECORD_NAME = "xadapter.json"
PLUGIN_NAME = "xadapter.safetensors"
CARD_NAME = "README.md"
CALIBRATION_NAME = (
    "calibration.jsonl"  # texts as it was trained on: lossy exports are made and judged with them
)
_FILES = ("*.json", "*.jsonl", "*.safetensors")  # hub patterns reach into folders; no code, no pickles


def read_record(folder: Path) -> CheckpointRecord:
    """Reads ``xadapter.json``.

    Raises:
        CheckpointError: If it is missing, is not what the format says, or has a key that is not known.
    """
    path = folder / RECORD_NAME
    if not path.is_file():
        raise CheckpointError(
            f"checkpoint {folder}: {RECORD_NAME} is missing; expected a folder written by save_pretrained"
        )
    return read_model(path, CheckpointRecord, "the checkpoint's record", CheckpointError)


def find_checkpoint(source: str | Path, revision: str | None = None) -> Path:
    """Finds a checkpoint folder, downloading it where ``source`` is ``org/name`` on the Hub.

    Raises:
        CheckpointError: If it is neither a folder nor a name on the Hub.
        HubError: If it cannot be downloaded.
        ConfigError: If there is a revision, and it is a folder.
    """
    if str(source) == BUILTIN:
        return builtin_folder()
    if (repo := HubRepo.find(source, revision)) is not None:
        return repo.at_commit(repo.fetch_first(RECORD_NAME)).fetch(_FILES)
    if Path(source).is_dir():
        return Path(source)
    raise CheckpointError(
        f"checkpoint {source} is neither a folder nor a reachable hub id; "
        "give a folder written by save_pretrained, or nothing for the built-in checkpoint"
    )


def push_checkpoint(folder: Path, repo: str, **options: Unpack[PushOptions]) -> str:
    """Uploads a checkpoint folder; see ``XAdapterModel.push_to_hub``."""
    read_record(folder)
    _refuse_pickles(folder)
    patterns = (*_FILES, "README.md")
    files = sorted({path for pattern in patterns for path in folder.rglob(pattern) if path.is_file()})
    names = [path.relative_to(folder).as_posix() for path in files]
    return push_files(folder, names, repo, **options)


def read_checkpoint(
    source: str | Path,
    *,
    plm: str | Path | None = None,
    clip: str | Path | None = None,
    revision: str | None = None,
) -> XAdapterModel:
    """Reads a checkpoint; see ``XAdapterModel.from_pretrained``."""
    folder = find_checkpoint(source, revision)
    record = read_record(folder)
    _refuse_pickles(folder)
    plm_source = plm or _local_or(folder / "plm", record.plm.source)
    frozen_plm = load_plm(plm_source, record.config.task)
    frozen_plm.source, frozen_plm.is_at_source = record.plm.source, plm_source != folder / "plm"
    tower = None
    if record.clip is not None:
        clip_source = clip or _local_or(folder / "clip", record.clip.source)
        tower = load_clip(clip_source, record.clip.family)
        tower.source, tower.is_at_source = record.clip.source, clip_source != folder / "clip"
    bank = FeatureBank.load(folder) if record.bank is not None else None

    model = XAdapterModel(record.config, frozen_plm, tower, bank)
    found: tuple[FrozenPart | BankPart | None, ...] = model.frozen_parts()
    for name, recorded, part in zip(
        ("PLM", "CLIP", "bank"), (record.plm, record.clip, record.bank), found, strict=True
    ):
        if recorded is not None and (part is None or part.sha256 != recorded.sha256):
            raise HashMismatchError(
                f"{name} of checkpoint {source} is not the one it was trained with: "
                f"expected weights {recorded.sha256[:12]}, got {part.sha256[:12] if part else 'none'}; "
                "get the original"
            )
    _load_plugin(model, folder / PLUGIN_NAME)
    model.calibration = _read_calibration(folder / CALIBRATION_NAME)
    for name, recorded_sha256, sha256 in (
        (PLUGIN_NAME, record.plugin_sha256, plugin_sha256(model)),
        (CALIBRATION_NAME, record.calibration_sha256, _text_sha256(model.calibration)),
    ):
        if sha256 != recorded_sha256:
            raise HashMismatchError(
                "the checkpoint is not the one that was saved",
                where=folder / name,
                expected=f"SHA-256 {recorded_sha256}",
                got=sha256,
                hint="copy the checkpoint again",
            )
    return model.eval()


def plugin_sha256(model: XAdapterModel) -> str:
    """Hashes what was trained, with those of its settings that are not the default."""
    settings = model.config.model_dump(mode="json", exclude_defaults=True)
    return weights_sha256(model.trained_state(), settings)


def _text_sha256(text: str | None) -> str | None:
    return None if text is None else hashlib.sha256(text.encode()).hexdigest()


def _local_or(folder: Path, source: str) -> str | Path:
    return folder if folder.is_dir() else source


def _refuse_pickles(folder: Path) -> None:
    check_files(folder, "a file of the checkpoint", CheckpointError)
    for path in sorted(folder.rglob("*")):
        if path.suffix in {".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle"}:
            raise CheckpointError(
                f"checkpoint {folder}: {path.relative_to(folder)} is a pickle, which is refused; "
                "save weights as safetensors"
            )


def _read_calibration(path: Path) -> str | None:
    if not path.is_file():
        return None
    return read_text(path, "the calibration texts", CheckpointError, largest=LARGEST_TEXT)


def _load_plugin(model: XAdapterModel, path: Path) -> None:
    if not path.is_file():
        raise CheckpointError(f"checkpoint {path} is missing; it holds the trained plug-in")
    try:
        state = load_file(path)
    except (SafetensorError, OSError, MemoryError) as error:
        raise CheckpointError(
            f"checkpoint {path} cannot be read ({error}); the file is truncated or not safetensors"
        ) from error
    expected = model.trained_state()
    for name in sorted(expected.keys() | state.keys()):
        want = tuple(expected[name].shape) if name in expected else "no such tensor"
        got = tuple(state[name].shape) if name in state else "none"
        if want != got:
            raise CheckpointError(
                f"checkpoint {path}: tensor {name} expected {want}, got {got}; it belongs to another "
                "configuration"
            )
        if not torch.isfinite(state[name]).all():
            raise CheckpointError(
                f"checkpoint {path}: tensor {name} has values that are not finite; train it again"
            )
    model.load_state_dict({name: tensor.to(torch.float32) for name, tensor in state.items()}, strict=False)


def write_checkpoint(
    model: XAdapterModel,
    folder: Path,
    *,
    self_contained: bool,
    dtype: torch.dtype,
    training: dict[str, str | int | float | bool | None],
    more_files: dict[str, str],
) -> None:
    """Writes a checkpoint; see ``XAdapterModel.save_pretrained``."""
    plm, clip, bank = model.frozen_parts()
    stores_plm = self_contained or not model.plm.is_at_source
    stores_clip = model.clip is not None and (self_contained or not model.clip.is_at_source)
    if stores_plm:  # then nobody needs to find it where it was
        plm = plm.model_copy(update={"source": public_name(plm.source)})
    if stores_clip:
        clip = clip and clip.model_copy(update={"source": public_name(clip.source)})
    record = CheckpointRecord(
        config=model.config,
        plm=plm,
        clip=clip,
        bank=bank,
        plugin_sha256=plugin_sha256(model),
        calibration_sha256=_text_sha256(more_files.get(CALIBRATION_NAME, model.calibration)),
        training=training,
    )
    with staged_folder(folder, force=True, marker=RECORD_NAME) as staged:
        staging = staged.path
        (staging / RECORD_NAME).write_text(record.model_dump_json(indent=2) + "\n", encoding="utf-8")
        save_file(
            {name: tensor.contiguous() for name, tensor in model.trained_state().items()},
            staging / PLUGIN_NAME,
        )
        (staging / CARD_NAME).write_text(checkpoint_card(record, staged.final.name), encoding="utf-8")
        if model.calibration is not None:
            (staging / CALIBRATION_NAME).write_text(model.calibration, encoding="utf-8", newline="")
        for name, text in more_files.items():
            (staging / name).write_text(text, encoding="utf-8", newline="")
        if model.bank is not None:
            model.bank.save(staging)
        if stores_plm:
            _save_plm(model, staging / "plm", dtype)
        if stores_clip and model.clip is not None:
            _check_lossless(model.clip.weights, dtype, "CLIP")
            model.clip.save(staging / "clip", dtype)


def _save_plm(model: XAdapterModel, folder: Path, dtype: torch.dtype) -> None:
    _check_lossless(dict(model.plm.model.state_dict()), dtype, "PLM")
    try:  # copies would not be tied any more, so the model itself is narrowed, and nothing is lost
        nn.Module.to(model.plm.model, dtype)
        model.plm.model.save_pretrained(folder)
    finally:
        nn.Module.to(model.plm.model, torch.float32)
    model.plm.tokenizer.save(str(folder / "tokenizer.json"), pretty=False)
    write_tokenizer_config(model, folder)


def write_tokenizer_config(model: XAdapterModel, folder: Path) -> None:
    """Writes ``tokenizer_config.json``, without which transformers and transformers.js read no tokenizer."""
    mask = {"mask_token": model.text_encoder.mask_token} if model.text_encoder.mask_token else {}
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": model.plm.max_seq,
        "pad_token": model.plm.tokenizer.id_to_token(model.plm.special["pad"]),
        **mask,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def _check_lossless(state: Mapping[str, Tensor], dtype: torch.dtype, what: str) -> None:
    if dtype == torch.float32:
        return
    rounded = {k: v.to(dtype) if v.is_floating_point() else v for k, v in state.items()}
    if weights_sha256(rounded) != weights_sha256(state):
        raise CheckpointError(
            f"{what}: storing as {dtype} would change its weights; "
            "round them before training, or store float32"
        )
