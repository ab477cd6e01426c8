"""``python -m benchmarks.masked_cpu -- COMMAND``: run a command with AVX2 kernels on a CPU that has more."""

import os
import sys

import click

from benchmarks.masked_cpu import environment
from xadapter_export.errors import XAdapterError


@click.command(context_settings={"ignore_unknown_options": True})
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED)
def main(command: tuple[str, ...]) -> None:
    """Run COMMAND, a program of this Python's environment, as if the CPU had AVX2 and no AVX-512."""
    try:
        masked = environment()
    except XAdapterError as error:
        raise click.ClickException(str(error)) from error
    sys.stdout.flush()
    os.execvpe(command[0], command, masked)


if __name__ == "__main__":
    main()
