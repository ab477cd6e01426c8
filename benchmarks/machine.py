"""The machine that is measured: what its CPU is, and how much of it others took meanwhile."""

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final, Self

from benchmarks import masked_cpu
from xadapter_export.bundle.machine import read_machine
from xadapter_export.bundle.manifest import Variant
from xadapter_export.runtime.choose import choose
from xadapter_export.targets import CPU_PROVIDER

_TICKS = 3  # resolution of the times, in ticks of each CPU, that a share must stand out of


@dataclass(frozen=True)
class Cpu:
    """The CPU, as far as a reader of a table needs it.

    Attributes:
        name: Its maker's name for it.
        kind: What int8 products it has: ``AVX-512 VNNI``, ``AVX-VNNI``, ``AVX2``, or the architecture.
        is_masked: Whether it has more than ``kind`` says; see ``benchmarks.masked_cpu``.
    """

    name: str
    kind: str
    is_masked: bool = False

    def __str__(self) -> str:
        return (
            f"{self.kind} kernels (CPUID masked) on {self.name}"
            if self.is_masked
            else f"{self.name}, {self.kind}"
        )


UNKNOWN: Final = Cpu("unknown CPU", "unknown kind")


def cpu_flags(information: str | None = None) -> list[str]:
    """Return what the CPU can do, as Linux lists it; empty elsewhere."""
    lines = _lines(information, ("flags", "Features"))
    return sorted(set(lines[0].split())) if lines else []


def cpu(information: str | None = None) -> Cpu:
    """Return the CPU of this machine, or the one that a ``/proc/cpuinfo`` describes."""
    (name, *_) = _lines(information, ("model name", "CPU part")) or [UNKNOWN.name]
    numbers = [found for key in ("cpu family", "model") for found in _lines(information, (key,))[:1]]
    if len(numbers) == 2:  # hypervisors cut names short
        name += " (family {}, model {})".format(*numbers)
    flags = set(cpu_flags(information))
    kinds = {"avx512_vnni": "AVX-512 VNNI", "avx_vnni": "AVX-VNNI", "avx512f": "AVX-512", "avx2": "AVX2"}
    kind = next((kind for flag, kind in kinds.items() if flag in flags), os.uname().machine)
    return Cpu(name, kind, masked_cpu.is_masked())


def has_bf16() -> bool:
    """Whether the CPU multiplies bf16, as far as is known: where not, bf16 is fp32 with detours."""
    flags = cpu_flags()
    return not flags or any("bf16" in flag for flag in flags)


def _lines(information: str | None, keys: tuple[str, ...]) -> list[str]:
    file = Path("/proc/cpuinfo")
    if information is None:
        information = file.read_text(encoding="utf-8") if file.is_file() else ""
    pairs = (line.partition(":") for line in information.splitlines())
    return [value.strip() for key, _, value in pairs if key.strip() in keys]


@dataclass(frozen=True)
class Pick:
    """What ``auto`` takes of a bundle here.

    Attributes:
        title: With or without OpenVINO.
        variant: What it takes.
        among: The variants that it could take.
    """

    title: str
    variant: str
    among: tuple[str, ...]


def picks_of(variants: Sequence[Variant]) -> Iterator[Pick]:
    """Yield what ``auto`` takes of the variants of one expert set on this CPU, without and with OpenVINO."""
    machine = read_machine()
    for runtimes in [frozenset[str](), *([machine.runtimes] if machine.runtimes else [])]:
        among = [each for each in variants if runtimes or not each.name.startswith("openvino")]
        if not among:
            continue
        here = replace(machine, runtimes=runtimes)
        choice = choose(among, "auto", providers=[CPU_PROVIDER], machine=here)
        title = "with OpenVINO" if runtimes else "without OpenVINO"
        yield Pick(title, choice.name, tuple(each.name for each in among))


@dataclass(frozen=True)
class CpuTime:
    """CPU time since the start, in seconds over all CPUs, of everybody and of some processes; Linux only.

    Attributes:
        busy_s: Everybody's, what a hypervisor took from this machine included.
        own_s: That of the processes.
        all_s: Busy and idle.
    """

    busy_s: float = 0.0
    own_s: float = 0.0
    all_s: float = 0.0

    @classmethod
    def read(cls, processes: Iterable[int]) -> Self:
        """Read it now; zeros where the system does not tell."""
        file = Path("/proc/stat")
        if not file.is_file():
            return cls()
        tick = 1 / os.sysconf("SC_CLK_TCK")
        user, nice, system, idle, waiting, *others = map(int, file.read_text().split("\n")[0].split()[1:9])
        own = 0
        for process in processes:
            try:
                fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
            except OSError:  # it has ended
                continue
            own += int(fields[11]) + int(fields[12])
        busy = user + nice + system + sum(others)
        return cls(tick * busy, tick * own, tick * (busy + idle + waiting))

    def others_share(self, later: "CpuTime") -> float:
        """Return the share of all CPU time until ``later`` that went to others; 0 where too short to tell."""
        whole = later.all_s - self.all_s
        others = (later.busy_s - self.busy_s) - (later.own_s - self.own_s)
        tick = 1 / os.sysconf("SC_CLK_TCK") * (os.cpu_count() or 1)
        return max(0.0, others / whole) if others > _TICKS * tick else 0.0
