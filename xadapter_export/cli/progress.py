"""What a command is doing, on stderr: a bar on a terminal, lines elsewhere."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final, Protocol

from xadapter_export.cli.command import make_console

_LONGEST_S: Final = 60.0  # without a line


class Say(Protocol):
    """Names a stage, and what it works on."""

    def __call__(self, stage: str, detail: str = "", /) -> None:
        """Show it."""


class Count(Protocol):
    """Counts the steps of a stage."""

    def __call__(self, done: int, total: int, note: str = "", /) -> None:
        """Show that so many are done, and a note beside them."""


@contextmanager
def show_progress(*, quiet: bool, line: str = "") -> Iterator[tuple[Say, Count]]:
    """Show what is done in the block; nothing where ``quiet``.

    Args:
        quiet: Whether nothing is shown.
        line: What is said of steps where there is no bar, at each tenth and each minute: a text with
            ``{done}``, ``{total}`` and ``{note}`` in it. Empty for nothing.

    Yields:
        What names a stage: the title of the bar, or a line with the seconds since the start. And what counts
        its steps.
    """
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = make_console(stderr=True)
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn())
    beside = TextColumn("{task.fields[beside]}", markup=False), TimeRemainingColumn()
    has_bar = console.is_terminal and not quiet
    start = last = time.monotonic()
    tenth = 0

    def say(stage: str, detail: str = "", /) -> None:
        nonlocal last, tenth
        text = f"{stage:5}  {detail}" if detail else stage
        bar.update(task, description=text, completed=0, total=None, beside="")
        last, tenth = time.monotonic(), 0
        tell(text)

    def count(done: int, total: int, note: str = "", /) -> None:
        nonlocal last, tenth
        bar.update(task, completed=done, total=total or None, beside=note)
        reached = done * 10 // max(total, 1)
        if line and (reached != tenth or time.monotonic() > last + _LONGEST_S):
            last, tenth = time.monotonic(), reached
            tell(line.format(done=done, total=total, note=note and f", {note}"))

    def tell(text: str) -> None:
        if not quiet and not has_bar:
            console.print(f"{time.monotonic() - start:6.1f} s  {text}", soft_wrap=True)

    with Progress(*columns, *beside, console=console, transient=True, disable=not has_bar) as bar:
        task = bar.add_task("starting", total=None, beside="")
        yield say, count
