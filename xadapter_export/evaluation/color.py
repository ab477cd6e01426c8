"""Which color does an object have? Accuracy as Memory Colors and ColorTerms are scored.

Dimensions: P prompts, n objects, C colors.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np

from xadapter_export.errors import ConfigError
from xadapter_export.evaluation.color_answers import ColorAnswers, answer_colors
from xadapter_export.evaluation.objects import ObjectSet
from xadapter_export.evaluation.readings import OnProgress, Reading, ignore_progress
from xadapter_export.evaluation.results import Evaluation, Row, percentage

METRICS: Final = {"accuracy": percentage("accuracy at 1"), "accuracy_sd": percentage("sd over prompts")}

# Accuracy at 1 on the whole set. Yariv et al. (arXiv 2406.13621), table 1; Hagstrom and Johansson 2022, mean
# over 13 prompts.
PUBLISHED: Final[dict[str, dict[str, float]]] = {
    "memory_colors": {
        "BERT (Yariv et al.)": 0.316,
        "BERT fine-tuned on the same text, no pictures (Yariv et al.)": 0.339,
        "X-adapter on BERT (Yariv et al.)": 0.641,
        "VaLM, 4 pictures (Yariv et al.)": 0.540,
        "VaLM, 8 pictures (Yariv et al.)": 0.586,
        "LaMI on BERT (Yariv et al.)": 0.745,
        "BERT trained on captions, text only (Hagstrom and Johansson)": 0.724,
        "CLIP-BERT, explicit feature (Hagstrom and Johansson)": 0.882,
    },
    "color_terms": {
        "BERT (Yariv et al.)": 0.307,
        "BERT fine-tuned on the same text, no pictures (Yariv et al.)": 0.315,
        "X-adapter on BERT (Yariv et al.)": 0.600,
        "VaLM, 4 pictures (Yariv et al.)": 0.527,
        "VaLM, 8 pictures (Yariv et al.)": 0.502,
        "LaMI on BERT (Yariv et al.)": 0.725,
    },
}


@dataclass(frozen=True, eq=False)
class ColorEvaluation:
    """The table, and the answers behind each row that a model answered."""

    evaluation: Evaluation
    answers: tuple[ColorAnswers, ...]


def evaluate_color(
    readings: Sequence[Reading],
    data: ObjectSet,
    prompts: Sequence[str],
    *,
    prompts_name: str = "",
    candidates: Sequence[str] | None = None,
    ends_with_stop: bool = True,
    published: bool = False,
    on_progress: OnProgress = ignore_progress,
) -> ColorEvaluation:
    """Score how often the right color is the most probable one.

    Args:
        readings: The rows.
        data: The objects.
        prompts: P prompts.
        prompts_name: What to call them in the report.
        candidates: Colors that may be answered; those that occur in the data's file if None. An empty word
            is ignored.
        ends_with_stop: Whether a full stop follows a mask that goes after the last word.
        published: Whether to add the published figures for the same benchmark.
        on_progress: Told after each batch.

    Raises:
        ConfigError: If an object's color is not among the candidates, or one is not one token of the PLM.
        UnsupportedError: If a model does not fill masks.
    """
    colors = _read_candidates(data, candidates)
    [(majority, num_majority)] = Counter(thing.color for thing in data.objects).most_common(1)
    guesses = {"chance": 1 / len(colors), f"majority ({majority})": num_majority / len(data.objects)}
    rows = [Row(name, {"accuracy": share}, is_baseline=True) for name, share in guesses.items()]
    answers = []
    for reading in readings:
        answered = answer_colors(
            reading, data.objects, prompts, colors, ends_with_stop=ends_with_stop, on_progress=on_progress
        )
        answers.append(answered)
        per_prompt = answered.is_right.mean(1)  # (P,)
        values = {"accuracy": float(per_prompt.mean()), "accuracy_sd": spread(per_prompt)}
        rows.append(Row(reading.name, values, reading.experts, details=answered.details(prompts)))
    settings: dict[str, str | int | float | bool | None] = {
        "prompts": prompts_name or None,
        "candidates": ", ".join(colors),
        "full stop after a mask that was put last": ends_with_stop,
        "accuracy": "mean over prompts and objects; sd over prompts with n - 1",
    }
    if published:
        rows += _published(data)
        settings["published"] = "on all objects of the benchmark, each with its own prompts"
    evaluation = Evaluation(
        kind="color",
        model=readings[0].scorer.name,
        data=Path(data.where).name,
        counts={"objects": len(data.objects), "prompts": len(prompts), "colors": len(colors)},
        settings=settings,
        metrics=METRICS,
        rows=tuple(rows),
    )
    return ColorEvaluation(evaluation, tuple(answers))


def _published(data: ObjectSet) -> list[Row]:
    """Return the published figures for a benchmark, if it is a known one."""
    return [
        Row(f"published: {name}", {"accuracy": accuracy}, is_baseline=True)
        for name, accuracy in PUBLISHED.get(data.benchmark, {}).items()
    ]


def _read_candidates(data: ObjectSet, candidates: Sequence[str] | None) -> tuple[str, ...]:
    """Return the colors that may be answered.

    Raises:
        ConfigError: If an object's color is not among them.
    """
    words = data.colors if candidates is None else [word.strip() for word in candidates]
    colors = tuple(word for word in words if word)
    for thing in data.objects:
        if thing.color not in colors:
            raise ConfigError(
                "an object's color is not among the candidates",
                where=f"{data.where}, {thing.name}",
                expected=f"one of {', '.join(colors)}",
                got=thing.color,
                hint="add it to --candidates",
            )
    return colors


def spread(values: np.ndarray[tuple[int, ...], np.dtype[np.float64]]) -> float | None:
    """Return the standard deviation of ``(P,) float64`` with n - 1; None for a single value."""
    return float(values.std(ddof=1)) if len(values) > 1 else None
