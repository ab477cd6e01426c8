"""What an evaluation found: as JSON, as Markdown, and as a folder of files."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

RESULTS_NAME: Final = "results.json"
MARKDOWN_NAME: Final = "results.md"
Settings = Mapping[str, str | int | float | bool | None]


@dataclass(frozen=True)
class Metric:
    """A column: what it is called, and how its numbers are written.

    Attributes:
        title: What it is called in a table.
        is_percentage: Whether a share is shown as so many in a hundred.
        decimals: Digits after the point.
    """

    title: str
    is_percentage: bool = False
    decimals: int = 3

    def write(self, value: float | None) -> str:
        """Return a number as a table shows it; a dash where there is none."""
        if value is None:
            return "-"
        return f"{100 * value if self.is_percentage else value:.{self.decimals}f}"


def percentage(title: str) -> Metric:
    """Return a metric shown as a percentage with one decimal."""
    return Metric(f"{title} (%)", is_percentage=True, decimals=1)


@dataclass(frozen=True)
class Row:
    """One row.

    Attributes:
        name: What was scored.
        values: Numbers by the key of their metric; shares from 0 to 1, None where undefined.
        experts: The expert set, where a model answered.
        is_baseline: Whether no model was asked: chance, majority, a published figure.
        details: More numbers for ``results.json``: of each prompt, of each object.
    """

    name: str
    values: Mapping[str, float | None]
    experts: str | None = None
    is_baseline: bool = False
    details: Mapping[str, object] = field(default_factory=dict)


@dataclass(frozen=True)
class Evaluation:
    """All that one evaluation found.

    Attributes:
        kind: ``color``, ``coda``, ``glue``, ``mlm`` or ``ablation``.
        model: The model's name.
        data: The data's name.
        counts: How many objects, texts or prompts there were.
        settings: What was asked for, and what the numbers mean.
        metrics: The columns by their key.
        rows: The rows, in the order of the table.
    """

    kind: str
    model: str
    data: str
    counts: Mapping[str, int]
    settings: Settings
    metrics: Mapping[str, Metric]
    rows: tuple[Row, ...]

    def row(self, name: str) -> Row:
        """Return a row by its name."""
        return {row.name: row for row in self.rows}[name]

    @property
    def title(self) -> str:
        """One line that says what was scored on what."""
        counts = ", ".join(f"{count} {name}" for name, count in self.counts.items())
        return f"{self.kind}: {self.model} on {self.data} ({counts})"

    def to_json(self) -> dict[str, object]:
        """Return everything, for ``json.dumps``."""
        return {
            "kind": self.kind,
            "model": self.model,
            "data": self.data,
            "counts": dict(self.counts),
            "settings": dict(self.settings),
            "rows": [
                {"name": row.name, "experts": row.experts, **row.values, **row.details} for row in self.rows
            ],
        }

    def to_markdown(self) -> str:
        """Return the table with its settings."""
        keys = list(self.metrics)
        lines = [f"# {self.title}", ""]
        lines.append("|  | " + " | ".join(self.metrics[key].title for key in keys) + " |")
        lines.append("| --- |" + " ---: |" * len(keys))
        for row in self.rows:
            cells = [self.metrics[key].write(row.values.get(key)) for key in keys]
            lines.append(f"| {row.name.replace('|', '/')} | " + " | ".join(cells) + " |")
        lines += ["", *(f"- {name}: {value}" for name, value in self.settings.items())]
        return "\n".join(lines) + "\n"

    def write(self, folder: Path) -> None:
        """Write ``results.json`` and ``results.md`` into an existing folder."""
        text = json.dumps(self.to_json(), indent=2, ensure_ascii=False) + "\n"
        (folder / RESULTS_NAME).write_text(text, encoding="utf-8")
        (folder / MARKDOWN_NAME).write_text(self.to_markdown(), encoding="utf-8")
