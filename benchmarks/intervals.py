"""Medians, their spread, and ratios with an interval, from times that were taken in turn."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

_RESAMPLES = 2000


@dataclass(frozen=True)
class Spread:
    """Median and quartiles of times, in ms, and how many there were."""

    median: float
    low: float
    high: float
    count: int


@dataclass(frozen=True)
class Ratio:
    """A ratio of medians and the 95 % interval that a bootstrap over rounds gives it."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.2f} ({self.low:.2f} to {self.high:.2f})"


def spread(times: Sequence[float]) -> Spread:
    """Return median and quartiles.

    Raises:
        ValueError: If there are no times.
    """
    if not times:
        raise ValueError("no times")
    low, median, high = np.percentile(np.asarray(times, dtype=np.float64), (25, 50, 75))
    return Spread(float(median), float(low), float(high), len(times))


def ratio(above: Sequence[float], below: Sequence[float]) -> Ratio:
    """Return median(above) / median(below), with a bootstrap interval over paired rounds.

    Rounds are drawn with replacement, the same ones for both, so what slows a whole round down cancels.

    Args:
        above: Times of the one, round by round.
        below: Times of the other in the same rounds.

    Raises:
        ValueError: If they are not of the same rounds.
    """
    one, other = (np.asarray(times, dtype=np.float64) for times in (above, below))
    if one.shape != other.shape or one.size == 0:
        raise ValueError(f"{one.size} and {other.size} rounds; a ratio needs the same ones")
    draws = np.random.default_rng(0).integers(0, one.size, (_RESAMPLES, one.size))
    ratios = np.median(one[draws], axis=1) / np.median(other[draws], axis=1)
    low, high = np.percentile(ratios, (2.5, 97.5))
    return Ratio(float(np.median(one) / np.median(other)), float(low), float(high))


def geometric_mean(values: Sequence[float]) -> float:
    """Return the geometric mean of positive numbers."""
    return float(np.exp(np.mean(np.log(np.asarray(values, dtype=np.float64)))))
