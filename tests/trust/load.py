"""Many threads on one session, and many processes on one bundle: answers as those of one thread, memory flat.

``python -m tests.trust.load`` prints a table. Texts of all lengths, alone and in lists, go to bundles of
several tasks with every expert set in random order, with calls that must fail among them. Each answer is
compared bit for bit with the one that a single thread got before. Latencies are shown as multiples of that
thread's median for the same mix, so that tables of different machines can be compared.
"""

import argparse
import random
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass, field, fields, is_dataclass
from multiprocessing import get_context
from pathlib import Path

import numpy as np

from xadapter_export import XAdapterSession
from xadapter_export.errors import XAdapterError

_STEP = 1.01  # of the histogram of latencies, whose memory does not grow with the calls
_NUM_STEPS = 2400  # from 1 us to 6 hours
_WARM_UP = 0.25  # share of the time before memory is looked at
_NOISE_BYTES = 2 << 20  # growth that says nothing: allocators keep and give back pages
PERCENTILES = (50, 90, 99, 99.9)


@dataclass(frozen=True)
class Call:
    """One call: which bundle, which expert set, which texts."""

    bundle: str
    experts: str
    texts: tuple[str, ...]


@dataclass
class Outcome:
    """What came of calls that one thread, or several together, made.

    Attributes:
        latencies: How many calls took how long, by steps of 1 %.
        wrong: Calls whose answer was another one, or an error where there should be none.
        growth_bytes: By how much the memory grew after the warm-up, by the line through it.
        noise_bytes: How far the memory is from that line, four standard deviations.
    """

    latencies: "np.ndarray[tuple[int], np.dtype[np.int64]]" = field(
        default_factory=lambda: np.zeros(_NUM_STEPS, np.int64)
    )
    wrong: list[str] = field(default_factory=list)
    growth_bytes: float = 0.0
    noise_bytes: float = 0.0

    @property
    def num_calls(self) -> int:
        """How many calls were made."""
        return int(self.latencies.sum())

    @property
    def grew(self) -> bool:
        """Whether the memory grew more than noise explains."""
        return self.growth_bytes > max(self.noise_bytes, _NOISE_BYTES)

    def add(self, other: "Outcome") -> None:
        """Add what another thread did."""
        self.latencies += other.latencies
        self.wrong += other.wrong

    def percentile_ms(self, percent: float) -> float:
        """Return the latency that so many percent of the calls stayed below."""
        step = int(np.searchsorted(self.latencies.cumsum(), percent / 100 * self.num_calls))
        return float(1e-3 * _STEP**step)


def bits(answer: object) -> object:
    """Return an answer as something that is equal only where every bit is."""
    if isinstance(answer, np.ndarray):
        return answer.tobytes()
    if isinstance(answer, list | tuple):
        return tuple(map(bits, answer))
    if is_dataclass(answer):
        return tuple(bits(getattr(answer, each.name)) for each in fields(answer))
    return answer


def ask(sessions: dict[str, XAdapterSession], call: Call) -> object:
    """Return the bits of what a call answers, or the error that it gives."""
    try:
        return bits(sessions[call.bundle].answer(call.texts, experts=call.experts))
    except XAdapterError as error:
        return f"{type(error).__name__}: {error}"


def make_calls(sessions: dict[str, XAdapterSession], rng: random.Random, count: int = 12) -> list[Call]:
    """Return calls of every bundle and expert set: ``count`` that are answered, and one that fails."""
    calls: list[Call] = []
    for name, session in sessions.items():
        plm, clip = session.manifest.plm, session.manifest.clip
        longest = min(plm.max_seq, plm.max_seq if clip is None else clip.context_length) - 10
        for experts in session.manifest.expert_sets:
            for _ in range(count):
                texts = [
                    f"{plm.mask_token} banana is a{' very' * rng.randint(0, longest)}"
                    for _ in range(rng.choice((1, 1, 1, 3, 8)))
                ]
                calls.append(Call(name, experts, tuple(texts)))
            calls.append(Call(name, experts, ("",)))
    return calls


def make_expected(sessions: dict[str, XAdapterSession], calls: Sequence[Call]) -> dict[Call, object]:
    """Return what one thread alone answers to each call.

    Raises:
        RuntimeError: If it does not answer the calls that should be, or answers the others.
    """
    expected = {call: ask(sessions, call) for call in calls}
    for call, answer in expected.items():
        if isinstance(answer, str) != (call.texts == ("",)):
            raise RuntimeError(f"{call}: {answer!r}")
    return expected


def repeat(
    sessions: dict[str, XAdapterSession], expected: dict[Call, object], seconds: float, seed: int
) -> Outcome:
    """Make every call once in random order, and again until the time is over."""
    rng, outcome, calls = random.Random(seed), Outcome(), list(expected)
    end = time.perf_counter() + seconds
    while not outcome.num_calls or time.perf_counter() < end:
        rng.shuffle(calls)
        for call in calls:
            start = time.perf_counter()
            answer = ask(sessions, call)
            step = np.log(max(1.0, 1e6 * (time.perf_counter() - start))) / np.log(_STEP)
            outcome.latencies[min(int(step), _NUM_STEPS - 1)] += 1
            if answer != expected[call] and len(outcome.wrong) < 10:
                outcome.wrong.append(f"{call}: {answer!r}"[:500])
    return outcome


def _memory_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text("ascii").split()[1])
    return pages * 4096


def measure(
    sessions: dict[str, XAdapterSession], expected: dict[Call, object], seconds: float, num_threads: int
) -> Outcome:
    """Make calls from several threads at once, and watch the memory of the process."""
    outcome, samples, done = Outcome(), list[tuple[float, int]](), threading.Event()

    def watch() -> None:
        start = time.monotonic()
        while not done.wait(1.0):
            if (now := time.monotonic() - start) >= _WARM_UP * seconds:
                samples.append((now, _memory_bytes()))

    watcher = threading.Thread(target=watch)
    watcher.start()
    with ThreadPoolExecutor(num_threads) as pool:
        started = [pool.submit(repeat, sessions, expected, seconds, seed) for seed in range(num_threads)]
        for thread in started:
            outcome.add(thread.result())
    done.set()
    watcher.join()
    if len(samples) < 3:  # no line can be seen in that
        return outcome
    times, sizes = np.array(samples, np.float64).T
    slope, offset = np.polyfit(times, sizes, 1)
    outcome.growth_bytes = float(slope * (times[-1] - times[0]))
    outcome.noise_bytes = float(4 * np.std(sizes - (slope * times + offset)))
    return outcome


def open_all(folder: Path) -> dict[str, XAdapterSession]:
    """Open every bundle in a folder, so that every answer takes the same number of threads."""
    return {
        path.name: XAdapterSession.load(path, num_threads=1, cache_size=16)
        for path in sorted(folder.iterdir())
    }


def work(folder: Path, expected: dict[Call, object], seconds: float) -> Outcome:
    """Do in a process of its own what ``measure`` does, with one thread."""
    return measure(open_all(folder), expected, seconds, 1)


def measure_processes(
    folder: Path, expected: dict[Call, object], seconds: float, num_processes: int
) -> Outcome:
    """Make calls from several processes, each with one thread; the memory is of the one that grew most."""
    outcome = Outcome()
    with ProcessPoolExecutor(num_processes, mp_context=get_context("spawn")) as pool:
        started = [pool.submit(work, folder, expected, seconds) for _ in range(num_processes)]
        done = [process.result() for process in started]
    for one in done:
        outcome.add(one)
    most = max(done, key=lambda one: (one.grew, one.growth_bytes))
    outcome.growth_bytes, outcome.noise_bytes = most.growth_bytes, most.noise_bytes
    return outcome


def write_bundles(folder: Path, *, small: bool) -> None:
    """Write the bundles: those of the built-in checkpoint, or tiny ones of every task."""
    if small:
        from tests.tiny_bundle import write_bundle

        for task in ("fill-mask", "text-classification", "feature-extraction"):
            write_bundle(folder / task, task=task)
        return
    from xadapter_export import export

    export("builtin", folder / "fill-mask", variants=("onnx-fp32", "cpu-int8"))
    export("builtin", folder / "split", split=True)
    export("builtin", folder / "feature-extraction", task="feature-extraction")


def _row(name: str, outcome: Outcome, alone_ms: float) -> str:
    ratios = [f"{outcome.percentile_ms(percent) / alone_ms:.1f}" for percent in PERCENTILES]
    growth = (
        f"{outcome.growth_bytes / 2**20:+.1f} (noise {max(outcome.noise_bytes, _NOISE_BYTES) / 2**20:.1f})"
    )
    return f"| {' | '.join([name, f'{outcome.num_calls:,}', str(len(outcome.wrong)), *ratios, growth])} |"


def main() -> int:
    """Print the table; return how many rows are wrong."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=1200, help="for the threads, and for the processes")
    parser.add_argument("--threads", type=int, default=8)
    parser.add_argument("--processes", type=int, default=4)
    parser.add_argument("--small", action="store_true", help="use tiny bundles, which need no export")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        write_bundles(folder, small=options.small)
        sessions = open_all(folder)
        expected = make_expected(sessions, make_calls(sessions, random.Random(0)))
        rows = {"1 thread": measure(sessions, expected, max(2.0, options.seconds / 20), 1)}
        alone_ms = rows["1 thread"].percentile_ms(50)
        rows[f"{options.threads} threads"] = measure(sessions, expected, options.seconds, options.threads)
        rows[f"{options.processes} processes"] = measure_processes(
            folder, expected, options.seconds, options.processes
        )
    titles = [f"p{percent:g}" for percent in PERCENTILES]
    print(f"One thread's median: {alone_ms:.2f} ms. {len(expected)} calls, latencies in multiples of it.\n")
    print(f"| | calls | wrong | {' | '.join(titles)} | memory grew (MiB) |")
    print(f"|---|{'---:|' * (len(titles) + 3)}")
    for name, outcome in rows.items():
        print(_row(name, outcome, alone_ms))
    for outcome in rows.values():
        print(*outcome.wrong, sep="\n", end="")
    return sum(bool(outcome.wrong) or outcome.grew for outcome in rows.values())


if __name__ == "__main__":
    sys.exit(min(main(), 1))
