"""The contestants: for each, what has to be prepared, and how its user loads and runs it.

Nothing heavy is imported here: a worker imports only the engine of its contestant.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal, Self

import numpy as np
from numpy.typing import NDArray

from benchmarks.feeds import Feed
from benchmarks.field import PTE, TFLITE
from benchmarks.prepare import APART, MODEL
from xadapter_export.bundle.folder import read_bundle
from xadapter_export.bundle.manifest import ExpertSet, Task, Variant
from xadapter_export.sessions.openvino_session import import_openvino
from xadapter_export.targets import CPU_PROVIDER, CUDA_PROVIDER

Answer = NDArray[np.float32]
Run = Callable[[Feed], Answer]
Kind = Literal["torch", "exporter", "plm", "encoder", "ours"]
_GPU_PREPARATIONS: Final = ("plain", "fused", "transformers", "fp16", "fused-fp16")


@dataclass(frozen=True)
class Place:
    """Where a contestant finds what it runs.

    Attributes:
        folder: What was prepared for it; None where it runs the model itself.
        threads: Threads inside one operator.
        variant: Name of a variant of ours.
        provider: onnxruntime's execution provider.
        cache_dir: Where ours keeps what OpenVINO compiled; nowhere if None.
    """

    case: str
    experts: ExpertSet
    task: Task
    folder: Path | None
    threads: int
    variant: str | None = None
    provider: str = CPU_PROVIDER
    cache_dir: Path | None = None

    def as_json(self) -> dict[str, Any]:
        """Return it for another process."""
        return {name: str(value) if isinstance(value, Path) else value for name, value in vars(self).items()}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Self:
        """Return what ``as_json`` was called on."""
        paths = {name: Path(values[name]) for name in ("folder", "cache_dir") if values[name] is not None}
        return cls(**{**values, **paths})


@dataclass(frozen=True)
class Contestant:
    """One way of running a model.

    Attributes:
        name: Name on the command line and in the tables.
        title: What it is, in words.
        precision: Precision of its matrix products.
        kind: ``torch``, another ``exporter``, the ``plm`` alone, its ``encoder`` without a head, or ``ours``.
        preparation: What it needs, a kind of ``prepare``; None for nothing.
        load: Makes it ready and returns what runs it: a feed to its first output.
        is_for_gpu: Whether it takes part on a GPU alone.
    """

    name: str
    title: str
    precision: str
    kind: Kind
    preparation: str | None
    load: Callable[[Place], Run]
    is_for_gpu: bool = False

    @property
    def is_apart(self) -> bool:
        """Whether its engine lives in the environment that ``benchmarks.field`` makes."""
        return self.preparation in APART

    def runs_with(self, provider: str) -> bool:
        """Whether it takes part with an execution provider: on a GPU, what computes in floats."""
        if provider == CPU_PROVIDER:
            return not self.is_for_gpu
        if self.kind == "ours":
            is_for_nvidia = self.name.startswith(("ours-cuda-", "ours-tensorrt-rtx-"))
            return self.name.startswith("ours-onnx-fp") or (is_for_nvidia and provider == CUDA_PROVIDER)
        if self.kind == "torch":
            return provider == CUDA_PROVIDER
        return self.load is _load_onnxruntime and self.preparation in _GPU_PREPARATIONS

    def size_bytes(self, place: Place) -> int | None:
        """Bytes of its files: graph and weights; None where it has none."""
        if place.folder is None:
            return None
        if place.variant is not None:
            return _variant(place).size_bytes
        return sum(
            file.stat().st_size
            for file in place.folder.iterdir()
            if file.is_file() and file.suffix != ".json"
        )


def _variant(place: Place) -> Variant:
    assert place.folder is not None
    assert place.variant is not None
    manifest = read_bundle(place.folder / "bundle", verify=False).manifest
    return manifest.variant(place.experts, place.variant)


# -------------------------------------------------------------------------------------------- torch


def _load_eager(place: Place) -> Run:
    return _torch_run(place)


def _load_eager_fp16(place: Place) -> Run:
    return _torch_run(place, is_half=True)


def _load_compiled(place: Place) -> Run:
    return _torch_run(place, is_compiled=True)


def _torch_run(place: Place, *, is_compiled: bool = False, is_half: bool = False) -> Run:
    import torch

    from benchmarks.cases import make_model, torch_feed

    torch.set_num_threads(place.threads)
    torch.set_num_interop_threads(1)
    device = "cuda" if place.provider == CUDA_PROVIDER else "cpu"
    model = make_model(place.case, place.task).to(device)
    if is_half:
        model = model.half()
    forward: Callable[..., Any] = model
    if is_compiled:
        torch._dynamo.config.recompile_limit = 64
        forward = torch.compile(model, dynamic=False)

    def run(feed: Feed) -> Answer:
        with torch.inference_mode():
            tensors = {name: tensor.to(device) for name, tensor in torch_feed(feed).items()}
            output = forward(**tensors, experts=place.experts)
            logits = output.answers.get("logits")
            answer = output.last_hidden_state if logits is None else logits
            if device != "cpu" and "mask_positions" not in feed and logits is not None:
                answer = answer.argmax(-1)  # its user takes the words, not the whole vocabulary
            return np.asarray(answer.float().cpu().numpy(), np.float32)

    return run


# -------------------------------------------------------------------------------------- onnxruntime


def _load_onnxruntime(place: Place) -> Run:
    import onnxruntime as ort

    from xadapter_export.sessions.onnx_session import open_onnx
    from xadapter_export.sessions.session import Opening

    assert place.folder is not None
    options = ort.SessionOptions()
    options.intra_op_num_threads = place.threads
    options.log_severity_level = 3  # its warnings are about its own graph passes
    if place.provider == CPU_PROVIDER:
        session = ort.InferenceSession(place.folder / MODEL, options, providers=[CPU_PROVIDER])
    else:  # as a bundle is opened: a provider that does not start is an error
        how = Opening(providers=[place.provider], num_threads=place.threads)
        session = open_onnx(place.folder / MODEL, how)
    names = [value.name for value in session.get_inputs()]

    def run(feed: Feed) -> Answer:
        return np.asarray(session.run(None, {name: feed[name] for name in names})[0], np.float32)

    return run


# ----------------------------------------------------------------------------------------- OpenVINO


def _load_openvino_fp32(place: Place) -> Run:
    return _openvino_run(place, {"INFERENCE_PRECISION_HINT": "f32"})


def _load_openvino_default(place: Place) -> Run:
    return _openvino_run(place, {})


def _openvino_run(place: Place, settings: dict[str, str]) -> Run:
    ov = import_openvino()
    assert place.folder is not None
    compiled = ov.Core().compile_model(
        place.folder / "model.xml",
        "CPU",
        {"INFERENCE_NUM_THREADS": place.threads, "PERFORMANCE_HINT": "LATENCY", **settings},
    )
    request = compiled.create_infer_request()
    names = [port.get_any_name() for port in compiled.inputs]

    def run(feed: Feed) -> Answer:
        return np.asarray(request.infer({name: feed[name] for name in names})[0], np.float32)

    return run


# ------------------------------------------------------------------------------ the rest of the field


def _load_executorch(place: Place) -> Run:
    import torch
    from executorch.extension.pybindings import portable_lib
    from executorch.runtime import Runtime

    assert place.folder is not None
    portable_lib._unsafe_reset_threadpool(place.threads)
    method = Runtime.get().load_program(place.folder / PTE).load_method("forward")
    names = ("input_ids", "attention_mask", "token_type_ids", "clip_input_ids")

    def run(feed: Feed) -> Answer:
        arrays = [feed[name] for name in names if name in feed][: method.metadata.num_inputs()]
        return np.asarray(method.execute([torch.from_numpy(array) for array in arrays])[0], np.float32)

    return run


def _load_litert(place: Place) -> Run:
    from ai_edge_litert.interpreter import Interpreter

    assert place.folder is not None
    interpreter = Interpreter(str(place.folder / TFLITE), num_threads=place.threads)
    runners: dict[str, Any] = {}

    def run(feed: Feed) -> Answer:
        name = "{}x{}".format(*feed["input_ids"].shape)
        if name not in runners:
            runners[name] = interpreter.get_signature_runner(name)
        inputs = {key: feed[key].astype(np.int32) for key in runners[name].get_input_details()}
        outputs = runners[name](**inputs)
        return np.asarray(outputs["output_0"], np.float32)

    return run


def _load_ctranslate2(place: Place) -> Run:
    import ctranslate2

    encoder = ctranslate2.Encoder(str(place.folder), device="cpu", intra_threads=place.threads)

    def run(feed: Feed) -> Answer:
        ids, lengths = (
            ctranslate2.StorageView.from_array(array.astype(np.int32))
            for array in (feed["input_ids"], feed["attention_mask"].sum(1))
        )
        types = feed["token_type_ids"].tolist()
        output = encoder.forward_batch(ids, lengths=lengths, token_type_ids=types)
        return np.asarray(output.last_hidden_state, np.float32)

    return run


# --------------------------------------------------------------------------------------------- ours


def _load_ours(place: Place) -> Run:
    """A bundle as an app uses it: ``XAdapterSession.load`` and ``run``."""
    from xadapter_export import XAdapterSession

    assert place.folder is not None
    assert place.variant is not None
    has_no_provider = place.provider == CPU_PROVIDER or place.variant.startswith("tensorrt")
    session = XAdapterSession.load(
        place.folder / "bundle",
        variant=place.variant,
        providers=None if has_no_provider else [place.provider],
        num_threads=place.threads,
        cache_dir=place.cache_dir,
    )
    output = session.manifest.expert_sets[place.experts].outputs[0].name

    def run(feed: Feed) -> Answer:
        return np.asarray(session.run(feed)[output], np.float32)

    return run


_ORT, _OPENVINO = _load_onnxruntime, _load_openvino_fp32
THEIRS: Final = (
    Contestant("eager", "PyTorch eager", "fp32", "torch", None, _load_eager),
    Contestant("compile", "torch.compile", "fp32", "torch", None, _load_compiled),
    Contestant("ort", "onnxruntime, torch.onnx.export", "fp32", "exporter", "plain", _ORT),
    Contestant("transformers", "onnxruntime, transformers, fused", "fp32", "exporter", "transformers", _ORT),
    Contestant("ort-int8", "onnxruntime, quantize_dynamic, plain", "int8", "exporter", "int8", _ORT),
    Contestant(
        "ort-fused-int8", "onnxruntime, quantize_dynamic, fused", "int8", "exporter", "fused-int8", _ORT
    ),
    Contestant("eager-fp16", "PyTorch eager, fp16", "fp16", "torch", None, _load_eager_fp16, is_for_gpu=True),
    Contestant("ort-fused", "onnxruntime, fused", "fp32", "exporter", "fused", _ORT, is_for_gpu=True),
    Contestant(
        "ort-fp16",
        "onnxruntime, its fp16 converter, plain",
        "fp16",
        "exporter",
        "fp16",
        _ORT,
        is_for_gpu=True,
    ),
    Contestant(
        "ort-fused-fp16",
        "onnxruntime, its fp16 converter, fused",
        "fp16",
        "exporter",
        "fused-fp16",
        _ORT,
        is_for_gpu=True,
    ),
    Contestant("openvino", "OpenVINO fp32", "fp32", "exporter", "openvino", _OPENVINO),
    Contestant("openvino-bf16", "OpenVINO default", "bf16", "exporter", "openvino", _load_openvino_default),
    Contestant(
        "openvino-int8", "OpenVINO, NNCF", "int8", "exporter", "openvino-int8", _load_openvino_default
    ),
    Contestant(
        "openvino-transformers",
        "OpenVINO fp32, transformers' exporter",
        "fp32",
        "exporter",
        "openvino-transformers",
        _OPENVINO,
    ),
    Contestant(
        "executorch", "ExecuTorch XNNPACK, transformers", "fp32", "exporter", "executorch", _load_executorch
    ),
    Contestant("litert", "LiteRT", "fp32", "exporter", "litert", _load_litert),
    Contestant("litert-int8", "LiteRT, dynamic int8", "int8", "exporter", "litert-int8", _load_litert),
    Contestant(
        "ctranslate2", "CTranslate2, PLM's encoder alone", "fp32", "encoder", "ctranslate2", _load_ctranslate2
    ),
    Contestant(
        "ctranslate2-int8",
        "CTranslate2 int8, PLM's encoder alone",
        "int8",
        "encoder",
        "ctranslate2-int8",
        _load_ctranslate2,
    ),
    Contestant("plm-ort", "PLM alone, onnxruntime", "fp32", "plm", "plain", _ORT),
    Contestant("plm-transformers", "PLM alone, transformers, fused", "fp32", "plm", "transformers", _ORT),
    Contestant("plm-openvino", "PLM alone, OpenVINO fp32", "fp32", "plm", "openvino", _OPENVINO),
)


def ours(variant: str) -> Contestant:
    """Return a variant of ours as a contestant; ``variant`` is its name in the manifest, ``cpu-int8``."""
    precision = variant.rpartition("-")[2]
    return Contestant(f"ours-{variant}", f"ours, {variant}", precision, "ours", "ours", _load_ours)


def find(name: str) -> Contestant:
    """Return a contestant by its name.

    Raises:
        KeyError: If there is none.
    """
    if name.startswith("ours-"):
        return ours(name.removeprefix("ours-"))
    return {contestant.name: contestant for contestant in THEIRS}[name]
