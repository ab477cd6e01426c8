"""``xad parity``: prove a bundle, with no PyTorch installed."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import click

from xadapter_export.bundle.model_card import describe_agreement
from xadapter_export.cli.command import (
    EXPERT_SETS,
    XadCommand,
    example,
    json_option,
    make_console,
    print_json,
    session_options,
)
from xadapter_export.errors import ParityError

if TYPE_CHECKING:
    from rich.table import Table

    from xadapter_export.bundle.manifest import ExpertSet, Variant
    from xadapter_export.parity import ParityReport


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
@click.option(
    "--variant",
    "variants",
    metavar="NAME",
    multiple=True,
    help="fp32 variant to prove, such as onnx-fp32; may be repeated. [default: all]",
)
@click.option(
    "--engine",
    type=click.Choice(("tensorrt-rtx", "tensorrt")),
    help="Prove the engines of this runtime instead of the graphs, on the GPU here; --variant then "
    "names the graphs that they were built from, lossy ones too.",
)
@click.option("--every-cell", is_flag=True, help="Show every case, not only the worst of each output.")
@session_options
@json_option
def parity(
    bundles: tuple[Path, ...],
    experts: "tuple[ExpertSet, ...]",
    variants: tuple[str, ...],
    engine: "Literal['tensorrt-rtx', 'tensorrt'] | None",
    every_cell: bool,
    providers: tuple[str, ...],
    threads: int | None,
    as_json: bool,
) -> None:
    """Prove that bundles say what PyTorch said when they were made.

    Runs every fp32 graph on the inputs that the bundle carries, compares outputs and each expert's
    contribution with PyTorch's, prints the table, and exits 1 if an element is too far off. Of a lossy
    variant it prints what it was measured to say when it was made, and exits 1 if it was not measured.
    A lossy engine is compared with its own graph in onnxruntime.

    Where the bank was swapped, graphs with the V-expert are compared with rows of the old bank in its place.
    """
    if engine is not None and (providers or threads is not None):
        raise click.UsageError("--engine runs on the GPU here; leave --provider and --threads out.")
    from xadapter_export.bundle.folder import read_bundle
    from xadapter_export.parity import TOLERANCES, prove_bundle, prove_engines
    from xadapter_export.parity.table import parity_table

    reports: dict[str, ParityReport] = {}
    lossy: dict[str, list[Variant]] = {}
    swapped: list[Path] = []
    for bundle in bundles:
        if engine is not None:
            lossy[str(bundle)] = []
            reports[str(bundle)] = prove_engines(bundle, engine, experts or None, variants=variants or None)
            continue
        manifest = read_bundle(bundle).manifest
        swapped += [bundle] if manifest.bank is not None and manifest.bank.swapped_from is not None else []
        held = [v for name in experts or manifest.expert_sets for v in manifest.variants_of(name)]
        lossy[str(bundle)] = [v for v in held if v.precision not in TOLERANCES and not variants]
        if len(lossy[str(bundle)]) < len(held):
            reports[str(bundle)] = prove_bundle(
                bundle,
                experts or None,
                variants=variants or None,
                providers=providers or None,
                num_threads=threads,
                verify=False,  # just done
            )
    if as_json:
        print_json({bundle: _to_json(reports.get(bundle), lossy[bundle]) for bundle in lossy})
    else:
        console = make_console()
        if reports:
            console.print(parity_table(reports, every_cell=every_cell))
        if any(lossy.values()):
            console.print(_agreement_table(lossy))
    for report in reports.values():
        report.raise_if_failed()
    _require_agreement(lossy)
    for bundle in swapped:
        click.echo(
            f"note: the bank of {bundle} was swapped; sets with the V-expert were proven with rows of the "
            "bank that it was exported with, and lossy variants measured with that one",
            err=True,
        )
    num_cells = sum(len(report.cells) for report in reports.values())
    num_lossy = sum(len(held) for held in lossy.values())
    proven = f"passed, {num_cells} cells" if reports else "no fp32 variant to prove"
    measured = f"; lossy variants measured when they were made: {num_lossy}" if num_lossy else ""
    click.echo(f"parity: {proven}{measured}", err=True)


def _to_json(report: "ParityReport | None", lossy: "list[Variant]") -> dict[str, object]:
    """Return the report, if there is one, and what each lossy variant was measured to say."""
    fields = {} if report is None else json.loads(report.to_json())
    measured = [
        {
            "expert_set": variant.expert_set,
            "variant": variant.name,
            "agreement": variant.agreement and variant.agreement.model_dump(mode="json"),
        }
        for variant in lossy
    ]
    return {**fields, "lossy": measured}


def _agreement_table(lossy: "dict[str, list[Variant]]") -> "Table":
    from rich.table import Table

    table = Table(caption="measured against fp32 when the bundle was made", show_edge=False)
    for column in ("bundle", "experts", "variant", "agreement with fp32"):
        table.add_column(column)
    for bundle, variants in lossy.items():
        for variant in variants:
            agreement = variant.agreement
            measured = "NOT MEASURED" if agreement is None else describe_agreement(agreement)
            table.add_row(
                bundle,
                variant.expert_set,
                variant.name,
                measured,
                style="bold red" if agreement is None else None,
            )
    return table


def _require_agreement(lossy: "dict[str, list[Variant]]") -> None:
    """Refuse a lossy variant that nobody measured.

    Raises:
        ParityError: If there is one.
    """
    for bundle, variants in lossy.items():
        for variant in variants:
            if variant.agreement is None:
                raise ParityError(
                    "a lossy variant was not measured against fp32",
                    where=f"{bundle}, {variant.name}, experts {variant.expert_set}",
                    mend="export the bundle again",
                )
