"""``python -m train.sst2_minilm --data FOLDER``: three seeds of three arms, and the bundle of each T-expert.

Runs are kept under ``build/sst2_minilm``; an interrupted recipe goes on after the last run that was finished.
"""

import time
import tomllib
import warnings
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from rich.console import Console

from material.models import minilm_folder
from material.tables import print_grid, write_results
from train.arms import CONTROL_NOTE, Comparison, Scores, name_arms, run_arms, score, seeds_grid
from xadapter_export import XAdapterModel, XAdapterSession, export
from xadapter_export.cli.command import XadCommand
from xadapter_export.evaluation.labeled import Labeled, read_labeled
from xadapter_export.runtime.text import TruncationWarning

_ROOT = Path(__file__).resolve().parents[2]
_ARMS = name_arms("MiniLM", "built-in CLIP")
_NOTES = (
    CONTROL_NOTE,
    "The built-in CLIP was trained on the names of 837 objects and reads 24 tokens of a sentence.",
    "Dev accuracy chooses the state that is kept; the test set is scored once.",
)


@click.command(cls=XadCommand)
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
    test = read_labeled(data, task="sst2", split="test")
    comparison = Comparison(
        settings=settings,
        parts={"plm": str(minilm_folder()), "clip": "builtin", "glue": "sst2", "glue_data": str(data)},
        identity=(str(data),),
        work=work,
    )

    def measure(model: XAdapterModel, folder: Path, is_t_expert: bool) -> Scores:
        found = {"test": score(model, test, "sst2")["accuracy"]}
        if is_t_expert:
            found["bundle"] = bundle_accuracy(export(model, folder / "bundle", "t", force=True).folder, test)
        return found

    found = run_arms(comparison, _ARMS, seeds, measure, console)
    rows = {name: [scores["test"] for scores in of_seeds] for name, of_seeds in found.items()}
    bundles = [scores["bundle"] for of_seeds in found.values() for scores in of_seeds if "bundle" in scores]
    grid = seeds_grid(
        f"SST-2 test accuracy, {len(test):,} sentences, %",
        seeds,
        {**rows, "T-expert's bundle, onnxruntime fp32": bundles},
    )
    print_grid(grid, console)
    write_results(results, "train.sst2_minilm", [grid], _NOTES, f"seeds {', '.join(map(str, seeds))}")
    console.print(
        f"took {(time.monotonic() - start) / 60:.1f} min; runs and bundles: {work}; table: {results}"
    )


def bundle_accuracy(bundle: Path, data: Labeled) -> float:
    """Share of texts whose first answer, through onnxruntime, is the label."""
    session = XAdapterSession.load(bundle)
    said = [answers[0].label for answers in session.classify(list(data.texts))]
    names = np.array(data.label_names)[np.array(data.labels)]
    return float((np.array(said) == names).mean())


if __name__ == "__main__":
    main()
