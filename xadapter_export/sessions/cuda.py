"""CUDA in onnxruntime: its options, what is missing where it does not start, runs that stay on the GPU."""

import contextlib
import ctypes
import io
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from xadapter_export.targets import CUDA_PROVIDER

_WARNINGS, _FATAL_ONLY = 2, 4  # onnxruntime's log severities
_Array = NDArray[np.int64] | NDArray[np.float32]


def exact_options(provider: str | tuple[str, dict[str, str]]) -> str | tuple[str, dict[str, str]]:
    """Return a provider with TF32 off, which keeps 10 of fp32's 23 bits, unless it was asked for."""
    name, options = (provider, {}) if isinstance(provider, str) else provider
    return (name, {"use_tf32": "0", **options}) if name == CUDA_PROVIDER else provider


def preload(ort: ModuleType) -> None:
    """Let onnxruntime find the CUDA libraries that pip installed, where there are some."""
    if hasattr(ort, "preload_dlls"):
        with contextlib.redirect_stdout(io.StringIO()):  # it prints what it does not find
            ort.preload_dlls()


def find_missing(ort: ModuleType) -> tuple[str, ...]:
    """Return what CUDA lacks on this machine: the driver, and the first library that cannot be loaded."""
    is_windows = sys.platform == "win32"
    driver = "nvcuda.dll" if is_windows else "libcuda.so.1"
    missing = [f"NVIDIA's driver ({driver})"] if _load_error(driver) else []
    capi = Path(str(ort.__file__)).parent / "capi"
    stem, ending = ("", ".dll") if is_windows else ("lib", ".so")
    preload(ort)
    for part in ("shared", "cuda"):  # the second refers to the first
        file = capi / f"{stem}onnxruntime_providers_{part}{ending}"
        if error := _load_error(str(file)):
            library = error.partition(":")[0]
            if library != driver:
                missing.append(library)
            break
    return tuple(missing)


def _load_error(library: str) -> str | None:
    """Return why a library cannot be loaded, in the loader's words, or None."""
    try:
        ctypes.CDLL(library, mode=ctypes.RTLD_GLOBAL)
    except OSError as error:
        return str(error)
    return None


@contextlib.contextmanager
def silenced(ort: ModuleType) -> Iterator[None]:
    """Keep onnxruntime's own log, which is the whole process's, to what is fatal.

    It does not tell what it was set to, so that afterwards it is what onnxruntime sets: warnings.
    """
    ort.set_default_logger_severity(_FATAL_ONLY)
    try:
        yield
    finally:
        ort.set_default_logger_severity(_WARNINGS)


class BoundSession:
    """A session whose inputs and outputs are bound: only what is asked for comes back from the device."""

    def __init__(self, session: Any) -> None:
        self._session = session

    def run(self, output_names: Sequence[str] | None, input_feed: Mapping[str, _Array]) -> list[_Array]:
        """Compute the named outputs."""
        binding = self._session.io_binding()  # one for each call: threads share the session
        for name, array in input_feed.items():
            binding.bind_cpu_input(name, np.ascontiguousarray(array))
        names = [value.name for value in self.get_outputs()] if output_names is None else output_names
        for name in names:
            binding.bind_output(name)
        self._session.run_with_iobinding(binding)
        answers: list[_Array] = binding.copy_outputs_to_cpu()
        return answers

    def get_providers(self) -> list[str]:
        """Return the active execution providers."""
        return list(self._session.get_providers())

    def get_inputs(self) -> Sequence[Any]:
        """Return the graph's inputs."""
        return list(self._session.get_inputs())

    def get_outputs(self) -> Sequence[Any]:
        """Return the graph's outputs."""
        return list(self._session.get_outputs())
