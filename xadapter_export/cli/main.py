"""The command group ``xad``."""

import click

from xadapter_export.cli.command import LazyGroup, example

_COMMANDS = {
    "bank": ("xadapter_export.cli.bank:bank", "Make and look at feature banks."),
    "train": ("xadapter_export.cli.train:train", "Train a plug-in between a frozen PLM and a frozen CLIP."),
    "eval": ("xadapter_export.cli.evaluate:evaluate", "Score a checkpoint or a bundle beside its controls."),
    "export": ("xadapter_export.cli.export:export", "Turn a trained X-adapter into a proven bundle."),
    "parity": ("xadapter_export.cli.parity:parity", "Prove that a bundle says what PyTorch said."),
    "run": ("xadapter_export.cli.run:run", "Ask a bundle."),
    "inspect": ("xadapter_export.cli.inspect:inspect", "Show what is in a bundle."),
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
    """Export X-adapters to ONNX, prove them, and run them."""
