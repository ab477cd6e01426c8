"""``python -m docs.cli_reference``: write docs/cli.md from what --help says."""

from collections.abc import Iterator
from pathlib import Path

import click

from xadapter_export.cli.bank import bank
from xadapter_export.cli.evaluate import evaluate
from xadapter_export.cli.export import export
from xadapter_export.cli.inspect import inspect
from xadapter_export.cli.main import xad
from xadapter_export.cli.parity import parity
from xadapter_export.cli.push import push
from xadapter_export.cli.run import run
from xadapter_export.cli.sign import sign
from xadapter_export.cli.train import train

_WIDTH = 100
COMMANDS: dict[str, click.Command] = {
    "xad": xad,
    "xad-bank": bank,
    "xad-train": train,
    "xad-eval": evaluate,
    "xad-export": export,
    "xad-run": run,
    "xad-parity": parity,
    "xad-inspect": inspect,
    "xad-sign": sign,
    "xad-push": push,
}


def render() -> str:
    """Return the reference as Markdown."""
    parts = [
        "# Commands",
        "Written by `python -m docs.cli_reference`. Each is also a sub-command: "
        "`xad export` is `xad-export`.",
    ]
    for name, command in COMMANDS.items():
        parts += _sections(name, command, "##")
    return "\n\n".join(parts) + "\n"


def _sections(name: str, command: click.Command, heading: str) -> Iterator[str]:
    """Heading and help of a command, and of the commands of a group; those of ``xad`` stand by themselves."""
    context = click.Context(command, info_name=name, terminal_width=_WIDTH, max_content_width=_WIDTH)
    yield f"{heading} {name}"
    yield f"```text\n{command.get_help(context)}\n```"
    if isinstance(command, click.Group) and command is not xad:
        for sub_name, sub_command in command.commands.items():
            if not sub_command.hidden:
                yield from _sections(f"{name} {sub_name}", sub_command, "###")


if __name__ == "__main__":
    Path(__file__).with_name("cli.md").write_text(render(), encoding="utf-8")
