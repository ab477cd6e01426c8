"""``xad parity``: check a bundle against PyTorch's outputs, with no PyTorch installed."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import click

from xadapter_export.bundle.model_card import describe_agreement
from xadapter_export.cli.command import (
    NamedPath,
    XadCommand,
    example,
    json_option,
    make_console,
    print_json,
    quiet_option,
    revision_option,
    session_options,
    verify_key_option,
)
from xadapter_export.cli.progress import QUICK_S, show_progress
from xadapter_export.errors import ParityError
from xadapter_export.experts import EXPERT_SETS
from xadapter_export.targets import all_targets

if TYPE_CHECKING:
    from rich.table import Table

    from xadapter_export.bundle.folder import Bundle
    from xadapter_export.bundle.manifest import ExpertSet, Variant
    from xadapter_export.parity import Check, ParityReport
    from xadapter_export.parity.everything import Finding


_SWAPPED_NOTE = (
    "note: the bank of {bundle} was swapped. Expert sets with the V-expert were checked with rows of the old "
    "bank, and the agreement of lossy variants was measured with the old bank. Here, lossy variants were "
    "compared with their outputs from the time of the swap."
)


@dataclass
class _Findings:
    """What was found of one bundle.

    Attributes:
        report: The proof of its fp32 variants, or of its engines; None where there is none to prove.
        lossy: Its lossy variants.
        checks: What they give here.
        swapped: Whether its bank was swapped.
    """

    report: "ParityReport | None"
    lossy: "list[Variant]" = field(default_factory=list)
    checks: "tuple[Check, ...]" = ()
    swapped: bool = False

    def checks_of(self, variant: "Variant") -> "list[Check]":
        """Return the checks of one lossy variant."""
        return [c for c in self.checks if (c.expert_set, c.variant) == (variant.expert_set, variant.name)]


@click.command(
    cls=XadCommand,
    epilog=example("xad-export --experts t --opset 17 -o bundle", "xad-parity bundle"),
)
@click.argument("bundles", metavar="BUNDLE...", type=NamedPath(), nargs=-1, required=True)
@click.option(
    "--experts",
    type=click.Choice(EXPERT_SETS),
    multiple=True,
    help="Expert set to check; may be repeated. [default: all]",
)
@click.option(
    "--variant",
    "variants",
    metavar="NAME",
    multiple=True,
    help="Variant to check, such as onnx-fp32; may be repeated. [default: all]",
)
@click.option(
    "--engine",
    type=click.Choice([target.name for target in all_targets() if target.is_engine]),
    help="Check the engines of this runtime on this machine's GPU, instead of the graphs. --variant then "
    "names the graphs that the engines were built from; these may be lossy.",
)
@click.option(
    "--every-cell", is_flag=True, help="Show every comparison, not only the worst one of each output."
)
@click.option(
    "--all",
    "everything",
    is_flag=True,
    help="Check hashes, signature, and every variant on this processor, and print one line each.",
)
@verify_key_option
@revision_option
@session_options
@quiet_option
@json_option
def parity(
    bundles: tuple[str, ...],
    experts: "tuple[ExpertSet, ...]",
    variants: tuple[str, ...],
    engine: str | None,
    every_cell: bool,
    everything: bool,
    verify_key: Path | None,
    revision: str | None,
    providers: tuple[str, ...],
    threads: int | None,
    quiet: bool,
    as_json: bool,
) -> None:
    """Check a bundle's outputs against PyTorch.

    BUNDLE is a folder, or the name of a bundle on the Hugging Face Hub: org/name.

    PyTorch is not needed: the bundle carries inputs and PyTorch's outputs for them. The command runs every
    fp32 graph on these inputs, compares the outputs and each expert's contribution with PyTorch's, and prints
    a table. It exits with 1 if any element is outside the tolerance.

    A lossy variant is compared with its own outputs from the time of export. The command exits with 1 if they
    differ on this processor, or if the variant's agreement with fp32 was never measured. A lossy engine is
    compared with its own graph in onnxruntime.

    If the bank was swapped, graphs with the V-expert are checked with rows of the old bank.
    """
    if everything:
        if experts or variants or engine or every_cell:
            raise click.UsageError("--all checks every variant; remove the options that choose some.")
        _check_everything(bundles, verify_key, revision, providers, threads, as_json=as_json)
        return
    if engine is not None and (providers or threads is not None):
        raise click.UsageError("--engine runs on this machine's GPU; remove --provider and --threads.")
    from xadapter_export.bundle.folder import read_bundle
    from xadapter_export.bundle.machine import read_machine
    from xadapter_export.bundle.signature import verify_signature
    from xadapter_export.parity import prove_engines

    found: dict[str, _Findings] = {}
    for name in bundles:
        bundle = read_bundle(name, revision=revision)
        if verify_key is not None:
            verify_signature(bundle, verify_key)
        if engine is None:
            found[name] = _examine(bundle, experts or None, variants, providers or None, threads, quiet=quiet)
        else:
            report = prove_engines(bundle.folder, engine, experts or None, variants=variants or None)
            found[name] = _Findings(report)
    reports = {bundle: of.report for bundle, of in found.items() if of.report is not None}
    if as_json:
        print_json({bundle: _to_json(of) for bundle, of in found.items()})
    else:
        _print_tables(found, every_cell=every_cell)
    for report in reports.values():
        report.raise_if_failed()
    for name, of in found.items():
        _require_the_same(name, of, str(read_machine()))
        if of.swapped:
            click.echo(_SWAPPED_NOTE.format(bundle=name), err=True)
    num_cells = sum(len(report.cells) for report in reports.values())
    num_lossy = sum(len(of.lossy) for of in found.values())
    num_cases = sum(len(of.checks) for of in found.values())
    proven = f"passed, {num_cells} comparisons" if reports else "no fp32 variant to check"
    recorded = f"; {num_lossy} lossy variants unchanged, {num_cases} cases" if num_lossy else ""
    click.echo(f"parity: {proven}{recorded}; on {read_machine()}", err=True)


def _check_everything(
    bundles: tuple[str, ...],
    key: Path | None,
    revision: str | None,
    providers: tuple[str, ...],
    threads: int | None,
    *,
    as_json: bool,
) -> None:
    """Print a line for each check of each bundle.

    Raises:
        ParityError: If one failed.
        As ``read_bundle``.
    """
    from xadapter_export.bundle.folder import read_bundle
    from xadapter_export.bundle.machine import read_machine
    from xadapter_export.parity.everything import check_everything

    console = make_console()
    found: dict[str, list[Finding]] = {}
    for name in bundles:
        bundle = read_bundle(name, revision=revision, verify=False)
        found[name] = []
        for finding in check_everything(bundle, key, providers=providers or None, num_threads=threads):
            found[name].append(finding)
            if not as_json:
                of_bundle = f"{name}: " if len(bundles) > 1 else ""
                line = f"{finding.verdict:<12} {of_bundle}{finding.check}: {finding.says}"
                console.print(line, style="bold red" if finding.verdict == "FAILED" else None, soft_wrap=True)
    if as_json:
        checks = {name: [asdict(finding) for finding in of] for name, of in found.items()}
        print_json({"processor": str(read_machine()), "bundles": checks})
    failed = [(name, finding) for name, of in found.items() for finding in of if finding.verdict == "FAILED"]
    if failed:
        total = sum(len(of) for of in found.values())
        what = f"{len(failed)} of {total} checks failed"
        raise ParityError(what, where=f"{failed[0][0]}, {failed[0][1].check}", got=failed[0][1].says)
    click.echo(f"parity: nothing failed; on {read_machine()}", err=True)


def _print_tables(found: dict[str, _Findings], *, every_cell: bool) -> None:
    """Print what was compared with PyTorch, and what lossy variants give."""
    from xadapter_export.parity.table import parity_table

    console = make_console()
    reports = {bundle: of.report for bundle, of in found.items() if of.report is not None}
    if reports:
        console.print(parity_table(reports, every_cell=every_cell))
    if any(of.lossy for of in found.values()):
        console.print(_lossy_table(found))


def _examine(
    bundle: "Bundle",
    experts: "tuple[ExpertSet, ...] | None",
    variants: tuple[str, ...],
    providers: tuple[str, ...] | None,
    threads: int | None,
    *,
    quiet: bool,
) -> _Findings:
    """Prove the fp32 variants of a bundle, and check its lossy ones.

    Raises:
        As ``prove_bundle`` and ``check_lossy``.
    """
    from xadapter_export.parity import TOLERANCES, check_lossy, prove_bundle
    from xadapter_export.parity.prove import runs_on

    folder, manifest = bundle.folder, bundle.manifest
    held = [v for name in experts or manifest.expert_sets for v in manifest.variants_of(name)]
    lossy = [v for v in held if v.precision not in TOLERANCES and (not variants or v.name in variants)]
    # What is not among the lossy ones is proven, or there is no such variant.
    exact = [name for name in variants or [v.name for v in held] if name not in {v.name for v in lossy}]
    total = sum(runs_on(v, providers) for v in held if not variants or v.name in variants)
    done: list[Variant] = []
    report: ParityReport | None = None
    checks: tuple[Check, ...] = ()
    with show_progress(quiet=quiet, unit="graph", line="{done} of {total} graphs{note}", after_s=QUICK_S) as (
        say,
        count,
    ):

        def on_variant(variant: "Variant") -> None:
            done.append(variant)
            count(len(done), total)

        say("check")
        if exact:
            report = prove_bundle(
                folder,
                experts,
                variants=exact if variants else None,
                providers=providers,
                num_threads=threads,
                verify=False,  # just done
                on_variant=on_variant,
            )
        if lossy:
            checks = check_lossy(
                folder,
                experts,
                variants=variants or None,
                providers=providers,
                num_threads=threads,
                verify=False,
                on_variant=on_variant,
            )
    return _Findings(
        report, lossy, checks, manifest.bank is not None and manifest.bank.swapped_from is not None
    )


def _to_json(of: _Findings) -> dict[str, object]:
    """Return the report, if there is one, and what each lossy variant was measured to say, and says here."""
    from xadapter_export.bundle.machine import read_machine

    fields = {} if of.report is None else json.loads(of.report.to_json())
    measured = [
        {
            "expert_set": variant.expert_set,
            "variant": variant.name,
            "agreement": variant.agreement and variant.agreement.model_dump(mode="json"),
            "checks": [asdict(check) for check in of.checks_of(variant)],
        }
        for variant in of.lossy
    ]
    return {**fields, "processor": str(read_machine()), "lossy": measured}


def _lossy_table(found: dict[str, _Findings]) -> "Table":
    from rich.table import Table

    from xadapter_export.parity.recorded import describe_checks

    table = Table(
        caption="agreement: measured against fp32 at export; here: root mean square of the differences from "
        "the outputs recorded at export, and the limit",
        show_edge=False,
    )
    several = len(found) > 1
    for column in [*(["bundle"] if several else []), "experts", "variant", "agreement with fp32", "here"]:
        table.add_column(column)
    for bundle, of in found.items():
        for variant in of.lossy:
            agreement, checks = variant.agreement, of.checks_of(variant)
            measured = "NOT MEASURED" if agreement is None else describe_agreement(agreement)
            is_right = agreement is not None and all(check.passed for check in checks)
            table.add_row(
                *([bundle] if several else []),
                variant.expert_set,
                variant.name,
                measured,
                describe_checks(checks),
                style=None if is_right else "bold red",
            )
    return table


def _require_agreement(bundle: str, of: _Findings) -> None:
    """Refuse a lossy variant that nobody measured.

    Raises:
        ParityError: If there is one.
    """
    for variant in of.lossy:
        if variant.agreement is None:
            raise ParityError(
                "the agreement of a lossy variant with fp32 was never measured",
                where=f"{bundle}, {variant.name}, experts {variant.expert_set}",
                hint="export the bundle again",
            )


def _require_the_same(bundle: str, of: _Findings, processor: str) -> None:
    """Refuse a lossy variant that nobody measured, or that gives here something else than at export.

    Raises:
        ParityError: If there is one.
    """
    _require_agreement(bundle, of)
    for check in of.checks:
        if not check.passed:
            raise ParityError(
                "a lossy variant gives other outputs here than at export",
                where=f"{bundle}, {check.variant}, experts {check.expert_set}, {processor}",
                expected=check.expected,
                got=check.got,
            )
