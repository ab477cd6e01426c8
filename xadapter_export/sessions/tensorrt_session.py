"""The one place where a TensorRT engine is opened and run: on the NVIDIA GPU of this machine."""

import threading
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, Final

import numpy as np

from xadapter_export.bundle.manifest import Deployment
from xadapter_export.errors import BundleError, ProviderError, import_extra, import_installed
from xadapter_export.sessions.session import Array, KnownValue
from xadapter_export.targets import TARGETS

_TYPES: Final = {"INT64": "tensor(int64)", "FLOAT": "tensor(float)"}


def import_library(target: str) -> ModuleType:
    """Import the library that builds and runs the engines of a target.

    Raises:
        MissingExtraError: If it is not installed, or is the stub that PyPI has for ``tensorrt``.
    """
    runtime = TARGETS[target].runtime
    assert runtime is not None  # a session runs it
    return import_installed(runtime.module, *runtime.requirements)


def find_gpu() -> str:
    """Return the compute capability of the first GPU, as ``sm89``.

    Raises:
        MissingExtraError: If CUDA's Python bindings are not installed.
        ProviderError: If there is no GPU, or no driver for it.
    """
    cuda = import_extra("cuda.bindings.runtime", "tensorrt")
    error, count = cuda.cudaGetDeviceCount()
    if int(error) or not count:
        raise ProviderError(
            "an engine needs an NVIDIA GPU, and CUDA finds none on this machine",
            got=error.name if int(error) else "no device",
            hint="run the same command on a machine with a GPU and its driver",
        )
    attribute = cuda.cudaDeviceAttr
    major, minor = (
        _check(cuda.cudaDeviceGetAttribute(kind, 0))
        for kind in (
            attribute.cudaDevAttrComputeCapabilityMajor,
            attribute.cudaDevAttrComputeCapabilityMinor,
        )
    )
    return f"sm{major}{minor}"


def engine_file_for(made: Deployment, gpu: str) -> str:
    """Return the file of the engine for a GPU, as ``find_gpu`` names it.

    Raises:
        ProviderError: If there is none.
        BundleError: If the manifest does not list it.
    """
    for label, file in made.engines.items():
        if gpu in label.split("+"):
            if file not in made.files:  # a path of the facts is trusted no further than the files
                raise BundleError("the manifest names an engine that is not among its files", where=file)
            return file
    raise ProviderError(
        f"the bundle has no engine for this GPU ({gpu})",
        where=f"{made.target}, experts {made.expert_set}, {made.source}",
        expected=f"one of {', '.join(made.engines)}",
        hint=f"export it with --compute-capability {gpu}, or current on a machine with such a GPU",
    )


def largest_batch(made: Deployment) -> int:
    """Return how many texts the engines of a deployment take together at most."""
    return int(made.facts["profile batch"].rpartition("..")[2])


class EngineSession:
    """An engine with memory of its own on the GPU; one call at a time.

    Memory of an input or output is kept from call to call, and grows with the largest.
    """

    def __init__(self, engine: Any, library: ModuleType, cuda: ModuleType, kept: tuple[object, ...]) -> None:
        self._kept = kept  # what the engine refers to: it must outlive it
        self._engine, self._library, self._cuda = engine, library, cuda
        self._context = engine.create_execution_context()
        if self._context is None:
            raise ProviderError(
                "the GPU does not have enough free memory for the engine",
                got=f"{engine.device_memory_size_v2} bytes",
            )
        self._stream = _check(cuda.cudaStreamCreate())
        self._lock = threading.Lock()
        self._places: dict[str, tuple[int, int]] = {}  # address and bytes
        weakref.finalize(self, _free, cuda, self._places, self._stream)
        names: list[str] = [engine.get_tensor_name(number) for number in range(engine.num_io_tensors)]
        is_input = [engine.get_tensor_mode(name) == library.TensorIOMode.INPUT for name in names]
        self._inputs = [name for name, chosen in zip(names, is_input, strict=True) if chosen]
        self._outputs = [name for name, chosen in zip(names, is_input, strict=True) if not chosen]

    def fits(self, feed: Mapping[str, Array]) -> bool:
        """Whether the engine was planned for inputs of these shapes."""
        return self._unplanned(feed) is None

    def _unplanned(self, feed: Mapping[str, Array]) -> str | None:
        """Return the first input whose shape is outside the profile, or None."""
        for name in self._inputs:
            least, _, largest = self._engine.get_tensor_profile_shape(name, 0)
            shape = feed[name].shape
            if not all(a <= n <= b for a, n, b in zip(least, shape, largest, strict=True)):
                return name
        return None

    def run(self, output_names: Sequence[str] | None, input_feed: Mapping[str, Array]) -> list[Array]:
        """Compute the named outputs.

        Raises:
            BundleError: If the engine was not planned for these shapes, or the GPU fails.
        """
        cuda, context = self._cuda, self._context
        to_gpu = cuda.cudaMemcpyKind.cudaMemcpyHostToDevice
        to_cpu = cuda.cudaMemcpyKind.cudaMemcpyDeviceToHost
        with self._lock:
            if (name := self._unplanned(input_feed)) is not None:
                least, _, largest = map(tuple, self._engine.get_tensor_profile_shape(name, 0))
                raise BundleError(
                    "the engine was not built for this shape",
                    where=name,
                    expected=f"{least} to {largest}",
                    got=input_feed[name].shape,
                    hint="export again with a wider --profile, or choose another variant",
                )
            for name in self._inputs:
                array = np.ascontiguousarray(input_feed[name])
                context.set_input_shape(name, array.shape)
                address = self._place(name, array.nbytes)
                _check(cuda.cudaMemcpyAsync(address, array.ctypes.data, array.nbytes, to_gpu, self._stream))
            answers: dict[str, Array] = {}
            for name in self._outputs:
                dtype = self._library.nptype(self._engine.get_tensor_dtype(name))
                answers[name] = np.empty(tuple(context.get_tensor_shape(name)), dtype)
                self._place(name, answers[name].nbytes)
            if not context.execute_async_v3(int(self._stream)):
                raise BundleError("the engine cannot run on these inputs")
            names = self._outputs if output_names is None else output_names
            for name in names:
                array, (address, _) = answers[name], self._places[name]
                _check(cuda.cudaMemcpyAsync(array.ctypes.data, address, array.nbytes, to_cpu, self._stream))
            _check(cuda.cudaStreamSynchronize(self._stream))
            return [answers[name] for name in names]

    def _place(self, name: str, size_bytes: int) -> int:
        """Return the address of an input or output on the GPU, where there is room for so many bytes."""
        address, capacity = self._places.get(name, (0, 0))
        if capacity < max(size_bytes, 1):
            if address:
                del self._places[name]
                _check(self._cuda.cudaFree(address))
            address = int(_check(self._cuda.cudaMalloc(max(size_bytes, 1))))
            self._places[name] = address, max(size_bytes, 1)
            self._context.set_tensor_address(name, address)
        return address

    def get_providers(self) -> list[str]:
        """Return the library's name and version."""
        return [f"{self._library.__name__} {self._library.__version__}"]

    def get_inputs(self) -> Sequence[KnownValue]:
        """Return the engine's inputs."""
        return [self._describe(name) for name in self._inputs]

    def get_outputs(self) -> Sequence[KnownValue]:
        """Return the engine's outputs."""
        return [self._describe(name) for name in self._outputs]

    def _describe(self, name: str) -> KnownValue:
        shape = [None if size < 0 else int(size) for size in self._engine.get_tensor_shape(name)]
        return KnownValue(name, list(shape), _TYPES[self._engine.get_tensor_dtype(name).name])


def make_logger(library: ModuleType, errors: list[str]) -> Any:
    """Return a logger for the library that adds what it says of errors to a list."""

    class Logger(library.ILogger):  # type: ignore[misc, name-defined]  # a module that is known only here
        def __init__(self) -> None:
            library.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            if severity <= library.ILogger.Severity.ERROR:
                errors.append(message)

    return Logger()


def open_engine(file: Path, target: str) -> EngineSession:
    """Load an engine onto the GPU of this machine.

    Args:
        file: The engine.
        target: Whose it is.

    Raises:
        MissingExtraError: If the library, or CUDA's Python bindings, are not installed.
        ProviderError: If there is no GPU, or the library cannot load the engine on it.
    """
    library = import_library(target)
    gpu = find_gpu()
    complaints: list[str] = []
    logger = make_logger(library, complaints)
    runtime = library.Runtime(logger)
    engine = runtime.deserialize_cuda_engine(file.read_bytes())
    if engine is None:
        raise ProviderError(
            f"{library.__name__} {library.__version__} cannot load the engine on this GPU ({gpu})",
            where=file,
            got=complaints[0] if complaints else "no reason given",
            hint="an engine runs only with the version that built it: export again with this version",
        )
    cuda = import_extra("cuda.bindings.runtime", "tensorrt")
    return EngineSession(engine, library, cuda, (runtime, logger))


def _free(cuda: ModuleType, places: dict[str, tuple[int, int]], stream: Any) -> None:
    """Give back what a session had on the GPU."""
    for address, _ in places.values():
        cuda.cudaFree(address)
    cuda.cudaStreamDestroy(stream)


def _check(answer: tuple[Any, ...]) -> Any:
    """Return what a call of CUDA gave.

    Raises:
        BundleError: If it failed: there is no memory left on the GPU, say.
    """
    error, *values = answer
    if int(error):
        raise BundleError("CUDA failed", got=error.name)
    return values[0] if values else None
