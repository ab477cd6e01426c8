"""Engines: TensorRT's compiled form of a graph, each built in a process of its own."""

import json
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import ModuleType

from xadapter_export.errors import ConfigError, UnsupportedError
from xadapter_export.exporters.makers.maker import Say
from xadapter_export.sessions.tensorrt_session import find_gpu

NO_FP32 = (
    "TensorRT-RTX has no fp32 matrix products for Turing (sm75); leave sm75 out, or choose --precision fp16"
)
# What the builders say, and what a reader can do about it.
_REASONS = {
    "FP32 GEMM is not supported": NO_FP32,
    "CUDA initialization failure": "this library builds on the GPU that it is for, and none is here",
    "no CUDA-capable device": "this library builds on the GPU that it is for, and none is here",
}
CURRENT = "current"  # stands for the GPU of this machine
_PROGRAM = Path(__file__).with_name("build_engine.py")


@dataclass(frozen=True)
class EngineJob:
    """One engine to build.

    Attributes:
        library: Module that builds it.
        graph: The ONNX file, its weights beside it.
        engine: The file to write.
        shapes: Least, usual and largest shape of every input.
        compute_capabilities: GPUs that it is for, as ``sm89``; the one that is present if empty.
    """

    library: str
    graph: Path
    engine: Path
    shapes: Mapping[str, tuple[list[int], list[int], list[int]]]
    compute_capabilities: tuple[str, ...]


@dataclass(frozen=True)
class BuiltEngine:
    """What building took, or why nothing was built.

    Attributes:
        size_bytes: Size of the engine; 0 where it was refused.
        seconds: From the start of the process to its end.
        peak_bytes: Most memory that the process had; None where the system does not tell.
        layers: Layers of the parsed network, by type; empty where the parser refused.
        refused: Why there is no engine, in one line; None where there is one.
    """

    size_bytes: int
    seconds: float
    peak_bytes: int | None = None
    layers: Mapping[str, int] = field(default_factory=dict)
    refused: str | None = None


def split_capabilities(asked: Sequence[str], library: ModuleType) -> list[tuple[str, ...]]:
    """The GPUs of each engine that was asked for: ``sm86+sm89`` is one engine for both.

    Args:
        asked: One entry for each engine; one for all that the library has after Turing if empty.
        library: The library that builds them.

    Raises:
        ConfigError: If the library does not know one, or one is named twice.
        ProviderError: If one is ``current``, the GPU of this machine, and there is none.
    """
    known = [name.lower() for name in library.ComputeCapability.__members__ if name.startswith("SM")]
    groups = [
        tuple(find_gpu() if part == CURRENT else part for part in item.lower().split("+")) for item in asked
    ]
    for name in (name for group in groups for name in group):
        if name not in known:
            raise ConfigError(
                f"TensorRT-RTX {library.__version__} cannot build engines for this compute capability",
                where=name or "an empty name",
                expected=f"some of {', '.join(sorted(known, key=_number))}",
                got=None if name else ", ".join(asked),
            )
    for number, group in enumerate(groups):
        if len(set(group)) < len(group) or set(group) in [set(other) for other in groups[:number]]:
            raise ConfigError(
                "an engine or compute capability is named twice",
                where="+".join(group),
                got=", ".join(asked),
            )
    return groups or [tuple(name for name in sorted(known, key=_number) if name != "sm75")]


def _number(name: str) -> int:
    return int(name.removeprefix("sm"))


def build_engine(job: EngineJob, say: Say) -> BuiltEngine:
    """Builds one engine; needs no GPU where compute capabilities are named.

    Args:
        job: What to build.
        say: Called with the builder's phases as they begin.

    Raises:
        UnsupportedError: If the process that builds cannot be started.
    """
    start = time.monotonic()
    job.engine.parent.mkdir(parents=True, exist_ok=True)
    try:
        process = subprocess.Popen(  # noqa: S603  # our own program, started without a shell
            # -P: this package's folder is not where the program looks for modules
            [sys.executable, "-P", str(_PROGRAM), json.dumps(asdict(job), default=str)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        )
    except OSError as error:
        raise UnsupportedError("the process that builds engines does not start", got=error) from error
    events: dict[str, object] = {}
    complaint = said = ""
    with process:  # closes its output, and waits for its end
        try:
            assert process.stdout is not None  # asked for above
            for line in process.stdout:
                if (event := _read_event(line)) is None:  # something that Python or the library printed
                    complaint = line.strip() or complaint
                    continue
                events.update(event)
                if (phase := str(event.get("phase", said)).lower()) != said:  # it repeats itself
                    said = phase
                    say(f"{job.engine.name}: {said}")
            process.wait()
        finally:
            process.kill()  # of a process that has ended this does nothing
    seconds = time.monotonic() - start
    layers = dict(events.get("layers", {}))  # type: ignore[call-overload]  # the program's own event
    if "peak_bytes" in events and process.returncode == 0:
        peak = events["peak_bytes"]
        assert peak is None or isinstance(peak, int)
        return BuiltEngine(job.engine.stat().st_size, seconds, peak, layers)
    job.engine.unlink(missing_ok=True)
    refused = events.get("refused")
    reason = _explain(str(refused)) if refused else _explain_end(process.returncode, complaint, layers)
    return BuiltEngine(0, seconds, None, layers, " ".join(reason.split()))


def _read_event(line: str) -> dict[str, object] | None:
    try:
        event = json.loads(line)
    except ValueError:
        return None
    return event if isinstance(event, dict) else None


def _explain(message: str) -> str:
    return next((reason for known, reason in _REASONS.items() if known in message), message)


def _explain_end(returncode: int, complaint: str, layers: Mapping[str, int]) -> str:
    """Why a process ended without an engine and without a word."""
    if returncode >= 0:
        return complaint or f"the builder ended with {returncode}"
    name = signal.Signals(-returncode).name
    if any("ATTENTION" in layer for layer in layers):
        return (
            f"the builder crashes ({name}) on the operator Attention of opset 23; export with opset 17 to 21"
        )
    return f"the builder crashed ({name}); where memory was short, build on a machine with more"
