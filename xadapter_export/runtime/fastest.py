"""Which variant is the fastest here: all are timed in turn on one text, and the result is kept.

No rule by the kind of CPU fits every model: with AVX2 alone OpenVINO's int8 is slower than fp32 in BERT-base
and faster than all else in MiniLM (docs/log.md).
"""

import hashlib
import json
import os
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Final

from xadapter_export.bundle.folder import MANIFEST_NAME, Bundle, sha256_file
from xadapter_export.bundle.machine import read_machine
from xadapter_export.bundle.manifest import ExpertSet
from xadapter_export.bundle.staging import write_whole
from xadapter_export.errors import ConfigError
from xadapter_export.registry import installed_version
from xadapter_export.sessions.session import Provider
from xadapter_export.targets import all_targets

BUDGET_S: Final = 2.0  # for opening, checking and timing
OPENING_S: Final = 1.2  # no further variant is opened after this
_MAX_ROUNDS: Final = 25
_MIN_ROUNDS: Final = 5  # before the first may be declared the winner
_CLEAR: Final = 1.05  # the winner is this much faster than the best run of every other
_FILE: Final = "fastest.json"
_LARGEST_BYTES: Final = 2**20
_MOST_KEPT: Final = 200


@dataclass(frozen=True)
class Timings:
    """Median milliseconds of each variant that was timed."""

    milliseconds: Mapping[str, float]

    @property
    def fastest(self) -> str:
        """The name of the fastest."""
        return min(self.milliseconds, key=lambda name: self.milliseconds[name])

    def __str__(self) -> str:
        """Return them as text, the fastest first."""
        ordered = sorted(self.milliseconds.items(), key=lambda item: item[1])
        return ", ".join(f"{name} {took:.2f} ms" for name, took in ordered)


def time_in_turn(runs: Mapping[str, Callable[[], object]], deadline: float) -> Timings:
    """Time each of several runs, one after the other, round by round.

    Args:
        runs: What to time, by name; each has run once before.
        deadline: When to stop, as ``time.perf_counter`` tells it; the first round is finished in any case.
    """
    took: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(_MAX_ROUNDS):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            took[name].append(1e3 * (time.perf_counter() - start))
        if time.perf_counter() > deadline or (number + 1 >= _MIN_ROUNDS and _has_won(took)):
            break
    return Timings({name: median(values) for name, values in took.items()})


def _has_won(took: Mapping[str, Sequence[float]]) -> bool:
    medians = sorted((median(values), name) for name, values in took.items())
    best, winner = medians[0]
    return all(min(values) > _CLEAR * best for name, values in took.items() if name != winner)


def key_of(
    bundle: Bundle,
    experts: ExpertSet,
    providers: Sequence[Provider] | None,
    num_threads: int | None,
) -> str:
    """Return what a measurement depends on, in short."""
    runtimes = [target.runtime for target in all_targets() if target.places and target.runtime]
    versions = {name: installed_version(name) for runtime in runtimes for name in runtime.distributions}
    facts = (
        sha256_file(bundle.folder / MANIFEST_NAME),
        experts,
        str(read_machine()),
        versions,
        [os.cpu_count(), num_threads],
        repr(list(providers or [])),
    )
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def recall(cache_dir: Path, key: str, names: Collection[str]) -> Timings | None:
    """Return what was measured before; None where that is not known, or what was kept is broken."""
    entry = _read(cache_dir / _FILE).get(key)
    if not isinstance(entry, dict) or not entry or not set(entry) <= set(names):
        return None
    if not all(isinstance(took, float) and took > 0 for took in entry.values()):
        return None
    return Timings(entry)


def remember(cache_dir: Path, key: str, timings: Timings) -> None:
    """Keep what was measured.

    Raises:
        ConfigError: If the folder cannot be written.
    """
    kept = _read(cache_dir / _FILE)
    kept.pop(key, None)
    kept = dict(list(kept.items())[1 - _MOST_KEPT :]) | {key: dict(timings.milliseconds)}
    try:
        cache_dir.mkdir(parents=True, exist_ok=True)
        write_whole(cache_dir / _FILE, json.dumps(kept))
    except OSError as error:
        raise ConfigError(
            "the timings cannot be saved",
            where=cache_dir,
            got=error.strerror or error,
            hint="choose a folder that you can write to, or remove cache_dir (--cache-dir)",
        ) from error


def _read(path: Path) -> dict[str, object]:
    try:
        with path.open("rb") as stream:
            content = json.loads(stream.read(_LARGEST_BYTES))
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}
