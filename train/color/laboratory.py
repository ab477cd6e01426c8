"""Trains and measures plug-ins for color: one split of the objects, one arm at a time.

B questions, P masks, V vocabulary, K pictures, N bank rows, C colors (11).
"""

import json
import random
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from rich.console import Console
from torch import Tensor

from material.pictures import COLORS, DemoObject
from material.splits import Split
from material.tables import Language
from material.text import MASK, TRAINING_TEMPLATES, UNSEEN_TEMPLATES, fill
from xadapter_export.bundle.manifest import ExpertSet
from xadapter_export.model.plm_family import PlmFamily
from xadapter_export.model.x_adapter_model import XAdapterModel
from xadapter_export.training import TrainConfig, read_config, train
from xadapter_export.training.config import all_flags

_WORD = re.compile(r"\w+")
_BATCH = 128


@dataclass(frozen=True)
class Arm:
    """One way to train.

    Attributes:
        name: Row of the tables.
        settings: Laid over the recipe's training settings.
        measured: Expert sets to measure, with the row that each fills.
    """

    name: str
    settings: dict[str, Any]
    measured: dict[ExpertSet, str]


@dataclass(frozen=True)
class ArmResult:
    """Color accuracy and language check by row."""

    accuracy: dict[str, float]
    language: dict[str, Language]


@dataclass(frozen=True)
class Laboratory:
    """What all splits and arms share.

    Attributes:
        plm: Frozen PLM with an MLM head.
        parts: ``plm``, ``clip`` and ``bank`` as a training config names them.
        objects: Named objects.
        targets: ``(objects, 11) float64``. Color shares to learn.
        sentences: Sentences without colors, for the language.
        kept: Sentences that were kept from everything, for the language check.
        settings: Section ``[training]`` of the recipe.
        work: Folder of runs and caches.
        console: Where progress goes.
    """

    plm: PlmFamily
    parts: dict[str, str]
    objects: Sequence[DemoObject]
    targets: NDArray[np.float64]
    sentences: Sequence[str]
    kept: Sequence[str]
    settings: dict[str, Any]
    work: Path
    console: Console

    def train(self, arm: Arm, split: Split, seed: int, folder: Path) -> XAdapterModel:
        """Train one arm on one split; the checkpoint is left in ``folder``."""
        files = self._write_texts(split, seed)
        config = self._config(arm, seed, folder, files)
        title = f"{folder.parent.name}, {arm.name}"

        def say(step: int, steps: int, note: str) -> None:
            if step * 4 // steps > (step - 1) * 4 // steps:
                self.console.print(f"  {title}: {step}/{steps} {note}")

        return train(config, plm=self.plm, on_step=say).model

    def measure(self, model: XAdapterModel, arm: Arm, split: Split, seed: int) -> ArmResult:
        """Ask for the colors of the held-out objects in unseen sentences, and check the language."""
        accuracy: dict[str, float] = {}
        language: dict[str, Language] = {}
        texts, colors = self.questions(split.held_out)
        sentences, answers = self.language_questions(self.settings["language_questions"], seed=0)
        for experts, row in arm.measured.items():
            said = mask_logits(model, texts, experts)[:, self._color_ids(model)].argmax(1)
            accuracy[row] = float((said == colors).float().mean())
            logits = mask_logits(model, sentences, experts)
            best = logits.argmax(1)
            language[row] = Language(
                loss=F.cross_entropy(logits, answers).item(),
                top1=float((best == answers).float().mean()),
                color_rate=float(torch.isin(best, self._color_ids(model)).float().mean()),
            )
            if row == "V-expert":
                order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(seed)).tolist()
                shuffled = mask_logits(model, texts, experts, seen=[texts[i] for i in order])
                said = shuffled[:, self._color_ids(model)].argmax(1)
                accuracy["V-expert, shuffled pictures"] = float((said == colors).float().mean())
        return ArmResult(accuracy, language)

    def questions(self, rows: Sequence[int]) -> tuple[list[str], Tensor]:
        """Unseen sentences about objects by CoDa's names, and ``(B,) int64`` colors."""
        asked = [
            (fill(template, str(self.objects[row].coda_name), c=MASK), row)
            for row in rows
            for template in UNSEEN_TEMPLATES
        ]
        colors = torch.from_numpy(self.targets.argmax(1))[[row for _, row in asked]]
        return [self._own_mask(text) for text, _ in asked], colors

    def language_questions(self, count: int, seed: int) -> tuple[list[str], Tensor]:
        """Kept sentences with one word masked that is one token, and ``(B,) int64`` tokens."""
        rng = random.Random(seed)
        texts: list[str] = []
        answers: list[int] = []
        for sentence in rng.sample(list(self.kept), min(count, len(self.kept))):
            words = [
                (word, encoding.ids[0])
                for word in _WORD.finditer(sentence)
                if len(
                    (encoding := self.plm.tokenizer.encode(" " + word.group(), add_special_tokens=False)).ids
                )
                == 1
            ]
            if words:
                word, token = rng.choice(words)
                texts.append(self._own_mask(sentence[: word.start()] + MASK + sentence[word.end() :]))
                answers.append(token)
        return texts, torch.tensor(answers)

    def _config(self, arm: Arm, seed: int, folder: Path, files: dict[str, Path]) -> TrainConfig:
        own = {key: value for key, value in self.settings.items() if key in all_flags()}
        settings = {**own, **self.parts, **arm.settings}
        weights = {"colors": 1, "facts": 2, "names": 1, "seen_names": 1}
        names = ["colors", "facts", *(["names"] if settings.get("distill_weight") else [])]
        names = settings.pop("texts", names)
        settings["train_weights"] = [weights[name] for name in names]
        return read_config(
            None,
            {
                **settings,
                "output": str(folder),
                "force": True,
                "seed": seed,
                "train_files": [str(files[name]) for name in names],
                "cache": str(self.work / "cache"),
            },
        )

    def _write_texts(self, split: Split, seed: int) -> dict[str, Path]:
        """Color questions of training objects, facts without held-out objects, and looks at names."""
        folder = self.work / "texts" / f"{seed}"
        folder.mkdir(parents=True, exist_ok=True)
        colors = [
            {
                "text": fill(template, noun, c=MASK),
                "answers": {c: s for c, s in zip(COLORS, self.targets[row].tolist(), strict=True) if s > 0},
            }
            for row in split.training
            for noun in self.objects[row].names
            for template in TRAINING_TEMPLATES
        ]
        rng = random.Random(seed)
        facts = [sentence for sentence in self.sentences if not split.names_held_out(sentence)]
        names = [
            {"text": fill(template, noun, c=MASK), "answers": None}
            for entry in self.objects
            for noun in entry.names
            for template in TRAINING_TEMPLATES
        ]
        seen_names = [
            {"text": fill(template, noun, c=MASK), "answers": None}
            for row in split.training
            for noun in self.objects[row].names
            for template in TRAINING_TEMPLATES
        ]
        lines = {
            "colors": [json.dumps(row) for row in colors],
            "names": [json.dumps(row) for row in names],
            "seen_names": [json.dumps(row) for row in seen_names],
            "facts": rng.sample(facts, min(len(facts), self.settings["num_facts"])),
        }
        paths = {name: folder / (f"{name}.txt" if name == "facts" else f"{name}.jsonl") for name in lines}
        for name, path in paths.items():
            path.write_text("\n".join(lines[name]) + "\n", encoding="utf-8")
        return paths

    def _own_mask(self, text: str) -> str:
        return text.replace(MASK, str(self.plm.tokenizer.id_to_token(self.plm.special["mask"])))

    def _color_ids(self, model: XAdapterModel) -> Tensor:
        ids = [model.plm.tokenizer.encode(" " + color, add_special_tokens=False).ids for color in COLORS]
        return torch.tensor([row[0] for row in ids])


@torch.inference_mode()
def mask_logits(
    model: XAdapterModel, texts: Sequence[str], experts: ExpertSet, seen: Sequence[str] | None = None
) -> Tensor:
    """``(B, V) float32`` at the one mask of each text; ``seen`` are texts whose memory is used instead."""
    parts = []
    for start in range(0, len(texts), _BATCH):
        inputs = model.encode(texts[start : start + _BATCH])
        clip_ids = (model.encode(seen[start : start + _BATCH]) if seen else inputs).get("clip_input_ids")
        output = model(
            inputs["input_ids"],
            inputs["attention_mask"],
            inputs.get("token_type_ids"),
            clip_ids,
            inputs["mask_positions"],
            experts=experts,
        )
        parts.append(output.logits[:, 0])
    return torch.cat(parts)


def to_json(result: ArmResult) -> dict[str, Any]:
    """A result as JSON."""
    return asdict(result)


def from_json(value: dict[str, Any]) -> ArmResult:
    """The inverse of ``to_json``."""
    return ArmResult(value["accuracy"], {row: Language(**check) for row, check in value["language"].items()})
