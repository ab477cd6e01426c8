"""The table of results, for the terminal and for ``docs/results.md``."""

import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean, stdev

from rich.console import Console
from rich.table import Table

from train.demo.plugin import Language, SplitResult

_BEGIN, _END = "<!-- train.demo begin -->", "<!-- train.demo end -->"


@dataclass(frozen=True)
class Grid:
    """A table: title, names of the columns, rows of text."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def color_grid(shipped: SplitResult, splits: Sequence[SplitResult]) -> Grid:
    """Colour accuracy of the shipped split, and over the splits."""
    sizes = [split.num_held_out for split in splits]
    return Grid(
        "Colour of held-out objects, unseen sentences, 11 colours, % right",
        (
            "",
            f"shipped ({shipped.num_held_out} objects)",
            f"{len(splits)} splits ({min(sizes)} to {max(sizes)} objects), mean ± sd",
        ),
        tuple(
            (name, f"{100 * value:.1f}", _spread([100 * split.accuracy[name] for split in splits], 1))
            for name, value in shipped.accuracy.items()
        ),
    )


def language_grid(splits: Sequence[SplitResult]) -> Grid:
    """The language check, over all splits."""

    def row(name: str) -> tuple[str, ...]:
        checks: list[Language] = [split.language[name] for split in splits]
        ratio = mean(split.language[name].loss / split.language["frozen PLM"].loss for split in splits)
        return (
            name,
            _spread([check.loss for check in checks], 3),
            f"{100 * (ratio - 1):+.1f} %",
            _spread([100 * check.top1 for check in checks], 1),
            _spread([100 * check.color_rate for check in checks], 2),
        )

    return Grid(
        "Language check: one masked word of sentences that were kept from training",
        ("", "MLM loss (nats)", "against frozen PLM", "top-1 %", "answers that are a colour %"),
        tuple(row(name) for name in splits[0].language),
    )


def _spread(values: Sequence[float], digits: int) -> str:
    spread = stdev(values) if len(values) > 1 else 0.0
    return f"{mean(values):.{digits}f} ± {spread:.{digits}f}"


def measure_grid(title: str, measured: dict[str, str]) -> Grid:
    """A plain list of names and values."""
    return Grid(title, ("", ""), tuple(measured.items()))


def print_grid(grid: Grid, console: Console) -> None:
    """Show a table in the terminal."""
    table = Table(title=grid.title, title_justify="left")
    for index, column in enumerate(grid.columns):
        table.add_column(column, justify="right" if index else "left")
    for row in grid.rows:
        table.add_row(*row)
    console.print(table)


def write_results(path: Path, grids: Sequence[Grid], notes: Sequence[str], seed: int) -> None:
    """Replace the recipe's section of a Markdown file, or add it; everything around it stays."""
    section = [
        _BEGIN,
        "",
        f"Printed by `python -m train.demo`, seed {seed}, on {platform.machine()} with 2 threads.",
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
    section += [*(f"- {note}" for note in notes), "", _END]
    text = path.read_text(encoding="utf-8") if path.is_file() else f"# Results\n\n{_BEGIN}\n{_END}\n"
    before, _, rest = text.partition(_BEGIN)
    after = rest.partition(_END)[2]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(before + "\n".join(section) + after, encoding="utf-8")


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def to_json(result: SplitResult) -> dict[str, object]:
    """A split's numbers as JSON."""
    return asdict(result)


def from_json(value: dict[str, object]) -> SplitResult:
    """The inverse of ``to_json``."""
    plain = dict(value)
    language = plain.pop("language")
    assert isinstance(language, dict)
    return SplitResult(**plain, language={name: Language(**check) for name, check in language.items()})  # type: ignore[arg-type]
