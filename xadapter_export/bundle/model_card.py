"""The README of a bundle."""

from collections.abc import Mapping

from xadapter_export.bundle.cuda import CUDA_PROVIDER
from xadapter_export.bundle.manifest import Manifest


def model_card(manifest: Manifest, name: str, choices: Mapping[str, str]) -> str:
    """Writes the bundle's README: what it is, how to run it, what was proven.

    Args:
        manifest: The bundle's.
        name: Its title.
        choices: The variant that answers by kind of CPU; see ``runtime.choose.choices_by_kind``.
    """
    sets = " | ".join(manifest.expert_sets)
    is_portable = any(variant.target == "onnx" for variant in manifest.variants)
    extra, provider = ("gpu", f" --provider {CUDA_PROVIDER}") if manifest.is_for_gpu else ("cpu", "")
    lines = [
        f"# {name}",
        "",
        f"An X-adapter bundle for {manifest.task}: "
        f"a frozen {manifest.plm.family} PLM ({manifest.plm.source}) that reads a frozen CLIP "
        f"through a trained plug-in, as ONNX graphs{' of standard operators' if is_portable else ''}, "
        f"opset {manifest.opset}. Expert sets: {sets}. It runs with onnxruntime; PyTorch is not needed.",
        "",
        "## Run",
        "",
        "```console",
        f'pip install "xadapter-export[{extra}]"',
        f'xad-run . "{_example(manifest)}"{provider}',
        "xad-parity .",
        "```",
        "",
        "## Graphs",
        "",
        "| experts | file | size (MB) | parameters | largest difference to PyTorch | tolerance |",
        "|---|---|---|---|---|---|",
    ]
    for variant in manifest.variants:
        total = sum(manifest.expert_sets[variant.expert_set].component_parameters.values())
        proof = variant.parity
        measured = "-" if proof is None else f"{proof.max_abs:.1e}"
        rule = "-" if proof is None else f"{proof.atol:.0e} + {proof.rtol:.0e} x reference"
        size = f"{variant.size_bytes / 1e6:.1f}"
        files = " + ".join(f"`{file}`" for file in variant.graph_files)
        lines.append(f"| {variant.expert_set} | {files} | {size} | {total:,} | {measured} | {rule} |")
    if choices:
        lines += ["", "Unless another is named, a session takes:", "", "| CPU | variant |", "|---|---|"]
        lines += [f"| {kind} | {variant} |" for kind, variant in choices.items()]
    if manifest.deployments:
        lines += [
            "",
            "## For other runtimes",
            "",
            "| runtime | experts | made from | files | size (MB) | proof |",
            "|---|---|---|---|---|---|",
        ]
    for made in manifest.deployments:
        shown = "proven" if made.prove_with is None else f"`{made.prove_with}`"
        size = f"{made.size_bytes / 1e6:.1f}"
        row = (made.name, made.expert_set, made.source, str(len(made.files)), size, shown)
        lines.append(f"| {' | '.join(row)} |")
    refused = [f"- {made.target}: {line}" for made in manifest.deployments for line in made.refused]
    if refused:
        lines += ["", "Refused:", "", *refused]
    if manifest.bank is not None and manifest.bank.features is not None:
        lines += [
            "",
            f"The {manifest.bank.num_pictures:,} pictures are searched outside the graphs: exactly, or with "
            "an index, which `xad-bank index . -o index` makes and `xad-run . TEXT --index index` uses.",
        ]
    if manifest.bank is not None and (proven := manifest.bank.swapped_from) is not None:
        lines += [
            "",
            f"The bank was swapped: it has {manifest.bank.num_pictures:,} pictures, and had "
            f"{proven.num_pictures:,} others when the bundle was exported. What is proven or measured of "
            "sets with the V-expert was so with those.",
        ]
    lines += ["", "Weights are shared between the graphs. Inputs, outputs and hashes: `manifest.json`.", ""]
    return "\n".join(lines)


def _example(manifest: Manifest) -> str:
    if manifest.task == "fill-mask":
        return f"The color of a banana is {manifest.plm.mask_token}."
    return "A banana is lying on the table."
