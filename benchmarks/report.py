"""What the benchmark says: one table for each question, a chart, JSON with every raw time."""

import json
import platform
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

from rich.console import Console
from rich.table import Table

from benchmarks.contestants import THEIRS, find
from benchmarks.feeds import Cell
from benchmarks.intervals import ratio, spread
from benchmarks.limits import Limits
from benchmarks.machine import cpu_flags
from benchmarks.prepare import versions
from benchmarks.verdicts import MOST_OF_AUTO, Measured, Results, Row, Verdict, chosen, picked

_WIDTH: Final = 200
_FEEDINGS = {"user": "as its user feeds it", "equal": "at our lengths"}
_PAPER = "#fbfaf7"
_MAIN = ("eager", "compile", "ort", "ort-fused-int8", "openvino", "openvino-int8", "plm-ort")


def make_console() -> Console:
    """Return a console on stdout, wide enough for every table, also where it is no terminal."""
    return Console(markup=False, highlight=False, emoji=False, width=_WIDTH)


def label(row: Row) -> str:
    """A row in words."""
    contestant = find(row.contestant)
    return contestant.title if contestant.kind == "ours" else f"{contestant.title}, {_FEEDINGS[row.feeding]}"


def latency_tables(results: Results) -> Iterable[Table]:
    """Yield a table for each case, expert set and answer: ms, ratio to the judged one of ours, limits."""
    groups: dict[tuple[str, str, str], list[Cell]] = {}
    for cell in results.cells:
        groups.setdefault((cell.case, cell.experts, cell.head), []).append(cell)
    for (case, experts, head), cells in groups.items():
        table = Table(
            title=f"{case}, experts {experts}, {head}, on {results.cpu}: "
            "median ms (quartiles), x ours, share of the limit",
            caption=_caption(results, cells),
            title_justify="left",
            caption_justify="left",
            show_edge=False,
        )
        table.add_column("contestant", no_wrap=True)
        for cell in cells:
            mark = " *" if cell in results.disturbed else ""
            table.add_column(cell.shape + mark, justify="right", no_wrap=True)
        rows = list(dict.fromkeys(row for cell in cells for row in results.cells[cell]))
        for row in rows:
            table.add_row(label(row), *(_entry(results, cell, row) for cell in cells))
        yield table


def _caption(results: Results, cells: Sequence[Cell]) -> str:
    """What helps to read a table: the contestants that do less, and the cells that were disturbed."""
    lines = []
    first = results.cells[cells[-1]]
    mine = next((each.gflop for row, each in first.items() if row.contestant.startswith("ours")), 0.0)
    for row, each in first.items():
        if find(row.contestant).kind in ("plm", "encoder") and mine:
            lines.append(f"{label(row)}: {each.gflop / mine:.0%} of our operations at {cells[-1].shape}")
    shares = [f"{cell.shape} {results.disturbed[cell]:.0%}" for cell in cells if cell in results.disturbed]
    if shares:
        lines.append(f"* disturbed, others took of the CPU: {', '.join(shares)}")
    return "\n".join(lines)


def auto_table(results: Results) -> Table:
    """What ``auto`` takes in every cell, and by how much the fastest variant is faster."""
    table = Table(title=f"what auto takes on {results.cpu}", title_justify="left", show_edge=False)
    table.add_column("case, experts, shape, answer", no_wrap=True)
    for column in ("", "auto takes", "the fastest"):
        table.add_column(column, no_wrap=True)
    table.add_column("slower by (interval)", justify="right", no_wrap=True)
    table.add_column("at most 5 %", no_wrap=True)
    for each in picked(results):
        value, low, high = (
            f"{each_ratio - 1:.1%}" for each_ratio in (each.ratio.value, each.ratio.low, each.ratio.high)
        )
        verdict = "PASS" if each.ratio.value <= MOST_OF_AUTO else "MISS"
        row = (
            str(each.cell),
            each.pick.title,
            each.pick.variant,
            each.best,
            f"{value} ({low} to {high})",
            verdict,
        )
        table.add_row(*row)
    return table


def as_markdown(tables: Iterable[Table]) -> str:
    """Return the tables as Markdown, each under its title."""
    parts = []
    for table in tables:
        columns = [[str(column.header), *map(str, column.cells)] for column in table.columns]
        rule = [["---:" if column.justify == "right" else "---" for column in table.columns]]
        heads, *rows = zip(*columns, strict=True)
        lines = ["| " + " | ".join(row) + " |" for row in (heads, *rule, *rows)]
        parts += [f"### {table.title}", "\n".join(lines)]
        parts += ["\n".join(f"- {line}" for line in str(table.caption).splitlines())] * bool(table.caption)
    return "\n\n".join(parts) + "\n"


def _entry(results: Results, cell: Cell, row: Row) -> str:
    rows = results.cells[cell]
    if row not in rows:
        return "-"
    found = spread(rows[row].times_ms)
    text = f"{_ms(found.median)} ({_ms(found.low)}-{_ms(found.high)})"
    precision = find(row.contestant).precision
    mine = chosen(results, precision if precision in ("int8", "fp16") else "fp32")
    own = next((other for other in rows if other.contestant == mine), None)
    times = f" x{ratio(rows[row].times_ms, rows[own].times_ms).value:.2f}" if own and own != row else ""
    return f"{text}{times} {rows[row].share:.0%}"


def _ms(value: float) -> str:
    return f"{value:.3g}" if value < 100 else f"{value:.0f}"


def limits_table(limits: Limits, results: Results) -> Table:
    """What the machine can do."""
    table = Table(
        title="limits of "
        + (f"{results.cpu}, {limits.threads} threads" if limits.device == "cpu" else limits.device),
        title_justify="left",
        show_edge=False,
    )
    for column in ("fp32 GFLOP/s", "bf16 GFLOP/s", "int8 Gop/s", "reading GB/s"):
        table.add_column(column, justify="right")
    values = (limits.fp32_gflops, limits.bf16_gflops, limits.int8_gops, limits.read_gb_s)
    table.add_row(*(f"{value:.0f}" for value in values))
    return table


def size_table(results: Results) -> Table:
    """Files of ours."""
    table = Table(title="files of ours", title_justify="left", show_edge=False)
    table.add_column("case, experts, answer, variant", no_wrap=True)
    for column in ("MB", "parameters (M)", "bytes a parameter", "below its gate"):
        table.add_column(column, justify="right")
    for size in results.sizes:
        table.add_row(
            f"{size.case} {size.experts} {size.head} {size.variant}",
            f"{size.size_bytes / 1e6:.2f}",
            f"{size.parameters / 1e6:.2f}",
            f"{size.size_bytes / size.parameters:.3f}",
            size.below_gate,
        )
    return table


def footprint_table(results: Results) -> Table:
    """What having each contestant costs, and making it."""
    table = Table(
        title=f"having and making on {results.cpu}, in fresh processes; memory beyond the imported libraries",
        title_justify="left",
        show_edge=False,
    )
    table.add_column("contestant", no_wrap=True)
    for column in ("files MiB", "load s", "first run s", "resident MiB", "of files", "two of one"):
        table.add_column(column, justify="right")
    for column in ("made in s", "peak MiB making it"):
        table.add_column(column, justify="right")
    names = dict.fromkeys([*results.footprints, *results.costs])
    for name in names:
        found, cost, files = results.footprints.get(name), results.costs.get(name), results.file_mib.get(name)
        table.add_row(
            name,
            f"{files:.0f}" if files else "-",
            f"{found.load_s:.2f}" if found else "-",
            f"{found.first_run_s:.2f}" if found else "-",
            f"{found.one_mib:.0f}" if found else "-",
            f"{found.one_mib / files:.2f}" if found and files else "-",
            f"{found.two_mib / found.one_mib:.2f}" if found else "-",
            f"{cost.seconds:.0f}" if cost else "-",
            f"{cost.beyond_mib:.0f}" if cost else "-",
        )
    return table


def as_json(
    results: Results,
    limits: Limits,
    verdicts: Sequence[Verdict],
    agreement: Mapping[str, float],
    missing: Mapping[str, str],
) -> dict[str, Any]:
    """Everything, for machines."""
    return {
        "versions": versions(),
        "machine": {
            "cpu": asdict(results.cpu),
            "system": platform.platform(),
            "processor": platform.processor() or platform.machine(),
            "cpu_flags": cpu_flags(),
        },
        "limits": asdict(limits),
        "cells": [
            {
                **asdict(cell),
                "shape": cell.shape,
                "others_share_of_cpu": results.disturbed.get(cell),
                "rows": [_row(row, measured) for row, measured in rows.items()],
            }
            for cell, rows in results.cells.items()
        ],
        "auto": [
            {**asdict(each.cell), **asdict(each.pick), "best": each.best, "ratio": asdict(each.ratio)}
            for each in picked(results)
        ],
        "sizes": [asdict(size) for size in results.sizes],
        "footprints": {name: asdict(found) for name, found in results.footprints.items()},
        "file_mib": dict(results.file_mib),
        "costs": {name: asdict(cost) for name, cost in results.costs.items()},
        "agreement_with_eager": dict(agreement),
        "not_measured": dict(missing),
        "targets": [{**asdict(verdict), "status": verdict.status} for verdict in verdicts],
    }


def _row(row: Row, measured: Measured) -> dict[str, Any]:
    contestant = find(row.contestant)
    return {
        "contestant": row.contestant,
        "feeding": row.feeding,
        "title": contestant.title,
        "precision": contestant.precision,
        "median_ms": measured.median_ms,
        "times_ms": list(measured.times_ms),
        "gflop": measured.gflop,
        "weight_bytes": measured.weight_bytes,
        "limit_ms": measured.limit_ms,
        "share_of_limit": measured.share,
    }


def write_json(value: Mapping[str, Any], path: Path) -> None:
    """Write JSON."""
    path.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")


def draw(results: Results, path: Path) -> None:
    """Draw ms of the main contestants: a row for each case, expert set and kind of answer, a panel a shape.

    Raises:
        MissingExtraError: If matplotlib is not installed.
    """
    from xadapter_export.errors import import_extra

    import_extra("matplotlib", "report")
    from matplotlib.figure import Figure

    tables: dict[tuple[str, str, str], list[Cell]] = {}
    for cell in results.cells:
        tables.setdefault((cell.case, cell.experts, cell.head), []).append(cell)
    orders = [_in_chart(results, cells) for cells in tables.values()]
    width = 3.2 + 1.9 * max(map(len, tables.values()))
    figure = Figure(
        (width, sum(0.27 * len(rows) + 1.0 for rows in orders)),
        dpi=130,
        layout="constrained",
        facecolor=_PAPER,
    )
    parts = figure.subfigures(len(tables), 1, squeeze=False, height_ratios=[len(rows) + 4 for rows in orders])
    for part, ((case, experts, head), cells), rows in zip(parts[:, 0], tables.items(), orders, strict=True):
        part.set_facecolor(_PAPER)
        part.suptitle(f"{case}, experts {experts}, {head}", x=0.01, ha="left", fontsize=11)
        for axis, cell in zip(part.subplots(1, len(cells), squeeze=False)[0], cells, strict=True):
            _draw_cell(axis, results.cells[cell], rows, has_names=cell is cells[0])
            axis.set_title(f"{cell.batch} x {cell.seq} tokens, ms", loc="left", fontsize=9)
    figure.savefig(path)


def _in_chart(results: Results, cells: Sequence[Cell]) -> list[Row]:
    """The rows of a panel from top to bottom: full precision first, ours last in each."""
    found = dict.fromkeys(row for cell in cells for row in results.cells[cell])
    rows = [row for row in found if is_main(row)] or list(found)
    order = ("fp32", "bf16", "fp16", "int8", "int4")

    def place(row: Row) -> tuple[int, bool, str]:
        contestant = find(row.contestant)
        return order.index(contestant.precision), contestant.kind == "ours", label(row)

    return sorted(rows, key=place)


def _draw_cell(axis: Any, cell: Mapping[Row, Measured], rows: Sequence[Row], *, has_names: bool) -> None:
    """A bar and its number for each row that was measured; ours in color."""
    for place, row in enumerate(rows):
        if row not in cell:
            continue
        is_ours = find(row.contestant).kind == "ours"
        bar = axis.barh(place, cell[row].median_ms, 0.72, color="#0b6b57" if is_ours else "#b9bcc2")
        weight = "bold" if is_ours else "normal"
        axis.bar_label(bar, [_ms(cell[row].median_ms)], fontsize=8, padding=3, fontweight=weight)
    axis.set_ylim(len(rows) - 0.4, -0.6)
    axis.set_yticks(range(len(rows)), [label(row) for row in rows] if has_names else [])
    axis.tick_params(labelsize=8.5, length=0)
    axis.set_xticks([])
    axis.margins(x=0.25)
    axis.set_facecolor(_PAPER)
    axis.spines[:].set_visible(False)


def is_main(row: Row) -> bool:
    """Whether the chart shows it: the main contestants as their users feed them, and ours."""
    contestant = find(row.contestant)
    if contestant.kind == "ours":
        return True
    return row.contestant in _MAIN and row.feeding == ("equal" if contestant.kind == "torch" else "user")


def all_names() -> tuple[str, ...]:
    """Names of the contestants that are not ours, and ``ours`` for all of ours."""
    return (*(contestant.name for contestant in THEIRS), "ours")


def usual_names() -> tuple[str, ...]:
    """Those that ``make bench`` times; the engines of ``benchmarks.field`` take minutes to prepare."""
    return (*(contestant.name for contestant in THEIRS if not contestant.is_apart), "ours")
