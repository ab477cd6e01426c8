"""Stages whose results are kept on disk, and progress that reads well in a terminal and in a log."""

import hashlib
import json
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


class Stages:
    """Runs named stages once and keeps their folders under one root.

    A stage's folder holds ``stage.json`` with the key it was made under. The key covers the stage's own
    settings, the seed and the keys of the stages it was made from. A folder is filled beside its final place
    and then renamed, so an interrupted stage leaves nothing that looks finished.
    """

    def __init__(self, root: Path, seed: int, console: Console) -> None:
        self.root = root
        self.seed = seed
        self.console = console
        self._keys: dict[str, str] = {}

    def run(self, name: str, settings: object, after: Iterable[str], make: Callable[[Path], None]) -> Path:
        """Return the stage's folder, filled by ``make(folder)`` unless it is there under the same key."""
        parents = {parent: self._keys[parent] for parent in after}
        key_source = json.dumps([name, self.seed, settings, parents], sort_keys=True)
        self._keys[name] = key = hashlib.sha256(key_source.encode()).hexdigest()
        folder = self.root / name
        marker = folder / "stage.json"
        if marker.is_file() and json.loads(marker.read_text())["key"] == key:
            self.console.print(f"[bold]{name}[/]: kept from an earlier run, {folder}")
            return folder
        self.console.print(f"[bold]{name}[/]")
        partial = self.root / f"{name}.partial"
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        start = time.monotonic()
        make(partial)
        elapsed_s = time.monotonic() - start
        (partial / "stage.json").write_text(json.dumps({"key": key, "elapsed_s": round(elapsed_s, 1)}))
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)
        self.console.print(f"  done in {elapsed_s:.0f} s, {folder}")
        return folder

    @property
    def names(self) -> tuple[str, ...]:
        """The stages of this run so far."""
        return tuple(self._keys)

    def elapsed_s(self, name: str) -> float:
        """Seconds that the stage took when it ran."""
        return float(json.loads((self.root / name / "stage.json").read_text())["elapsed_s"])


def track(steps: int, title: str, console: Console) -> Iterator[tuple[int, Callable[[str], None]]]:
    """Count to ``steps``; each turn yields the step and a function that sets the note shown beside it.

    A terminal gets a progress bar, anything else one plain line for every tenth of the way.
    """
    note = ""

    def set_note(text: str) -> None:
        nonlocal note
        note = text

    if console.is_terminal:
        columns = (
            TextColumn("  {task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
        )
        with Progress(*columns, TextColumn("{task.fields[note]}"), console=console) as progress:
            task = progress.add_task(title, total=steps, note="")
            for step in range(steps):
                yield step, set_note
                progress.update(task, advance=1, note=note)
        return
    start = time.monotonic()
    for step in range(steps):
        yield step, set_note
        if (step + 1) * 10 // steps > step * 10 // steps:
            console.print(f"  {title} {step + 1}/{steps} after {time.monotonic() - start:.0f} s {note}")
