"""``xad export``: turn a checkpoint into a bundle."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import click

from xadapter_export.bundle.opsets import check_opset
from xadapter_export.cli.command import (
    EXPERT_SETS,
    XadCommand,
    example,
    json_option,
    make_console,
    print_json,
)
from xadapter_export.errors import UnsupportedError, import_extra

if TYPE_CHECKING:
    from xadapter_export.bundle.manifest import ExpertSet, Task
    from xadapter_export.exporters.pipeline import ExportResult, OnStage

TASKS = ("fill-mask", "text-classification", "feature-extraction")


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
        raise click.BadParameter(f"there is no readable file {value}; give words with commas, or a file.")
    return [word.strip() for word in words if word.strip()]


@click.command(
    cls=XadCommand,
    epilog=example(
        "xad-export --experts t --opset 17",
        "xad-export --experts vt --experts none -o bundle --candidates yellow,green,red",
    ),
)
@click.argument("checkpoint", default="builtin")
@click.option(
    "--experts",
    type=click.Choice(EXPERT_SETS),
    multiple=True,
    help="Expert set; may be repeated: the sets share their weights, the first is the default. "
    "[default: all that the checkpoint holds]",
)
@click.option(
    "--opset", type=int, default=17, callback=_check_opset, show_default=True, help="ONNX opset, 17 to 21."
)
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    help="Folder of the bundle. [default: bundle-<experts>]",
)
@click.option(
    "--task", type=click.Choice(TASKS), help="What the graphs answer. [default: the checkpoint's task]"
)
@click.option(
    "--candidates",
    callback=_read_candidates,
    metavar="WORDS|FILE",
    help="Words fill-mask chooses from, with commas or a file of one per line; the head is sliced to them.",
)
@click.option(
    "--max-seq", type=click.IntRange(min=1), help="Longest input in tokens. [default: the PLM's limit]"
)
@click.option("--force", is_flag=True, help="Replace a bundle that is already there.")
@click.option("--quiet", is_flag=True, help="No progress.")
@json_option
def export(
    checkpoint: str,
    experts: "tuple[ExpertSet, ...]",
    opset: int,
    output: Path | None,
    task: "Task | None",
    candidates: list[str] | None,
    max_seq: int | None,
    force: bool,
    quiet: bool,
    as_json: bool,
) -> None:
    """Turn a trained X-adapter into a proven bundle that runs without PyTorch.

    CHECKPOINT is a folder or a hub id; without one, the built-in checkpoint is exported. Every graph is
    compared with PyTorch before the bundle is put in its place; a bundle that fails is kept beside as
    NAME.rejected.
    """
    output = output or Path("bundle-" + "-".join(experts) if experts else "bundle")
    with _progress(quiet=quiet) as on_stage:
        on_stage("load", "PyTorch")
        module = import_extra("xadapter_export.exporters", "export")
        result: ExportResult = module.export(
            checkpoint,
            output,
            experts or None,
            opset,
            task=task,
            candidates=candidates,
            max_seq=max_seq,
            force=force,
            on_stage=on_stage,
        )
    if as_json:
        print_json({"bundle": str(result.folder), "manifest": result.manifest.model_dump(mode="json")})
    else:
        _report(result)


def _report(result: "ExportResult") -> None:
    manifest = result.manifest
    console = make_console()
    for variant in manifest.variants:
        proof = variant.parity
        if proof is None:
            continue
        console.print(
            f"experts {variant.expert_set}: {result.folder.name}/{variant.file}, "
            f"{variant.size_bytes / 1e6:.1f} MB, opset {manifest.opset}; "
            f"parity passed in {proof.num_cells} cells, max difference {proof.max_abs:.1e}"
        )
    console.print(f"bundle: {result.folder}")
    if manifest.task == "fill-mask":
        console.print(f'try: xad-run {result.folder} "The color of a banana is {manifest.plm.mask_token}."')


@contextmanager
def _progress(*, quiet: bool) -> "Iterator[OnStage]":
    """Shows the stage at work on stderr: a spinner on a terminal, a line for each stage elsewhere."""
    from rich.console import Console

    console = Console(stderr=True, markup=False, highlight=False)
    start = time.monotonic()

    def say(stage: str, detail: str) -> str:
        return f"{time.monotonic() - start:6.1f} s  {stage:5}  {detail}"

    if quiet:
        yield lambda *_: None
    elif console.is_terminal:
        with console.status("starting") as status:
            yield lambda stage, detail: status.update(say(stage, detail))
    else:
        yield lambda stage, detail: click.echo(say(stage, detail), err=True)
