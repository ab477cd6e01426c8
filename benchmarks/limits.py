"""``python -m benchmarks.limits``: what the machine can do at most, with the threads that everyone gets.

Each figure is the best of several runs: a limit is what was reached, so a run that was disturbed says
nothing about it.
"""

import functools
import json
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, astuple, dataclass

from benchmarks.machine import has_bf16

_SIDE = 2048  # of the square matrices
_READ_BYTES = 1 << 29
_SECONDS = 1.0  # of each measurement, at least


@dataclass(frozen=True)
class Limits:
    """Peaks of the machine.

    Attributes:
        fp32_gflops: Multiplying large fp32 matrices, 2 operations to a multiply-add; the faster of
            onnxruntime and PyTorch.
        bf16_gflops: The same in bf16, by PyTorch; as in fp32 where the CPU has no bf16.
        int8_gops: The same in int8, the faster of both.
        read_gb_s: Reading an array much larger than the caches, 1e9 bytes a second.
        threads: Threads that each had.
        device: ``cpu``, or the name of a GPU.
    """

    fp32_gflops: float
    bf16_gflops: float
    int8_gops: float
    read_gb_s: float
    threads: int
    device: str = "cpu"

    def best(self, other: "Limits") -> "Limits":
        """Return the higher of both in each figure: a limit is what was reached at any time."""
        return Limits(*(max(pair) for pair in zip(astuple(self), astuple(other), strict=True)))

    def peak(self, precision: str) -> float:
        """Operations a second, in 1e9, at a precision; int4, and fp16 on a CPU, are multiplied as fp32."""
        peaks = {"int8": self.int8_gops, "bf16": self.bf16_gflops}
        if self.device != "cpu":
            peaks["fp16"] = self.bf16_gflops  # tensor cores multiply both equally fast
        return peaks.get(precision, self.fp32_gflops)

    def least_ms(self, gflop: float, weight_bytes: float, precision: str) -> float:
        """Time below which no run can be: operations at the peak, or weights read once, in ms."""
        return 1e3 * max(gflop / self.peak(precision), weight_bytes / (1e9 * self.read_gb_s))


def best_s(run: Callable[[], object], seconds: float) -> float:
    """Return the shortest of as many runs as fit into ``seconds``, three at least."""
    run()
    times: list[float] = []
    while len(times) < 3 or sum(times) < seconds:
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return min(times)


def measure(
    threads: int, side: int = _SIDE, read_bytes: int = _READ_BYTES, seconds: float = _SECONDS
) -> Limits:
    """Measure the limits in this process."""
    import torch

    torch.set_num_threads(threads)
    operations = 2 * side**3 / 1e9
    a, b = torch.randn(side, side), torch.randn(side, side)
    a16, b16 = a.bfloat16(), b.bfloat16()
    large = torch.ones(read_bytes // 4)
    onnxruntime_s = functools.partial(_onnxruntime_s, side, threads, seconds)
    fp32_gflops = operations / min(best_s(lambda: torch.mm(a, b), seconds), onnxruntime_s(is_int8=False))
    return Limits(
        fp32_gflops=fp32_gflops,
        bf16_gflops=operations / best_s(lambda: torch.mm(a16, b16), seconds) if has_bf16() else fp32_gflops,
        int8_gops=operations / min(_int8_torch_s(side, seconds), onnxruntime_s(is_int8=True)),
        read_gb_s=read_bytes / 1e9 / best_s(large.sum, seconds),
        threads=threads,
    )


def measure_gpu(
    side: int = 4 * _SIDE, read_bytes: int = 4 * _READ_BYTES, seconds: float = _SECONDS
) -> Limits:
    """Measure the limits of the first NVIDIA GPU; fp32 without TF32."""
    import torch

    def timed(run: Callable[[], object]) -> float:
        def whole() -> None:
            run()
            torch.cuda.synchronize()

        return best_s(whole, seconds)

    operations = 2 * side**3 / 1e9
    a, b = (torch.randn(side, side, device="cuda") for _ in range(2))
    a16, b16 = a.bfloat16(), b.bfloat16()
    a8, b8 = (torch.randint(-127, 127, (side, side), dtype=torch.int8, device="cuda") for _ in range(2))
    large = torch.ones(read_bytes // 4, device="cuda")
    return Limits(
        fp32_gflops=operations / timed(lambda: torch.mm(a, b)),
        bf16_gflops=operations / timed(lambda: torch.mm(a16, b16)),
        int8_gops=operations / timed(lambda: torch._int_mm(a8, b8.t())),
        read_gb_s=read_bytes / 1e9 / timed(large.sum),
        threads=1,
        device=torch.cuda.get_device_name(),
    )


def measure_in_child(threads: int, environment: Mapping[str, str], *, on_gpu: bool = False) -> Limits:
    """Measure the limits in a process of its own, so that its memory is given back."""
    command = [sys.executable, "-m", "benchmarks.limits", "gpu" if on_gpu else str(threads)]
    child = subprocess.run(command, env=dict(environment), check=True, stdout=subprocess.PIPE, text=True)
    return Limits(**json.loads(child.stdout))


def _int8_torch_s(side: int, seconds: float) -> float:
    import torch

    a, b = (torch.randint(-127, 127, (side, side), dtype=torch.int8) for _ in range(2))
    return best_s(lambda: torch._int_mm(a, b), seconds)


def _onnxruntime_s(side: int, threads: int, seconds: float, *, is_int8: bool) -> float:
    """MatMul, or MatMulInteger of uint8 activations; the weights known in advance as in a model."""
    import numpy as np
    import onnxruntime as ort
    from onnx import TensorProto, helper, numpy_helper

    rng = np.random.default_rng(0)
    if is_int8:
        x: np.ndarray = rng.integers(0, 127, (side, side), dtype=np.uint8)
        w: np.ndarray = rng.integers(0, 127, (side, side), dtype=np.int8)
        op_type, taken, given = "MatMulInteger", TensorProto.UINT8, TensorProto.INT32
    else:
        x, w = (rng.standard_normal((side, side), np.float32) for _ in range(2))
        op_type, taken, given = "MatMul", TensorProto.FLOAT, TensorProto.FLOAT
    graph = helper.make_graph(
        [helper.make_node(op_type, ["x", "w"], ["y"])],
        "product",
        [helper.make_tensor_value_info("x", taken, [side, side])],
        [helper.make_tensor_value_info("y", given, [side, side])],
        [numpy_helper.from_array(w, "w")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return best_s(lambda: session.run(None, {"x": x}), seconds)


if __name__ == "__main__":
    _what = sys.argv[1] if len(sys.argv) > 1 else "2"
    print(json.dumps(asdict(measure_gpu() if _what == "gpu" else measure(int(_what)))))
