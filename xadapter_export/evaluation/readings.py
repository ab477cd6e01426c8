"""Which rows a table has: each expert set of the model, and the controls beside them.

A gain counts only beside its controls: the frozen PLM, the same plug-in with the memory of another text, and
a plug-in that was trained on the same text without pictures.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from xadapter_export.bundle.manifest import ExpertSet, Task
from xadapter_export.errors import ConfigError
from xadapter_export.evaluation.scorer import Scorer
from xadapter_export.experts import NONE, title_of
from xadapter_export.tasks import TASKS

OnProgress = Callable[[str, int, int], None]  # name of the row, texts that are done, and all
SEED: Final = 7


def ignore_progress(_name: str, _done: int, _total: int) -> None:
    """The default of ``on_progress``."""


@dataclass(frozen=True)
class Reading:
    """One row to compute.

    Attributes:
        name: What the row is called.
        scorer: The model.
        experts: The expert set that is switched on.
        is_shuffled: Whether every text gets the memory of another one.
        is_control: Whether the row is there for comparison only.
    """

    name: str
    scorer: Scorer
    experts: ExpertSet
    is_shuffled: bool = False
    is_control: bool = False


def plan_readings(
    scorer: Scorer,
    task: Task,
    experts: Sequence[ExpertSet] = (),
    *,
    shuffled: bool = False,
    controls: Mapping[str, Scorer] | None = None,
) -> tuple[Reading, ...]:
    """Return the rows of a table: for each expert set its own, and then its shuffled memory.

    Args:
        scorer: The model.
        task: What it must be for.
        experts: Expert sets; all that the model has if empty.
        shuffled: Whether to add the frozen PLM and, for each set that reads CLIP, the shuffled memory.
        controls: Other models by the name of their row, each run with its own default expert set.

    Raises:
        UnsupportedError: If a model is for another task.
        BundleError: If a bundle does not hold an expert set.
        CheckpointError: If a checkpoint does not.
    """
    sets: list[ExpertSet] = list(dict.fromkeys(experts or scorer.expert_sets))
    if shuffled and NONE not in sets and NONE in scorer.expert_sets:
        sets.insert(0, NONE)
    for model in (scorer, *(controls or {}).values()):
        model.require_task(task)
    readings = []
    for name in sets:
        scorer.check_experts(name)
        label = "experts off" if name == NONE and TASKS[task].has_labels else title_of(name)
        readings.append(Reading(label, scorer, name, is_control=name == NONE))
        if shuffled and scorer.reads_clip(name):
            readings.append(
                Reading(f"{label}, shuffled memory", scorer, name, is_shuffled=True, is_control=True)
            )
    for label, control in (controls or {}).items():
        readings.append(Reading(label, control, control.default_experts, is_control=True))
    return tuple(readings)


def main_reading(readings: Sequence[Reading]) -> Reading:
    """Return the row that charts show: the largest expert set that is no control, else the first row."""
    own = [reading for reading in readings if not reading.is_control]
    return max(own, key=lambda reading: len(reading.experts), default=readings[0])


def derangement(count: int, seed: int = SEED) -> list[int]:
    """Return a permutation of ``range(count)`` that leaves nothing in its place, drawn uniformly.

    Raises:
        ConfigError: If ``count`` is 1: nothing can change places.
    """
    if count < 2:
        raise ConfigError(
            "a shuffled memory needs at least two texts",
            got=count,
            hint="remove --controls, or give more data",
        )
    rng = np.random.default_rng(seed)
    while True:  # one draw in e is a derangement
        order = rng.permutation(count)
        if not (order == np.arange(count)).any():
            return [int(i) for i in order]
