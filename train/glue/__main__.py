"""``python -m train.glue --task sst2 --data FOLDER``: a T-expert on a GLUE task, with its controls.

The last row is the T-expert; above it stand the frozen PLM with a head and an adapter of the same size that
has nothing of CLIP. Runs are kept under ``build/glue/TASK``; an interrupted recipe goes on after the last run
that was finished.
"""

import argparse
import time
import tomllib
import warnings
from pathlib import Path
from typing import Any

import click
import torch
from rich.console import Console

from material.models import minilm_folder
from material.tables import print_grid, write_results
from train.arms import CONTROL_NOTE, Comparison, Scores, name_arms, run_arms, score, seeds_grid
from xadapter_export import XAdapterModel
from xadapter_export.errors import XAdapterError
from xadapter_export.evaluation.labeled import GLUE_TASKS, SUFFIXES, Labeled, read_labeled
from xadapter_export.runtime.text import TruncationWarning

_ROOT = Path(__file__).resolve().parents[2]
_TITLES = {
    "accuracy": "accuracy, %",
    "f1": "F1, %",
    "matthews": "Matthews correlation, times 100",
    "pearson": "Pearson correlation, times 100",
    "spearman": "Spearman correlation, times 100",
}
_NOTES = (
    CONTROL_NOTE,
    "The labels of GLUE's test sets are not public, so the dev set is reported. It chooses nothing: the "
    "state after the last step is kept.",
    "Texts longer than max_seq, or than CLIP reads, are cut.",
)


def main() -> None:
    """Train and score every arm, and write the table."""
    parser = argparse.ArgumentParser(prog="python -m train.glue", description=__doc__)
    parser.add_argument("--task", choices=tuple(GLUE_TASKS), required=True, help="GLUE task")
    parser.add_argument("--data", type=Path, help="folder with its train and dev files (default: the hub's)")
    parser.add_argument("--plm", default="minilm", help="minilm, a folder, or a hub id (default: minilm)")
    parser.add_argument(
        "--clip", default="builtin", help="builtin, a folder, model:tag, or a hub id (default: builtin)"
    )
    parser.add_argument("--seeds", type=int, nargs="+", help="seeds (default: the recipe's)")
    parser.add_argument("--work", type=Path, help="runs (default: build/glue/TASK)")
    parser.add_argument("--results", type=Path, default=_ROOT / "docs" / "results.md", help="tables")
    parser.add_argument(
        "--recipe", type=Path, default=Path(__file__).with_name("recipe.toml"), help="settings"
    )
    options = parser.parse_args()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", TruncationWarning)  # said in the notes
            _compare(options)
    except (XAdapterError, click.ClickException) as error:
        parser.exit(130 if isinstance(error, KeyboardInterrupt) else 1, f"{parser.prog}: {error}\n")


def _compare(options: argparse.Namespace) -> None:
    torch.set_num_threads(2)
    start = time.monotonic()
    console = Console()
    task: str = options.task
    work: Path = options.work or _ROOT / "build" / "glue" / task
    settings: dict[str, Any] = tomllib.loads(options.recipe.read_text(encoding="utf-8"))
    seeds: list[int] = settings.pop("seeds")
    seeds = options.seeds or seeds
    sets = _read_dev_sets(options.data, task)
    is_minilm, is_builtin = options.plm == "minilm", options.clip == "builtin"
    data = None if options.data is None else str(options.data)
    comparison = Comparison(
        settings=settings,
        parts={
            "plm": str(minilm_folder()) if is_minilm else options.plm,
            "clip": options.clip,
            "glue": task,
            "glue_data": data,
        },
        identity=(data, task, options.plm, options.clip),
        work=work,
    )

    def measure(model: XAdapterModel, _folder: Path, _is_t_expert: bool) -> Scores:
        return {
            metric + name: value
            for name, dev in sets.items()
            for metric, value in score(model, dev, task).items()
        }

    arms = name_arms(
        "MiniLM" if is_minilm else Path(options.plm).name,
        "built-in CLIP" if is_builtin else Path(options.clip).name,
    )
    found = run_arms(comparison, arms, seeds, measure, console)
    grids = [
        seeds_grid(
            f"GLUE {task}{name.replace('_', ', ')}, dev set, {len(dev):,} texts, {_TITLES[metric]}",
            seeds,
            {arm: [scores[metric + name] for scores in rows] for arm, rows in found.items()},
        )
        for name, dev in sets.items()
        for metric in GLUE_TASKS[task].metrics
    ]
    for grid in grids:
        print_grid(grid, console)
    write_results(
        options.results, f"train.glue --task {task}", grids, _NOTES, f"seeds {', '.join(map(str, seeds))}"
    )
    console.print(f"took {(time.monotonic() - start) / 60:.1f} min; runs: {work}; table: {options.results}")


def _read_dev_sets(data: Path | None, task: str) -> dict[str, Labeled]:
    """Return the dev set, and MNLI's second one where it is there, by what their metrics' names end in."""
    sets = {"": read_labeled(data, task=task, split="validation")}
    splits = GLUE_TASKS[task].splits or {}
    stems = splits.get("validation_mismatched", ())
    if stems and (
        data is None or any((data / f"{stem}{end}").is_file() for stem in stems for end in SUFFIXES)
    ):
        sets["_mismatched"] = read_labeled(data, task=task, split="validation_mismatched")
    return sets


if __name__ == "__main__":
    main()
