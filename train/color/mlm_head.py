"""An MLM head for a PLM that comes without one: trained on the recipe's text, over the frozen encoder.

B batch, T tokens, M masked tokens of a batch, H hidden size, V vocabulary.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console

from material.pictures import DemoObject
from material.stages import track
from material.text import draw_color_sentences
from xadapter_export.torchvision_cure import cure_torchvision

cure_torchvision()

from transformers import AutoModelForMaskedLM, AutoTokenizer  # noqa: E402  # torchvision must be cured first


@dataclass(frozen=True)
class HeadSettings:
    """Section ``[head]`` of the recipe."""

    steps: int
    batch_size: int
    learning_rate: float
    mask_probability: float


def train_head(
    plm: str,
    sentences: Sequence[str],
    objects: Sequence[DemoObject],
    settings: HeadSettings,
    seed: int,
    console: Console,
    folder: Path,
) -> None:
    """Write a ``save_pretrained`` folder of the same encoder with a head that fills masks.

    Three parts of the text are facts, one is color sentences whose colors have nothing to do with the
    objects in them. The decoder is the frozen embedding table; the transform before it and its bias learn.
    """
    torch.manual_seed(seed)
    rng = random.Random(seed)
    tokenizer = AutoTokenizer.from_pretrained(plm)
    model: Any = AutoModelForMaskedLM.from_pretrained(
        plm, dtype=torch.float32, attn_implementation="sdpa"
    ).eval()
    model.tie_weights()
    model.requires_grad_(False)
    transform = model.cls.predictions.transform.requires_grad_(True)
    bias = model.cls.predictions.bias.requires_grad_(True)
    trained = [*transform.parameters(), bias]
    optimizer = torch.optim.AdamW(trained, lr=settings.learning_rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, settings.learning_rate, settings.steps, pct_start=0.1, cycle_momentum=False
    )
    colors = draw_color_sentences(objects, rng)
    special = torch.tensor(tokenizer.all_special_ids)
    average = 0.0
    for step, note in track(settings.steps, "MLM head", console):
        texts = [*islice(colors, settings.batch_size // 4)]
        texts += rng.choices(list(sentences), k=settings.batch_size - len(texts))
        batch = tokenizer(texts, padding=True, return_tensors="pt")
        ids = batch["input_ids"]  # (B, T)
        chance = torch.rand(ids.shape).masked_fill(torch.isin(ids, special), 2.0)
        chosen = (chance < settings.mask_probability) | (chance == chance.amin(1, keepdim=True))
        masked = ids.masked_fill(chosen, tokenizer.mask_token_id)
        with torch.no_grad():
            hidden = model.base_model(masked, attention_mask=batch["attention_mask"]).last_hidden_state
        loss = F.cross_entropy(model.cls(hidden[chosen]), ids[chosen])  # (M, V) against (M,)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]  # torch
        optimizer.step()
        schedule.step()
        average = loss.item() if step == 0 else 0.98 * average + 0.02 * loss.item()
        note(f"loss {average:.3f}")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
