"""What the CPU of this machine is and can do, as archspec finds out."""

import platform
import warnings
from contextlib import suppress
from dataclasses import dataclass
from functools import cache

from archspec import cpu
from archspec.cpu import detect

from xadapter_export.targets import all_targets

INT8_DOT_PRODUCTS = ("avx512_vnni", "avx_vnni", "asimddp")
_KNOWN_FEATURES = (*INT8_DOT_PRODUCTS, "avx2", "i8mm", "sme")


@dataclass(frozen=True)
class Machine:
    """What the choice of a variant, and whoever reads of a failure, needs to know of a machine.

    Attributes:
        architecture: ``x86-64``, ``arm64``, or whatever else Python calls it.
        features: Which of AVX2, the int8 dot products, Arm's int8 matrix products and SME the CPU has, by
            Linux's names; none where that cannot be found out.
        runtimes: Modules of the optional runtimes of ``targets`` that are installed, as ``openvino``.
        cpu: The CPU's name.
    """

    architecture: str
    features: frozenset[str]
    runtimes: frozenset[str]
    cpu: str = "unknown CPU"

    def __str__(self) -> str:
        """Return the CPU's name and what is known of it, for messages and reports."""
        facts = [self.architecture, *(name for name in _KNOWN_FEATURES if name in self.features)]
        return f"{self.cpu} ({', '.join(facts)})"


@cache
def read_machine() -> Machine:
    """Return what this machine is."""
    name = platform.machine().lower()
    optional = {t.runtime for t in all_targets() if t.runtime is not None and t.runtime.is_optional}
    architecture = {"amd64": "x86-64", "x86_64": "x86-64", "aarch64": "arm64"}.get(name, name)
    cpu_name, features = _read_cpu(architecture)
    return Machine(
        architecture,
        frozenset(_KNOWN_FEATURES) & features,
        frozenset(each.module for each in optional if each.is_installed),
        cpu_name,
    )


def _read_cpu(architecture: str) -> tuple[str, frozenset[str]]:
    """Return the name and all features of the CPU."""
    if architecture == "x86-64":
        # The instruction itself: what a file of the system says is the host's under an emulator, and the
        # name that archspec gives to a CPU holds the features of its generation alone.
        with suppress(Exception):  # where no memory may be executed, say; archspec has no error of its own
            asked = detect.CpuidInfoCollector()
            return " ".join((asked.brand_string() or asked.vendor).split()), frozenset(asked.features)
    with suppress(Exception), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a CPU that cannot be read is an unknown one
        known = cpu.host()
        name = cpu.brand_string() if platform.system() == "Darwin" else None
        return name or known.name, frozenset(known.features | detect.detected_info().features)
    return Machine.cpu, frozenset()
