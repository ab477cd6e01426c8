"""Which variant of an expert set answers on this machine: one rule, a pure function of what there is."""

import importlib.util
import platform
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from xadapter_export.bundle.cuda import CUDA_PROVIDER
from xadapter_export.bundle.manifest import Deployment, Variant
from xadapter_export.errors import BundleError, ConfigError

CPU_PROVIDER = "CPUExecutionProvider"
GPU_PROVIDERS = frozenset(
    f"{name}ExecutionProvider"
    for name in ("CUDA", "Tensorrt", "NvTensorRTRTX", "ROCM", "MIGraphX", "Dml", "CoreML", "WebGpu")
)
INT8_DOT_PRODUCTS = ("avx512_vnni", "avx_vnni", "asimddp")
_USED_FEATURES = frozenset((*INT8_DOT_PRODUCTS, "avx2"))
_PRECISIONS = ("fp32", "fp16", "int8", "int4")


@dataclass(frozen=True)
class Machine:
    """What the rule needs to know of a machine.

    Attributes:
        architecture: ``x86-64``, ``arm64``, or whatever else Python calls it.
        features: Which of AVX2 and the int8 dot products the CPU has, by Linux's names; none where that
            cannot be found out.
        has_openvino: Whether OpenVINO is installed.
    """

    architecture: str
    features: frozenset[str]
    has_openvino: bool


@dataclass(frozen=True)
class Choice:
    """The variant that answers, and why in a few words; with ``engine``, its engines in its place."""

    variant: Variant
    reason: str
    engine: Deployment | None = None

    @property
    def name(self) -> str:
        """Name of what answers: ``cpu-int8``, ``tensorrt-rtx-fp16``."""
        return self.variant.name if self.engine is None else self.engine.name


def choose(
    variants: Sequence[Variant],
    name: str,
    *,
    providers: Sequence[str],
    machine: Machine,
    engines: Sequence[Deployment] = (),
) -> Choice:
    """Choose among the variants of one expert set.

    ``auto`` takes, with a GPU provider, fp16 and else fp32: of the graphs for CUDA where that is the provider
    and they are there, else of the portable ones. On the CPU it takes the first of these that is there:
    OpenVINO's int8 where OpenVINO is installed on x86-64; onnxruntime's int8 where the CPU has int8 dot
    products or AVX2; fp32, where OpenVINO is installed on x86-64 its own first. It never takes fp16
    on a CPU, where fp16 is slower than fp32; int4, and engines, only by name. Where the CPU's features are
    unknown it takes fp32; int8, asked for by name, gives the same answers there, only more slowly.

    Args:
        variants: The variants of the set.
        name: ``auto``; a variant's whole name, ``cpu-int8``; a precision, ``int8``, which is the fastest
            target here that has it; or the name of engines, ``tensorrt-rtx-fp16``.
        providers: Names of the onnxruntime providers that were asked for.
        machine: The machine.
        engines: The deployments of the set that are engines.

    Raises:
        BundleError: If the set has no such variant, or for ``auto`` none that suits.
        ConfigError: If the variant that is named cannot go with the providers.
    """
    by_name = {variant.name: variant for variant in variants}
    on_cpu = set(providers) <= {CPU_PROVIDER}
    if engine := next((made for made in engines if made.name == name), None):
        if not on_cpu:
            raise ConfigError(
                "an engine runs on the GPU by itself, with no execution provider",
                where=name,
                got=", ".join(providers),
                mend="leave the provider out, or choose another variant",
            )
        return Choice(by_name[engine.source], "named", engine)
    if name == "auto":
        rules = _rules(providers, machine)
        mend = "name one of those with variant=, or export with --precision fp32"
        if on_cpu and all(variant.is_for_gpu for variant in variants):
            mend = f"ask for the GPU (--provider {CUDA_PROVIDER}), or export with --target onnx too"
    elif name in _PRECISIONS:
        rules = [
            (f"{target}-{name}", f"the fastest {name} here")
            for target in (_cpu_targets(machine) if on_cpu else _gpu_targets(providers))
        ]
        mend = "choose one of those, or export with its --precision and --target"
    else:
        rules, mend = [(name, "named")], "choose one of those, or export with its --precision and --target"
    is_engine = name.startswith("tensorrt")  # of which there is none, or it would be chosen
    if name.endswith("fp16") and not is_engine and not GPU_PROVIDERS & set(providers):
        raise ConfigError(
            "fp16 is slower than fp32 on a CPU, and no GPU provider was asked for",
            where=name,
            mend="ask for one with providers= (--provider CUDAExecutionProvider), or choose fp32 or int8",
        )
    if name.startswith(("cpu-", "openvino-")) and not on_cpu:
        raise ConfigError(
            "this variant is for the CPU, and another provider was asked for",
            where=name,
            got=", ".join(providers),
            mend="leave the provider out, or choose a variant whose name starts with onnx",
        )
    if name.startswith("cuda-") and CUDA_PROVIDER not in providers:
        raise ConfigError(
            "this variant is for onnxruntime's CUDA provider",
            where=name,
            got=", ".join(providers),
            mend=f"ask for it (--provider {CUDA_PROVIDER}), or choose another variant",
        )
    for wanted, reason in rules:
        if wanted in by_name:
            return Choice(by_name[wanted], reason)
    raise BundleError(
        "the bundle holds no variant that suits this machine"
        if name == "auto"
        else "the bundle does not hold this variant",
        where=f"{name}, experts {variants[0].expert_set}",
        expected=f"one of {', '.join([*by_name, *(made.name for made in engines)])}",
        mend=mend,
    )


def runs_on_cpu(name: str) -> bool:
    """Whether what is named, ``auto`` included, can be had on a CPU."""
    return not name.endswith("fp16") and not name.startswith(("tensorrt", "cuda"))


def _rules(providers: Sequence[str], machine: Machine) -> list[tuple[str, str]]:
    """Return the names that ``auto`` may take, the best first, each with the reason."""
    if GPU_PROVIDERS & set(providers):
        reason = "a GPU provider was asked for"
        precisions = ("fp16", "fp32")
        return [(f"{t}-{p}", reason) for t in _gpu_targets(providers) for p in precisions]
    if set(providers) - {CPU_PROVIDER}:
        return [("onnx-fp32", "the portable graph runs on any provider")]
    rules = []
    if machine.has_openvino and machine.architecture == "x86-64":
        rules.append(("openvino-int8", "OpenVINO is installed and the CPU is x86-64"))
    known = [feature for feature in (*INT8_DOT_PRODUCTS, "avx2") if feature in machine.features]
    if known:
        rules.append(("cpu-int8", f"the CPU has {known[0]}"))
    reason = "no faster variant suits this CPU"
    targets = [t for t in _cpu_targets(machine) if t != "openvino" or machine.has_openvino]
    return rules + [(f"{target}-fp32", reason) for target in targets]


def _gpu_targets(providers: Sequence[str]) -> list[str]:
    """Return the targets for the first GPU provider, the fastest first."""
    first = next((name for name in providers if name in GPU_PROVIDERS), None)
    return ["cuda", "onnx"] if first == CUDA_PROVIDER else ["onnx"]


def _cpu_targets(machine: Machine) -> list[str]:
    """Return the targets for the CPU, the fastest first."""
    if machine.has_openvino and machine.architecture == "x86-64":
        return ["openvino", "cpu", "onnx"]
    return ["cpu", "onnx", "openvino"]  # one that is not installed says so when it is opened


@cache
def read_machine() -> Machine:
    """Return what this machine is."""
    name = platform.machine().lower()
    return Machine(
        architecture={"amd64": "x86-64", "x86_64": "x86-64", "aarch64": "arm64"}.get(name, name),
        features=_read_features(),
        has_openvino=importlib.util.find_spec("openvino") is not None,
    )


def _read_features() -> frozenset[str]:
    if sys.platform == "win32":
        import ctypes

        # PF_AVX2_INSTRUCTIONS_AVAILABLE and PF_ARM_V82_DP_INSTRUCTIONS_AVAILABLE of winnt.h
        has = ctypes.windll.kernel32.IsProcessorFeaturePresent
        return frozenset(name for number, name in ((40, "avx2"), (43, "asimddp")) if has(number))
    try:
        if sys.platform == "darwin":
            line = ["/usr/sbin/sysctl", "hw.optional"]  # fixed: nothing of a user's is in it
            done = subprocess.run(line, capture_output=True, text=True, check=True)  # noqa: S603
            return parse_sysctl(done.stdout)
        return parse_cpuinfo(Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace"))
    except (OSError, subprocess.SubprocessError):
        return frozenset()


def parse_cpuinfo(text: str) -> frozenset[str]:
    """Return the features that the rule uses from the text of Linux's ``/proc/cpuinfo``.

    Where the cores differ, only what every core has.
    """
    rows = [
        frozenset(value.split()) & _USED_FEATURES
        for key, _, value in (line.partition(":") for line in text.splitlines())
        if key.strip() in ("flags", "Features")  # x86 and Arm
    ]
    return frozenset.intersection(*rows) if rows else frozenset()


def parse_sysctl(text: str) -> frozenset[str]:
    """Return the features that the rule uses from what macOS's ``sysctl hw.optional`` prints."""
    known = {"hw.optional.avx2_0": "avx2", "hw.optional.arm.FEAT_DotProd": "asimddp"}
    pairs = (line.partition(":") for line in text.splitlines())
    return frozenset(known[key] for key, _, value in pairs if key in known and value.strip() == "1")
