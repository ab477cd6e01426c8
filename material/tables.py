"""The tables of results, for the terminal and for ``docs/results.md``."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev

from rich.console import Console
from rich.table import Table

from xadapter_export.bundle.machine import read_machine


@dataclass(frozen=True)
class Grid:
    """A table: title, names of the columns, rows of text."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def print_grid(grid: Grid, console: Console) -> None:
    """Show a table in the terminal."""
    table = Table(title=grid.title, title_justify="left")
    for index, column in enumerate(grid.columns):
        table.add_column(column, justify="right" if index else "left")
    for row in grid.rows:
        table.add_row(*row)
    console.print(table)


def write_results(path: Path, recipe: str, grids: Sequence[Grid], notes: Sequence[str], seeds: str) -> None:
    """Replace a recipe's section of a Markdown file, or add it; everything around it stays.

    Args:
        path: The file.
        recipe: Module that printed the tables, ``train.demo``.
        grids: The tables.
        notes: What must be read beside them.
        seeds: What is said of the seeds.
    """
    begin, end = f"<!-- {recipe} begin -->", f"<!-- {recipe} end -->"
    section = [
        begin,
        "",
        f"Printed by `python -m {recipe}`, {seeds}, on {read_machine()}.",
        "",
    ]
    for grid in grids:
        section += [
            f"### {grid.title}",
            "",
            _line(grid.columns),
            _line(("---", *("---:" for _ in grid.columns[1:]))),
        ]
        section += [*(_line(row) for row in grid.rows), ""]
    section += [*(f"- {note}" for note in notes), "", end]
    text = path.read_text(encoding="utf-8") if path.is_file() else "# Results\n"
    if begin not in text:
        text = f"{text.rstrip()}\n\n{begin}\n{end}\n"
    before, _, rest = text.partition(begin)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(before + "\n".join(section) + rest.partition(end)[2], encoding="utf-8")


def spread(values: Sequence[float], digits: int) -> str:
    """Return mean and standard deviation of some values, as ``mean ± sd``."""
    deviation = stdev(values) if len(values) > 1 else 0.0
    return f"{mean(values):.{digits}f} ± {deviation:.{digits}f}"


@dataclass(frozen=True)
class Language:
    """The language check on ordinary words: mean loss in nats, share right, share answered with a color."""

    loss: float
    top1: float
    color_rate: float


def language_grid(
    splits: Sequence[Mapping[str, Language]], names: Iterable[str] | None = None, where: str = ""
) -> Grid:
    """The language check, over all splits.

    Args:
        splits: What was measured of each split, by arm; the frozen PLM is among them.
        names: The arms to show; all if None.
        where: Words of the title: `` on MiniLM-L6``.
    """

    def row(name: str) -> tuple[str, ...]:
        checks = [split[name] for split in splits]
        ratio = mean(split[name].loss / split["frozen PLM"].loss for split in splits)
        return (
            name,
            spread([check.loss for check in checks], 3),
            f"{100 * (ratio - 1):+.1f} %",
            spread([100 * check.top1 for check in checks], 1),
            spread([100 * check.color_rate for check in checks], 2),
        )

    return Grid(
        f"Language check{where}: one masked word of sentences that were kept from training",
        ("", "MLM loss (nats)", "against frozen PLM", "top-1 %", "answers that are a color %"),
        tuple(row(name) for name in names or splits[0]),
    )


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"
