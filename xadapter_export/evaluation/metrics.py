"""The numbers that a classifier, a regression or a predicted distribution is judged by.

Dimensions: n texts, L labels, C colors.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from xadapter_export.errors import ShapeError, import_extra
from xadapter_export.evaluation.labeled import glue_task

FloatArray = NDArray[np.float32] | NDArray[np.float64]


def task_metrics(
    task: str | None, logits: FloatArray, labels: NDArray[Any] | Sequence[int] | Sequence[float]
) -> dict[str, float]:
    """Score logits as GLUE scores the task.

    Args:
        task: Name of a GLUE task. None for any other data: Pearson and Spearman for one logit, else accuracy
            and, for two labels, F1.
        logits: ``(n, L) float``. One column is a regression.
        labels: ``(n,)``. Indices of the right labels, or the values of a regression.

    Returns:
        Every number by its name, from -1 or 0 to 1. F1 is that of label 1. A correlation with predictions
        that are all equal is undefined and given as 0.

    Raises:
        ConfigError: If the task is unknown.
        ShapeError: If the arrays do not fit each other or the task, or a number is not finite.
        MissingExtraError: If scikit-learn or scipy is not installed.
    """
    scores, truth = np.asarray(logits, dtype=np.float64), np.asarray(labels)
    _check_arrays(scores, truth)
    num_labels = scores.shape[1]
    if task is not None:
        names = glue_task(task).metrics
    elif num_labels == 1:
        names = ("pearson", "spearman")
    else:
        names = ("accuracy", "f1") if num_labels == 2 else ("accuracy",)
    if (num_labels == 1) != ("pearson" in names):
        raise ShapeError(
            "the logits belong to another kind of task",
            where=task,
            expected="one column" if "pearson" in names else "a column for each label",
            got=f"{num_labels} columns",
        )
    if num_labels == 1:
        return {
            "pearson": correlation("pearsonr", scores[:, 0], truth) or 0.0,
            "spearman": correlation("spearmanr", scores[:, 0], truth) or 0.0,
        }
    if not np.equal(np.mod(truth, 1), 0).all() or truth.min() < 0 or truth.max() >= num_labels:
        raise ShapeError("a label is out of range", expected=f"0 to {num_labels - 1}", got=truth.max())
    metrics = import_extra("sklearn.metrics", "report", "train")
    right, said = truth.astype(int), scores.argmax(1)
    compute = {
        "accuracy": lambda: metrics.accuracy_score(right, said),
        "f1": lambda: metrics.f1_score(right, said, labels=[1], average="macro", zero_division=0.0),
        "matthews": lambda: metrics.matthews_corrcoef(right, said),
    }
    return {name: float(compute[name]()) for name in names}


def _check_arrays(scores: FloatArray, truth: NDArray[Any]) -> None:
    """Refuse logits and labels that do not go together.

    Raises:
        ShapeError: If they do not, or a number is not finite.
    """
    if scores.ndim != 2 or truth.shape != scores.shape[:1] or not scores.size:
        raise ShapeError(
            "logits and labels have shapes that do not match",
            expected="(n, L) and (n,) with n > 0",
            got=f"{scores.shape} and {truth.shape}",
        )
    if not (np.isfinite(scores).all() and np.isfinite(truth.astype(np.float64)).all()):
        raise ShapeError("logits and labels must be finite", hint="the training run may have diverged")


def correlation(kind: str, a: FloatArray, b: NDArray[Any]) -> float | None:
    """Return a correlation of scipy's, ``pearsonr``, ``spearmanr`` or ``kendalltau`` (tau-b).

    Returns:
        The correlation of two ``(n,)`` arrays, or None where it is undefined: one of them is constant.

    Raises:
        MissingExtraError: If scipy is not installed.
    """
    if len(a) < 2 or np.ptp(a) == 0 or np.ptp(b) == 0:
        return None
    stats = import_extra("scipy.stats", "report", "train")
    return float(getattr(stats, kind)(a, b).statistic)


def jensen_shannon_divergence(p: FloatArray, q: FloatArray) -> float:
    """Return the Jensen-Shannon divergence, base 2, of two ``(C,)`` distributions: 0 if equal, at most 1.

    It is the square of what scipy calls the Jensen-Shannon distance.

    Raises:
        MissingExtraError: If scipy is not installed.
    """
    distance = import_extra("scipy.spatial.distance", "report", "train").jensenshannon
    return float(distance(np.asarray(p, np.float64), np.asarray(q, np.float64), base=2) ** 2)
