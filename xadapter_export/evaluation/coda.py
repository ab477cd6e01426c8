"""Does a model know how often people say which color? Its distribution over colors beside CoDa's.

Dimensions: P prompts, n objects, C colors.

Source:
    Paik et al. 2021, The World of an Octopus (arXiv 2110.08182). The sentences are ours (``prompts.CODA``).
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from xadapter_export.evaluation.color import ColorEvaluation, spread
from xadapter_export.evaluation.color_answers import answer_colors
from xadapter_export.evaluation.metrics import correlation, jensen_shannon_divergence
from xadapter_export.evaluation.objects import ObjectSet
from xadapter_export.evaluation.readings import OnProgress, Reading, ignore_progress
from xadapter_export.evaluation.results import Evaluation, Metric, Row, percentage

METRICS: Final = {
    "accuracy": percentage("accuracy at 1"),
    "accuracy_sd": percentage("sd over prompts"),
    "spearman": Metric("Spearman"),
    "kendall": Metric("Kendall tau"),
    "jensen_shannon": Metric("Jensen-Shannon"),
}

_MEANINGS: Final = {
    "accuracy": "of the most probable color against the one that most people say",
    "Jensen-Shannon": "divergence, base 2: 0 is best, 1 is worst",
    "Spearman, Kendall tau-b": "over the colors of an object; -1 to 1",
    "mean": "over prompts and objects; sd over prompts with n - 1",
}


def evaluate_coda(
    readings: Sequence[Reading],
    data: ObjectSet,
    prompts: Sequence[str],
    *,
    prompts_name: str = "",
    ends_with_stop: bool = True,
    on_progress: OnProgress = ignore_progress,
) -> ColorEvaluation:
    """Compare each object's softmax over the colors with the shares of people who say them.

    Accuracy counts the most probable color as right where no color is said by more people. Every number is
    a mean over objects and prompts; a correlation is left out of it where a distribution is constant.

    Args:
        readings: The rows.
        data: The objects.
        prompts: P prompts.
        prompts_name: What to call them in the report.
        ends_with_stop: Whether a full stop follows a mask that goes after the last word.
        on_progress: Told after each batch.

    Raises:
        ConfigError: If a color is not one token of the PLM.
        UnsupportedError: If a model does not fill masks.
        MissingExtraError: If scipy is not installed.
    """
    colors = data.colors
    truth = np.array([[thing.shares[color] for color in colors] for thing in data.objects])  # (n, C)
    rows = _baselines(truth)
    answers = []
    for reading in readings:
        answered = answer_colors(
            reading, data.objects, prompts, colors, ends_with_stop=ends_with_stop, on_progress=on_progress
        )
        answers.append(answered)
        per_prompt = answered.is_right.mean(1)  # (P,)
        values = {
            "accuracy": float(per_prompt.mean()),
            "accuracy_sd": spread(per_prompt),
            **_compare(_softmax(answered.logits), truth),
        }
        rows.append(Row(reading.name, values, reading.experts, details=answered.details(prompts)))
    evaluation = Evaluation(
        kind="coda",
        model=readings[0].scorer.name,
        data=Path(data.where).name,
        counts={"objects": len(data.objects), "prompts": len(prompts), "colors": len(colors)},
        settings={"prompts": prompts_name or None, "candidates": ", ".join(colors), **_MEANINGS},
        metrics=METRICS,
        rows=tuple(rows),
    )
    return ColorEvaluation(evaluation, tuple(answers))


def _baselines(truth: NDArray[np.float64]) -> list[Row]:
    """Return the rows of a guess, and of the mean of ``(n, C)`` shares as every object's answer."""
    is_top = truth == truth.max(1, keepdims=True)
    mean = truth.mean(0)
    uniform = np.full(truth.shape[1], 1 / truth.shape[1])
    return [
        # What a guess is right about on average; argmax of equal shares would always say the first color.
        Row("chance", {**_compare(uniform, truth), "accuracy": float(is_top.mean())}, is_baseline=True),
        Row(
            "mean distribution of these objects",
            {**_compare(mean, truth), "accuracy": float(is_top[:, mean.argmax()].mean())},
            is_baseline=True,
        ),
    ]


def _softmax(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    exponents = np.exp(logits.astype(np.float64) - logits.max(-1, keepdims=True))
    shares: NDArray[np.float64] = exponents / exponents.sum(-1, keepdims=True)
    return shares


def _compare(predicted: NDArray[np.float64], truth: NDArray[np.float64]) -> dict[str, float | None]:
    """Return the means over ``(..., n, C)`` predictions, or one ``(C,)`` for all, beside ``(n, C)``."""
    shape = (-1, *truth.shape)
    every = np.broadcast_to(predicted, np.broadcast_shapes(predicted.shape, truth.shape)).reshape(shape)
    pairs = [(p, q) for prediction in every for p, q in zip(prediction, truth, strict=True)]
    found: dict[str, float | None] = {}
    for key, kind in (("spearman", "spearmanr"), ("kendall", "kendalltau")):
        values = [correlation(kind, p, q) for p, q in pairs]
        defined = [value for value in values if value is not None]
        found[key] = float(np.mean(defined)) if defined else None
    found["jensen_shannon"] = float(np.mean([jensen_shannon_divergence(p, q) for p, q in pairs]))
    return found
