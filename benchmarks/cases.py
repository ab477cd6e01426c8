"""The models that are measured, always with the same weights, and the texts that they read.

Dimensions: B batch, T PLM tokens, S CLIP tokens, P masks per text.
"""

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.feeds import Feed
from material.models import CASES as PARITY_CASES
from material.models import random_bank, randomize_plugin
from xadapter_export.bundle.manifest import Task
from xadapter_export.errors import ConfigError
from xadapter_export.model.config import RetrievalConfig
from xadapter_export.model.x_adapter_model import XAdapterModel
from xadapter_export.runtime.text import TruncationWarning
from xadapter_export.tasks import FILL_MASK, TASKS

NUM_PICTURES: Final = 20_000  # in the bank of the large case
_NUM_CALIBRATION = 32  # texts; a graph is as fast whatever it was calibrated on
NUM_PROTOTYPES: Final = 512  # in the static bank whose size is asked for

_SUBJECTS = ("strawberry", "banana", "house", "river", "dog", "bird", "car", "table", "window", "letter")
_FILLER = (
    "the old man walked down a long road to the small town and saw that every house by the water was new "
    "while two children were playing in the garden with their brown dog before the rain came over the hill"
)


def make_model(case: str, task: Task = FILL_MASK.name) -> XAdapterModel:
    """Make the model of a case, always with the same weights.

    Args:
        case: ``bert-base``, ``bert-base-static``, or another of ``material.models``.
        task: fill-mask, or feature-extraction on the bare encoder.
    """
    model = PARITY_CASES[case.removesuffix("-static")]()
    if case == "bert-base-static":
        return _rebuild(model, task, NUM_PROTOTYPES, retrieval=RetrievalConfig(mode="static"))
    if case == "bert-base":
        return _rebuild(model, task, NUM_PICTURES)
    return model.eval() if task == model.config.task else _rebuild(model, task)


def _rebuild(
    model: XAdapterModel, task: Task, num_pictures: int | None = None, **changes: object
) -> XAdapterModel:
    """Return the same parts with another task, bank or retrieval."""
    plm, bank = model.plm, model.bank
    if TASKS[task].head is None and model.config.task != task:
        plm = type(plm)(plm.encoder, plm.tokenizer, plm.special, plm.source)
    if num_pictures is not None and bank is not None:
        bank = random_bank(bank.features.shape[1], num_pictures)
    config = model.config.model_copy(update={"task": task, **changes})
    rebuilt = randomize_plugin(XAdapterModel(config, plm, model.clip, bank))
    rebuilt.adapters.load_state_dict(model.adapters.state_dict())
    return rebuilt.eval()


def make_feed(model: XAdapterModel, batch: int, seq: int) -> Feed:
    """Make B different texts of exactly T PLM tokens, one mask each, with CLIP's tokens at their true length.

    Returns:
        Arrays as ``TextEncoder.encode`` makes them.

    Raises:
        ConfigError: If the PLM cannot read T tokens.
    """
    if not 8 <= seq <= model.plm.max_seq:
        raise ConfigError("no text of this length", expected=f"8 to {model.plm.max_seq} tokens", got=seq)
    encoder = model.make_text_encoder(seq)
    rng = np.random.default_rng([batch, seq])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", TruncationWarning)  # CLIP reads its 77 tokens of a long text
        texts = [_text(model, rng, seq) for _ in range(batch)]
        feed = dict(encoder.encode(texts))
    if feed["input_ids"].shape != (batch, seq):
        raise RuntimeError(f"texts of {feed['input_ids'].shape} tokens, wanted {(batch, seq)}")
    return feed


def _text(model: XAdapterModel, rng: np.random.Generator, seq: int) -> str:
    """A text of ``seq`` tokens, or a few more, of which the encoder cuts the end."""
    tokenizer, filler = model.plm.tokenizer, _FILLER.split()
    words = [model.text_encoder.mask_token or "thing", str(rng.choice(_SUBJECTS))]
    while len(tokenizer.encode(" ".join(words)).ids) < seq:
        words.append(str(rng.choice(filler)))
    return " ".join(words)


def calibration_feeds(model: XAdapterModel) -> list[Feed]:
    """Make single texts of many lengths to calibrate on: B = 1, T from 8 to 64."""
    return [dict(model.text_encoder.encode([text])) for text in _calibration_texts(model, _NUM_CALIBRATION)]


def write_calibration(model: XAdapterModel, folder: Path) -> Path:
    """Write texts of the same kind to a file: as many to calibrate on, and as many to compare on."""
    file = folder / "calibration.txt"
    file.write_text("\n".join(_calibration_texts(model, 2 * _NUM_CALIBRATION)), encoding="utf-8")
    return file


def _calibration_texts(model: XAdapterModel, count: int) -> list[str]:
    lengths = [8 + (7 * number) % (min(64, model.plm.max_seq) - 7) for number in range(count)]
    rng = np.random.default_rng(1)
    return [_text(model, rng, seq) for seq in lengths]


def torch_feed(feed: Mapping[str, NDArray[np.int64]]) -> dict[str, torch.Tensor]:
    """Return the arrays as tensors that share their memory."""
    return {name: torch.from_numpy(array) for name, array in feed.items()}
