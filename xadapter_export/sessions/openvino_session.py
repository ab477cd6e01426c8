"""The one place where OpenVINO is imported and a session of it is made."""

import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any, Final

import numpy as np

from xadapter_export.bundle.graph_check import check_openvino
from xadapter_export.errors import BundleError, ConfigError, import_extra
from xadapter_export.sessions.session import AS_IT_IS, Array, KnownValue, OnnxSession, Opening

_TELEMETRY: Final = "openvino_telemetry"
_DTYPES: Final = {"i64": "tensor(int64)", "f32": "tensor(float)"}
# Left alone, OpenVINO takes bfloat16 where the CPU has it: then what a bundle says would depend on the
# machine, and neither its proof nor its measured agreement would hold.
_SETTINGS: Final = {
    "PERFORMANCE_HINT": "LATENCY",
    "INFERENCE_PRECISION_HINT": "f32",
}


def import_openvino(module: str = "openvino") -> ModuleType:
    """Import OpenVINO, or a module that builds on it, with its telemetry switched off.

    On import both ``openvino`` and ``nncf`` start the package ``openvino_telemetry``, which writes below the
    user's home and sends events unless a file there forbids it. Both take a stub where it is not installed,
    and that is what they find here. Whatever imported OpenVINO earlier in this process decided for itself.

    Args:
        module: ``"openvino"`` or ``"nncf"``.

    Raises:
        MissingExtraError: If it cannot be imported.
    """
    with _without_telemetry():
        return import_extra(module, "openvino")


@contextmanager
def _without_telemetry() -> Iterator[None]:
    hidden = {name: sys.modules[name] for name in sys.modules if name.split(".")[0] == _TELEMETRY}
    sys.modules.update(dict.fromkeys(hidden) | {_TELEMETRY: None})  # type: ignore[arg-type]  # None: no such module
    try:
        yield
    finally:
        del sys.modules[_TELEMETRY]
        sys.modules.update(hidden)


class _OpenVinoSession:
    """A compiled model, for several threads: each call takes a request that no other call is using."""

    def __init__(self, compiled: Any) -> None:
        self._compiled = compiled
        self._outputs = {name: port for port in compiled.outputs for name in port.names}
        self._idle: list[Any] = []
        self._lock = threading.Lock()

    def run(self, output_names: Sequence[str] | None, input_feed: Mapping[str, Array]) -> list[Array]:
        names = [value.name for value in self.get_outputs()] if output_names is None else output_names
        ports = [self._outputs[name] for name in names]
        with self._lock:
            request = self._idle.pop() if self._idle else None
        request = request or self._compiled.create_infer_request()
        try:
            request.infer(dict(input_feed), share_inputs=True, share_outputs=True)
            # The next call writes over the originals. A lookup among the answers of infer is slower.
            return [np.array(request.get_tensor(port).data) for port in ports]
        finally:
            with self._lock:
                self._idle.append(request)

    def get_providers(self) -> list[str]:
        return ["OpenVINO"]

    def get_inputs(self) -> Sequence[KnownValue]:
        return [_describe(port) for port in self._compiled.inputs]

    def get_outputs(self) -> Sequence[KnownValue]:
        return [_describe(port) for port in self._compiled.outputs]


def open_openvino(model_file: Path, how: Opening = AS_IT_IS) -> OnnxSession:
    """Load OpenVINO's own form of a graph into OpenVINO's CPU engine.

    Whatever the file does not hold as int8 or int4 is computed in float32. The weights are mapped from the
    file. Nothing is sent, and nothing is written but the compiled graph, without its weights, where there is
    a place for it.

    Args:
        model_file: The ``.xml`` file; its weights are in the ``.bin`` file of the same name.
        how: How to open it. A compiled graph in ``cache_dir`` is read instead of being compiled; what another
            version of OpenVINO or another CPU left there, or what is damaged, is compiled anew.

    Returns:
        A session for several threads: inputs and outputs are int64 and float32, under the graph's names.

    Raises:
        MissingExtraError: If OpenVINO is not installed.
        ConfigError: If ``cache_dir`` cannot be written.
        BundleError: If the graph could do harm (``bundle.graph_check``), or OpenVINO cannot load it.
    """
    check_openvino(model_file)
    ov = import_openvino()
    settings = dict(_SETTINGS)
    if how.num_threads is not None:
        settings["INFERENCE_NUM_THREADS"] = str(how.num_threads)
    if how.cache_dir is not None:
        _make_writable(how.cache_dir)
        settings |= {"CACHE_DIR": str(how.cache_dir), "CACHE_MODE": "OPTIMIZE_SIZE"}  # without the weights
    try:
        compiled = ov.Core().compile_model(str(model_file), "CPU", settings)
    except Exception as error:  # OpenVINO raises RuntimeError for most, and its own error for a frontend
        raise BundleError("OpenVINO cannot load the graph", where=model_file, got=error) from error
    return _OpenVinoSession(compiled)


def _make_writable(cache_dir: Path) -> None:
    """Make the folder; OpenVINO itself says nothing where it cannot write there."""
    try:
        cache_dir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=cache_dir):
            pass
    except OSError as error:
        raise ConfigError(
            "the folder for compiled graphs cannot be written",
            where=cache_dir,
            got=error.strerror or error,
            hint="choose one that you can write to, or remove cache_dir (--cache-dir)",
        ) from error


def _describe(port: Any) -> KnownValue:
    shape: list[int | str | None] = [
        dim.get_length() if dim.is_static else None for dim in port.get_partial_shape()
    ]
    return KnownValue(port.get_any_name(), shape, _DTYPES[port.get_element_type().get_type_name()])
