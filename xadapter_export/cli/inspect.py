"""``xad inspect``: show what is in a bundle."""

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from xadapter_export.cli.command import (
    NamedPath,
    XadCommand,
    example,
    json_option,
    make_console,
    print_json,
    revision_option,
    verify_key_option,
)
from xadapter_export.tasks import TASKS

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from xadapter_export.bundle.folder import Bundle
    from xadapter_export.bundle.manifest import ExpertSet, Manifest, Optimization, TensorSpec, Variant

MB = 1_000_000
MOST_FILES = 4  # of a deployment; the manifest has all


@click.command(
    cls=XadCommand,
    epilog=example("xad-export --experts t --opset 17 -o bundle", "xad-inspect bundle"),
)
@click.argument("bundle", type=NamedPath())
@click.option(
    "--verify/--no-verify", default=True, show_default=True, help="Check every file against its hash."
)
@click.option(
    "--verbose", is_flag=True, help="Also show files, optimizations, inputs, outputs and parameters."
)
@click.option(
    "--time", "timed", is_flag=True, help="Time the variants on this machine, about 2 s per expert set."
)
@click.option(
    "--bom",
    metavar="FILE",
    type=NamedPath(path_type=Path),
    help="Write the bundle's parts, with hashes and licenses, as a CycloneDX ML-BOM (JSON).",
)
@click.option(
    "--license",
    "licenses",
    metavar="PART=SPDX",
    multiple=True,
    help="License of a part in --bom, such as plm=Apache-2.0; also clip, bank, plug-in and bundle; may be "
    "repeated.",
)
@verify_key_option
@revision_option
@json_option
def inspect(
    bundle: str,
    verify: bool,
    verbose: bool,
    timed: bool,
    bom: Path | None,
    licenses: tuple[str, ...],
    verify_key: Path | None,
    revision: str | None,
    as_json: bool,
) -> None:
    """Show a bundle's variants, their sizes and how they were checked.

    BUNDLE is a folder, or the name of a bundle on the Hugging Face Hub: org/name. With --no-verify, only its
    manifest is downloaded.
    """
    if licenses and bom is None:
        raise click.UsageError("--license is for --bom; add it.")
    from xadapter_export.bundle.folder import read_bundle

    found = read_bundle(bundle, revision=revision, verify=verify, on_demand=not verify)
    manifest = found.manifest
    signed = _describe_signature(found, verify_key, verify=verify)
    if bom is not None:
        _write_bom(bom, found, licenses)
    speeds = _time(bundle, revision, manifest) if timed else {}
    if as_json:
        more = {"signature": signed, **({"timed": speeds} if timed else {})}
        print_json({**json.loads(manifest.to_json()), **more})
        return
    tables = [_variants(manifest, verbose=verbose), _speeds(speeds), _choices(manifest)]
    tables += [_deployments(manifest, verbose=verbose), _refused(manifest)]
    if verbose:
        tables += [_optimizations(manifest), _tensors(manifest), _parameters(manifest)]
    console = make_console()
    _print_facts(console, _facts(manifest, verify=verify, timed=timed) | {"signed": signed})
    for table in tables:
        if table.row_count:
            console.print()
            console.print(table)
    console.print()
    _print_facts(console, _sources(manifest, verbose=verbose))


def _describe_signature(bundle: "Bundle", key: Path | None, *, verify: bool) -> str:
    """Return who signed a bundle, and whether that was verified.

    Raises:
        SignatureError: If the signature is of other files; with a key, as ``verify_signature``.
    """
    from xadapter_export.bundle.signature import check_signed_files, read_signature, verify_signature

    if key is not None:
        return f"verified, with {verify_signature(bundle, key).signer}"
    if not verify:
        return "not read"
    if (signature := read_signature(bundle)) is None:
        return "no"
    check_signed_files(bundle, signature)
    return f"not verified (use --verify-key), with {signature.signer}"


def _write_bom(path: Path, bundle: "Bundle", licenses: tuple[str, ...]) -> None:
    """Write the ML-BOM of a bundle, and say of which parts no license is known."""
    from xadapter_export.bundle.bom import make_bom
    from xadapter_export.bundle.staging import staged_file

    if path.resolve().is_relative_to(bundle.folder.resolve()):
        raise click.UsageError("--bom would add a file to the bundle; write it to another folder.")
    bom, unknown = make_bom(bundle, dict(entry.partition("=")[::2] for entry in licenses))
    with staged_file(path) as file:
        file.write_text(bom, encoding="utf-8")
    if unknown:
        click.echo(f"note: no license known for {', '.join(unknown)}; add it with --license", err=True)


def _print_facts(console: "Console", facts: "dict[str, str]") -> None:
    for name, value in facts.items():
        console.print(f"{name:<12}{value}")


def _facts(manifest: "Manifest", *, verify: bool, timed: bool) -> dict[str, str]:
    size_bytes = sum(entry.size_bytes for entry in manifest.files.values())
    checked = "hashes verified" if verify else "hashes not verified"
    facts = {
        "task": f"{manifest.task}: {TASKS[manifest.task].says}",
        "files": f"{len(manifest.files)}, {size_bytes / MB:.1f} MB, {checked}",
    }
    if not timed:
        facts["speed"] = "not measured here; add --time"
    if manifest.labels is not None:
        facts["labels"] = ", ".join(manifest.labels)
    if manifest.candidates is not None:
        facts["candidates"] = ", ".join(candidate.word for candidate in manifest.candidates)
    return facts


def _sources(manifest: "Manifest", *, verbose: bool) -> dict[str, str]:
    """What the bundle was made from."""
    plm, clip, bank, checkpoint = manifest.plm, manifest.clip, manifest.bank, manifest.checkpoint
    nulls = f", {checkpoint.null_rows} null rows alongside each memory" if checkpoint.null_rows else ""
    facts = {
        "checkpoint": f"{checkpoint.source} (SHA-256 {checkpoint.sha256[:12]})",
        "layer": f"{checkpoint.layer}{nulls}",
        "PLM": f"{plm.source} ({plm.family}, {plm.hidden_size} wide, up to {plm.max_seq} tokens)",
    }
    if clip is not None:
        facts["CLIP"] = (
            f"{clip.source} (text tower {clip.text_width} wide, up to {clip.context_length} tokens)"
        )
    if bank is not None:
        facts["bank"] = f"{bank.num_pictures} pictures, {bank.retrieval} retrieval, k = {bank.k}"
        if bank.swapped_from is not None:
            facts["bank"] += (
                f"; it replaced the {bank.swapped_from.num_pictures} that the bundle was exported with"
            )
    if verbose:
        facts["opset"] = str(manifest.opset)
        facts["made with"] = ", ".join(f"{name} {version}" for name, version in manifest.created_with.items())
    return facts


def _variants(manifest: "Manifest", *, verbose: bool) -> "Table":
    table = _table("experts", "variant", "MB", *(["file"] if verbose else []), "check")
    for variant in manifest.variants:
        table.add_row(
            variant.expert_set + (" (default)" if variant.expert_set == manifest.default_expert_set else ""),
            variant.name,
            f"{variant.size_bytes / MB:.1f}",
            *([variant.file] if verbose else []),
            _proof(variant, verbose=verbose),
        )
    return table


def _time(bundle: str, revision: str | None, manifest: "Manifest") -> dict[str, str]:
    """What the variants of each expert set take here for one text."""
    from xadapter_export.runtime.session import XAdapterSession

    def time(experts: "ExpertSet") -> str:
        return XAdapterSession.load(
            bundle, revision=revision, experts=experts, variant="fastest"
        ).variant_reason

    return {experts: time(experts) for experts in manifest.expert_sets}


def _speeds(speeds: "dict[str, str]") -> "Table":
    table = _table("experts", "one text on this machine")
    for experts, measured in speeds.items():
        table.add_row(experts, measured.removeprefix("measured: "))
    return table


def _choices(manifest: "Manifest") -> "Table":
    from xadapter_export.runtime.choose import choices_of

    table = _table("CPU", "variant used by default")
    for kind, variant in choices_of(manifest).items():
        table.add_row(kind, variant)
    return table


def _proof(variant: "Variant", *, verbose: bool) -> str:
    from xadapter_export.bundle.model_card import describe_agreement

    if variant.agreement is not None:
        whole = describe_agreement(variant.agreement)
        return whole if verbose else whole.partition(" (")[0]
    proof = variant.parity
    if proof is None:
        return "not checked"
    verdict = "passed" if proof.passed else "FAILED"
    return f"{verdict}, {proof.num_cells} comparisons, max abs {proof.max_abs:.1e}"


def _deployments(manifest: "Manifest", *, verbose: bool) -> "Table":
    table = _table("experts", "deployment", "made from", "MB", *(["files", "check with"] if verbose else []))
    for made in manifest.deployments:
        more = [_shorten(made.files), made.prove_with or "checked on export"] if verbose else []
        table.add_row(made.expert_set, made.name, made.source, f"{made.size_bytes / MB:.1f}", *more)
    return table


def _shorten(files: tuple[str, ...]) -> str:
    return "\n".join(files if len(files) <= MOST_FILES else (*files[: MOST_FILES - 1], "..."))


def _refused(manifest: "Manifest") -> "Table":
    table = _table("deployment", "refused")
    for made in manifest.deployments:
        for line in made.refused:
            table.add_row(made.name, line)
    return table


def _optimizations(manifest: "Manifest") -> "Table":
    table = _table("experts", "variant", "optimization", "saved", "lossless")
    for variant in manifest.variants:
        for step in variant.optimizations:
            lossless = "yes" if step.lossless else "no"
            table.add_row(variant.expert_set, variant.name, step.name, _saved(step), lossless)
    return table


def _saved(step: "Optimization") -> str:
    share = f", {1 - step.after / step.before:.1%} less" if step.before else ""
    return f"{step.unit} {step.before:,} to {step.after:,}{share}"


def _tensors(manifest: "Manifest") -> "Table":
    table = _table("experts", "inputs", "outputs")
    for name, spec in manifest.expert_sets.items():
        table.add_row(name, "\n".join(map(_describe, spec.inputs)), "\n".join(map(_describe, spec.outputs)))
        table.add_section()
    return table


def _describe(tensor: "TensorSpec") -> str:
    return f"{tensor.name} ({', '.join(map(str, tensor.axes))}) {tensor.dtype}"


def _parameters(manifest: "Manifest") -> "Table":
    components = list(
        dict.fromkeys(c for spec in manifest.expert_sets.values() for c in spec.component_parameters)
    )
    table = _table("parameters", *components)
    for name, spec in manifest.expert_sets.items():
        table.add_row(name, *(f"{spec.component_parameters.get(component, 0):,}" for component in components))
    return table


def _table(*columns: str) -> "Table":
    from rich.table import Table

    return Table(*columns, show_edge=False)
