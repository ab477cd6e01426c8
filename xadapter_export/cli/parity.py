"""``xad parity``: prove a bundle, with no PyTorch installed."""

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from xadapter_export.cli.command import (
    EXPERT_SETS,
    XadCommand,
    example,
    json_option,
    make_console,
    print_json,
    session_options,
)

if TYPE_CHECKING:
    from xadapter_export.bundle.manifest import ExpertSet


@click.command(
    cls=XadCommand,
    epilog=example("xad-export --experts t --opset 17 -o bundle", "xad-parity bundle"),
)
@click.argument("bundles", metavar="BUNDLE...", type=click.Path(path_type=Path), nargs=-1, required=True)
@click.option(
    "--experts",
    type=click.Choice(EXPERT_SETS),
    multiple=True,
    help="Expert set to prove; may be repeated. [default: all]",
)
@click.option("--every-cell", is_flag=True, help="Show every case, not only the worst of each output.")
@session_options
@json_option
def parity(
    bundles: tuple[Path, ...],
    experts: "tuple[ExpertSet, ...]",
    every_cell: bool,
    providers: tuple[str, ...],
    threads: int | None,
    as_json: bool,
) -> None:
    """Prove that bundles say what PyTorch said when they were made.

    Runs every graph on the inputs that the bundle carries, compares outputs and each expert's contribution
    with PyTorch's, prints the table, and exits 1 if an element is too far off.
    """
    from xadapter_export.parity import prove_bundle
    from xadapter_export.parity.table import parity_table

    reports = {
        str(bundle): prove_bundle(bundle, experts or None, providers=providers or None, num_threads=threads)
        for bundle in bundles
    }
    if as_json:
        print_json({bundle: json.loads(report.to_json()) for bundle, report in reports.items()})
    else:
        make_console().print(parity_table(reports, every_cell=every_cell))
    for report in reports.values():
        report.raise_if_failed()
    num_cells = sum(len(report.cells) for report in reports.values())
    click.echo(f"parity: passed, {num_cells} cells", err=True)
