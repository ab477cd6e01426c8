"""The report as a table for the terminal: a line for each graph and output, the worst of its cases."""

from collections.abc import Callable, Iterable, Mapping

from rich.table import Table

from xadapter_export.parity.compare import Cell
from xadapter_export.parity.report import ParityReport


def parity_table(reports: Mapping[str, ParityReport], *, every_cell: bool = False) -> Table:
    """Return the table of one or several reports.

    Args:
        reports: Reports by the name of their bundle; the name is a column where there are several.
        every_cell: Whether to show each case on its own line instead of the worst of them.
    """
    several = len(reports) > 1
    table = Table(
        caption="element passes when |got - ref| <= atol + rtol * |ref|, in float64", show_edge=False
    )
    for name in [*(["bundle"] if several else []), "experts", "variant", "output"]:
        table.add_column(name)
    for name in (
        "case" if every_cell else "cases",
        "elements",
        "max abs",
        *(["max rel"] if every_cell else []),
        "cosine",
        "smallest atol",
    ):
        table.add_column(name, justify="right")
    table.add_column("argmax", justify="right")
    table.add_column("passed")
    for bundle, report in reports.items():
        for cells in _groups(report.cells, every_cell=every_cell):
            first = cells[0]
            problem = next((cell.problem for cell in cells if cell.problem), "NO")
            table.add_row(
                *([bundle] if several else []),
                first.expert_set,
                first.variant,
                first.output,
                first.case if every_cell else str(len(cells)),
                f"{sum(cell.num_elements for cell in cells):,}",
                _worst(max, (cell.max_abs for cell in cells), ".1e"),
                *([_worst(max, (cell.max_rel for cell in cells), ".1e")] if every_cell else []),
                _worst(min, (cell.cosine for cell in cells), ".8f"),
                _worst(max, (cell.smallest_atol for cell in cells), ".1e"),
                _agreement(cells),
                "yes" if all(cell.passed for cell in cells) else problem,
                style=None if all(cell.passed for cell in cells) else "bold red",
            )
    return table


def _groups(cells: Iterable[Cell], *, every_cell: bool) -> list[list[Cell]]:
    if every_cell:
        return [[cell] for cell in cells]
    groups: dict[tuple[str, str, str], list[Cell]] = {}
    for cell in cells:
        groups.setdefault((cell.expert_set, cell.variant, cell.output), []).append(cell)
    return list(groups.values())


def _worst(
    choose: Callable[[Iterable[float]], float], values: Iterable[float | None], format_spec: str
) -> str:
    known = [value for value in values if value is not None]
    return format(choose(known), format_spec) if known else "-"


def _agreement(cells: list[Cell]) -> str:
    """Return the worst argmax agreement, or for retrieved rows the number of ties."""
    num_ties = sum(cell.num_ties or 0 for cell in cells)
    if num_ties:
        return f"{num_ties} ties"
    return _worst(min, (cell.argmax_agreement for cell in cells), ".0%")
