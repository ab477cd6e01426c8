"""AVX2 kernels at native speed on an x86-64 CPU that has AVX-512: CPUID is masked.

Engines choose their kernels by the instruction CPUID, which a program cannot redefine on every CPU. So their
shared libraries are copied, with every CPUID replaced by ``int3; nop``, and a small library that is loaded
first (``mask.c``) answers the trap with the real CPUID less AVX-512, VNNI, BF16 and AMX. What runs then is
what runs on a CPU with AVX2 alone, products that saturate at int16 included; what a CPU does with it, its
clock and its caches, stays that CPU's. Publish figures as "AVX2 kernels (CPUID masked) on" that CPU.

PyTorch, oneDNN, MKL, CTranslate2 and OpenBLAS have environment variables for the same and are not copied.
"""

import hashlib
import importlib.metadata
import importlib.util
import os
import re
import shutil
import struct
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final

from xadapter_export.errors import XAdapterError

MASKED: Final = "MASKED_CPUINFO"  # is set, to the masked /proc/cpuinfo, in a masked process
PACKAGES: Final = ("onnxruntime", "openvino", "archspec")  # patched where installed
SETTINGS: Final = {
    "ATEN_CPU_CAPABILITY": "avx2",
    "ONEDNN_MAX_CPU_ISA": "AVX2",
    "DNNL_MAX_CPU_ISA": "AVX2",
    "MKL_ENABLE_INSTRUCTIONS": "AVX2",
    "CT2_FORCE_CPU_ISA": "AVX2",
    "OPENBLAS_CORETYPE": "Haswell",
}
_CPUID, _TRAP = b"\x0f\xa2", b"\xcc\x90"
_CPUID_TEXT, _TRAP_TEXT = "0x0f, 0xa2,", "0xcc, 0x90,"  # machine code in a Python source, as archspec has it
_FLAGS = re.compile(r" (avx512\w*|avx_(vnni|ifma|ne_convert)\w*|avx10\w*|amx_\w*|gfni)\b")
_HERE = Path(__file__).resolve().parent
_BUILD = _HERE.parent.parent / "build" / "masked-cpu"
_LOADED, _EXECUTABLE = 1, 1  # ELF: PT_LOAD, PF_X


class MaskError(XAdapterError, RuntimeError):
    """The CPU cannot be masked here."""


def is_masked() -> bool:
    """Whether this process runs masked."""
    return MASKED in os.environ


def environment(packages: Sequence[str] = PACKAGES, build: Path = _BUILD) -> dict[str, str]:
    """Make the patched copies, or find them made, and return the environment of a masked process.

    Args:
        packages: Import names of packages of this interpreter; those not installed are left out.
        build: Where copies are kept; a folder for each set of versions.

    Raises:
        MaskError: If this is no x86-64 Linux, or gcc or objdump is missing or fails.
    """
    if sys.platform != "linux" or os.uname().machine != "x86_64":
        raise MaskError("the CPU is masked on x86-64 Linux alone")
    sources = {name: source for name in packages if (source := _source(name))}
    folder = build / _key(sources)
    if not folder.is_dir():
        build.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=build) as temporary:
            made = Path(temporary) / "made"
            make(made, list(sources.values()))
            if not folder.is_dir():
                made.rename(folder)
    return masked(folder)


def masked(folder: Path) -> dict[str, str]:
    """Return the environment of a masked process, from what ``make`` made."""
    paths = [str(folder / "site"), *filter(None, [os.environ.get("PYTHONPATH")])]
    preloaded = [str(folder / "mask.so"), *filter(None, [os.environ.get("LD_PRELOAD")])]
    return {
        **os.environ,
        **SETTINGS,
        MASKED: str(folder / "cpuinfo"),
        "PYTHONPATH": os.pathsep.join(paths),
        "LD_PRELOAD": " ".join(preloaded),
    }


def _source(name: str) -> Path | None:
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        return None
    return Path(spec.submodule_search_locations[0])


def _key(sources: Mapping[str, Path]) -> str:
    digest = hashlib.sha256((_HERE / "mask.c").read_bytes() + Path(__file__).read_bytes())
    for name, source in sources.items():
        distribution = name.replace("_", "-")
        digest.update(f"{name} {source} {importlib.metadata.version(distribution)} ".encode())
    return digest.hexdigest()[:16]


def make(folder: Path, sources: Sequence[Path]) -> None:
    """Make all that a masked process needs: ``mask.so``, ``cpuinfo``, patched packages under ``site``.

    Args:
        folder: Is made.
        sources: Folders of packages; what wheels keep beside one, in ``NAME.libs``, is taken along.

    Raises:
        MaskError: If gcc or objdump is missing or fails.
    """
    site = folder / "site"
    site.mkdir(parents=True)
    _run(
        [
            "gcc",
            "-O2",
            "-Wall",
            "-shared",
            "-fPIC",
            "-o",
            str(folder / "mask.so"),
            str(_HERE / "mask.c"),
            "-ldl",
        ]
    )
    information = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    (folder / "cpuinfo").write_text(_FLAGS.sub("", information), encoding="utf-8")
    for source in sources:
        for part in (source, source.with_name(f"{source.name}.libs")):
            if part.is_dir():
                shutil.copytree(part, site / part.name, ignore=shutil.ignore_patterns("__pycache__"))
    patch_all(site)


def patch_all(folder: Path) -> None:
    """Patch every shared library, and every Python source that holds the instruction, below a folder."""
    for source in folder.rglob("*cpuid*.py"):
        text = source.read_text(encoding="utf-8")
        source.write_text(text.replace(_CPUID_TEXT, _TRAP_TEXT), encoding="utf-8")
    with ThreadPoolExecutor() as pool:
        list(pool.map(patch, folder.rglob("*.so*")))


def patch(library: Path) -> int:
    """Replace every CPUID of a shared library by a trap, in place; return how many there were.

    Only what objdump disassembles as that instruction is replaced: the two bytes are data elsewhere.

    Raises:
        MaskError: If objdump is missing or fails.
    """
    content = bytearray(library.read_bytes())
    if not content.startswith(b"\x7fELF") or _CPUID not in content:
        return 0
    listing = _run(["objdump", "--disassemble", "--no-show-raw-insn", "--wide", str(library)])
    offsets = [
        _offset(content, int(place, 16)) for place in re.findall(r"^ *([0-9a-f]+):\tcpuid", listing, re.M)
    ]
    for offset in offsets:
        if content[offset : offset + 2] != _CPUID:
            raise MaskError("no CPUID where objdump sees one", where=str(library), got=hex(offset))
        content[offset : offset + 2] = _TRAP
    library.write_bytes(content)
    return len(offsets)


def _offset(content: bytes | bytearray, address: int) -> int:
    """Where an address of a 64-bit ELF file's code stands in the file."""
    start, size, count = (
        struct.unpack_from("<Q", content, 32)[0],
        *struct.unpack_from("<HH", content, 54),
    )
    for number in range(count):
        kind, flags, offset, virtual, _, length = struct.unpack_from(
            "<IIQQQQ", content, start + number * size
        )
        if kind == _LOADED and flags & _EXECUTABLE and virtual <= address < virtual + length:
            return int(offset + address - virtual)
    raise MaskError("an instruction outside of the code", got=hex(address))


def _run(command: Sequence[str]) -> str:
    try:
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout
    except FileNotFoundError as error:
        raise MaskError("a tool is missing", got=command[0], hint="install gcc and binutils") from error
    except subprocess.CalledProcessError as error:
        raise MaskError("a tool failed", where=command[0], got=error.stderr.strip()) from error
