"""Packages of Debian, unpacked into a folder: nothing is installed, and no rights are needed.

apt runs with lists, downloads and status of its own, so that the system's apt is neither asked nor changed;
it checks Debian's signatures and hashes as always.
"""

import re
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Final, Literal

from xadapter_export.errors import XAdapterError

Architecture = Literal["amd64", "arm64"]
_MERGED: Final = ("bin", "lib", "lib64", "sbin")  # links to the folders of these names in usr


class UnavailableError(XAdapterError, RuntimeError):
    """A package or program that an emulated processor needs cannot be had on this machine."""


def unpack(
    folder: Path,
    packages: Sequence[str],
    suite: str,
    architecture: Architecture,
    *,
    with_dependencies: bool = True,
) -> Path:
    """Download packages and unpack them, or find them unpacked.

    Args:
        folder: Where they go; it is there whole or not at all.
        packages: Their names.
        suite: The release of Debian, as in ``trixie``.
        architecture: Of the processor that runs them.
        with_dependencies: Whether to unpack what they depend on too.

    Returns:
        ``folder``.

    Raises:
        UnavailableError: If apt or dpkg is missing, apt has no mirror of Debian, or a download fails.
    """
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
        private = folder.parent / f"apt-{suite}-{architecture}"  # kept: a download that stopped is resumed
        archives = _download(private, packages, suite, architecture, with_dependencies=with_dependencies)
        root = Path(temporary) / "root"
        for archive in archives:
            call(["dpkg", "-x", str(archive), str(root)])
        for name in _MERGED:
            if (root / "usr" / name).is_dir() and not (root / name).exists():
                (root / name).symlink_to(f"usr/{name}")
        root.rename(folder)
    shutil.rmtree(private)
    return folder


def call(command: Sequence[str]) -> str:
    """Run a program to its end and return what it printed on stdout.

    Raises:
        UnavailableError: If it is not installed, or fails; the reason is its last line.
    """
    try:
        done = subprocess.run(command, check=True, capture_output=True, text=True)
    except FileNotFoundError as error:
        raise UnavailableError("a program is not installed", where=command[0]) from error
    except subprocess.CalledProcessError as error:
        reason = (error.stderr.strip().splitlines() or [f"exit {error.returncode}"])[-1]
        raise UnavailableError("a program failed", where=" ".join(command[:2]), got=reason) from error
    return done.stdout


def _download(
    private: Path,
    packages: Sequence[str],
    suite: str,
    architecture: Architecture,
    *,
    with_dependencies: bool,
) -> list[Path]:
    """Return the archives of the packages, in the folder of a private apt."""
    archives = private / "cache" / "archives"
    for path in (archives / "partial", private / "lists" / "partial"):
        path.mkdir(parents=True, exist_ok=True)
    (private / "status").touch()
    (private / "sources.list").write_text(f"deb {_mirror()} {suite} main\n", encoding="utf-8")
    settings = {
        "Dir::State::lists": private / "lists",
        "Dir::State::status": private / "status",
        "Dir::Cache": private / "cache",
        "Dir::Etc::sourcelist": private / "sources.list",
        "Dir::Etc::sourceparts": "/dev/null",
        "APT::Architecture": architecture,
        "APT::Architectures": architecture,
        "APT::Sandbox::User": "root",  # whoever runs this: the folder is theirs
        "Debug::NoLocking": "1",
        "Acquire::Retries": "1",
        "Acquire::http::Timeout": "10",
        "APT::Update::Error-Mode": "any",
    }
    apt = [
        "apt-get",
        "--quiet",
        *(part for key, value in settings.items() for part in ("-o", f"{key}={value}")),
    ]
    call([*apt, "update"])
    if with_dependencies:
        call([*apt, "--yes", "--no-install-recommends", "--download-only", "install", *packages])
    else:
        listed = call([*apt, "--print-uris", "download", *packages])
        names = re.findall(r"' (\S+\.deb) ", listed)
        call(["env", f"--chdir={archives}", *apt, "download", *packages])
        return [archives / name for name in names]
    return sorted(archives.glob("*.deb"))


def _mirror() -> str:
    """Return the address of the mirror of Debian that the system's apt uses."""
    found = re.search(r"'(\S+/debian)/dists/", call(["apt-get", "--print-uris", "update"]))
    if found is None:
        raise UnavailableError("apt has no mirror of Debian here")
    return found[1]
