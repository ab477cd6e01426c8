"""What every command shares: errors as one line, warnings as one line, common options, lazy sub-commands."""

import importlib
import json
import re
import shutil
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from io import TextIOWrapper
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, TypeVar

import click

from xadapter_export.errors import OutputExistsError, XAdapterError, printable, shortened

if TYPE_CHECKING:
    from rich.console import Console

    from xadapter_export.evaluation.results import Evaluation

WIDE_COLUMNS = 200
INTERRUPTED = 130  # what a shell reports for a program that Ctrl-C ended
TERMINATED = 143  # and for one that SIGTERM ended

F = TypeVar("F", bound=Callable[..., object])


class XadCommand(click.Command):
    """A command whose foreseen errors are one line on stderr and exit 1; results alone go to stdout.

    ``--debug``, or ``XAD_DEBUG=1``, shows the traceback instead.
    """

    def __init__(self, name: str | None, **settings: object) -> None:
        super().__init__(name, **settings)  # type: ignore[arg-type]  # click's own settings, passed through
        self.params.append(
            click.Option(
                ["--debug"],
                is_flag=True,
                envvar="XAD_DEBUG",
                expose_value=False,
                callback=_remember_debug,
                help="Show the traceback when an error occurs.",
            )
        )

    def invoke(self, ctx: click.Context) -> object:
        """Run the command; see the class."""
        for stream in (sys.stdout, sys.stderr):  # a terminal that lacks a letter is no reason to fail
            if isinstance(stream, TextIOWrapper):
                stream.reconfigure(errors="replace")
        with warnings.catch_warnings(), _stopped_by_sigterm():
            warnings.showwarning = _show_warning
            try:
                return super().invoke(ctx)
            except XAdapterError as error:
                if ctx.meta.get("xad.debug"):
                    raise
                if isinstance(error, KeyboardInterrupt):  # stopped, and it says where what was done is kept
                    click.echo(f"{ctx.command_path}: {error}", err=True)
                    ctx.exit(getattr(error, "exit_code", INTERRUPTED))
                raise click.ClickException(str(error)) from error
            except KeyboardInterrupt as interrupt:
                if ctx.meta.get("xad.debug"):
                    raise
                click.echo(f"{ctx.command_path}: stopped", err=True)
                ctx.exit(TERMINATED if isinstance(interrupt, _Terminated) else INTERRUPTED)


class _Terminated(KeyboardInterrupt):
    """SIGTERM came: what Ctrl-C cleans up must be cleaned up too."""


@contextmanager
def _stopped_by_sigterm() -> Iterator[None]:
    def stop(_signal: int, _frame: FrameType | None) -> None:
        raise _Terminated

    if threading.current_thread() is not threading.main_thread():  # only there may a handler be set
        yield
        return
    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


class NamedPath(click.Path):
    """A path that is not empty: pathlib takes an empty one for the current folder."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return the path; see the class."""
        if value == "":
            self.fail("the path is empty; give the name of a folder.", param, ctx)
        return super().convert(value, param, ctx)


class LazyGroup(click.Group):
    """A group that imports a sub-command only when it is asked for.

    Args:
        name: Name of the group.
        lazy: ``"package.module:attribute"`` of each sub-command, by its name.
        settings: click's own settings.
    """

    def __init__(self, name: str | None, *, lazy: Mapping[str, tuple[str, str]], **settings: object) -> None:
        super().__init__(name, **settings)  # type: ignore[arg-type]  # click's own settings, passed through
        self._lazy = dict(lazy)

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002  # click's signature
        """Return the names in the order of the work."""
        return list(self._lazy)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002  # same
        """Import and return a sub-command."""
        if cmd_name not in self._lazy:
            return None
        module, attribute = self._lazy[cmd_name][0].split(":")
        command: click.Command = getattr(importlib.import_module(module), attribute)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:  # noqa: ARG002  # same
        """List the sub-commands by their summaries, without importing them."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, summary) for name, (_, summary) in self._lazy.items()])


def session_options(function: F) -> F:
    """Add ``--provider`` and ``--threads``."""
    function = click.option(
        "--threads", type=click.IntRange(min=1), help="Threads per operator. [default: onnxruntime's choice]"
    )(function)
    return click.option(
        "--provider",
        "providers",
        multiple=True,
        help="onnxruntime execution provider, such as CUDAExecutionProvider; may be repeated. [default: CPU]",
    )(function)


def revision_option(function: F) -> F:
    """Add ``--revision``."""
    return click.option(
        "--revision", metavar="NAME", help="Branch, tag or commit on the Hub. [default: main]"
    )(function)


def verify_key_option(function: F) -> F:
    """Add ``--verify-key``."""
    return click.option(
        "--verify-key",
        type=NamedPath(path_type=Path),
        help="PEM file with the public key, or trusted certificates, that the bundle must be signed with.",
    )(function)


def sign_option(function: F) -> F:
    """Add ``--sign``."""
    return click.option(
        "--sign",
        metavar="KEY",
        type=NamedPath(path_type=Path),
        help="Sign the new bundle with this private key (PEM); see xad-sign.",
    )(function)


def json_option(function: F) -> F:
    """Add ``--json``."""
    return click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")(function)


def quiet_option(function: F) -> F:
    """Add ``--quiet``."""
    return click.option("--quiet", is_flag=True, help="Do not show progress.")(function)


def check_new_file(path: Path | None, *, force: bool) -> None:
    """Refuse a file that is to be written and is already there.

    Raises:
        OutputExistsError: If it is.
    """
    if path is not None and path.exists() and not force:
        raise OutputExistsError("the output path already exists", where=path, hint="replace it with --force")


def as_typed(command: str) -> str:
    """Return how a command of this installation is typed here: by its path where its name is not enough."""
    beside = Path(sys.executable).with_name(command)
    if shutil.which(command) or not beside.is_file():
        return command
    here = Path.cwd()
    return str(beside.relative_to(here) if beside.is_relative_to(here) else beside)


def example(*lines: str) -> str:
    """Return a help epilog with an example that works as it stands."""
    return "\b\nExample:\n" + "\n".join(f"  {line}" for line in lines)


def print_json(value: object) -> None:
    """Print a value as JSON on stdout; control characters are escaped, also those that JSON would allow."""
    text = json.dumps(value, indent=2, ensure_ascii=False)
    click.echo(re.sub("[\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]", _json_escape, text))


def _json_escape(found: re.Match[str]) -> str:
    return f"\\u{ord(found[0]):04x}"


def print_evaluation(found: "Evaluation", *, hidden: Collection[str] = ()) -> None:
    """Print the table of an evaluation on stdout, and its settings but for the hidden ones."""
    from rich.table import Table

    table = Table(show_edge=False)
    table.add_column("")
    for metric in found.metrics.values():
        table.add_column(metric.title, justify="right")
    before = None
    for row in found.rows:
        if before is not None and before.is_baseline != row.is_baseline:
            table.add_section()
        cells = [metric.write(row.values.get(key)) for key, metric in found.metrics.items()]
        table.add_row(row.name, *cells, style="dim" if row.is_baseline else None)
        before = row
    console = make_console()
    console.print(found.title, style="bold")
    console.print(table)
    for name, value in found.settings.items():
        if value is not None and name not in hidden:
            console.print(f"{name}: {value}", style="dim")


def make_console(*, stderr: bool = False) -> "Console":
    """Return a console that prints no control characters of the texts that it is given.

    Args:
        stderr: Whether it is on stderr. On stdout that is no terminal it is wide enough to cut nothing.
    """
    from rich.console import Console
    from rich.text import Text

    class PlainConsole(Console):
        """Escapes what a terminal would obey, in every text and every cell of a table."""

        def render_str(self, text: str, **settings: Any) -> Text:
            return super().render_str(printable(text, keep="\n\t"), **settings)

    wide = None if stderr or sys.stdout.isatty() else WIDE_COLUMNS
    return PlainConsole(stderr=stderr, markup=False, highlight=False, emoji=False, width=wide)


def _remember_debug(ctx: click.Context, _param: click.Parameter, value: bool) -> None:
    ctx.meta["xad.debug"] = value


def _show_warning(message: Warning | str, *_args: object, **_kwargs: object) -> None:
    """Print a warning as one line, in the place of ``warnings.showwarning``."""
    click.echo(f"Warning: {printable(' '.join(shortened(str(message)).split()))}", err=True)
