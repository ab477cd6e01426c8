"""The README of a bundle."""

from collections.abc import Mapping

from xadapter_export.bundle.card_data import bundle_card_data
from xadapter_export.bundle.manifest import Agreement, Manifest
from xadapter_export.targets import CUDA_PROVIDER, ONNXRUNTIME, TARGETS
from xadapter_export.tasks import TASKS

FROM_SOURCE = (
    "If pip does not find the package, clone its repository and install that folder: `pip install "
    '"./xadapter-export[cpu]"`, with the extras of the line above.'
)


def model_card(manifest: Manifest, name: str, choices: Mapping[str, str]) -> str:
    """Writes the bundle's README: what it is, how to run it, what was proven, what the Hub reads of it.

    Args:
        manifest: The bundle's.
        name: Its title.
        choices: The variant that answers by kind of CPU; see ``runtime.choose.choices_by_kind``.
    """
    lines = [
        f"# {name}",
        "",
        *_summary(manifest, choices),
        *_graphs(manifest, choices),
        *_deployments(manifest),
        *_bank(manifest),
        "",
        "Weights are shared between the graphs. Inputs, outputs and hashes: `manifest.json`.",
        "",
    ]
    return bundle_card_data("\n".join(lines), name, manifest)


def run_flags(manifest: Manifest, choices: Mapping[str, str]) -> str:
    """Return the flags without which ``xad-run`` would find nothing to run on this bundle.

    Args:
        manifest: The bundle's.
        choices: As ``model_card``.
    """
    if manifest.is_for_gpu:
        return f" --provider {CUDA_PROVIDER}"
    if choices:
        return ""
    return f" --variant {manifest.variants[0].name}"


def _summary(manifest: Manifest, choices: Mapping[str, str]) -> list[str]:
    """What the bundle is, and how to run it."""
    sets = " | ".join(manifest.expert_sets)
    targets = [TARGETS[variant.target] for variant in manifest.variants]
    runtimes = {target.runtime for target in targets if target.runtime is not None}
    runtime = ONNXRUNTIME if ONNXRUNTIME in runtimes else next(iter(runtimes))
    requirement = runtime.requirements[-1 if manifest.is_for_gpu else 0]
    is_portable = any(target.provider is None for target in targets)
    return [
        f"An X-adapter bundle for {manifest.task} ({TASKS[manifest.task].says}): "
        f"a frozen {manifest.plm.family} PLM ({manifest.plm.source}) that reads a frozen CLIP "
        f"through a trained plug-in, as {'ONNX ' if runtime == ONNXRUNTIME else ''}graphs"
        f"{' of standard operators' if is_portable else ''}, opset {manifest.opset}. Expert sets: {sets}. "
        f"It runs with {runtime.name}; PyTorch is not needed.",
        "",
        "## Run",
        "",
        "```console",
        f'pip install "{requirement}"',
        f'xad-run . "{manifest.example}"{run_flags(manifest, choices)}',
        "xad-parity .",
        "```",
        "",
        FROM_SOURCE,
    ]


def _graphs(manifest: Manifest, choices: Mapping[str, str]) -> list[str]:
    """The graphs, what was proven or measured of each, and which answers where."""
    titles = ["experts", "file", "size (MB)", "parameters"]
    proven = any(variant.parity for variant in manifest.variants)
    titles += ["largest difference to PyTorch", "tolerance"] if proven else []
    lines = ["", "## Graphs", "", f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    for variant in manifest.variants:
        total = sum(manifest.expert_sets[variant.expert_set].component_parameters.values())
        files = " + ".join(f"`{file}`" for file in variant.graph_files)
        cells = [variant.expert_set, files, f"{variant.size_bytes / 1e6:.1f}", f"{total:,}"]
        if proof := variant.parity:
            cells += [f"{proof.max_abs:.1e}", f"{proof.atol:.0e} + {proof.rtol:.0e} x reference"]
        elif proven:
            cells += ["-", "-"]
        lines.append(f"| {' | '.join(cells)} |")
    lossy = [
        f"- experts {variant.expert_set}, {variant.name}: {describe_agreement(variant.agreement)}"
        for variant in manifest.variants
        if variant.agreement is not None
    ]
    if lossy:
        lines += ["", "Graphs in fewer bits than fp32, compared with it when they were exported:", "", *lossy]
    if choices:
        lines += ["", "By default, a session uses:", "", "| CPU | variant |", "|---|---|"]
        lines += [f"| {kind} | {variant} |" for kind, variant in choices.items()]
    return lines


def _deployments(manifest: Manifest) -> list[str]:
    """What was made for other runtimes, and what was refused."""
    if not manifest.deployments:
        return []
    lines = [
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
    refused = [f"- {made.name}: {line}" for made in manifest.deployments for line in made.refused]
    return [*lines, "", "Refused:", "", *refused] if refused else lines


def _bank(manifest: Manifest) -> list[str]:
    """Where the bank is searched, where that is outside the graphs, and what was swapped."""
    bank, lines = manifest.bank, []
    if bank is not None and bank.features is not None:
        lines += [
            "",
            f"The {bank.num_pictures:,} pictures are searched outside the graphs: exactly, or with "
            "an index, which `xad-bank index . -o index` makes and `xad-run . TEXT --index index` uses.",
        ]
    if bank is not None and (proven := bank.swapped_from) is not None:
        lines += [
            "",
            f"The bank was swapped: it has {bank.num_pictures:,} pictures, and had "
            f"{proven.num_pictures:,} others when the bundle was exported. What is proven or measured of "
            "sets with the V-expert was so with those.",
        ]
    return lines


def describe_agreement(agreement: Agreement) -> str:
    """Return in one line how a lossy variant compared with fp32, and what it was judged on."""
    same, interval, count = agreement.same_top, agreement.same_top_interval, agreement.num_answers
    if same is None:
        facts = [f"cosine {agreement.cosine:.4f} over {count} answers (gate {agreement.min_same_top:g})"]
    else:
        range95 = "" if interval is None else f"95 % interval {interval[0]:.1%} to {interval[1]:.1%}, "
        facts = [f"same top answer in {same:.1%} of {count} ({range95}gate {agreement.min_same_top:.1%})"]
        facts.append(f"cosine {agreement.cosine:.4f}")
    if agreement.accuracy_fp32 is not None and agreement.accuracy is not None:
        facts.append(
            f"{agreement.accuracy:.1%} of {agreement.num_questions} questions right, "
            f"fp32 {agreement.accuracy_fp32:.1%} (gate {agreement.max_points_lost:g} "
            f"point{'' if agreement.max_points_lost == 1 else 's'})"
        )
    if agreement.gate_lowered:
        facts.append("gate lowered by the user")
    if (judged := agreement.judged_on) is not None:
        questions = "" if judged.questions is None else f" and {judged.questions}"
        facts.append(f"judged on {judged.texts}{questions}, on {judged.processor}")
    return ", ".join(facts)
