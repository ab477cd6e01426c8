"""Classification and regression, scored as GLUE scores its tasks.

Dimensions: n texts, L labels.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Final

import numpy as np

from xadapter_export.errors import ConfigError
from xadapter_export.evaluation.labeled import Labeled
from xadapter_export.evaluation.metrics import task_metrics
from xadapter_export.evaluation.readings import SEED, OnProgress, Reading, derangement, ignore_progress
from xadapter_export.evaluation.results import Evaluation, Metric, Row, percentage
from xadapter_export.evaluation.scorer import Scorer
from xadapter_export.runtime.text import clip_text

_METRICS: Final = {
    "accuracy": percentage("accuracy"),
    "f1": percentage("F1"),
    "matthews": Metric("Matthews"),
    "pearson": Metric("Pearson"),
    "spearman": Metric("Spearman"),
}


def match_labels(data: Labeled, scorer: Scorer) -> Labeled:
    """Return the data with its labels in the order of the model's logits.

    Raises:
        ConfigError: If the model's labels are others, or one of both is a regression.
    """
    ours, theirs = scorer.labels, data.label_names
    if len(ours) == 1 and data.is_regression:
        return data
    if set(ours) == set(theirs) and len(ours) > 1:
        index = [ours.index(name) for name in theirs]
        return Labeled(data.texts, data.pairs, tuple(index[int(i)] for i in data.labels), ours, data.where)
    numbered = [str(number) for number in range(len(ours))]
    if len(ours) == len(theirs) > 1 and numbered in (list(ours), list(theirs)):
        return data
    raise ConfigError(
        "the model and the data have different labels",
        where=data.where,
        expected=", ".join(ours),
        got=", ".join(theirs),
        hint="choose the task or the data that the model was trained for",
    )


def evaluate_glue(
    readings: Sequence[Reading],
    sets: Mapping[str, Labeled],
    *,
    task: str | None = None,
    on_progress: OnProgress = ignore_progress,
) -> Evaluation:
    """Score a classifier, or a regression, on labeled texts.

    Args:
        readings: The rows.
        sets: Labeled texts by name; the numbers of all but the first are called ``metric_name``.
        task: Name of a GLUE task, which says what is reported; None for accuracy, and F1 for two labels.
        on_progress: Told after each batch.

    Raises:
        ConfigError: If the task is unknown, the model's labels are not those of the data, or a single text's
            memory is to be shuffled.
        ShapeError: If the logits are not those of the task.
        UnsupportedError: If a model does not classify.
        MissingExtraError: If scikit-learn or scipy is not installed.
    """
    first = next(iter(sets))
    columns: dict[str, Metric] = {}
    rows: dict[str, dict[str, float | None]] = {}
    for name, data in sets.items():
        scores = _score(readings, data, task, on_progress)
        key_end, title_end = ("", "") if name == first else (f"_{name}", f", {name}")
        for row, found in scores.items():
            for key, value in found.items():
                metric = _METRICS[key]
                columns[key + key_end] = replace(metric, title=metric.title + title_end)
                rows.setdefault(row, {})[key + key_end] = value
    experts = {reading.name: reading.experts for reading in readings}
    where = Path(sets[first].where).name
    return Evaluation(
        kind="glue",
        model=readings[0].scorer.name,
        data=where if task is None else f"{task}, {where}",
        counts={"texts" if name == first else f"{name} texts": len(data) for name, data in sets.items()},
        settings={
            "task": task,
            "labels": ", ".join(sets[first].label_names),
            "F1": f"of {sets[first].label_names[1]}" if "f1" in columns else None,
        },
        metrics=columns,
        rows=tuple(
            Row(name, values, experts.get(name), is_baseline=name not in experts)
            for name, values in rows.items()
        ),
    )


def _score(
    readings: Sequence[Reading], data: Labeled, task: str | None, on_progress: OnProgress
) -> dict[str, dict[str, float]]:
    """Return the metrics of the majority's label, except for a regression, and of each reading."""
    scores: dict[str, dict[str, float]] = {}
    for reading in readings:
        matched = match_labels(data, reading.scorer)
        if not (scores or matched.is_regression):
            scores["majority"] = _majority(task, matched)
        logits = reading.scorer.label_logits(
            data.texts,
            data.pairs,
            reading.experts,
            memory_texts=_memory_texts(data, reading),
            on_batch=partial(on_progress, reading.name),
        )
        scores[reading.name] = task_metrics(task, logits, matched.labels)
    return scores


def _majority(task: str | None, data: Labeled) -> dict[str, float]:
    counts = np.bincount(np.asarray(data.labels, dtype=int), minlength=len(data.label_names))
    return task_metrics(task, np.tile(counts.astype(np.float64), (len(data), 1)), data.labels)


def _memory_texts(data: Labeled, reading: Reading) -> list[str] | None:
    """Return what CLIP reads for each text: nothing else, or what it would read for another one."""
    if not reading.is_shuffled:
        return None
    pairs = data.pairs or (None,) * len(data)
    mask = reading.scorer.encoder.mask_token
    read = [clip_text(text, mask, pair) for text, pair in zip(data.texts, pairs, strict=True)]
    return [read[source] for source in derangement(len(read), SEED)]
