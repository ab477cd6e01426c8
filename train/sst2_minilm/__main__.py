"""``python -m train.sst2_minilm --data FOLDER``: three seeds of three arms, and the bundle of each T-expert.

Runs are kept under ``build/sst2_minilm``; an interrupted recipe goes on after the last run that was finished.
"""

import json
import time
import tomllib
import warnings
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import click
import numpy as np
import torch
from rich.console import Console

from train.minilm import minilm_folder
from train.tables import Grid, print_grid, write_results
from xadapter_export import XAdapterModel, XAdapterSession, export
from xadapter_export.evaluation.labelled import Labelled, read_labelled
from xadapter_export.runtime.text import TruncationWarning
from xadapter_export.training import make_config, train

_ROOT = Path(__file__).resolve().parents[2]
_ARMS: dict[str, dict[str, Any]] = {
    "frozen MiniLM + head": {"experts": "t", "head_only": True},
    "+ same-size adapter without CLIP": {"experts": "t", "control": True},
    "+ T-expert (built-in CLIP)": {"experts": "t"},
}
_T_EXPERT = "+ T-expert (built-in CLIP)"
_NOTES = (
    "The adapter without CLIP attends to 16 random rows that never change; it has as many parameters as the "
    "T-expert, the same data, steps and seed.",
    "The built-in CLIP was trained on the names of 837 objects and reads 24 tokens of a sentence.",
    "Dev accuracy chooses the state that is kept; the test set is scored once.",
)


@click.command()
@click.option(
    "--data",
    type=click.Path(path_type=Path),
    required=True,
    help="Folder with train.tsv, dev.tsv and test.tsv: sentence, tab, 0 or 1.",
)
@click.option(
    "--work",
    type=click.Path(path_type=Path),
    default=_ROOT / "build" / "sst2_minilm",
    help="Runs and bundles.",
)
@click.option(
    "--results", type=click.Path(path_type=Path), default=_ROOT / "docs" / "results.md", help="Tables."
)
@click.option(
    "--recipe",
    type=click.Path(path_type=Path),
    default=Path(__file__).with_name("recipe.toml"),
    help="Settings.",
)
def main(data: Path, work: Path, results: Path, recipe: Path) -> None:
    """Train and score every arm, and write the table."""
    warnings.simplefilter("ignore", TruncationWarning)  # said in the notes
    torch.set_num_threads(2)
    start = time.monotonic()
    console = Console()
    settings: dict[str, Any] = tomllib.loads(recipe.read_text(encoding="utf-8"))
    seeds: list[int] = settings.pop("seeds")
    test = read_labelled(data, task="sst2", split="test")
    scores: dict[str, list[float]] = {name: [] for name in _ARMS}
    bundles: list[float] = []
    for seed in seeds:
        for number, (name, arm) in enumerate(_ARMS.items()):
            folder = work / f"seed-{seed}" / f"arm-{number}"
            record = folder.with_suffix(".json")
            key = json.dumps([settings, arm, seed, str(data)], sort_keys=True)
            if not (record.is_file() and json.loads(record.read_text())["key"] == key):
                console.print(f"seed {seed}: {name}")
                config = make_config(
                    {
                        **settings,
                        **arm,
                        "output": str(folder),
                        "plm": str(minilm_folder()),
                        "clip": "builtin",
                        "objective": "task",
                        "glue": "sst2",
                        "glue_data": str(data),
                        "seed": seed,
                        "cache": str(work / "cache"),
                        "force": True,
                    },
                    str(recipe),
                )
                model = train(config, on_stage=lambda *a: console.print(f"  {a[0]}: {a[1]}")).model
                found = {"key": key, "test": checkpoint_accuracy(model, test)}
                if name == _T_EXPERT:
                    bundle = export(model, work / f"seed-{seed}" / "bundle", "t", force=True).folder
                    found["bundle"] = bundle_accuracy(bundle, test)
                record.write_text(json.dumps(found))
            found = json.loads(record.read_text())
            scores[name].append(found["test"])
            console.print(f"seed {seed}: {name}: test accuracy {100 * found['test']:.2f} %")
            if "bundle" in found:
                bundles.append(found["bundle"])
                console.print(f"seed {seed}: its bundle: {100 * found['bundle']:.2f} %")
    rows = [
        (name, *(f"{100 * value:.2f}" for value in values), _spread(values))
        for name, values in [*scores.items(), ("T-expert's bundle, onnxruntime fp32", bundles)]
    ]
    grid = Grid(
        f"SST-2 test accuracy, {len(test):,} sentences, %",
        ("", *(f"seed {s}" for s in seeds), "mean ± sd"),
        tuple(rows),
    )
    print_grid(grid, console)
    write_results(results, "train.sst2_minilm", [grid], _NOTES, f"seeds {', '.join(map(str, seeds))}")
    console.print(
        f"took {(time.monotonic() - start) / 60:.1f} min; runs and bundles: {work}; table: {results}"
    )


@torch.inference_mode()
def checkpoint_accuracy(model: XAdapterModel, data: Labelled, batch_size: int = 64) -> float:
    """Share of texts whose largest logit is the label's."""
    right = 0
    for start in range(0, len(data), batch_size):
        rows = slice(start, start + batch_size)
        logits = model(**_without_masks(model.encode(data.texts[rows]))).logits
        right += int((logits.argmax(1) == torch.tensor(data.labels[rows])).sum())
    return right / len(data)


def _without_masks(inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in inputs.items() if name != "mask_positions"}


def bundle_accuracy(bundle: Path, data: Labelled) -> float:
    """The same through onnxruntime."""
    session = XAdapterSession.load(bundle)
    said = [answers[0].label for answers in session.classify(list(data.texts))]
    names = np.array(data.label_names)[np.array(data.labels)]
    return float((np.array(said) == names).mean())


def _spread(values: list[float]) -> str:
    return f"{100 * mean(values):.2f} ± {100 * stdev(values) if len(values) > 1 else 0:.2f}"


if __name__ == "__main__":
    main()
