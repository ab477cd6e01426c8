"""``python -m benchmarks.training``: training a plug-in against fine-tuning the whole PLM.

Both learn two labels from the same texts in the same order, in batches of the same size and length, with the
same head, loss, optimizer and clipping; neither has dropout, which would only slow fine-tuning down. The
plug-in, V- and T-expert of width 64 before the last two layers, is trained as ``xad-train`` does it: what the
frozen models say was computed once and is read from disk. Random labels and a random CLIP of ViT-B/32's text
width serve, because only speed and memory are measured.

Speed: blocks of steps take turns in one process, and the figure to read is the ratio. Memory: each arm runs
in a process of its own; beyond the weights is the largest resident size while it trains, less that before the
first step, when models and data are loaded: gradients, optimizer state, activations.

Dimensions: B batch, T PLM tokens.
"""

import ctypes
import gc
import json
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
import torch.nn.functional as F
from rich.table import Table
from tokenizers import Tokenizer
from torch import Tensor, nn

from benchmarks.machine import cpu
from material.models import minilm_folder, random_bank
from xadapter_export.cli.command import make_console, print_json
from xadapter_export.model.clip_text import ClipTextConfig, OpenClipTower
from xadapter_export.model.clip_tokenizer import clip_tokenizer
from xadapter_export.model.config import XAdapterConfig
from xadapter_export.model.plm import load_plm
from xadapter_export.model.plm_family import PlmFamily
from xadapter_export.model.post_norm import Bert
from xadapter_export.model.tasks import ClassificationHead
from xadapter_export.model.x_adapter_model import XAdapterModel
from xadapter_export.runtime.text import TruncationWarning
from xadapter_export.training.batches import Collator, Source, TrainingOrder
from xadapter_export.training.config import TrainConfig
from xadapter_export.training.examples import encode_labeled
from xadapter_export.training.frozen_features import FeatureCache, FrozenFeatures, frozen_features
from xadapter_export.training.objective import TrainingModel

from transformers import BertConfig, BertModel  # isort: skip  # cured by model.plm

ARMS = ("plug-in", "fine-tuning")
_NUM_BATCHES = 4  # of different texts
_K, _POOL = 4, 8
_SEED = 7
_MIB = 1024.0  # KiB
_QUICK = {"steps": 2, "block": 1, "batch_size": 4, "seq": 16}


@dataclass(frozen=True)
class _Shape:
    """What both arms are given."""

    plm: str
    batch_size: int
    seq: int


class _FineTuning(nn.Module):
    """The PLM as transformers has it, all of it trained, with the head and the loss of the plug-in's task."""

    def __init__(self, plm: nn.Module, hidden_size: int) -> None:
        super().__init__()
        self.plm = plm
        self.head = ClassificationHead(hidden_size, 2)

    def forward(self, labels: Tensor, **inputs: Tensor) -> dict[str, Tensor]:
        """Return the loss of ``(B, T)`` tokens and ``(B,) int64`` labels."""
        logits = self.head(self.plm(**inputs).last_hidden_state)
        return {"loss": F.cross_entropy(logits, labels)}


def _load_plm(name: str) -> PlmFamily:
    if name == "minilm":
        return load_plm(minilm_folder(), "text-classification")
    tokenizer = Tokenizer.from_file(str(minilm_folder() / "tokenizer.json"))  # BERT's own vocabulary
    tokenizer.no_padding()
    tokenizer.no_truncation()
    torch.manual_seed(_SEED)
    model = BertModel(BertConfig(), add_pooling_layer=False)
    return Bert(model, tokenizer, {"pad": 0, "mask": 103}, "random BERT-base")


def _make_model(plm: PlmFamily) -> XAdapterModel:
    """A fresh plug-in with a CLIP of one layer: its depth is paid once, before training."""
    torch.manual_seed(_SEED)
    clip = OpenClipTower(ClipTextConfig(embed_dim=512, layers=1), clip_tokenizer(), "random CLIP")
    with torch.no_grad():
        for parameter in clip.parameters():
            if parameter.ndim == 2:
                parameter.normal_(std=0.05)
    count = len(plm.layers)
    config = XAdapterConfig.model_validate(
        {
            "experts": "vt",
            "layers": (count - 2, count - 1),
            "adapter_width": 64,
            "num_heads": 4,
            "retrieval": {"mode": "topk", "k": _K},
            "task": "text-classification",
            "labels": ("no", "yes"),
        }
    )
    return XAdapterModel(config, plm, clip, random_bank(clip.feature_dim))


def _make_source(shape: _Shape, model: XAdapterModel, cache: Path, *, with_features: bool) -> Source:
    """Texts of exactly T tokens with random labels, and what the frozen models say about them."""
    vocabulary = sorted(model.plm.tokenizer.get_vocab())
    words = [word for word in vocabulary if word.isascii() and word.isalpha() and word.islower()]
    rng = np.random.default_rng(_SEED)
    count = _NUM_BATCHES * shape.batch_size
    texts = [" ".join(rng.choice(words, shape.seq - 2)) for _ in range(count)]  # and two special tokens
    model.text_encoder = model.make_text_encoder(shape.seq)
    labels = rng.integers(0, 2, count).tolist()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", TruncationWarning)  # CLIP reads its 77 tokens of a long text
        examples = encode_labeled(model.text_encoder, texts, None, labels, regression=False)
    if any(len(row) != shape.seq for row in examples.input_ids):
        raise RuntimeError(f"a text has not {shape.seq} tokens")
    if not with_features:
        return Source(examples, FrozenFeatures(None, None, None, None))
    # The folder is this benchmark's own, so that the hashes need not tell models apart.
    kept = FeatureCache(cache, dict.fromkeys(("plm", "clip", "bank"), "random"))
    return Source(examples, frozen_features(model, examples, kept, pool=_POOL, with_hidden=True))


class _Arm:
    """One way of training: a model, its optimizer, and its batches without end."""

    def __init__(self, name: str, shape: _Shape, cache: Path) -> None:
        plm = _load_plm(shape.plm)
        model = _make_model(plm)
        is_plugin = name == "plug-in"
        source = _make_source(shape, model, cache, with_features=is_plugin)
        self._batches = _batches(source, shape, plm.special["pad"])
        if is_plugin:
            self._model: nn.Module = TrainingModel(model).train()
        else:
            whole = _FineTuning(plm.model.requires_grad_(True), plm.hidden_size)
            self._model = whole.eval()  # which switches dropout off
        self._trained = [p for p in self._model.parameters() if p.requires_grad]
        self.num_trained = sum(parameter.numel() for parameter in self._trained)
        self._optimizer = torch.optim.AdamW(self._trained, lr=1e-5, weight_decay=0.01, fused=True)

    def step(self) -> float:
        """Take one step; return the loss."""
        loss: Tensor = self._model(**next(self._batches))["loss"]
        loss.backward()  # type: ignore[no-untyped-call]  # torch annotates no backward
        nn.utils.clip_grad_norm_(self._trained, TrainConfig.model_fields["max_grad_norm"].default)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return loss.item()


def _batches(source: Source, shape: _Shape, pad: int) -> Iterator[dict[str, Tensor]]:
    order, collate, start = TrainingOrder([source], sys.maxsize, _K, _SEED), Collator(pad), 0
    while True:
        yield collate([order[draw] for draw in range(start, start + shape.batch_size)])
        start += shape.batch_size


# ------------------------------------------------------------------------------------------ memory


def _resident_mib(field: str) -> float:
    """Read a field of Linux's record of this process, in MiB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) / _MIB
    raise RuntimeError(f"this system does not tell {field}")


def _measure_memory(arm: _Arm, steps: int) -> dict[str, float]:
    """Return what training needs beyond what is resident before its first step, in MiB."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(
        0
    )  # what loading freed goes back, so that it cannot hide what training takes
    Path("/proc/self/clear_refs").write_text("5")  # the highest resident size so far is forgotten
    before = _resident_mib("VmRSS")
    for _ in range(steps):
        arm.step()
    return {"before_mib": before, "beyond_mib": _resident_mib("VmHWM") - before}


def _memory_in_own_process(name: str, shape: _Shape, threads: int, cache: Path) -> dict[str, float]:
    options = {"plm": shape.plm, "batch-size": shape.batch_size, "seq": shape.seq, "threads": threads}
    flags = [part for option, value in options.items() for part in (f"--{option}", str(value))]
    command = [
        sys.executable,
        "-m",
        "benchmarks.training",
        *flags,
        "--memory-of",
        name,
        "--cache",
        str(cache),
    ]
    finished = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return dict(json.loads(finished.stdout))


# ------------------------------------------------------------------------------------------ speed


def _samples_per_s(step: Callable[[], object], block: int, batch_size: int) -> float:
    start = time.perf_counter()
    for _ in range(block):
        step()
    return block * batch_size / (time.perf_counter() - start)


def _measure_speed(shape: _Shape, cache: Path, steps: int, block: int) -> dict[str, Any]:
    arms = {name: _Arm(name, shape, cache) for name in ARMS}
    speeds: dict[str, list[float]] = {name: [] for name in ARMS}
    for arm in arms.values():
        arm.step()  # makes the optimizer's state
    for number in range(max(1, steps // block)):
        for name in ARMS[:: 1 if number % 2 else -1]:
            speeds[name].append(_samples_per_s(arms[name].step, block, shape.batch_size))
    ratios = sorted(one / other for one, other in zip(*speeds.values(), strict=True))
    return {
        "trained parameters": {name: arm.num_trained for name, arm in arms.items()},
        "samples/s": {name: statistics.median(found) for name, found in speeds.items()},
        "ratio": statistics.median(ratios),
        "ratio, lowest": ratios[0],
        "ratio, highest": ratios[-1],
    }


@click.command()
@click.option("--plm", type=click.Choice(["minilm", "bert-base"]), default="minilm", show_default=True)
@click.option("--steps", default=24, show_default=True, help="Timed steps of each arm.")
@click.option("--block", default=2, show_default=True, help="Steps that an arm takes in its turn.")
@click.option("--batch-size", default=16, show_default=True)
@click.option("--seq", default=64, show_default=True, help="Tokens of each text.")
@click.option("--threads", default=torch.get_num_threads(), show_default=True)
@click.option("--quick", is_flag=True, help="Two short steps: says only that it runs.")
@click.option("--json", "as_json", is_flag=True)
@click.option("--memory-of", type=click.Choice(ARMS), hidden=True)
@click.option("--cache", type=click.Path(path_type=Path), hidden=True)
def main(
    threads: int, quick: bool, as_json: bool, memory_of: str | None, cache: Path | None, **options: Any
) -> None:
    """Compare speed and memory of plug-in training with those of full fine-tuning."""
    if quick:
        options |= _QUICK
    shape = _Shape(options["plm"], options["batch_size"], options["seq"])
    torch.set_num_threads(threads)
    if memory_of is not None and cache is not None:
        print_json(_measure_memory(_Arm(memory_of, shape, cache), steps=3))
        return
    with tempfile.TemporaryDirectory() as temporary:
        result = _measure_speed(shape, Path(temporary), options["steps"], options["block"])
        memory = {name: _memory_in_own_process(name, shape, threads, Path(temporary)) for name in ARMS}
    beyond = {name: found["beyond_mib"] for name, found in memory.items()}
    result |= {"beyond the weights (MiB)": beyond, "memory, share": beyond[ARMS[0]] / beyond[ARMS[1]]}
    if as_json:
        print_json({"plm": shape.plm, "batch_size": shape.batch_size, "seq": shape.seq, **result})
        return
    title = (
        f"{shape.plm}, {shape.batch_size} texts of {shape.seq} tokens, {threads} threads, "
        f"{options['steps']} steps in interleaved blocks of {options['block']}, medians"
    )
    table = Table("", *(name for name, value in result.items() if isinstance(value, dict)), show_edge=False)
    for name in ARMS:
        trained, speed = result["trained parameters"][name], result["samples/s"][name]
        table.add_row(name, f"{trained:,}", f"{speed:.1f}", f"{beyond[name]:.0f}")
    console = make_console()
    console.print(title)
    console.print(f"on {cpu()}")
    console.print(table)
    console.print(
        f"plug-in to fine-tuning: {result['ratio']:.2f} times the samples/s "
        f"(blocks {result['ratio, lowest']:.2f} to {result['ratio, highest']:.2f}), "
        f"{result['memory, share']:.2f} of the memory beyond the weights"
    )
    console.print(shlex.join(["python", "-m", "benchmarks.training", *sys.argv[1:]]))


if __name__ == "__main__":
    main()
