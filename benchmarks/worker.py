"""One contestant in a process of its own, and the processes seen from the one that asks them in turn.

A worker runs only in its turn: between turns the whole process is stopped (SIGSTOP), so no thread of it can
spin, whatever its engine's defaults, and no engine's setting has to be changed to be fair to the others.
"""

import ctypes
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import numpy as np

from benchmarks.contestants import Place, Run, find
from benchmarks.feeds import Feed, feed_as
from benchmarks.prepare import ROOT
from xadapter_export.errors import XAdapterError

_PR_SET_PDEATHSIG = 1


class ContestantError(XAdapterError, RuntimeError):
    """A contestant could not be loaded, or could not run a cell."""


class Worker:
    """A contestant's process, as the process that measures sees it.

    Args:
        contestant: Its name.
        place: What it runs.
        environment: Environment of the process.
        python: Its interpreter.

    Raises:
        ContestantError: If it cannot be loaded.
    """

    def __init__(
        self, contestant: str, place: Place, environment: Mapping[str, str], python: Path | None = None
    ) -> None:
        self.contestant = contestant
        command = [
            str(python or sys.executable),
            "-m",
            "benchmarks.worker",
            json.dumps([contestant, place.as_json()]),
        ]
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115  # open until ``close``: a pipe that fills up would stop the process
        self._process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=dict(environment),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
        )
        self._reason = ""  # why it ended, once it has
        self.loaded = self._read()
        self._stop()

    @property
    def process_id(self) -> int:
        """Number of its process."""
        return self._process.pid

    def first(self, feed: Path, feeding: str, clip_context: int | None) -> float:
        """Run a cell for the first time, where engines compile and plan; return the seconds it took."""
        return float(
            self._ask({"do": "first", "feed": str(feed), "feeding": feeding, "context": clip_context})
        )

    def turn(self, runs: int, *, is_warmed: bool) -> list[float]:
        """Run the latest cell ``runs`` times, after an untimed run if ``is_warmed``; return times in ms."""
        return [float(ms) for ms in self._ask({"do": "turn", "runs": runs, "warm": is_warmed})]

    def use(self, feed: Path, feeding: str, clip_context: int | None) -> None:
        """Take a cell that was run before."""
        self._ask({"do": "use", "feed": str(feed), "feeding": feeding, "context": clip_context})

    def answer(self, output: Path) -> None:
        """Write the answers of the latest cell at its masks to an ``.npy`` file."""
        self._ask({"do": "answer", "output": str(output)})

    def close(self) -> None:
        """End the process."""
        if self._process.poll() is None:
            os.kill(self._process.pid, signal.SIGCONT)
            self._process.kill()
        self._process.communicate()
        self._errors.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _ask(self, request: dict[str, object]) -> Any:
        assert self._process.stdin is not None
        if self._process.poll() is not None:
            raise ContestantError(
                "a contestant has ended in an earlier cell", where=self.contestant, got=self._reason
            )
        os.kill(self._process.pid, signal.SIGCONT)
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        reply = self._read()
        self._stop()
        return reply

    def _stop(self) -> None:
        os.kill(self._process.pid, signal.SIGSTOP)

    def _read(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            code = self._process.wait()
            self._errors.seek(0)
            self._reason = (self._errors.read().strip().splitlines() or [f"exit {code}"])[-1]
            self.close()
            raise ContestantError("a contestant failed", where=self.contestant, got=self._reason)
        return json.loads(line)


# ------------------------------------------------------------------------------------ in the worker


def serve(contestant: str, place: Place) -> None:
    """Load a contestant and do what is asked, line by line, until the input ends."""
    _end_with_parent()
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever an engine prints is no reply

    def reply(value: object) -> None:
        replies.write(json.dumps(value) + "\n")
        replies.flush()

    start = time.perf_counter()
    run = find(contestant).load(place)
    reply(time.perf_counter() - start)
    fed: Feed = {}
    positions: np.ndarray | None = None
    for line in sys.stdin:
        request = json.loads(line)
        if request["do"] in ("first", "use"):
            with np.load(request["feed"]) as arrays:
                feed = dict(arrays)
            positions = feed.get("mask_positions")
            fed = feed_as(feed, request["feeding"], request["context"])
        if request["do"] == "first":
            reply(_time_ms(run, fed) / 1e3)
        elif request["do"] == "turn":
            if request["warm"]:
                run(fed)
            reply([_time_ms(run, fed) for _ in range(request["runs"])])
        elif request["do"] == "answer":
            np.save(request["output"], _at_masks(run(fed), positions, fed))
            reply(True)
        else:
            reply(True)


def _end_with_parent() -> None:
    """Have Linux end this process when the one that asks is gone: a process that is stopped cannot see it."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _time_ms(run: Run, feed: Feed) -> float:
    start = time.perf_counter()
    run(feed)
    return 1e3 * (time.perf_counter() - start)


def _at_masks(answer: np.ndarray, positions: np.ndarray | None, feed: Feed) -> np.ndarray:
    """``(B, P, V)`` at the masks, from logits there or at all T positions; features are left as they are."""
    if positions is None or answer.shape[1] == positions.shape[1] != feed["input_ids"].shape[1]:
        return answer
    return np.take_along_axis(answer, positions[:, :, None], axis=1)


def _main() -> None:
    name, setup = json.loads(sys.argv[1])
    serve(name, Place.from_json(setup))


if __name__ == "__main__":
    _main()
