"""The tiny CLIP: its tokenizer, its training, and how well names find pictures.

B batch, N pictures, D embedding size, S text tokens.
"""

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from open_clip.tokenizer import SimpleTokenizer
from rich.console import Console
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor

from material.pictures import Material
from material.stages import track
from material.text import MASK, TRAINING_TEMPLATES, UNSEEN_TEMPLATES, caption_words, draw_caption, fill
from xadapter_export.model.clip_tokenizer import build_clip_tokenizer
from xadapter_export.runtime.text import clip_text

# open_clip's own normalization constants, so that its default preprocessing suits this model.
_MEAN = torch.tensor(open_clip.OPENAI_DATASET_MEAN).view(1, 3, 1, 1)
_STD = torch.tensor(open_clip.OPENAI_DATASET_STD).view(1, 3, 1, 1)


@dataclass(frozen=True)
class ClipSettings:
    """Section ``[clip]`` of the recipe."""

    embed_dim: int
    patch_size: int
    vision_width: int
    vision_layers: int
    text_width: int
    text_layers: int
    head_width: int
    context_length: int
    batch_size: int
    steps: int
    learning_rate: float
    weight_decay: float


def make_tokenizer(words: Sequence[str]) -> Tokenizer:
    """Cut CLIP's byte-level BPE down to what ``words`` need, without losing the ability to read any text.

    Source:
        open_clip 3.3 ``tokenizer.py``: the same merges in the same order, but those that no word uses are
        left out, so that other words fall into more pieces.
    """
    full = SimpleTokenizer()
    used = {pair for word in words for pair in _merges_of(full, word)}
    return build_clip_tokenizer(sorted(used, key=lambda pair: full.bpe_ranks[pair]))


def _merges_of(full: SimpleTokenizer, word: str) -> list[tuple[str, str]]:
    """The merges that open_clip's BPE makes on its way through one word, first to last."""
    symbols = [full.byte_encoder[byte] for byte in word.encode()]
    parts = [*symbols[:-1], symbols[-1] + "</w>"]
    made: list[tuple[str, str]] = []
    while len(parts) > 1:
        pair = min(pairwise(parts), key=lambda pair: full.bpe_ranks.get(pair, float("inf")))
        if pair not in full.bpe_ranks:
            break
        made.append(pair)
        merged: list[str] = []
        for part in parts:
            if merged and (merged[-1], part) == pair:
                merged[-1] += part
            else:
                merged.append(part)
        parts = merged
    return made


def tokenize(tokenizer: Tokenizer, texts: Sequence[str], context_length: int) -> Tensor:
    """``(B, context_length) int64``, zeros after end-of-text, which a text that is cut keeps."""
    ids = torch.zeros(len(texts), context_length, dtype=torch.long)
    for row, encoding in enumerate(tokenizer.encode_batch(list(texts))):
        kept = (
            encoding.ids[: context_length - 1] + encoding.ids[-1:]
            if len(encoding.ids) > context_length
            else encoding.ids
        )
        ids[row, : len(kept)] = torch.tensor(kept)
    return ids


def to_pixels(images: NDArray[np.uint8]) -> Tensor:
    """``(N, size, size, 3) uint8`` to ``(N, 3, size, size) float32``, normalized as open_clip does."""
    return (torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255 - _MEAN) / _STD


def train_clip(material: Material, settings: ClipSettings, seed: int, console: Console, folder: Path) -> None:
    """Train on distinct objects per batch, and write an open_clip folder that ``local-dir:`` can load."""
    torch.manual_seed(seed)
    rng = random.Random(seed)
    tokenizer = make_tokenizer(caption_words(material.objects))
    model_cfg = _model_config(settings, material.images.shape[1], tokenizer.get_vocab_size())
    model: Any = open_clip.CLIP(**model_cfg)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=settings.learning_rate, weight_decay=settings.weight_decay
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, settings.learning_rate, settings.steps, pct_start=0.1, cycle_momentum=False
    )
    pixels = to_pixels(material.images)
    white = ((1 - _MEAN) / _STD)[0]
    pictures_of = [np.flatnonzero(material.object_of == row).tolist() for row in range(len(material.objects))]
    targets = torch.arange(settings.batch_size)
    for _, note in track(settings.steps, "CLIP", console):
        rows = rng.sample(range(len(material.objects)), settings.batch_size)
        images = _augment(pixels[[rng.choice(pictures_of[row]) for row in rows]], white)
        captions = [draw_caption(material.objects[row], rng) for row in rows]
        text = tokenize(tokenizer, captions, settings.context_length)
        image_features, text_features, scale = model(images, text)
        logits = scale * image_features @ text_features.T  # (B, B)
        loss = (F.cross_entropy(logits, targets) + F.cross_entropy(logits.T, targets)) / 2
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]  # torch
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        with torch.no_grad():
            model.logit_scale.clamp_(max=float(np.log(100)))
        note(f"loss {loss.item():.3f}")
    weights = {name: tensor.half().float().contiguous() for name, tensor in model.state_dict().items()}
    save_file(weights, folder / "open_clip_model.safetensors", metadata={"format": "pt"})
    config = {
        "model_cfg": model_cfg,
        "preprocess_cfg": {"mean": _MEAN.flatten().tolist(), "std": _STD.flatten().tolist()},
    }
    (folder / "open_clip_config.json").write_text(json.dumps(config, indent=2))
    tokenizer.save(str(folder / "tokenizer.json"))


def _model_config(settings: ClipSettings, image_size: int, vocab_size: int) -> dict[str, Any]:
    return {
        "embed_dim": settings.embed_dim,
        "vision_cfg": {
            "image_size": image_size,
            "patch_size": settings.patch_size,
            "width": settings.vision_width,
            "layers": settings.vision_layers,
            "head_width": settings.head_width,
        },
        "text_cfg": {
            "context_length": settings.context_length,
            "vocab_size": vocab_size,
            "width": settings.text_width,
            "heads": settings.text_width // settings.head_width,
            "layers": settings.text_layers,
        },
    }


def _augment(pixels: Tensor, background: Tensor) -> Tensor:
    """Rotate, scale, shift and flip ``(B, 3, H, W) float32``; colors stay as they are."""
    count = len(pixels)
    angle = (torch.rand(count) - 0.5) * 0.7
    scale = 0.85 + 0.45 * torch.rand(count)
    flip = torch.where(torch.rand(count) < 0.5, -1.0, 1.0)
    cos, sin, shift = angle.cos() * scale, angle.sin() * scale, (torch.rand(count, 2) - 0.5) * 0.25
    theta = torch.stack(
        [torch.stack([cos * flip, -sin, shift[:, 0]], 1), torch.stack([sin * flip, cos, shift[:, 1]], 1)], 1
    )  # (B, 2, 3)
    grid = F.affine_grid(theta, list(pixels.shape), align_corners=False)
    return F.grid_sample(pixels - background, grid, align_corners=False) + background


@dataclass(frozen=True)
class Clip:
    """A trained CLIP that is ready to encode."""

    model: Any
    tokenizer: Tokenizer
    context_length: int

    @classmethod
    def load(cls, folder: Path) -> "Clip":
        """Load an open_clip folder."""
        model = open_clip.create_model(f"local-dir:{folder}").eval()
        config = json.loads((folder / "open_clip_config.json").read_text())
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        return cls(model, tokenizer, config["model_cfg"]["text_cfg"]["context_length"])

    @torch.no_grad()
    def encode_images(self, images: NDArray[np.uint8]) -> Tensor:
        """``(N, D) float32``, unit length."""
        parts = torch.split(to_pixels(images), 512)
        return torch.cat([self.model.encode_image(part, normalize=True) for part in parts])

    @torch.no_grad()
    def encode_texts(self, texts: Sequence[str]) -> Tensor:
        """``(B, D) float32``, unit length."""
        ids = tokenize(self.tokenizer, texts, self.context_length)
        return torch.cat([self.model.encode_text(part, normalize=True) for part in torch.split(ids, 512)])


def measure_clip(clip: Clip, material: Material) -> dict[str, float]:
    """How often the pictures nearest to a text show its object: by bare name, and by whole sentences."""
    bank = clip.encode_images(material.images)
    names = [entry.name for entry in material.objects]
    measured: dict[str, float] = {}
    for title, templates in (
        ("name", ("{n}",)),
        ("training sentence", TRAINING_TEMPLATES),
        ("unseen sentence", UNSEEN_TEMPLATES),
    ):
        hits = torch.stack(
            [
                torch.from_numpy(material.object_of)[
                    (
                        clip.encode_texts([clip_text(fill(template, name, c=MASK), MASK) for name in names])
                        @ bank.T
                    )
                    .topk(5)
                    .indices
                ]
                == torch.arange(len(names))[:, None]
                for template in templates
            ]
        ).float()  # (templates, objects, 5)
        measured[f"{title}, first picture right"] = hits[..., 0].mean().item()
        measured[f"{title}, one of five right"] = hits.amax(-1).mean().item()
        measured[f"{title}, share right of four"] = hits[..., :4].mean().item()
    return measured
