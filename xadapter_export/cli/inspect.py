"""``xad inspect``: show what is in a bundle."""

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from xadapter_export.cli.command import XadCommand, example, json_option, make_console, print_json

if TYPE_CHECKING:
    from rich.table import Table

    from xadapter_export.bundle.manifest import Manifest, TensorSpec

MIB = 1024 * 1024


@click.command(
    cls=XadCommand,
    epilog=example("xad-export --experts t --opset 17 -o bundle", "xad-inspect bundle"),
)
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option(
    "--verify/--no-verify", default=True, show_default=True, help="Compare every file with its hash."
)
@json_option
def inspect(bundle: Path, verify: bool, as_json: bool) -> None:
    """Show what is in a bundle: expert sets, inputs and outputs, sizes, parity, what made it."""
    from xadapter_export.bundle.folder import read_bundle

    manifest = read_bundle(bundle, verify=verify).manifest
    if as_json:
        print_json(json.loads(manifest.to_json()))
        return
    console = make_console()
    for name, value in _facts(manifest, verify=verify).items():
        console.print(f"{name:<12}{value}")
    for table in (_graphs(manifest), _tensors(manifest), _parameters(manifest)):
        console.print()
        console.print(table)


def _facts(manifest: "Manifest", *, verify: bool) -> dict[str, str]:
    plm, clip, bank = manifest.plm, manifest.clip, manifest.bank
    size_bytes = sum(entry.size_bytes for entry in manifest.files.values())
    checked = "hashes verified" if verify else "hashes not verified"
    facts = {
        "task": manifest.task,
        "checkpoint": f"{manifest.checkpoint.source} (SHA-256 {manifest.checkpoint.sha256[:12]})",
        "PLM": f"{plm.source} ({plm.family}, {plm.hidden_size} wide, up to {plm.max_seq} tokens)",
        "opset": str(manifest.opset),
        "files": f"{len(manifest.files)}, {size_bytes / MIB:.1f} MiB, {checked}",
        "made with": ", ".join(f"{name} {version}" for name, version in manifest.created_with.items()),
    }
    if clip is not None:
        facts["CLIP"] = (
            f"{clip.source} (text tower {clip.text_width} wide, up to {clip.context_length} tokens)"
        )
    if bank is not None:
        facts["bank"] = f"{bank.num_pictures} pictures, {bank.retrieval} retrieval, k = {bank.k}"
    if manifest.labels is not None:
        facts["labels"] = ", ".join(manifest.labels)
    if manifest.candidates is not None:
        facts["candidates"] = ", ".join(candidate.word for candidate in manifest.candidates)
    return facts


def _graphs(manifest: "Manifest") -> "Table":
    table = _table("experts", "precision", "file", "MiB with weights", "parity", "max abs")
    for variant in manifest.variants:
        proof = variant.parity
        table.add_row(
            variant.expert_set + (" (default)" if variant.expert_set == manifest.default_expert_set else ""),
            variant.precision,
            variant.file,
            f"{variant.size_bytes / MIB:.1f}",
            "not proven"
            if proof is None
            else f"{'passed' if proof.passed else 'FAILED'}, {proof.num_cells} cells",
            "-" if proof is None else f"{proof.max_abs:.1e}",
        )
    return table


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
