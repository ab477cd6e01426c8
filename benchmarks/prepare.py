"""``python -m benchmarks.prepare``: make one graph or bundle of a case, and say what making it cost.

Every preparation runs in a process of its own, so that its peak memory is its own, and lands in a folder
that is kept: a second run of the benchmark finds it there. What stands in a folder depends on its name and
on ``key``: versions of the packages, the code that makes it, and the case.
"""

import functools
import hashlib
import importlib.metadata
import json
import os
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from benchmarks import field
from benchmarks.feeds import CANDIDATES
from xadapter_export.bundle.manifest import ExpertSet, Task
from xadapter_export.errors import XAdapterError
from xadapter_export.sessions.openvino_session import import_openvino
from xadapter_export.targets import Precision
from xadapter_export.tasks import TASKS

if TYPE_CHECKING:
    from torch import Tensor, nn

    from xadapter_export.model.x_adapter_model import XAdapterModel

ROOT: Final = Path(__file__).resolve().parent.parent
PACKAGES: Final = (
    "torch", "transformers", "onnx", "onnxscript", "onnx-ir", "onnxruntime", "openvino", "nncf", "numpy",
)  # fmt: skip
DONE: Final = "done.json"
MODEL: Final = "model.onnx"
_MIB = 1 << 20
_OPSET = 18
_PROFILE: Final = {"batch": (1, 32), "seq": (8, 128)}  # of engines: ``feeds.SHAPES``
_THEIR_CODE = ("xadapter_export/model", "material/models.py", "benchmarks/prepare.py", "benchmarks/cases.py")
_FIELD_CODE = ("benchmarks/field.py", "benchmarks/feeds.py")
OUR_CODE = ("xadapter_export/exporters", "xadapter_export/bundle", "xadapter_export/parity")


class PreparationError(XAdapterError, RuntimeError):
    """A graph that a contestant needs could not be made."""


@dataclass(frozen=True)
class Preparation:
    """What is to be made.

    Attributes:
        kind: A key of ``MAKERS`` or ``CONVERTERS``.
        case: The case.
        experts: Expert set; ``none`` is the plain PLM.
        task: What it answers.
        with_candidates: Whether the head is sliced to the 11 candidates; ours only.
    """

    kind: str
    case: str
    experts: ExpertSet
    task: Task
    with_candidates: bool = False

    @property
    def name(self) -> str:
        """Folder name."""
        parts = [self.kind, self.case, self.experts, self.task]
        return "-".join(parts + ["candidates"] * self.with_candidates)

    def folder(self, cache: Path) -> Path:
        """Where it is, or will be."""
        code = OUR_CODE if self.kind.startswith("ours") else _FIELD_CODE if self.kind in APART else ()
        return cache / key(self.case, code) / self.name


@dataclass(frozen=True)
class Cost:
    """What making it took.

    Attributes:
        seconds: From the model in memory to the files on disk.
        peak_mib: Highest resident size of the process.
        beyond_mib: The same, less what was resident before the model was made: Python and its libraries. Of a
            graph that is converted, less what was resident before its libraries were imported.
        size_bytes: Size of the files.
    """

    seconds: float
    peak_mib: float
    beyond_mib: float
    size_bytes: int


@functools.cache  # the code that this process runs does not change under it
def key(case: str, code: tuple[str, ...] = ()) -> str:
    """Return the hash that a prepared folder stands under.

    Args:
        case: The case.
        code: Files and folders that make what stands there, beyond those that make everything.
    """
    digest = hashlib.sha256(f"{case} {versions()}".encode())
    for part in _THEIR_CODE + code:
        path = ROOT / part
        for file in sorted(path.rglob("*.py")) if path.is_dir() else [path]:
            digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


def versions() -> dict[str, str]:
    """Return the versions of the packages that decide what is measured; those not installed are left out."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def prepare(preparation: Preparation, cache: Path, environment: Mapping[str, str]) -> Cost:
    """Make it in a child process, or find it made.

    Raises:
        PreparationError: If it cannot be made; the reason is the child's last line.
    """
    folder = preparation.folder(cache)
    if not (folder / DONE).is_file():
        shutil.rmtree(folder, ignore_errors=True)
        python = find_python(preparation.kind, cache)
        command = [str(python), "-m", "benchmarks.prepare", json.dumps(asdict(preparation)), str(folder)]
        child = subprocess.run(
            command, cwd=ROOT, env=dict(environment), check=False, capture_output=True, text=True
        )
        if child.returncode:
            reason = (child.stderr.strip().splitlines() or [f"exit {child.returncode}"])[-1]
            raise PreparationError("a contestant could not be prepared", where=preparation.name, got=reason)
    return Cost(**json.loads((folder / DONE).read_text(encoding="utf-8")))


def find_python(kind: str | None, cache: Path) -> Path:
    """Return the Python that makes and runs a kind of preparation.

    Raises:
        FieldError: If it has to be made first, and that fails.
    """
    return field.find_python(cache) if kind in APART else Path(sys.executable)


# ------------------------------------------------------------------------------------- in the child


def _make_here(preparation: Preparation, folder: Path) -> None:
    """Make it in this process; the record of its cost is written last."""
    folder.mkdir(parents=True, exist_ok=True)
    if preparation.kind in CONVERTERS:
        before, start = _peak_mib(), time.perf_counter()
        CONVERTERS[preparation.kind](preparation, folder)
    else:
        from benchmarks.cases import make_model

        _import_exporter()
        before = _peak_mib()
        model = make_model(preparation.case, preparation.task)
        start = time.perf_counter()
        MAKERS[preparation.kind](preparation, model, folder)
    seconds = time.perf_counter() - start
    peak = _peak_mib()
    cost = Cost(seconds, peak, peak - before, size_bytes(folder))
    (folder / DONE).write_text(json.dumps(asdict(cost)), encoding="utf-8")


def _import_exporter() -> None:
    """Import what every exporter imports when it is first used: PyTorch's own, which all of them call."""
    import torch

    torch.onnx.export(torch.nn.Linear(1, 1), (torch.ones(1, 1),), dynamo=True, verbose=False)


def size_bytes(folder: Path) -> int:
    """Return the bytes of all files in a folder."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def _peak_mib() -> float:
    """Highest resident size so far; on Linux not getrusage's, in which a child begins with its parent's."""
    status = Path("/proc/self/status")
    if status.is_file():
        return int(status.read_text().split("VmHWM:")[1].split()[0]) / 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (_MIB if sys.platform == "darwin" else 1024)


def _plain(preparation: Preparation, model: "XAdapterModel", folder: Path) -> None:
    """What a user writes by hand: a module that returns logits at all positions, and torch.onnx.export."""
    import torch

    wrapper, inputs = wrapper_of(model, preparation.experts)
    dims = {axis: torch.export.Dim(axis, max=limit) for axis, limit in _limits(model).items()}
    shapes = {name: {0: dims["batch"], 1: dims[second_axis(name)]} for name in inputs}
    torch.onnx.export(
        wrapper,
        (),
        folder / MODEL,
        kwargs=inputs,
        dynamo=True,
        opset_version=_OPSET,
        input_names=list(inputs),
        output_names=[output.name for output in TASKS[preparation.task].outputs],
        dynamic_shapes=shapes,
        external_data=True,
        verbose=False,
    )


def _transformers(preparation: Preparation, model: "XAdapterModel", folder: Path) -> None:
    """Give the model to transformers' own exporter with its fusions for onnxruntime's CPU provider."""
    from transformers.exporters.configs import OnnxConfig
    from transformers.exporters.exporter_onnx import OnnxExporter

    target, inputs = as_target(model, preparation.experts)
    config = OnnxConfig(dynamic=True, ort_fusions="cpu")
    exporter = OnnxExporter()  # type: ignore[no-untyped-call]  # transformers annotates no constructor here
    program, _ = exporter.export_program(target, inputs, config)
    exporter.save_program(program, folder / MODEL)


def _openvino_transformers(preparation: Preparation, model: "XAdapterModel", folder: Path) -> None:
    """Give the model to transformers' own exporter for OpenVINO; weights stay fp32."""
    from transformers.exporters.configs import OpenVINOConfig
    from transformers.exporters.exporter_openvino import OpenVINOExporter

    target, inputs = as_target(model, preparation.experts)
    exporter = OpenVINOExporter()  # type: ignore[no-untyped-call]  # transformers annotates no constructor here
    program, _ = exporter.export_program(target, inputs, OpenVINOConfig(dynamic=True))
    exporter.save_program(program, folder / "model.xml")


def _fused(preparation: Preparation, folder: Path) -> None:
    """Apply onnxscript's fusions for onnxruntime to the plain export."""
    import onnx_ir as ir
    from onnxscript.rewriter.ort_fusions import optimize_for_ort

    graph = ir.load(of("plain", preparation, folder) / MODEL)
    fused = optimize_for_ort(graph)
    ir.save(fused[0] if isinstance(fused, tuple) else fused, folder / MODEL, external_data=f"{MODEL}.data")


def _int8(preparation: Preparation, folder: Path) -> None:
    """The usual int8 recipe: dynamic, per channel, MatMul, Gemm and Gather."""
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    source = "fused" if preparation.kind == "fused-int8" else "plain"
    quantize_dynamic(
        of(source, preparation, folder) / MODEL,
        folder / MODEL,
        op_types_to_quantize=["MatMul", "Gemm", "Gather"],
        per_channel=True,
        weight_type=QuantType.QInt8,
        use_external_data_format=True,
        extra_options={"DefaultTensorType": onnx.TensorProto.FLOAT},
    )


def _fp16(preparation: Preparation, folder: Path) -> None:
    """The usual fp16 recipe: onnxruntime's converter, with inputs and outputs as they were."""
    import onnx
    from onnxruntime.transformers.float16 import convert_float_to_float16

    source = "fused" if preparation.kind == "fused-fp16" else "plain"
    graph = onnx.load(of(source, preparation, folder) / MODEL)
    half = convert_float_to_float16(graph, keep_io_types=True)
    onnx.save(half, folder / MODEL, save_as_external_data=True, location=f"{MODEL}.data")


def _openvino(preparation: Preparation, folder: Path) -> None:
    """OpenVINO's own conversion of the plain export; weights stay fp32."""
    ov = import_openvino()
    converted = ov.convert_model(of("plain", preparation, folder) / MODEL)
    ov.save_model(converted, folder / "model.xml", compress_to_fp16=False)


def _openvino_int8(preparation: Preparation, model: "XAdapterModel", folder: Path) -> None:
    """NNCF's post-training quantization of it for transformers, calibrated on texts fed as its user would."""
    from benchmarks.cases import calibration_feeds
    from benchmarks.feeds import feed_as

    ov, nncf = import_openvino(), import_openvino("nncf")
    converted = ov.Core().read_model(of("openvino", preparation, folder) / "model.xml")
    names = {name for port in converted.inputs for name in port.get_names()}
    context = model.clip.context_length if model.clip is not None else None
    feeds = [
        {name: array for name, array in feed_as(feed, "user", context).items() if name in names}
        for feed in calibration_feeds(model)
    ]
    quantized = nncf.quantize(
        converted, nncf.Dataset(feeds), model_type=nncf.ModelType.TRANSFORMER, subset_size=len(feeds)
    )
    ov.save_model(quantized, folder / "model.xml", compress_to_fp16=False)


def _ours(preparation: Preparation, model: "XAdapterModel", folder: Path) -> None:
    """Make a bundle of ours for onnxruntime in every precision for the CPU."""
    is_for_size = preparation.case.endswith("-static")
    for_size: tuple[Precision, ...] = () if preparation.with_candidates or is_for_size else ("int4",)
    _export(preparation, model, folder, ("int8",) if is_for_size else ("fp32", "int8", *for_size), ())


def _ours_openvino(preparation: Preparation, model: "XAdapterModel", folder: Path) -> None:
    """Make a bundle of ours for OpenVINO."""
    _export(preparation, model, folder, ("fp32", "int8"), ("openvino",))


def _ours_portable(preparation: Preparation, model: "XAdapterModel", folder: Path) -> None:
    """Make a bundle of ours with the portable fp32 graph alone, which is what other exporters make."""
    _export(preparation, model, folder, ("fp32",), ("onnx",))


def _ours_gpu(preparation: Preparation, model: "XAdapterModel", folder: Path) -> None:
    """Make a bundle of ours for onnxruntime on a GPU."""
    _export(preparation, model, folder, ("fp32", "fp16"), ("onnx", "cuda"))


def _ours_engines(preparation: Preparation, model: "XAdapterModel", folder: Path) -> None:
    """Make a bundle of ours with TensorRT-RTX engines for the GPU of this machine, for every shape."""
    _export(preparation, model, folder, ("fp32", "fp16"), ("tensorrt-rtx",))


def _export(
    preparation: Preparation,
    model: "XAdapterModel",
    folder: Path,
    precisions: Sequence[Precision],
    targets: Sequence[str],
) -> None:
    from benchmarks.cases import write_calibration
    from xadapter_export import export
    from xadapter_export.exporters.makers.engines import CURRENT

    has_engines = "tensorrt-rtx" in targets
    is_lossy = any(precision != "fp32" for precision in precisions)
    is_random = preparation.case != "builtin"  # its weights, so that no text is better than another
    export(
        model,
        folder / "bundle",
        preparation.experts,
        candidates=CANDIDATES if preparation.with_candidates else None,
        precisions=precisions,
        targets=targets,
        calibration=write_calibration(model, folder) if is_lossy and is_random else None,
        # With the gates open, so that what is below one is timed too; its row and verdict say so.
        min_agreement=0.0 if is_lossy else None,
        max_points_lost=100.0 if is_lossy else None,
        profile=_PROFILE if has_engines else {},
        compute_capabilities=(CURRENT,) if has_engines else (),
    )


Maker = Callable[[Preparation, "XAdapterModel", Path], None]
MAKERS: Final[dict[str, Maker]] = {
    "plain": _plain,
    "transformers": _transformers,
    "openvino-transformers": _openvino_transformers,
    "openvino-int8": _openvino_int8,
    "executorch": field.make_executorch,
    "litert": field.make_litert,
    "ctranslate2": field.make_ctranslate2,
    "ctranslate2-int8": field.make_ctranslate2,
    "ours": _ours,
    "ours-openvino": _ours_openvino,
    "ours-portable": _ours_portable,
    "ours-gpu": _ours_gpu,
    "ours-engines": _ours_engines,
}
CONVERTERS: Final[dict[str, Callable[[Preparation, Path], None]]] = {  # of a graph, with no model
    "fused": _fused,
    "fp16": _fp16,
    "fused-fp16": _fp16,
    "int8": _int8,
    "fused-int8": _int8,
    "openvino": _openvino,
    "litert-int8": field.make_litert_int8,
}
NEEDS: Final = {
    "fused": "plain",
    "fp16": "plain",
    "fused-fp16": "fused",
    "int8": "plain",
    "fused-int8": "fused",
    "openvino": "plain",
    "openvino-int8": "openvino",
    "litert-int8": "litert",
}
APART: Final = (
    "executorch",
    "litert",
    "litert-int8",
    "ctranslate2",
    "ctranslate2-int8",
)  # by ``field``'s Python


def of(kind: str, preparation: Preparation, folder: Path) -> Path:
    """Return where that which this is made from stands: beside it."""
    return folder.parent / Preparation(kind, preparation.case, preparation.experts, preparation.task).name


def _limits(model: "XAdapterModel") -> dict[str, int | None]:
    context = model.clip.context_length if model.clip is not None else None
    return {"batch": None, "seq": model.plm.max_seq, "clip_seq": context}


def second_axis(name: str) -> str:
    """Return the name of an input's second axis."""
    return "clip_seq" if name == "clip_input_ids" else "seq"


def wrapper_of(model: "XAdapterModel", experts: ExpertSet) -> tuple["nn.Module", dict[str, "Tensor"]]:
    """Return the module that a user would write around ``XAdapterModel``, and inputs to trace it with."""
    import torch
    from torch import Tensor, nn

    class Wrapper(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(
            self,
            input_ids: Tensor,
            attention_mask: Tensor,
            token_type_ids: Tensor | None = None,
            clip_input_ids: Tensor | None = None,
        ) -> Tensor | tuple[Tensor, ...]:
            output = self.model(input_ids, attention_mask, token_type_ids, clip_input_ids, experts=experts)
            answers: tuple[Tensor, ...] = tuple(output.answers.values())
            return answers[0] if len(answers) == 1 else answers

    ids = torch.arange(14).reshape(2, 7) % model.plm.vocab_size
    inputs = {"input_ids": ids, "attention_mask": torch.tensor([[1] * 7, [1] * 6 + [0]])}
    if model.plm.has_token_type_ids:
        inputs["token_type_ids"] = torch.zeros_like(ids)
    if (
        model.clip is not None
        and (model.config.retrieval.mode == "topk" or "t" in experts)
        and experts != "none"
    ):
        inputs["clip_input_ids"] = torch.tensor([[1, 2, 3, 4, model.clip.end_token_id]] * 2)
    return Wrapper().eval(), inputs


def as_target(model: "XAdapterModel", experts: ExpertSet) -> tuple[Any, dict[str, "Tensor"]]:
    """Return what transformers' exporters are given: the plain PLM itself, or the module as one of theirs."""
    wrapper, inputs = wrapper_of(model, experts)
    return model.plm.model if experts == "none" else _as_pretrained(wrapper, model), inputs


def _as_pretrained(wrapper: "nn.Module", model: "XAdapterModel") -> Any:
    """The same module as the class that transformers' exporter asks for."""
    from transformers import PreTrainedModel
    from transformers.modeling_outputs import MaskedLMOutput

    class Pretrained(PreTrainedModel):  # type: ignore[no-untyped-call]  # transformers annotates no constructor here
        config_class = type(model.plm.model.config)
        _supports_sdpa = True

        def __init__(self) -> None:
            super().__init__(model.plm.model.config)
            self.wrapper = wrapper

        def forward(self, **inputs: "Tensor") -> Any:
            answer = self.wrapper(**inputs)
            return MaskedLMOutput(logits=answer[0] if isinstance(answer, tuple) else answer)

    return Pretrained().eval()  # type: ignore[no-untyped-call]  # transformers annotates no constructor here


def quiet_environment(threads: int, cache: Path) -> dict[str, str]:
    """Return the environment of every child: its threads, and where torch.compile keeps its work."""
    count = str(threads)
    return {
        **os.environ,
        "OMP_NUM_THREADS": count,
        "MKL_NUM_THREADS": count,
        "KMP_BLOCKTIME": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        "TORCHINDUCTOR_CACHE_DIR": str(cache.resolve() / "inductor"),
    }


if __name__ == "__main__":
    _make_here(Preparation(**json.loads(sys.argv[1])), Path(sys.argv[2]))
