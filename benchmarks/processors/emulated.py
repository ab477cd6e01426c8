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
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

from benchmarks.processors.debian import UnavailableError, call, unpack

ROOT: Final = Path(__file__).resolve().parents[2]
CACHE: Final = ROOT / "build" / "processors"
SUITE: Final = "trixie"  # a fixed release, so that every machine emulates with the same qemu
ARM_PYTHON: Final = "3.13"  # of that release
_PLATFORMS: Final = ("manylinux_2_28", "manylinux_2_27", "manylinux2014")
_SSE: Final = "fpu cx8 cmov mmx fxsr sse sse2 ht syscall nx lm pni ssse3 cx16 sse4_1 sse4_2 popcnt lahf_lm"
_AVX2: Final = f"{_SSE} pclmulqdq aes xsave avx f16c rdrand fma movbe bmi1 bmi2 avx2 abm fsgsbase smep erms"
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
        features: What Linux would list in ``/proc/cpuinfo``: apps and onnxruntime read that.
        part: Number of its part there; on x86 of its model.
        suite: The release of Debian whose qemu emulates it.
        is_faulty: Whether that qemu is known to compute wrongly: a processor that a session must detect.
    """

    name: str
    cpu: str
    architecture: Literal["x86_64", "aarch64"]
    has: str
    features: str
    part: str
    suite: str = SUITE
    is_faulty: bool = False


PROCESSORS: Final = {
    "nehalem": Processor("Nehalem", "Nehalem", "x86_64", "SSE4.2", _SSE, "26"),
    "haswell": Processor("Haswell", "Haswell-noTSX", "x86_64", "AVX2, no VNNI", _AVX2, "60"),
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

    def whole_environment(self) -> dict[str, str]:
        """Return the whole environment of a process: the user's, less Python's own, and ``environment``."""
        kept = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
        return {**kept, **self.environment}


def native() -> Machine:
    """Return this machine."""
    return Machine((str(Path(sys.executable).resolve()),), variables(_own_packages()))


def build(processor: Processor, cache: Path = CACHE) -> Machine:
    """Get what a processor needs, or find it.

    Raises:
        UnavailableError: If this machine is no x86-64 Linux, or something cannot be downloaded.
    """
    if sys.platform != "linux" or os.uname().machine != "x86_64":
        raise UnavailableError("processors are emulated on x86-64 Linux only")
    qemu = find_qemu(processor.architecture, processor.suite, cache)
    emulator = call([str(qemu), "--version"]).splitlines()[0].replace(" version ", " ").split(" (")[0]
    # qemu looks under -L first: for /proc/cpuinfo, and of another architecture for libraries.
    view = cache / "roots" / processor.name.replace(" ", "-")
    command = (str(qemu), "-cpu", processor.cpu, "-L", str(view))
    if processor.architecture == "x86_64":
        _write_view(view, processor, None)
        own = native()
        return Machine((*command, *own.command), own.environment, emulator)
    root = unpack(cache / f"python-{SUITE}-arm64", ("python3", "libstdc++6"), SUITE, "arm64")
    _write_view(view, processor, root)
    packages = install(ARM_PYTHON, "aarch64", cache)
    python = root / "usr" / "bin" / f"python{ARM_PYTHON}"
    return Machine((*command, str(python)), variables(packages), emulator)


def find_qemu(architecture: str, suite: str, cache: Path = CACHE) -> Path:
    """Return a static qemu of a release, unpacked.

    Raises:
        UnavailableError: If it cannot be downloaded.
    """
    ending = "-static" if suite == "bookworm" else ""  # qemu-user is static itself since trixie
    packages = (f"qemu-user{ending}",)
    folder = unpack(cache / f"qemu-{suite}", packages, suite, "amd64", with_dependencies=False)
    return folder / "usr" / "bin" / f"qemu-{architecture}{ending}"


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


def _write_view(view: Path, processor: Processor, root: Path | None) -> None:
    """Write a folder that shows ``root``, if there is one, and the processor's own ``/proc/cpuinfo``."""
    shutil.rmtree(view, ignore_errors=True)
    (view / "proc").mkdir(parents=True)
    for path in root.iterdir() if root is not None else ():
        (view / path.name).symlink_to(path.resolve())
    if processor.architecture == "x86_64":
        identity = {"vendor_id": "GenuineIntel", "cpu family": "6", "model": processor.part}
        lines = {**identity, "model name": processor.name, "stepping": "1", "flags": processor.features}
    else:
        identity = {"CPU implementer": "0x41", "CPU architecture": "8", "CPU variant": "0x1"}
        lines = {"Features": processor.features, **identity, "CPU part": processor.part, "CPU revision": "0"}
    lines = {"processor": "0", **lines}
    text = "".join(f"{key}\t: {value}\n" for key, value in lines.items())
    (view / "proc" / "cpuinfo").write_text(f"{text}\n", encoding="utf-8")


def _own_packages() -> Path:
    return Path(sysconfig.get_paths()["purelib"])


def variables(packages: Path) -> dict[str, str]:
    """Return what an interpreter needs to find this checkout and its packages, and one thread."""
    return {
        "PYTHONPATH": f"{ROOT}{os.pathsep}{packages}",
        "PYTHONDONTWRITEBYTECODE": "1",
        "OMP_NUM_THREADS": "1",  # a processor is one thread of this machine
    }
