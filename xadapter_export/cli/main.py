"""The command group ``xad``."""

import click

from xadapter_export.cli.command import LazyGroup, example

_COMMANDS = {
    "bank": ("xadapter_export.cli.bank:bank", "Build, inspect and search feature banks."),
    "train": ("xadapter_export.cli.train:train", "Train a plug-in on your own texts and images."),
    "eval": (
        "xadapter_export.cli.evaluate:evaluate",
        "Evaluate a checkpoint or bundle against its baselines.",
    ),
    "export": ("xadapter_export.cli.export:export", "Export a trained X-adapter to ONNX and check it."),
    "parity": ("xadapter_export.cli.parity:parity", "Check a bundle's outputs against PyTorch."),
    "run": ("xadapter_export.cli.run:run", "Run a bundle on your text."),
    "inspect": ("xadapter_export.cli.inspect:inspect", "Show a bundle's variants, sizes and checks."),
    "sign": ("xadapter_export.cli.sign:sign", "Sign a bundle, so others can verify who made it."),
    "push": ("xadapter_export.cli.push:push", "Upload a bundle or checkpoint to the Hugging Face Hub."),
}


def _print_version(ctx: click.Context, _param: click.Parameter, value: bool) -> None:
    if value:
        from xadapter_export import __version__

        click.echo(f"xadapter-export {__version__}")
        ctx.exit()


@click.group(
    cls=LazyGroup,
    lazy=_COMMANDS,
    epilog=example(
        "xad export --experts v --opset 17 -o bundle",
        'xad run bundle "The color of a banana is [MASK]."',
    ),
)
@click.option(
    "--version",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_print_version,
    help="Show the version and exit.",
)
def xad() -> None:
    """Train X-adapters, export them to ONNX, check them and run them."""
