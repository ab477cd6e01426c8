"""``python -m export.parity``: prove every expert set of the built-in checkpoint and of three larger cases.

What the cases are: ``material/models.py``.
"""

import sys
from pathlib import Path

import click
from rich.console import Console

from material.models import CASES
from xadapter_export import export
from xadapter_export.errors import ParityError
from xadapter_export.parity.table import parity_table


@click.command()
@click.option(
    "--output", type=click.Path(path_type=Path), default="bundles/parity", show_default=True, help="Bundles."
)
@click.option(
    "--case",
    "names",
    type=click.Choice(list(CASES)),
    multiple=True,
    help="Case; may be repeated. [default: all]",
)
@click.option("--opset", default=17, show_default=True)
def main(output: Path, names: tuple[str, ...], opset: int) -> None:
    """Export every case with all four expert sets, and print one table."""
    reports = {}
    for name in names or CASES:
        click.echo(f"{name}", err=True)
        result = export(
            CASES[name](),
            output / name,
            ("vt", "v", "t", "none"),
            opset=opset,
            force=True,
            on_stage=lambda stage, detail: click.echo(f"  {stage:5}  {detail}", err=True),
        )
        reports[name] = result.parity
    Console(width=160, highlight=False).print(parity_table(reports))
    num_cells = sum(len(report.cells) for report in reports.values())
    click.echo(f"parity: passed, {num_cells} comparisons in {len(reports)} cases; bundles: {output}")


if __name__ == "__main__":
    try:
        main()
    except ParityError as error:
        click.echo(f"Error: {error}", err=True)
        sys.exit(1)
