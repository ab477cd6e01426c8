"""CLIP's image tower with its own preprocessing, and its identity.

Dimensions: B batch, D CLIP embedding size.
"""

import json
import logging
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from xadapter_export.bank import BankClip
from xadapter_export.errors import CheckpointError, ConfigError, UnsupportedError
from xadapter_export.model.builtin import BUILTIN
from xadapter_export.model.clip_text import (
    CONFIG_NAME,
    WEIGHTS_NAME,
    OpenClipTower,
    find_clip,
    read_clip_config,
)
from xadapter_export.model.identity import public_name, weights_sha256
from xadapter_export.torchvision_cure import cure_torchvision

BUILTIN_CLIP_SOURCE = "built-in/clip"  # what the built-in checkpoint calls it

Precision = Literal["fp32", "fp16", "bf16"]
_INPUT_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class ImageTower:
    """An image tower on its device.

    Attributes:
        model: open_clip's model.
        preprocess: RGB picture to ``(3, size, size) float32``.
        clip: Its identity.
        device: Where it is.
        input_dtype: What it takes.
    """

    model: nn.Module
    preprocess: Callable[[Any], Tensor]
    clip: BankClip
    device: torch.device
    input_dtype: torch.dtype

    @torch.inference_mode()
    def encode(self, pixels: Tensor) -> Tensor:
        """Encode ``(B, 3, size, size) float32`` to ``(B, D) float32`` of length 1, on the tower's device."""
        pixels = pixels.to(self.device, self.input_dtype, non_blocking=True)
        encode_image: Callable[[Tensor], Tensor] = self.model.encode_image  # type: ignore[assignment]  # method
        return F.normalize(encode_image(pixels).to(torch.float32), dim=-1)


def choose_device(name: str, *, local_rank: int = 0) -> torch.device:
    """Return a device by name; ``auto`` takes an accelerator where there is one.

    Raises:
        ConfigError: If there is no such device.
    """
    if name == "auto":
        name = torch.accelerator.current_accelerator().type if torch.accelerator.is_available() else "cpu"  # type: ignore[union-attr]  # there is one
    if name == "cuda":
        name = f"cuda:{local_rank}"
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ConfigError(
            "no such device", where=name, got=str(error).split("\n", 1)[0], hint="use --device cpu"
        ) from error
    return device


def load_image_tower(source: str | None, *, device: torch.device, precision: Precision) -> ImageTower:
    """Load an image tower.

    Args:
        source: Folder in open_clip's hub layout, ``model:tag``, hub id; None for the built-in CLIP.
        device: Where it goes.
        precision: What it computes in; fp16 needs an accelerator.

    Raises:
        CheckpointError: If it is not found, or holds no image tower.
        ConfigError: If the device does not have the precision.
    """
    if precision == "fp16" and device.type == "cpu":
        raise ConfigError("fp16 is slow and inexact on a CPU", hint="use --precision fp32 or bf16")
    folder = find_clip(source or BUILTIN)
    name = BUILTIN_CLIP_SOURCE if source in {None, BUILTIN} else str(source)
    visual = _visual_weights(folder / WEIGHTS_NAME, name)
    settings = read_clip_config(folder)
    needed, model_cfg = {"embed_dim", "vision_cfg", "text_cfg"}, settings["model_cfg"]
    if not isinstance(model_cfg, dict) or not needed <= model_cfg.keys():
        expected = f"a model_cfg with {', '.join(sorted(needed))}"
        raise CheckpointError(f"CLIP {name}: {CONFIG_NAME} cannot be read", expected=expected)
    cure_torchvision()
    import open_clip
    from open_clip.transform import PreprocessCfg, image_transform_v2

    try:
        with tempfile.TemporaryDirectory() as work, _no_log():  # with nothing but what was checked
            (Path(work) / CONFIG_NAME).write_text(json.dumps(settings), encoding="utf-8")
            model = open_clip.create_model(
                f"local-dir:{work}", precision=precision, device=device, pretrained_text=False
            )
        open_clip.load_checkpoint(model, str(folder / WEIGHTS_NAME))
        preprocess = image_transform_v2(PreprocessCfg(**model.visual.preprocess_cfg), is_train=False)
    except Exception as error:  # open_clip raises many kinds
        raise CheckpointError(
            "open_clip cannot load the CLIP", where=name, got=f"{type(error).__name__}: {str(error)[:300]}"
        ) from error
    model.eval().requires_grad_(False)
    identity = {
        "vision_cfg": model_cfg.get("vision_cfg"),
        "quick_gelu": bool(model_cfg.get("quick_gelu", False)),
        "preprocess": {key: _plain(value) for key, value in model.visual.preprocess_cfg.items()},
    }
    clip = BankClip(
        source=public_name(name),
        sha256=_text_sha256(folder),
        image_sha256=weights_sha256(visual, identity),
    )
    return ImageTower(model, preprocess, clip, device, _INPUT_DTYPES[precision])


@contextmanager
def _no_log() -> Iterator[None]:
    """Keep open_clip from saying that it has no weights yet."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


def _visual_weights(path: Path, name: str) -> dict[str, Tensor]:
    try:
        with safe_open(path, framework="pt") as weights:
            visual = {key: weights.get_tensor(key) for key in weights.keys() if key.startswith("visual.")}  # noqa: SIM118  # no dict
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"CLIP {name}: {WEIGHTS_NAME} cannot be read", got=error) from error
    if not visual:
        raise CheckpointError(
            f"CLIP {name} has only its text tower, but images need the image tower; give the whole CLIP"
        )
    return visual


def _text_sha256(folder: Path) -> str:
    """Hash the text tower as a model does; one of another kind, which no model reads, by its weights."""
    try:
        tower = OpenClipTower.load(folder)
    except UnsupportedError:
        with safe_open(folder / WEIGHTS_NAME, framework="pt") as weights:
            names = [key for key in weights.keys() if not key.startswith("visual.")]  # noqa: SIM118  # no dict
            return weights_sha256({key: weights.get_tensor(key) for key in names})
    return tower.sha256


def _plain(value: Any) -> Any:
    """Return a setting for hashing; numbers as float32, however many digits are written down."""
    if isinstance(value, tuple | list):
        return [_plain(part) for part in value]
    return torch.tensor(value, dtype=torch.float32).item() if isinstance(value, float) else value
