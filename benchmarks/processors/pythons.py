"""Other versions of Python on this machine's own processor: Debian's, unpacked, or installed ones."""

import shutil
import subprocess
from pathlib import Path
from typing import Final

from benchmarks.processors.debian import UnavailableError, unpack
from benchmarks.processors.emulated import CACHE, Machine, install, variables

# Each version, and the release of Debian that has it: 3.12 is in none.
VERSIONS: Final = {"3.11": "bookworm", "3.12": None, "3.13": "trixie", "3.14": "forky"}


def build_python(version: str, cache: Path = CACHE) -> Machine:
    """Get an interpreter and the packages that a bundle needs to run, or find them.

    Args:
        version: A key of ``VERSIONS``.
        cache: Where downloads are kept.

    Raises:
        UnavailableError: If no release of Debian has it and none is installed, or a download fails.
    """
    suite = VERSIONS[version]
    packages = install(version, "x86_64", cache)
    if suite is None:
        return Machine((_installed(version),), variables(packages), "installed")
    root = unpack(cache / f"python-{suite}-amd64", ("python3", "libstdc++6"), suite, "amd64")
    libraries = root / "usr" / "lib" / "x86_64-linux-gnu"
    loader = root / "lib64" / "ld-linux-x86-64.so.2"  # its own libc, which may be newer than the system's
    command = (str(loader), "--library-path", str(libraries), str(root / "usr" / "bin" / f"python{version}"))
    return Machine(command, variables(packages), f"Debian's {suite}")


def _installed(version: str) -> str:
    """Return an interpreter that is on the path or that pyenv built."""
    name = f"python{version}"
    built = sorted((Path.home() / ".pyenv" / "versions").glob(f"{version}.*/bin/{name}"))
    for path in (shutil.which(name), *map(str, built)):
        if path is None:
            continue
        done = subprocess.run([path, "-c", "import ssl, sqlite3"], check=False, capture_output=True)
        if done.returncode == 0:  # a shim of pyenv is on the path, and may start nothing
            return path
    raise UnavailableError(
        "there is no such interpreter: none is installed, and no release of Debian has it", where=name
    )
