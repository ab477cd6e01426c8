"""Engines that live in an environment of their own: CTranslate2, LiteRT and ExecuTorch, with their exporters.

They bring a gigabyte of packages that nothing else here needs, some in versions of their own. So the
benchmark makes one environment for them below its cache, which sees ours too, and runs their contestants with
its Python.
"""

import hashlib
import importlib.metadata
import shutil
import subprocess
import sys
import sysconfig
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from benchmarks import masked_cpu
from benchmarks.feeds import SHAPES
from xadapter_export.errors import XAdapterError

if TYPE_CHECKING:
    from benchmarks.prepare import Preparation
    from xadapter_export.model.x_adapter_model import XAdapterModel

PACKAGES: Final = ("ctranslate2==4.8.5", "executorch==1.5.1", "litert-torch==0.10.0")
_OURS: Final = ("numpy", "torch", "transformers")  # stay as they are
_PATCHED: Final = ("ctranslate2", "ctranslate2.libs", "ai_edge_litert", "executorch")
_LOCK: Final = threading.Lock()  # two preparations at a time ask for the same environment
_FAILED: Final[dict[Path, str]] = {}  # what could not be made in this run, and why
_MOST_TEXTS, _MOST_TOKENS = 32, 128  # that ExecuTorch plans memory for: the largest of ``SHAPES``
TFLITE: Final = "model.tflite"
PTE: Final = "model.pte"


class FieldError(XAdapterError, RuntimeError):
    """The environment of the other engines could not be made, or one of them cannot convert a model."""


def find_python(cache: Path) -> Path:
    """Make the environment, or find it made, and return its Python. A masked process has one of its own.

    Raises:
        FieldError: If pip cannot install the packages; the reason is its last line.
    """
    digest = hashlib.sha256(f"{PACKAGES} {_pins()} {sys.prefix} {sys.version}".encode()).hexdigest()[:16]
    folder = cache.resolve() / f"field-{digest}{'-masked' * masked_cpu.is_masked()}"
    with _LOCK:
        if folder in _FAILED:
            raise FieldError(_FAILED[folder])
        if not (folder / "done").is_file():
            try:
                _make(folder)
            except FieldError as error:
                _FAILED[folder] = str(error)
                raise
    return folder / "bin" / "python"


def _make(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    _run([sys.executable, "-m", "venv", str(folder)])
    (site,) = folder.glob("lib/python*/site-packages")
    (site / "ours.pth").write_text(sysconfig.get_path("purelib"), encoding="utf-8")
    pins = folder / "constraints.txt"
    pins.write_text("\n".join(_pins()), encoding="utf-8")
    pip = [str(folder / "bin" / "python"), "-m", "pip", "install", "--quiet"]
    _run([*pip, "--constraint", str(pins), *PACKAGES])
    if masked_cpu.is_masked():
        for name in _PATCHED:
            masked_cpu.patch_all(site / name)
    (folder / "done").touch()


def _pins() -> list[str]:
    return [f"{name}=={importlib.metadata.version(name).partition('+')[0]}" for name in _OURS]


def _run(command: list[str]) -> None:
    child = subprocess.run(command, check=False, capture_output=True, text=True)
    if child.returncode:
        lines = [line for line in child.stderr.strip().splitlines() if line.startswith("ERROR")]
        reason = (lines or child.stderr.strip().splitlines() or [f"exit {child.returncode}"])[-1]
        raise FieldError("the other engines could not be installed", got=reason)


# ---------------------------------------------------------------------------------- in their Python


def make_executorch(preparation: "Preparation", model: "XAdapterModel", folder: Path) -> None:
    """Give the model to transformers' own exporter for ExecuTorch, whose operators XNNPACK computes."""
    import torch
    from transformers.exporters.configs import ExecutorchConfig
    from transformers.exporters.exporter_executorch import ExecutorchExporter

    from benchmarks.prepare import as_target, second_axis

    target, inputs = as_target(model, preparation.experts)
    dims = {
        "batch": torch.export.Dim("batch", max=_MOST_TEXTS),
        "seq": torch.export.Dim("seq", max=min(_MOST_TOKENS, model.plm.max_seq)),
        "clip_seq": torch.export.Dim("clip_seq", max=model.clip.context_length if model.clip else None),
    }
    shapes = {name: {0: dims["batch"], 1: dims[second_axis(name)]} for name in inputs}
    exporter = ExecutorchExporter()  # type: ignore[no-untyped-call]  # transformers annotates no constructor here
    config = ExecutorchConfig(dynamic=True, dynamic_shapes=shapes)
    program, _ = exporter.export_program(target, inputs, config)
    exporter.save_program(program, folder / PTE)


def make_litert(preparation: "Preparation", model: "XAdapterModel", folder: Path) -> None:
    """Convert the module for LiteRT, with a signature for each shape that is timed, at our lengths.

    Its converter takes no symbolic length (``arange`` up to one is a TypeError), and no 64-bit arg-max, so
    the ids are 32 bits wide. The signatures share their weights.
    """
    import litert_torch

    from benchmarks.cases import make_feed, torch_feed
    from benchmarks.prepare import wrapper_of

    wrapper, inputs = wrapper_of(model, preparation.experts)
    converter: Any = litert_torch
    for batch, seq in SHAPES:
        if seq <= model.plm.max_seq:
            feed = torch_feed(make_feed(model, batch, seq))
            arguments = {name: feed[name].int() for name in inputs}
            converter = converter.signature(f"{batch}x{seq}", wrapper, sample_kwargs=arguments)
    converter.convert(strict_export=False).export(str(folder / TFLITE))


def make_litert_int8(preparation: "Preparation", folder: Path) -> None:
    """Apply Google's quantizer to the converted model: int8 weights, activations scaled as they come."""
    from ai_edge_quantizer import quantizer, recipe

    from benchmarks.prepare import of

    made = quantizer.Quantizer(str(of("litert", preparation, folder) / TFLITE), recipe.dynamic_wi8_afp32())
    made.quantize().export_model(str(folder / TFLITE))


def make_ctranslate2(preparation: "Preparation", model: "XAdapterModel", folder: Path) -> None:
    """Convert the PLM's encoder for CTranslate2, which has no MLM head, no CLIP and no adapters."""
    import torch
    from ctranslate2.converters import transformers as converters
    from transformers import BertModel

    encoder: Any = model.plm.encoder
    loader = converters._MODEL_LOADERS.get(type(encoder.config).__name__)
    if loader is None or not isinstance(encoder, BertModel):
        raise FieldError("CTranslate2 has no converter for this encoder", got=type(encoder).__name__)
    encoder.config.position_embedding_type = "absolute"  # which transformers 5 no longer says
    whole: Any = BertModel(encoder.config)  # with a pooler, which the converter asks for and nobody reads
    whole.load_state_dict(encoder.state_dict(), strict=False)
    with torch.no_grad():
        made = loader(whole.eval(), _Vocabulary(model))
    made.validate()
    made.optimize(quantization="int8" if preparation.kind.endswith("int8") else None)
    made.save(str(folder))


class _Vocabulary:
    """What CTranslate2's converter reads of a transformers tokenizer."""

    unk_token = "[UNK]"

    def __init__(self, model: "XAdapterModel") -> None:
        self.get_vocab: Callable[[], dict[str, int]] = model.plm.tokenizer.get_vocab
