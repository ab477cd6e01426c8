"""A program that builds one TensorRT engine: ``engines.py`` runs it in a process of its own.

The builder can end the process on a graph that it cannot take (a segmentation fault at an ``Attention`` of
opset 23, TensorRT-RTX 1.7.1), and the memory that it took is free again when the process ends.

The only argument is the job as JSON: ``library``, ``graph``, ``engine``, ``shapes`` (least, usual and largest
of each input) and ``compute_capabilities``. Every line of the output is a JSON object with one key:
``phase``, ``layers`` (of the parsed network, by type), ``refused``, or at the end ``peak_bytes``.
"""

import importlib
import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

from xadapter_export.sessions.tensorrt_session import make_logger


def _tell(**event: object) -> None:
    sys.stdout.write(json.dumps(event) + "\n")
    sys.stdout.flush()


def _build(job: dict[str, Any]) -> None:
    trt = importlib.import_module(job["library"])
    errors: list[str] = []

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc, name-defined]  # a module that is known only here
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)

        def phase_start(self, phase: str, parent: str | None, num_steps: int) -> None:
            del parent, num_steps
            _tell(phase=phase)

        def step_complete(self, phase: str, step: int) -> bool:
            del phase, step
            return True

        def phase_finish(self, phase: str) -> None:
            del phase

    logger = make_logger(trt, errors)
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(job["graph"]) or parser.num_errors:
        first = parser.get_error(0) if parser.num_errors else None
        at = f" at {first.node_operator()} {first.node_name()}" if first else ""
        _tell(refused=f"{parser.num_errors} parser errors{at}: {first.desc() if first else errors[:1]}")
        return
    layers = Counter(network.get_layer(number).type.name for number in range(network.num_layers))
    _tell(layers=dict(layers))

    config = builder.create_builder_config()
    monitor = Monitor()
    config.progress_monitor = monitor
    config.clear_flag(trt.BuilderFlag.TF32)  # fp32 means fp32
    profile = builder.create_optimization_profile()
    for name, shapes in job["shapes"].items():
        profile.set_shape(name, *shapes)
    config.add_optimization_profile(profile)
    if job["compute_capabilities"]:
        config.num_compute_capabilities = len(job["compute_capabilities"])
        for number, name in enumerate(job["compute_capabilities"]):
            config.set_compute_capability(trt.ComputeCapability.__members__[name.upper()], number)
    engine = builder.build_serialized_network(network, config)
    if engine is None:
        _tell(refused=errors[0] if errors else "the builder gave no reason")
        return
    with Path(job["engine"]).open("wb") as stream:
        stream.write(memoryview(engine))
    _tell(peak_bytes=_peak_bytes())


def _peak_bytes() -> int | None:
    """Highest resident size of this process; None where the system does not tell."""
    status = Path("/proc/self/status")
    if not status.is_file():
        return None
    return int(status.read_text(encoding="utf-8").split("VmHWM:")[1].split()[0]) * 1024


if __name__ == "__main__":
    _build(json.loads(sys.argv[1]))
