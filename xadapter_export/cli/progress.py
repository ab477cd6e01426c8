"""What a command is doing, on stderr: a bar on a terminal, lines elsewhere."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final, Protocol

from xadapter_export.cli.command import make_console

QUICK_S: Final = 5.0  # what is over sooner needs no lines
_SHORTEST_S: Final = 5.0  # between two lines, where there are few steps
_MANY: Final = 100  # steps, of which each tenth has a line
_LONGEST_S: Final = 60.0  # without a line


class Say(Protocol):
    """Names a stage, and what it works on."""

    def __call__(self, stage: str, detail: str = "", /) -> None:
        """Show it."""


class Count(Protocol):
    """Counts the steps of a stage."""

    def __call__(self, done: int, total: int, note: str = "", /) -> None:
        """Show that so many are done, and a note next to them."""


class _Pace:
    """How fast something is counted since the first count, which also pays for warming up."""

    def __init__(self, unit: str) -> None:
        self._unit = unit
        self._first: tuple[float, int] | None = None

    def text_of(self, done: int, total: int) -> str:
        """Return the rate and the time left as a text, empty as long as nobody knows."""
        now = time.monotonic()
        if self._first is None or done < self._first[1]:
            self._first = now, done
        elapsed, more = now - self._first[0], done - self._first[1]
        if not more or elapsed <= 0:
            return ""
        rate = more / elapsed
        shown = f"{rate:.3g} {self._unit}s/s" if rate >= 1 else f"{1 / rate:.3g} s per {self._unit}"
        return shown if done >= total else f"{shown}, {_duration((total - done) / rate)} left"


def _duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    return (
        f"{seconds:.0f} s" if seconds < 90 else f"{minutes} min" if minutes < 90 else f"{minutes / 60:.1f} h"
    )


@contextmanager
def show_progress(
    *, quiet: bool, unit: str = "step", line: str = "", across_stages: bool = False, after_s: float = 0.0
) -> Iterator[tuple[Say, Count]]:
    """Show what is done in the block; nothing where ``quiet``.

    Args:
        quiet: Whether nothing is shown.
        unit: What is counted, in the singular.
        line: What is said of steps where there is no bar, at each tenth, each minute and the end: a text
            with ``{done}``, ``{total}`` and ``{note}`` in it; the note has the rate and the time left. Few
            steps that pass quickly have a line at the end only. Empty for nothing.
        across_stages: Whether one count goes through all stages; else each has its own.
        after_s: Where there is no bar, nothing is said in the first seconds: of work that is mostly quick.

    Yields:
        What names a stage: the title of the bar, or a line with the seconds since the start. And what counts
        its steps.
    """
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    console = make_console(stderr=True)
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn())
    note_column = TextColumn("{task.fields[note]}", markup=False)
    has_bar = console.is_terminal and not quiet
    start = last = time.monotonic()
    pace, tenth = _Pace(unit), 0

    def say(stage: str, detail: str = "", /) -> None:
        nonlocal last, tenth, pace
        text = f"{stage:5}  {detail}" if detail else stage
        bar.update(task, description=text)
        if not across_stages:
            bar.update(task, completed=0, total=None, note="")
            pace, tenth = _Pace(unit), 0
        last = time.monotonic()
        tell(text)

    def count(done: int, total: int, note: str = "", /) -> None:
        nonlocal last, tenth
        notes = ", ".join(filter(None, (note, pace.text_of(done, total))))
        bar.update(task, completed=done, total=total or None, note=notes)
        reached, now = done * 10 // max(total, 1), time.monotonic()
        shortest = 0.0 if total >= _MANY else _SHORTEST_S
        is_due = now > last + (_LONGEST_S if reached == tenth else shortest)
        if line and total and (is_due or done == total):
            last, tenth = now, reached
            tell(line.format(done=done, total=total, note=notes and f", {notes}"))

    def tell(text: str) -> None:
        elapsed = time.monotonic() - start
        if not quiet and not has_bar and elapsed >= after_s:
            console.print(f"{elapsed:6.1f} s  {text}", soft_wrap=True)

    shown = (*columns, note_column, TimeElapsedColumn())
    with Progress(*shown, console=console, transient=True, disable=not has_bar) as bar:
        task = bar.add_task("starting", total=None, note="")
        yield say, count
