"""Writes the checkpoint folder that the wheel carries."""

import json
import random
import shutil
from collections.abc import Sequence
from itertools import islice
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from material.pictures import COLORS, DemoObject
from material.text import MASK, UNSEEN_TEMPLATES, draw_color_sentences, fill, list_facts
from xadapter_export.model.x_adapter_model import XAdapterModel

MAX_BYTES = 12_000_000
_NUM_CALIBRATION = 600  # sentences for the export of lossy variants
_NOTICE = Path(__file__).with_name("NOTICE.md")


def write_checkpoint(
    model: XAdapterModel,
    clip_folder: Path,
    objects: Sequence[DemoObject],
    held_out: Sequence[DemoObject],
    seed: int,
    folder: Path,
) -> int:
    """Write plug-in, bank, PLM, the whole CLIP, the held-out objects and the notices.

    Returns:
        Size in bytes.

    Raises:
        ValueError: If it is larger than the wheel may carry.
    """
    model.plm.source, model.clip.source = "built-in/plm", "built-in/clip"  # type: ignore[union-attr]  # it has a CLIP
    model.calibration = draw_calibration(objects, seed)
    model.save_pretrained(
        folder,
        self_contained=True,
        dtype=torch.float16,
        training={"recipe": "python -m train.demo", "seed": seed},
    )
    # Inference needs the text tower alone; with the image tower users can add pictures to the bank.
    for name in ("open_clip_config.json", "tokenizer.json"):
        shutil.copyfile(clip_folder / name, folder / "clip" / name)
    weights = load_file(clip_folder / "open_clip_model.safetensors")
    save_file(
        {name: tensor.half() for name, tensor in weights.items()},
        folder / "clip" / "open_clip_model.safetensors",
        metadata={"format": "pt"},
    )
    (folder / "heldout.jsonl").write_text(
        "".join(json.dumps(describe_held_out(entry), ensure_ascii=False) + "\n" for entry in held_out),
        encoding="utf-8",
    )
    shutil.copyfile(_NOTICE, folder / _NOTICE.name)
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    if size > MAX_BYTES:
        raise ValueError(
            f"{folder} has {size} bytes and the wheel may carry {MAX_BYTES}; make [clip] or [plm] smaller"
        )
    return size


def draw_calibration(objects: Sequence[DemoObject], seed: int) -> str:
    """Sentences as the models were trained on, half of them facts and half with a color, as JSON lines."""
    rng = random.Random(seed)
    facts = [wording for fact in list_facts(objects) for wording in fact.wordings]
    colors = islice(draw_color_sentences(objects, rng), _NUM_CALIBRATION // 2)
    texts = [*rng.sample(facts, _NUM_CALIBRATION // 2), *colors]
    return "".join(json.dumps({"sentence": text}, ensure_ascii=False) + "\n" for text in texts)


def describe_held_out(entry: DemoObject) -> dict[str, object]:
    """An object to score with: its name and colors as CoDa has them, and the sentences that ask."""
    return {
        "name": entry.coda_name,
        "color": entry.color,
        "distribution": dict(zip(COLORS, entry.color_shares, strict=True)),
        "sentences": [fill(template, str(entry.coda_name), c=MASK) for template in UNSEEN_TEMPLATES],
    }
