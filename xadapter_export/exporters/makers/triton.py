"""A model repository for Triton Inference Server: a proven graph, its weights, and how to serve it.

The graph takes token ids, so that there is no ensemble and no Python in the server; clients tokenize. Its
configuration is made as NVIDIA's own protobuf, read back from the text that is written, and compared with
what onnxruntime, which Triton runs it with, says of the ONNX file.

Source:
    model_config.proto of tritonclient; docs/user_guide/model_configuration.md of triton-inference-server.
"""

from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnx_ir as ir

from xadapter_export.bundle.folder import Bundle
from xadapter_export.bundle.manifest import ExpertSetSpec, Manifest, Variant
from xadapter_export.errors import ParityError, import_extra
from xadapter_export.exporters.makers.maker import Deployed, Deployer, DeployJob
from xadapter_export.exporters.onnx_files import write_alone
from xadapter_export.parity.reference import read_reference
from xadapter_export.sessions.onnx_session import open_onnx
from xadapter_export.sessions.session import Array, OnnxSession

_MAX_BATCH_SIZE = 32
_QUEUE_DELAY_US = 500  # how long a request waits for others
_WARMUP_CASE = "single_typical"
_TYPES = {"tensor(int64)": "TYPE_INT64", "tensor(float)": "TYPE_FP32"}
_NUMPY_TYPES = {"int64": "TYPE_INT64", "float32": "TYPE_FP32"}
# Where instances run: AUTO is the GPUs where there are some, and else the CPU.
_KINDS = {"fp32": "KIND_AUTO", "fp16": "KIND_GPU", "int8": "KIND_CPU"}


def model_name(variant: Variant) -> str:
    """Return the name that clients ask for: ``xadapter_vt_int8``."""
    return f"xadapter_{variant.expert_set}_{variant.precision}"


class TritonMaker(Deployer):
    """Writes ``triton/<name>/``: ``config.pbtxt``, ``1/model.onnx``, its weights, and a warm-up request."""

    def deploy(self, job: DeployJob) -> Deployed:
        """Write it; the upper end of the axis ``batch`` is the largest batch, 32 if it is not given.

        Raises:
            MissingExtraError: If tritonclient, whose protobuf the configuration is, is not installed.
            ParityError: If configuration and graph do not say the same.
        """
        proto = import_extra("tritonclient.grpc.model_config_pb2", "triton")
        folder, manifest, variant = job.folder, job.manifest, job.variant
        name = model_name(variant)
        job.say(f"{self.target.name}, {name}")
        home = folder / self.target.name / name
        (home / "1").mkdir(parents=True)
        (home / "warmup").mkdir()
        graph = ir.load(folder / variant.file)
        _type_outputs(graph, manifest.expert_sets[variant.expert_set])
        write_alone(graph, home / "1" / "model.onnx")
        warmup = _write_warmup(Bundle(folder, manifest), variant, home / "warmup")
        largest = job.options.profile.get("batch", (1, _MAX_BATCH_SIZE))[1]
        config = _configure(proto, manifest, variant, largest, warmup)
        (home / "config.pbtxt").write_text(_to_text(config), encoding="utf-8")
        check_repository(home)
        written = [path for path in sorted(home.rglob("*")) if path.is_file()]
        return Deployed(
            files=tuple(path.relative_to(folder).as_posix() for path in written),
            facts={
                "model": name,
                "max_batch_size": str(largest),
                "instances": _KINDS[variant.precision],
                "checked": "config.pbtxt against tritonclient's protobuf and the ONNX file",
            },
            prove_with=f"tritonserver --model-repository BUNDLE/{self.target.name} & "
            f"python examples/triton_client.py BUNDLE --model {name} --prove",
        )


def check_repository(home: Path) -> None:
    """Checks the configuration of one model against the protobuf and against its graph.

    Args:
        home: Folder with ``config.pbtxt`` and ``1/model.onnx``.

    Raises:
        MissingExtraError: If tritonclient is not installed.
        ParityError: If the text is not that protobuf, or does not describe the graph.
    """
    from google.protobuf import text_format

    proto = import_extra("tritonclient.grpc.model_config_pb2", "triton")
    text = (home / "config.pbtxt").read_text(encoding="utf-8")
    try:
        config = text_format.Parse(text, proto.ModelConfig())
    except text_format.ParseError as error:
        raise ParityError("config.pbtxt is not Triton's protobuf", where=home, got=error) from error
    _require(_to_text(config), text, "config.pbtxt, read and written again")
    _require(config.name, home.name, "name")
    session = open_onnx(home / "1" / "model.onnx")
    for kind, values, tensors in (
        ("input", session.get_inputs(), config.input),
        ("output", session.get_outputs(), config.output),
    ):
        got = {tensor.name: (proto.DataType.Name(tensor.data_type), list(tensor.dims)) for tensor in tensors}
        _require(got, {value.name: _describe(value.name, value.type, value.shape) for value in values}, kind)
    for setting in config.model_warmup:
        _run_warmup(session, proto, config, setting, home / "warmup")


def _describe(name: str, kind: str, shape: Sequence[int | str | None]) -> tuple[str, list[int]]:
    """Returns type and axes as Triton wants them: no batch, which must come first; -1 where one varies."""
    _require(shape[:1], ["batch"], f"first axis of {name}")
    return _TYPES[kind], [axis if isinstance(axis, int) else -1 for axis in shape[1:]]


def _run_warmup(session: OnnxSession, proto: ModuleType, config: Any, setting: Any, folder: Path) -> None:
    """Runs a warm-up request; its answers must be of the types and axes that the configuration says."""
    _require(sorted(setting.inputs), sorted(tensor.name for tensor in config.input), "inputs of the warm-up")
    feed: dict[str, Array] = {}
    for name, item in setting.inputs.items():
        _require(proto.DataType.Name(item.data_type), "TYPE_INT64", f"type of {name} of the warm-up")
        numbers = np.frombuffer((folder / item.input_data_file).read_bytes(), "<i8").astype(np.int64)
        _require(numbers.size, setting.batch_size * int(np.prod(item.dims)), f"numbers of {name}")
        feed[name] = numbers.reshape(setting.batch_size, *item.dims)
    names = [tensor.name for tensor in config.output]
    for tensor, array in zip(config.output, session.run(names, feed), strict=True):
        _require(
            _NUMPY_TYPES[array.dtype.name], proto.DataType.Name(tensor.data_type), f"type of {tensor.name}"
        )
        fixed = [-1 if dim == -1 else size for dim, size in zip(tensor.dims, array.shape[1:], strict=True)]
        _require(fixed, list(tensor.dims), f"axes of {tensor.name}")


def _configure(
    proto: ModuleType, manifest: Manifest, variant: Variant, largest: int, warmup: dict[str, list[int]]
) -> Any:
    """Makes the ``ModelConfig``."""
    config = proto.ModelConfig(name=model_name(variant), backend="onnxruntime", max_batch_size=largest)
    config.default_model_filename = "model.onnx"
    spec = manifest.expert_sets[variant.expert_set]
    for tensors, listed in ((spec.inputs, config.input), (spec.outputs, config.output)):
        for tensor in tensors:
            dims = [axis if isinstance(axis, int) else -1 for axis in tensor.axes[1:]]
            kind = "TYPE_INT64" if tensor.dtype == "int64" else "TYPE_FP32"
            listed.add(name=tensor.name, data_type=proto.DataType.Value(kind), dims=dims)
    config.dynamic_batching.max_queue_delay_microseconds = _QUEUE_DELAY_US
    kinds = proto.ModelInstanceGroup.Kind
    config.instance_group.add(count=1, kind=kinds.Value(_KINDS[variant.precision]))
    setting = config.model_warmup.add(name=_WARMUP_CASE, batch_size=1)
    for name, dims in warmup.items():
        item = setting.inputs[name]
        item.data_type = proto.DataType.Value("TYPE_INT64")
        item.dims.extend(dims)
        item.input_data_file = name
    return config


def _type_outputs(model: ir.Model, spec: ExpertSetSpec) -> None:
    """Writes the axes of the outputs into the graph: passes that quantize leave some of them out."""
    for value, tensor in zip(model.graph.outputs, spec.outputs, strict=True):
        value.shape = ir.Shape(tensor.axes)


def _write_warmup(bundle: Bundle, variant: Variant, folder: Path) -> dict[str, list[int]]:
    """Writes a request of the proof as raw numbers; returns its axes without the batch."""
    reference = read_reference(bundle)
    axes = {}
    for tensor in bundle.manifest.expert_sets[variant.expert_set].inputs:
        array = reference[f"{_WARMUP_CASE}/in/{tensor.name}"]
        (folder / tensor.name).write_bytes(array.astype("<i8").tobytes())
        axes[tensor.name] = list(array.shape[1:])
    return axes


def _to_text(config: Any) -> str:
    from google.protobuf import text_format

    return str(text_format.MessageToString(config))


def _require(got: object, want: object, what: str) -> None:
    if got != want:
        raise ParityError(
            "the Triton configuration is not right",
            where=what,
            expected=want,
            got=got,
            hint="please report this",
        )
