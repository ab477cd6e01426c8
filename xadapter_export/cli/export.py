"""``xad export``: turn a checkpoint into a bundle."""

import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Unpack

import click

from xadapter_export.bundle.folder import MANIFEST_NAME
from xadapter_export.bundle.model_card import run_flags
from xadapter_export.bundle.opsets import check_opset
from xadapter_export.bundle.staging import check_replaceable, resolved
from xadapter_export.cli.command import (
    NamedPath,
    XadCommand,
    as_typed,
    example,
    json_option,
    make_console,
    print_json,
    quiet_option,
    sign_option,
)
from xadapter_export.cli.progress import show_progress
from xadapter_export.errors import UnsupportedError, import_extra
from xadapter_export.experts import EXPERT_SETS
from xadapter_export.exporters.request import (
    RETRIEVALS,
    STEPS,
    ExportOptions,
    ExportRequest,
    default_target,
)
from xadapter_export.targets import PRECISIONS, TARGETS, all_targets, all_variants
from xadapter_export.tasks import TASKS

if TYPE_CHECKING:
    from xadapter_export.bundle.manifest import ExpertSet, Variant
    from xadapter_export.exporters.pipeline import ExportResult


def _check_opset(_ctx: click.Context, _param: click.Parameter, opset: int) -> int:
    try:
        check_opset(opset)
    except UnsupportedError as error:
        raise click.BadParameter(str(error)) from error
    return opset


def _read_candidates(_ctx: click.Context, _param: click.Parameter, value: str | None) -> list[str] | None:
    """Reads ``yellow,green,red``, or a file with one word per line."""
    if value is None:
        return None
    path = Path(value)
    try:
        words = path.read_text(encoding="utf-8").split("\n") if path.is_file() else value.split(",")
    except UnicodeDecodeError as error:
        raise click.BadParameter(f"{value} is not a UTF-8 text file with one word per line.") from error
    except OSError:  # a list of words that is too long for a file name, or a file that cannot be read
        words = value.split(",")
    if words == [value] and (path.suffix or len(path.parts) > 1):
        raise click.BadParameter(f"cannot read the file {value}; give words separated by commas, or a file.")
    return [word.strip() for word in words if word.strip()]


def _read_config(ctx: click.Context, _param: click.Parameter, path: Path | None) -> None:
    """Makes the settings of a file the defaults of this call."""
    if path is None:
        return
    try:
        settings = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise click.BadParameter(f"{path} is not a TOML file of settings: {error}.") from error
    flags = {
        option.removeprefix("--").replace("-", "_"): param
        for param in ctx.command.params
        if isinstance(param, click.Option) and param.expose_value
        for option in param.opts
        if option.startswith("--")
    }
    if unknown := sorted(set(settings) - set(flags)):
        raise click.BadParameter(
            f"{path} has unknown settings: {', '.join(unknown)}; known are {', '.join(sorted(flags))}."
        )
    if isinstance(words := settings.get("candidates"), list):
        settings["candidates"] = ",".join(map(str, words))
    for key, value in settings.items():
        if isinstance(value, dict) or (isinstance(value, list) and not flags[key].multiple):
            raise click.BadParameter(f"{path}: {key} takes one value, not {value!r}.")
    ctx.default_map = {
        str(flags[key].name): [value] if flags[key].multiple and not isinstance(value, list) else value
        for key, value in settings.items()
    }


def _default_targets() -> str:
    """Returns who gets what where no target is named, ``onnx for fp32 and fp16, cpu for int8 and int4``."""
    given: dict[str, list[str]] = {}
    for precision in PRECISIONS:
        given.setdefault(default_target(precision), []).append(precision)
    return ", ".join(f"{target} for {' and '.join(takes)}" for target, takes in given.items())


@click.command(
    cls=XadCommand,
    epilog=example(
        "xad-export --experts t --opset 17",
        "xad-export --experts vt --experts none -o bundle --candidates yellow,green,red",
        "xad-export --variant onnx-fp32 --variant cpu-int8 -o bundle-small",
    ),
)
@click.argument("checkpoint", default="builtin")
@click.option(
    "--config",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    is_eager=True,
    expose_value=False,
    callback=_read_config,
    help="TOML file with settings, named like the flags but with _ for -. A flag with a value overrides the "
    "file; a switch that the file turns on stays on.",
)
@click.option(
    "--experts",
    type=click.Choice(EXPERT_SETS),
    multiple=True,
    help="Expert set to export; may be repeated. The sets share their weights, and the first is the default. "
    "[default: all in the checkpoint]",
)
@click.option(
    "--opset", type=int, default=17, callback=_check_opset, show_default=True, help="ONNX opset, 17 to 21."
)
@click.option(
    "-o",
    "--output",
    type=NamedPath(path_type=Path),
    help="Folder for the bundle. [default: bundle-<experts>]",
)
@click.option(
    "--task",
    type=click.Choice(tuple(TASKS)),
    help="Task of the graphs. [default: the checkpoint's task]",
)
@click.option(
    "--candidates",
    callback=_read_candidates,
    metavar="WORDS|FILE",
    help="Words that fill-mask may predict: separated by commas, or a file with one per line. The MLM head "
    "is reduced to them.",
)
@click.option(
    "--max-seq", type=click.IntRange(min=1), help="Longest input in tokens. [default: the PLM's limit]"
)
@click.option(
    "--variant",
    "variants",
    type=click.Choice(tuple(all_variants())),
    multiple=True,
    metavar="TARGET-PRECISION",
    help="Variant to export, such as cpu-int8 or tensorrt-rtx-fp16; may be repeated. --precision and "
    "--target add more variants. An unknown name prints the full list. [default: onnx-fp32]",
)
@click.option(
    "--precision",
    "precisions",
    type=click.Choice(PRECISIONS),
    multiple=True,
    help="Shorthand for several variants: this precision for every --target that supports it; may be "
    "repeated. int8 and int4 are for CPUs, fp16 is for GPUs. int8 is made for onnx only if no other target "
    "supports it, and for TensorRT only if no CPU target does or TensorRT has no other precision. [default: "
    "fp32]",
)
@click.option(
    "--target",
    "targets",
    type=click.Choice(tuple(TARGETS)),
    multiple=True,
    help="Runtime to export for; may be repeated. "
    f"{'; '.join(f'{t.name}: {t.says}' for t in all_targets())}. "
    f"[default: {_default_targets()}]",
)
@click.option(
    "--profile",
    "ranges",
    multiple=True,
    metavar="RANGES",
    help='Input sizes that engines are built for, such as "batch=1..8 seq=8..128"; also masks and clip_seq. '
    "For triton, the largest batch. [default: depends on the task, up to the longest text]",
)
@click.option(
    "--compute-capability",
    "compute_capabilities",
    multiple=True,
    metavar="SM",
    help="NVIDIA GPU to build an engine for, such as sm89; may be repeated, for one engine each. sm86+sm89 "
    "builds one engine for both; current is this machine's GPU. [default: one engine for sm75 and later]",
)
@click.option(
    "--calibration",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Texts for calibrating lossy variants and comparing them with fp32: one per line, or CSV, TSV or "
    "JSONL with a column sentence or text. Use texts like those the model will read. [default: the "
    "checkpoint's, else everyday sentences]",
)
@click.option(
    "--evaluate",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Questions with known answers for evaluating lossy variants: labeled texts for a classifier; for "
    "fill-mask, colors in the format of Memory Colors or ColorTerms. [default: the built-in checkpoint's "
    "own, else none]",
)
@click.option(
    "--min-agreement",
    type=click.FloatRange(0, 1),
    help="Reject a lossy variant whose top answer equals fp32's less often than this; for embeddings and "
    "regression, one whose mean cosine is lower. [default: fp16 0.999, int8 0.99, int4 0.97; cosine for fp16 "
    "0.9999]",
)
@click.option(
    "--max-points-lost",
    type=click.FloatRange(0, 100),
    help="Reject a lossy variant that loses more percentage points of accuracy than this. [default: fp16 "
    "0.5, int8 1, int4 2]",
)
@click.option(
    "--skip-failed",
    is_flag=True,
    help="Leave out a lossy variant that fails its accuracy check, with a warning, instead of rejecting the "
    "bundle.",
)
@click.option(
    "--without",
    type=click.Choice(STEPS),
    multiple=True,
    help="Skip a lossless optimization; may be repeated.",
)
@click.option(
    "--retrieval",
    type=click.Choice(RETRIEVALS),
    default="in-graph",
    show_default=True,
    help="Where the bank is searched: in the graph, or outside it by the app, with or without an index "
    "(xad-bank index).",
)
@click.option(
    "--split",
    is_flag=True,
    help="Split each graph that uses CLIP in two, so repeated texts skip the CLIP half. [default: only with "
    "--retrieval external]",
)
@click.option(
    "--with-explanations",
    is_flag=True,
    help="Let the graphs also report how much each image and CLIP token contributed, for xad-run --explain.",
)
@sign_option
@click.option("--force", is_flag=True, help="Replace an existing bundle.")
@quiet_option
@json_option
def export(
    checkpoint: str,
    experts: "tuple[ExpertSet, ...]",
    output: Path | None,
    ranges: tuple[str, ...],
    quiet: bool,
    as_json: bool,
    **options: Unpack[ExportOptions],
) -> None:
    """Export a trained X-adapter to ONNX and check it against PyTorch.

    CHECKPOINT is a folder or a hub id. Without one, the built-in checkpoint is exported. The bundle runs
    without PyTorch. If any graph's outputs differ from PyTorch's, no bundle is written; the files are kept as
    NAME.rejected.
    """
    output = output or Path("bundle-" + "-".join(experts) if experts else "bundle")
    ExportRequest(experts=experts, **options)  # refuses what it can before PyTorch takes seconds to import
    from xadapter_export.exporters.makers.axis_profile import parse_profile

    options["profile"] = parse_profile(ranges)
    check_replaceable(resolved(output), MANIFEST_NAME, force=bool(options["force"]))
    line = "{done} of {total} graphs{note}"
    with show_progress(quiet=quiet, unit="graph", line=line, across_stages=True) as (on_stage, on_graph):
        on_stage("load", "PyTorch")
        module = import_extra("xadapter_export.exporters.pipeline", "export")
        result: ExportResult = module.export(
            checkpoint, output, experts, on_stage=on_stage, on_graph=on_graph, **options
        )
    if as_json:
        found = {"bundle": str(result.folder), "manifest": result.manifest.model_dump(mode="json")}
        print_json({**found, "left_out": list(result.left_out)})
    else:
        _report(result)


def _report(result: "ExportResult") -> None:
    from xadapter_export.runtime.choose import choices_of

    manifest = result.manifest
    console = make_console()
    for variant in manifest.variants:
        console.print(
            f"experts {variant.expert_set}, {variant.name}: {result.folder.name}/{variant.file}, "
            f"{variant.size_bytes / 1e6:.1f} MB; {_proof(variant)}",
            soft_wrap=True,
        )
    for made in manifest.deployments:
        console.print(
            f"experts {made.expert_set}, {made.name} from {made.source}: {len(made.files)} files, "
            f"{made.size_bytes / 1e6:.1f} MB in {made.seconds:.1f} s"
            + (f"; to check it, run on the target machine: {made.prove_with}" if made.prove_with else "")
        )
        for line in made.refused:
            console.print(f"refused: {line}")
    choices = choices_of(manifest)
    for name, kinds in _by_variant(choices).items():
        console.print(f"used by default: {name} on {'; '.join(kinds)}")
    console.print(f"bundle: {result.folder}")
    flags = run_flags(manifest, choices)
    console.print(f'try: {as_typed("xad-run")} {result.folder} "{manifest.example}"{flags}')


def _by_variant(choices: "Mapping[str, str]") -> dict[str, list[str]]:
    """Returns kinds of CPU by the variant that answers there."""
    kinds: dict[str, list[str]] = {}
    for kind, name in choices.items():
        kinds.setdefault(name, []).append(kind)
    return kinds


def _proof(variant: "Variant") -> str:
    from xadapter_export.bundle.model_card import describe_agreement

    proof, agreement = variant.parity, variant.agreement
    if proof is not None:
        return f"parity passed, {proof.num_cells} comparisons, max difference {proof.max_abs:.1e}"
    assert agreement is not None  # a variant has the one or the other
    return describe_agreement(agreement)
