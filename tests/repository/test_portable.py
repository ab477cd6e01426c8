"""What an app needs runs on Windows, macOS and Linux: nothing in the base relies on one of them."""

import ast
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import ROOT

# Python's documentation marks these "Availability: Unix" (or Linux); Windows lacks them.
UNIX_MODULES = {"fcntl", "grp", "posix", "pty", "pwd", "resource", "syslog", "termios", "tty"}
UNIX_OS = """
    chown chroot fchmod fchown fork forkpty getegid geteuid getgid getgroups getloadavg getpgid getpgrp
    getpriority getresuid getsid getuid initgroups killpg lchown lockf mkfifo mknod nice O_DIRECTORY
    O_NOFOLLOW pipe2 posix_fadvise posix_fallocate posix_spawn pread preadv pwrite sched_getaffinity
    sched_setaffinity sched_yield sendfile setegid seteuid setgid setpgid setpriority setsid setuid splice
    statvfs symlink sysconf tcgetpgrp uname wait3 wait4 WNOHANG
"""
UNIX_SIGNAL = """
    SIGALRM SIGCHLD SIGCONT SIGHUP SIGKILL SIGPIPE SIGQUIT SIGSTOP SIGTSTP SIGUSR1 SIGUSR2 SIGWINCH alarm
    getitimer pause pthread_kill setitimer sigwait
"""
UNIX_NAMES = {"os": set(UNIX_OS.split()), "signal": set(UNIX_SIGNAL.split())}
METHODS = {"symlink_to", "hardlink_to", "lchmod"}
FOLDERS = ("/proc", "/sys/", "/dev/", "/tmp", "/etc/")


def base_files() -> list[Path]:
    """Modules that import no PyTorch, as import-linter's contract lists them, and the commands."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    (contract,) = [
        contract
        for contract in project["tool"]["importlinter"]["contracts"]
        if contract["type"] == "forbidden"
    ]
    found: list[Path] = []
    for name in [*contract["source_modules"], "xadapter_export.cli"]:
        path = ROOT / name.replace(".", "/")
        found += sorted(path.rglob("*.py")) if path.is_dir() else [path.with_suffix(".py")]
    return found


def leaves_windows_first(node: ast.AST) -> bool:
    """Whether a function returns on Windows before it does anything else."""
    if not isinstance(node, ast.FunctionDef):
        return False
    first = node.body[min(ast.get_docstring(node) is not None, len(node.body) - 1)]
    return (
        isinstance(first, ast.If)
        and ast.unparse(first.test) in ("sys.platform == 'win32'", "os.name != 'posix'")
        and isinstance(first.body[-1], ast.Return)
    )


def unportable(source: str) -> Iterator[str]:
    waiting: list[ast.AST] = [ast.parse(source)]
    while waiting:
        node = waiting.pop()
        waiting += [child for child in ast.iter_child_nodes(node) if not leaves_windows_first(child)]
        match node:
            case ast.Import(names=names) if bad := UNIX_MODULES & {name.name for name in names}:
                yield f"line {node.lineno}: imports {', '.join(bad)}"
            case ast.ImportFrom(module=str(module), names=names) if bad := {module} & UNIX_MODULES or {
                name.name for name in names
            } & UNIX_NAMES.get(module, set()):
                yield f"line {node.lineno}: imports {', '.join(bad)}"
            case ast.Attribute(value=ast.Name(id=module), attr=name) if name in UNIX_NAMES.get(module, ()):
                yield f"line {node.lineno}: {module}.{name}"
            case ast.Attribute(attr=name) if name in METHODS:
                yield f"line {node.lineno}: {name}"
            case ast.Constant(value=str(text)) if text.startswith(FOLDERS):
                yield f"line {node.lineno}: {text}"


def test_the_base_has_its_modules() -> None:
    names = {path.relative_to(ROOT / "xadapter_export").as_posix() for path in base_files()}
    assert {"runtime/session.py", "bundle/staging.py", "cli/run.py", "errors.py"} <= names


@pytest.mark.parametrize("path", base_files(), ids=lambda path: path.relative_to(ROOT).as_posix())
def test_nothing_needs_one_system(path: Path) -> None:
    assert list(unportable(path.read_text(encoding="utf-8"))) == []


@pytest.mark.parametrize(
    "line",
    [
        "import fcntl",
        "from os import fork",
        "os.sched_getaffinity(0)",
        "os.kill(1, signal.SIGKILL)",
        "path.symlink_to(other)",
        "open('/proc/self/status')",
    ],
)
def test_what_needs_one_system_is_found(line: str) -> None:
    assert len(list(unportable(line))) == 1


def test_what_windows_never_reaches_may_be_there() -> None:
    function = "def lock(folder):\n    {}\n    import fcntl\n"
    assert list(unportable(function.format("if sys.platform == 'win32':\n        return None"))) == []
    assert len(list(unportable(function.format("if sys.platform == 'linux':\n        return None")))) == 1
