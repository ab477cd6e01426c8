"""``xad train``: train a plug-in."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args, get_origin

import click

from xadapter_export.cli.command import (
    NamedPath,
    XadCommand,
    example,
    json_option,
    make_console,
    print_evaluation,
    print_json,
    quiet_option,
)
from xadapter_export.cli.progress import show_progress
from xadapter_export.errors import import_extra
from xadapter_export.training.config import all_flags, has_arms, read_config

if TYPE_CHECKING:
    from pydantic.fields import FieldInfo

    from xadapter_export.evaluation.results import Evaluation
    from xadapter_export.training.ablation import Ablation
    from xadapter_export.training.run import TrainResult


def _flags(function: Callable[..., None]) -> Callable[..., None]:
    """Add a flag for every setting."""
    for name, (_, _, field) in reversed(all_flags().items()):
        function = _flag(name, field)(function)
    return function


def _flag(name: str, field: "FieldInfo") -> Callable[[Callable[..., None]], Callable[..., None]]:
    option = "--" + name.replace("_", "-")
    kind: Any = field.annotation
    kinds = [part for part in get_args(kind) if part is not type(None)]
    if type(None) in get_args(kind):  # "X | None"
        kind = kinds[0]
    help_text = str(field.description)
    shown = field.default
    if not field.is_required() and shown not in (None, (), False) and not isinstance(shown, tuple):
        help_text += f" [default: {shown}]"
    if kind is bool:
        return click.option(f"{option}/--no-{name.replace('_', '-')}", default=None, help=help_text)
    choices: Any = get_args(kind) if get_origin(kind) is Literal else ()
    if isinstance(field.json_schema_extra, dict):  # where they come from a table
        choices = field.json_schema_extra["enum"]
    if choices:
        return click.option(option, type=click.Choice(choices), help=help_text)
    if get_origin(kind) is tuple:
        return click.option(option, multiple=True, metavar="VALUE", help=f"{help_text} May be repeated.")
    names = ["-o", option] if name == "output" else [option]
    if kind is Path:
        return click.option(*names, type=NamedPath(path_type=str), metavar="PATH", help=help_text)
    return click.option(*names, metavar="VALUE", help=help_text)


@click.command(
    cls=XadCommand,
    epilog=example(
        "echo 'The banana is yellow.' > text.txt",
        "xad-train --plm builtin --clip builtin --bank builtin --train-files text.txt --epochs 2 -o plugin",
    ),
)
@click.option("--config", type=NamedPath(path_type=Path), help="TOML file with settings; flags override it.")
@_flags
@quiet_option
@json_option
def train(config: Path | None, quiet: bool, as_json: bool, **flags: Any) -> None:
    """Train a plug-in that lets a frozen PLM use a frozen CLIP.

    You can give every setting as a flag or as a key of the config file. A config file with [[arm]] tables is
    an ablation: every arm is trained, and a table compares them. To resume a run that was stopped, run the
    same command again. To use several processes: torchrun --nproc-per-node 2 -m xadapter_export.cli.train
    --config FILE
    """
    given = {name: value for name, value in flags.items() if value not in (None, ())}
    is_first = os.environ.get("RANK", "0") == "0"
    settings = None if config is not None and has_arms(config) else read_config(config, given)
    if settings is not None:
        from xadapter_export.bank.record import CHECKPOINT_RECORD_NAME
        from xadapter_export.bundle.staging import check_replaceable, resolved

        check_replaceable(resolved(settings.output), CHECKPOINT_RECORD_NAME, force=settings.force)
    line = "train  step {done} of {total}{note}"
    with show_progress(quiet=quiet or not is_first, line=line) as (on_stage, on_step):
        on_stage("load", "PyTorch")
        if settings is None:
            module = import_extra("xadapter_export.training.ablation", "train")
            ablation: Ablation = module.read_ablation(config, given)
            table: Evaluation = module.run_ablation(ablation, on_stage=on_stage, on_step=on_step)
        else:
            module = import_extra("xadapter_export.training.run", "train")
            result: TrainResult = module.train(settings, on_stage=on_stage, on_step=on_step)
    if not is_first:
        return
    if settings is None and as_json:
        print_json(table.to_json())
    elif settings is None:
        print_evaluation(table)
        make_console().print(f"results: {ablation.output}")
    elif as_json:
        print_json({"checkpoint": str(result.folder), "record": result.record})
    else:
        _report(result)


def _report(result: "TrainResult") -> None:
    from xadapter_export.training.run import held_out

    console = make_console()
    record = result.record
    losses = [entry["loss"] for entry in result.curve if "loss" in entry]
    if losses:
        console.print(f"loss: from {losses[0]:.3f} to {losses[-1]:.3f} in {result.steps} steps")
    if scored := held_out(record):
        console.print(f"held out: {', '.join(f'{name} {value:.4f}' for name, value in scored.items())}")
    console.print(
        f"trained {record['trained_parameters']:,} parameters in {record['elapsed_s']:.0f} s; "
        "the frozen weights are unchanged (hashes compared)"
    )
    console.print(f"checkpoint: {result.folder}; cached features: {result.cache}")
    console.print(f"next: xad-export {result.folder}")


if __name__ == "__main__":
    train()
