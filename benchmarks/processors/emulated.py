"""The emulated processors: which there are, what each needs on disk, and how Python runs on one.

x86 processors run this interpreter and its packages; Arm ones an interpreter of Debian's and aarch64 wheels
in the versions of ``constraints.txt``.
"""

import hashlib
import os
import shutil
import sys
import sysconfig
import tempfile
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

from benchmarks.processors.debian import UnavailableError, call, unpack

ROOT: Final = Path(__file__).resolve().parents[2]
CACHE: Final = ROOT / "build" / "processors"
SUITE: Final = "trixie"  # a fixed release, so that every machine emulates with the same qemu
ARM_PYTHON: Final = "3.13"  # of that release
_PLATFORMS: Final = ("manylinux_2_28", "manylinux_2_27", "manylinux2014")
_ARMV8: Final = "fp asimd evtstrm aes pmull sha1 sha2 crc32 cpuid"
_NEOVERSE_N1: Final = f"{_ARMV8} atomics fphp asimdhp asimdrdm lrcpc dcpop asimddp"
_NEOVERSE_V1: Final = (
    f"{_NEOVERSE_N1} jscvt fcma sha3 sm3 sm4 sha512 asimdfhm flagm ssbs sve svei8mm svebf16 i8mm bf16"
)
_MAX: Final = (
    f"{_NEOVERSE_V1} sve2 svef32mm svef64mm sme smei16i64 smef64f64 smei8i32 smef16f32 smeb16f32 smef32f32"
)


@dataclass(frozen=True)
class Processor:
    """A processor that qemu emulates.

    Attributes:
        name: What the tables call it.
        cpu: What qemu calls it.
        architecture: Of its instructions.
        has: What decides which kernels run on it, in words.
        features: Of an Arm one, what Linux would list in ``/proc/cpuinfo``; onnxruntime reads that.
        part: Of an Arm one, its number there.
        suite: The release of Debian whose qemu emulates it.
        is_faulty: Whether that qemu is known to compute wrongly: a processor that a session must detect.
    """

    name: str
    cpu: str
    architecture: Literal["x86_64", "aarch64"]
    has: str
    features: str = ""
    part: str = ""
    suite: str = SUITE
    is_faulty: bool = False


PROCESSORS: Final = {
    "nehalem": Processor("Nehalem", "Nehalem", "x86_64", "SSE4.2"),
    "haswell": Processor("Haswell", "Haswell-noTSX", "x86_64", "AVX2, no VNNI"),
    "cortex-a57": Processor("Cortex-A57", "cortex-a57", "aarch64", "no dot products", _ARMV8, "0xd07"),
    "neoverse-n1": Processor("Neoverse-N1", "neoverse-n1", "aarch64", "dot products", _NEOVERSE_N1, "0xd0c"),
    "neoverse-v1": Processor("Neoverse-V1", "neoverse-v1", "aarch64", "SVE, i8mm", _NEOVERSE_V1, "0xd40"),
    "sme": Processor("max", "max", "aarch64", "SVE2, SME", _MAX, "0xd0c"),
    "sme-faulty": Processor(
        "max of qemu 7.2", "max", "aarch64", "SME that errs", _NEOVERSE_N1, "0xd0c", "bookworm", True
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Machine:
    """A way to run Python: natively, or on an emulated processor.

    Attributes:
        command: What comes before the arguments of Python.
        environment: Variables to set.
        emulator: The emulator and its version; empty natively.
    """

    command: tuple[str, ...]
    environment: Mapping[str, str]
    emulator: str = ""

    def variables(self) -> dict[str, str]:
        """Return the whole environment of a process: the user's, less Python's own, and ``environment``."""
        kept = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
        return {**kept, **self.environment}


def native() -> Machine:
    """Return this machine."""
    return Machine((str(Path(sys.executable).resolve()),), _variables(_own_packages()))


def build(processor: Processor, cache: Path = CACHE) -> Machine:
    """Get what a processor needs, or find it.

    Raises:
        UnavailableError: If this machine is no x86-64 Linux, or something cannot be downloaded.
    """
    if sys.platform != "linux" or os.uname().machine != "x86_64":
        raise UnavailableError("processors are emulated on x86-64 Linux only")
    qemu = find_qemu(processor.architecture, processor.suite, cache)
    emulator = call([str(qemu), "--version"]).splitlines()[0].replace(" version ", " ").split(" (")[0]
    command = [str(qemu), "-cpu", processor.cpu]
    if processor.architecture == "x86_64":
        own = native()
        return Machine((*command, *own.command), own.environment, emulator)
    # A root for each processor: qemu looks for /proc/cpuinfo there first.
    root = unpack(cache / f"python-{SUITE}-arm64", ("python3", "libstdc++6"), SUITE, "arm64")
    view = _view(root, cache / "roots" / processor.name.replace(" ", "-"), processor)
    packages = install(ARM_PYTHON, "aarch64", cache)
    python = root / "usr" / "bin" / f"python{ARM_PYTHON}"
    return Machine((*command, "-L", str(view), str(python)), _variables(packages), emulator)


def find_qemu(architecture: str, suite: str, cache: Path = CACHE) -> Path:
    """Return a static qemu of a release, unpacked.

    Raises:
        UnavailableError: If it cannot be downloaded.
    """
    package = "qemu-user-static" if suite == "bookworm" else "qemu-user"  # static itself since trixie
    folder = unpack(cache / f"qemu-{suite}", (package,), suite, "amd64", with_dependencies=False)
    (found,) = folder.glob(f"usr/bin/qemu-{architecture}*")
    return found


def install(python: str, architecture: Literal["x86_64", "aarch64"], cache: Path = CACHE) -> Path:
    """Install what the base package and onnxruntime need for another interpreter, or find it.

    Args:
        python: Its version, ``3.13``.
        architecture: Its processor.
        cache: Where.

    Raises:
        UnavailableError: If a wheel cannot be had.
    """
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = [*project["dependencies"], *project["optional-dependencies"]["cpu"]]
    constraints = ROOT / "constraints.txt"
    key = hashlib.sha256(f"{wanted} {constraints.read_text(encoding='utf-8')}".encode()).hexdigest()[:8]
    folder = cache / f"packages-{python}-{architecture}-{key}"
    if folder.is_dir():
        return folder
    cache.mkdir(parents=True, exist_ok=True)
    platforms = [part for name in _PLATFORMS for part in ("--platform", f"{name}_{architecture}")]
    with tempfile.TemporaryDirectory(dir=cache) as temporary:
        target = Path(temporary) / "packages"
        call(
            [
                sys.executable, "-m", "pip", "install", "--quiet", "--no-compile", "--only-binary=:all:",
                "--implementation", "cp", "--python-version", python, *platforms, "--retries", "1",
                "--timeout", "10", "--constraint", str(constraints), "--target", str(target), *wanted,
            ]
        )  # fmt: skip
        target.rename(folder)
    return folder


def _view(root: Path, view: Path, processor: Processor) -> Path:
    """Return a folder that shows ``root`` and the processor's own ``/proc/cpuinfo``."""
    shutil.rmtree(view, ignore_errors=True)
    (view / "proc").mkdir(parents=True)
    for path in root.iterdir():
        (view / path.name).symlink_to(path.resolve())
    (view / "proc" / "cpuinfo").write_text(
        f"processor\t: 0\nBogoMIPS\t: 50.00\nFeatures\t: {processor.features}\nCPU implementer\t: 0x41\n"
        f"CPU architecture: 8\nCPU variant\t: 0x1\nCPU part\t: {processor.part}\nCPU revision\t: 0\n\n",
        encoding="utf-8",
    )
    return view


def _own_packages() -> Path:
    return Path(sysconfig.get_paths()["purelib"])


def _variables(packages: Path) -> dict[str, str]:
    return {
        "PYTHONPATH": f"{ROOT}{os.pathsep}{packages}",
        "PYTHONDONTWRITEBYTECODE": "1",
        "OMP_NUM_THREADS": "1",  # a processor is one thread of this machine
    }


def run_python(machine: Machine, arguments: Sequence[str]) -> str:
    """Run a short piece of Python to its end and return what it printed.

    Raises:
        UnavailableError: If it fails.
    """
    return call(
        [
            "env",
            *(f"{key}={value}" for key, value in machine.environment.items()),
            *machine.command,
            *arguments,
        ]
    )
