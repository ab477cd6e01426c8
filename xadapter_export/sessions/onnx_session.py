"""Graphs in onnxruntime: providers, threads and clear errors."""

import warnings
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from types import ModuleType

from xadapter_export.bundle.graph_check import check_onnx
from xadapter_export.bundle.graph_file import read_linked, with_weights
from xadapter_export.errors import (
    BundleError,
    MissingExtraError,
    ProviderError,
    import_installed,
)
from xadapter_export.registry import installed_version
from xadapter_export.sessions.cuda import (
    BoundSession,
    exact_options,
    find_missing,
    preload,
    silenced,
)
from xadapter_export.sessions.session import AS_IT_IS, OnnxSession, Opening, Provider
from xadapter_export.targets import CPU_PROVIDER, CUDA_PROVIDER, ONNXRUNTIME

_WEIGHTS_FOLDER_KEY = "session.model_external_initializers_file_folder_path"
# onnxruntime fuses a sum and the norm after it into one operator that is not vectorized on the CPU: in
# BERT-base at 8x32 it took 22 ms of 128, the two operators apart 5 (docs/log.md).
_SLOW_FUSIONS = ("SkipLayerNormFusion",)
_ERRORS_ONLY = 3  # onnxruntime's log severity; the warnings of a session are about its own graph passes


def open_onnx(model_file: Path, how: Opening = AS_IT_IS) -> OnnxSession:
    """Load a graph into onnxruntime.

    Args:
        model_file: The ``.onnx`` file; its external weights are looked for in its folder.
        how: How to open it; a folder for what was compiled is left aside.

    Raises:
        MissingExtraError: If onnxruntime is not installed.
        ProviderError: If a provider that was named is not there or does not start.
        BundleError: If the graph could do harm (``bundle.graph_check``), or onnxruntime cannot load it.
    """
    check_onnx(model_file, how.weight_files)
    ort = _import_onnxruntime()
    wanted = _providers(ort, how.providers)
    names = [provider if isinstance(provider, str) else provider[0] for provider in wanted]
    options = ort.SessionOptions()
    options.log_severity_level = _ERRORS_ONLY
    if how.num_threads is not None:
        options.intra_op_num_threads = how.num_threads
    model: str | bytes = str(model_file)
    if how.appended or how.weights or model_file.is_symlink():
        is_link = model_file.is_symlink()
        model, folder = read_linked(model_file) if is_link else (model_file.read_bytes(), model_file.parent)
        options.add_session_config_entry(_WEIGHTS_FOLDER_KEY, str(folder))
        model = (with_weights(model, model_file, how.weights) if how.weights else model) + how.appended
    try:
        slow = _SLOW_FUSIONS if names == [CPU_PROVIDER] else ()
        # What CUDA misses is said below, in one line.
        with silenced(ort) if CUDA_PROVIDER in names else nullcontext():
            session: OnnxSession = ort.InferenceSession(
                model,
                options,
                providers=wanted,
                disabled_optimizers=list(slow),
                enable_fallback=0,  # or a provider that fails while it runs would become the CPU unseen
            )
    except Exception as error:  # onnxruntime's own errors have no common base below Exception
        if CUDA_PROVIDER in names and (missing := find_missing(ort)):
            raise _did_not_start(missing, names, error) from error
        raise BundleError("onnxruntime cannot load the graph", where=model_file, got=error) from error
    if CUDA_PROVIDER in names and CUDA_PROVIDER not in session.get_providers():
        raise _did_not_start(find_missing(ort), names, ", ".join(session.get_providers()))
    _check_active(names, session.get_providers(), "did not start")
    return session if session.get_providers() == [CPU_PROVIDER] else BoundSession(session)


def _providers(ort: ModuleType, asked: Sequence[Provider] | None) -> list[Provider]:
    """Return the providers that were asked for, or the CPU, with their libraries loaded.

    Raises:
        ProviderError: If this onnxruntime has no such provider.
    """
    available = ort.get_available_providers()
    if not asked and CUDA_PROVIDER in available:
        _warn_that_the_cpu_answers(ort)
    wanted = [exact_options(provider) for provider in asked or [CPU_PROVIDER]]
    names = [provider if isinstance(provider, str) else provider[0] for provider in wanted]
    _check_known(names, available)
    _check_active(names, available, "is not in this onnxruntime")
    if CUDA_PROVIDER in names:
        preload(ort)
    return wanted


def _did_not_start(missing: Sequence[str], names: Sequence[str], got: object) -> ProviderError:
    """Return the error that says what CUDA lacks here."""
    lacking = f"; missing: {', '.join(missing)}" if missing else ""
    return ProviderError(
        f"the execution provider {CUDA_PROVIDER} did not start{lacking}",
        expected=", ".join(names),
        got=got,
        hint=_clash()
        or 'install an NVIDIA driver, and CUDA and cuDNN with: pip install "onnxruntime-gpu[cuda,cudnn]"; or '
        "fall back to the CPU with allow_fallback=True (xad-run --allow-fallback)",
    )


def _warn_that_the_cpu_answers(ort: ModuleType) -> None:
    missing = find_missing(ort)
    why = (
        f"CUDA cannot start here (missing: {', '.join(missing)})" if missing else "no provider was requested"
    )
    warnings.warn(
        f"onnxruntime-gpu is installed, but {why}; using the CPU. Request the GPU with "
        f'providers=["{CUDA_PROVIDER}"] (--provider {CUDA_PROVIDER})',
        UserWarning,
        stacklevel=4,
    )


def _import_onnxruntime() -> ModuleType:
    clash = _clash()
    try:
        ort = import_installed(ONNXRUNTIME.module, *ONNXRUNTIME.requirements)
    except MissingExtraError as error:
        if clash is None:
            raise
        raise MissingExtraError("onnxruntime cannot be imported", got=error.__cause__, hint=clash) from error
    ort.disable_telemetry_events()
    if clash is not None:
        warnings.warn(clash, UserWarning, stacklevel=3)
    return ort


def _check_known(names: Sequence[str], available: Sequence[str]) -> None:
    """Refuse the first name that is not a whole provider name.

    Raises:
        ProviderError: If there is one; the hint has the provider that was probably meant.
    """
    for name in names:
        if name.endswith("ExecutionProvider"):
            continue
        known = dict.fromkeys([*available, CUDA_PROVIDER])
        meant = next((whole for whole in known if whole.lower().startswith(name.lower())), None)
        raise ProviderError(
            "there is no execution provider of this name",
            where=name,
            hint=(f"did you mean {meant}? " if meant else "") + f"available here: {', '.join(available)}",
        )


def _check_active(names: Sequence[str], active: Sequence[str], problem: str) -> None:
    missing = [name for name in names if name not in active]
    if missing:
        raise ProviderError(
            f"the execution provider {missing[0]} {problem}",
            expected=", ".join(names),
            got=", ".join(active),
            hint=_clash() or 'a GPU needs: pip install "xadapter-export[gpu]", its driver and its libraries',
        )


def _clash() -> str | None:
    """Return what to do about two onnxruntime packages in one place: they overwrite each other's files."""
    found = [name for name in ONNXRUNTIME.distributions if installed_version(name)]
    if len(found) < 2:
        return None
    return (
        f"{' and '.join(found)} are both installed and overwrite each other's files: run "
        f"pip uninstall -y {' '.join(found)} and install one of xadapter-export[cpu] and xadapter-export[gpu]"
    )
