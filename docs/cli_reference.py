"""``python -m docs.cli_reference``: write docs/cli.md from what --help says."""

from pathlib import Path

import click

from xadapter_export.cli.export import export
from xadapter_export.cli.inspect import inspect
from xadapter_export.cli.main import xad
from xadapter_export.cli.parity import parity
from xadapter_export.cli.run import run

_WIDTH = 100
_COMMANDS = {"xad": xad, "xad-export": export, "xad-run": run, "xad-parity": parity, "xad-inspect": inspect}


def render() -> str:
    """Return the reference as Markdown."""
    parts = [
        "# Commands",
        "Written by `python -m docs.cli_reference`. Each is also a sub-command: "
        "`xad export` is `xad-export`.",
    ]
    for name, command in _COMMANDS.items():
        context = click.Context(command, info_name=name, terminal_width=_WIDTH, max_content_width=_WIDTH)
        parts += [f"## {name}", f"```text\n{command.get_help(context)}\n```"]
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    Path(__file__).with_name("cli.md").write_text(render(), encoding="utf-8")
