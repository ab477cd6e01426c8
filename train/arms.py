"""The arms of a comparison on a classification or regression task, and the loop over arms and seeds.

Dimensions: n texts.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from material.tables import Grid, spread
from xadapter_export import XAdapterModel
from xadapter_export.evaluation.checkpoint_scorer import CheckpointScorer
from xadapter_export.evaluation.labeled import Labeled
from xadapter_export.evaluation.metrics import task_metrics
from xadapter_export.training import read_config, train

CONTROL_NOTE = (
    "The adapter without CLIP attends to 16 random rows that never change; it has as many parameters as the "
    "T-expert, the same data, steps and seed."
)
_BATCH_SIZE = 64

Scores = dict[str, float]
Measure = Callable[[XAdapterModel, Path, bool], Scores]


@dataclass(frozen=True)
class Comparison:
    """What every arm has in common.

    Attributes:
        settings: The recipe's, those of ``xad-train`` that every arm shares.
        parts: Settings that say what is trained on what: ``plm``, ``clip``, ``glue``, ``glue_data``.
        identity: What a kept result depends on besides the settings, for ``json.dumps``.
        work: Folder of runs and records.
    """

    settings: Mapping[str, Any]
    parts: Mapping[str, Any]
    identity: Sequence[str | None]
    work: Path


def name_arms(plm: str, clip: str) -> dict[str, dict[str, Any]]:
    """Return the settings of each arm by its name: the frozen PLM, the control, and last the T-expert."""
    return {
        f"frozen {plm} + head": {"experts": "t", "head_only": True},
        "+ same-size adapter without CLIP": {"experts": "t", "control": True},
        f"+ T-expert ({clip})": {"experts": "t"},
    }


def run_arms(
    comparison: Comparison,
    arms: Mapping[str, dict[str, Any]],
    seeds: Sequence[int],
    measure: Measure,
    console: Console,
) -> dict[str, list[Scores]]:
    """Train and measure every arm with every seed; what an earlier start finished is kept.

    Args:
        comparison: What the arms have in common.
        arms: Settings of each arm by its name; the last one is the T-expert.
        seeds: Seeds.
        measure: Called with a trained model, the folder of its seed, and whether it is the T-expert.
        console: Told what goes on.

    Returns:
        By the name of the arm, what was measured for each seed.

    Raises:
        XAdapterError: As ``training.train``.
    """
    found: dict[str, list[Scores]] = {name: [] for name in arms}
    work = comparison.work
    for seed in seeds:
        for number, (name, arm) in enumerate(arms.items()):
            folder = work / f"seed-{seed}" / f"arm-{number}"
            record = folder.with_suffix(".json")
            key = json.dumps([comparison.settings, arm, seed, *comparison.identity], sort_keys=True)
            if not (record.is_file() and json.loads(record.read_text(encoding="utf-8"))["key"] == key):
                console.print(f"seed {seed}: {name}")
                values = {
                    **comparison.settings,
                    **arm,
                    **comparison.parts,
                    "output": str(folder),
                    "task": "text-classification",
                    "seed": seed,
                    "cache": str(work / "cache"),
                    "force": True,
                }
                config = read_config(None, values)
                model = train(config, on_stage=lambda *a: console.print(f"  {a[0]}: {a[1]}")).model
                scores = measure(model, folder.parent, number == len(arms) - 1)
                partial = record.with_suffix(".part")
                partial.write_text(json.dumps({"key": key, **scores}), encoding="utf-8")
                partial.replace(record)
            kept = json.loads(record.read_text(encoding="utf-8"))
            found[name].append({metric: value for metric, value in kept.items() if metric != "key"})
            shown = ", ".join(f"{metric} {100 * value:.2f}" for metric, value in found[name][-1].items())
            console.print(f"seed {seed}: {name}: {shown}")
    return found


def score(model: XAdapterModel, data: Labeled, task: str) -> Scores:
    """Return what GLUE reports for the task, each number by its name, from -1 or 0 to 1.

    Args:
        model: A trained classifier or regression.
        data: n texts with their labels, in the order of the model's.
        task: Name of the GLUE task.
    """
    scorer = CheckpointScorer(model, task)
    scorer.batch_size = _BATCH_SIZE
    return task_metrics(
        task, scorer.label_logits(data.texts, data.pairs, scorer.default_experts), data.labels
    )


def seeds_grid(title: str, seeds: Sequence[int], rows: Mapping[str, Sequence[float]]) -> Grid:
    """Return a table with a column for each seed, then mean and deviation; times 100."""
    return Grid(
        title,
        ("", *(f"seed {seed}" for seed in seeds), "mean ± sd"),
        tuple(
            (name, *(f"{100 * value:.2f}" for value in values), spread([100 * value for value in values], 2))
            for name, values in rows.items()
        ),
    )
