"""The table of targets: who runs a graph, or what files are made from one.

A target is one row here and one maker, a module of ``exporters/makers``; one that a session runs has an
opener too, a module of ``sessions``. The row says all that the rest of the library asks of a target, so that
its name is compared nowhere else (``tests/repository/test_house.py`` counts).

There are two sorts. A *variant* is a graph of the bundle, made from the portable graph of its expert set and
compared with PyTorch. A *deployment* is files for another runtime, made from a variant that is proven.

Another package adds a target as an entry point of the group ``xadapter_export.targets``, which names a row.
Makers and openers are named, and imported when they are needed.
"""

import importlib.util
import warnings
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Final, Literal, NamedTuple, get_args

from xadapter_export.errors import UnsupportedError
from xadapter_export.registry import Registry

Precision = Literal["fp32", "fp16", "int8", "int4"]
PRECISIONS: Final[tuple[Precision, ...]] = get_args(Precision)

CPU_PROVIDER: Final = "CPUExecutionProvider"
CUDA_PROVIDER: Final = "CUDAExecutionProvider"
GPU_PROVIDERS: Final = frozenset(
    f"{name}ExecutionProvider"
    for name in ("CUDA", "Tensorrt", "NvTensorRTRTX", "ROCM", "MIGraphX", "Dml", "CoreML", "WebGpu")
)

Kind = Literal[
    "x86-64 with VNNI",
    "x86-64 with AVX2",
    "x86-64 without AVX2",
    "Arm with int8 dot products",
    "Arm without int8 dot products",
    "any other CPU",
]
KINDS: Final[tuple[Kind, ...]] = get_args(Kind)

Int8 = Literal["always", "if it gets nothing else", "if nobody else takes it"]

AXES: Final = ("batch", "seq", "masks", "clip_seq")  # that vary in length; those of a profile


class VariantName(NamedTuple):
    """Target and precision: what ``--variant`` names."""

    target: str
    precision: Precision

    def __str__(self) -> str:
        """Return it as it is written, ``cpu-int8``."""
        return f"{self.target}-{self.precision}"


PORTABLE: Final = "onnx-fp32"  # the master: standard operators, and all else is made from it


@dataclass(frozen=True)
class Runtime:
    """The library that runs a target.

    Attributes:
        name: As people call it.
        module: What is imported.
        requirements: What pip installs to bring it, as ``my-package[export]``; one of them is enough.
        distributions: Its packages, as pip calls them.
        is_optional: Whether a machine that runs bundles may lack it.
    """

    name: str
    module: str
    requirements: tuple[str, ...]
    distributions: tuple[str, ...]
    is_optional: bool = True

    @property
    def is_installed(self) -> bool:
        """Whether Python finds it."""
        try:
            return importlib.util.find_spec(self.module) is not None
        except ModuleNotFoundError:  # nor the package that it is in
            return False


@dataclass(frozen=True)
class Target:
    """One row of the table.

    Attributes:
        name: ``openvino``; with a precision it names a variant, ``openvino-int8``.
        says: Who runs it, for ``--help`` and the docs.
        maker: Where its maker is, ``module:class``; see ``exporters.makers.maker``.
        precisions: Those that it takes.
        opener: Where its opener is, ``module:function``; None where no session runs it.
        runtime: What the opener runs it with; None where there is no opener.
        made_from: Of a deployment, the variant that each precision is made from; empty of a variant.
        needs: What its maker imports besides the extra ``export``: a module, and what pip installs for it.
        provider: The only execution provider of onnxruntime that it is for; None if it runs with any.
        default_for: Precisions that are made for it where no target is named.
        int8: When ``--precision int8`` is made for it, where several of the targets that are named take int8.
        splits: Precisions that are made of two graphs as well as of one: nothing is calibrated on the inputs
            of a graph.
        taps: Which contributions of experts can be read in its graphs: ``all``, those ``left`` by fusion, or
            ``none``.
        swap_refused: Why its ONNX files cannot take another bank, by precision; no other files can.
        axes: Axes of a profile that it is planned for.
        largest_axes: Those of which it reads only the largest length.
        reads: Other options for deployments that it reads, as the command names them.
        places: Where each precision stands in the order of ``auto``, by the kinds of CPU in the order of
            ``KINDS``: the lowest place that is in a bundle is taken. A precision without places never is.
        why: Why its int8 is taken on a kind of CPU.
    """

    name: str
    says: str
    maker: str
    precisions: tuple[Precision, ...]
    opener: str | None = None
    runtime: Runtime | None = None
    made_from: Mapping[Precision, VariantName] = field(default_factory=dict)
    needs: tuple[str, str] | None = None
    provider: str | None = None
    default_for: tuple[Precision, ...] = ()
    int8: Int8 = "always"
    splits: tuple[Precision, ...] = ()
    taps: Literal["all", "left", "none"] = "none"
    swap_refused: Mapping[Precision, str] = field(default_factory=dict)
    axes: tuple[str, ...] = ()
    largest_axes: tuple[str, ...] = ()
    reads: tuple[str, ...] = ()
    places: Mapping[Precision, tuple[int, ...]] = field(default_factory=dict)
    why: Mapping[Kind, str] = field(default_factory=dict)

    @property
    def variants(self) -> tuple[VariantName, ...]:
        """Its names with each of its precisions."""
        return tuple(VariantName(self.name, precision) for precision in self.precisions)

    @property
    def is_deployment(self) -> bool:
        """Whether it is made from a variant of the bundle, and is none itself."""
        return bool(self.made_from)

    @property
    def is_engine(self) -> bool:
        """Whether it is a deployment that a session can run."""
        return self.is_deployment and self.opener is not None

    @property
    def runs_on_cpu(self) -> bool:
        """Whether a session can run it with no GPU."""
        return not self.is_engine and (self.provider is None or self.provider not in GPU_PROVIDERS)

    def runs_with(self, providers: Collection[str]) -> bool:
        """Whether its variants can be run with these providers; with the CPU all can, if slowly."""
        others = set(providers) - {CPU_PROVIDER}
        return self.provider is None or not others or self.provider in others

    def is_for_gpu(self, precision: str) -> bool:
        """Whether no CPU runs it as fast as fp32."""
        return precision == "fp16" or not self.runs_on_cpu


ONNXRUNTIME: Final = Runtime(
    "onnxruntime",
    "onnxruntime",
    ("xadapter-export[cpu]", "xadapter-export[gpu]"),
    ("onnxruntime", "onnxruntime-gpu"),
    is_optional=False,
)
_TENSORRT_EXTRA: Final = "xadapter-export[tensorrt]"
_OPENVINO: Final = Runtime("OpenVINO", "openvino", ("xadapter-export[openvino]",), ("openvino",))
_TENSORRT: Final = Runtime("TensorRT", "tensorrt", (_TENSORRT_EXTRA,), ("tensorrt",))
_TENSORRT_RTX: Final = Runtime("TensorRT-RTX", "tensorrt_rtx", (_TENSORRT_EXTRA,), ("tensorrt-rtx",))

_MAKERS: Final = "xadapter_export.exporters.makers"
_OPEN_ONNX: Final = "xadapter_export.sessions.onnx_session:open_onnx"
_OPEN_ENGINE: Final = "xadapter_export.sessions.tensorrt_session:open_engine"

_ENGINES: Final[dict[Precision, VariantName]] = {
    "fp32": VariantName("onnx", "fp32"),
    "fp16": VariantName("onnx", "fp16"),
    "int8": VariantName("onnx", "int8"),
}

_TABLE: Final = (
    Target(
        name="onnx",
        says="any ONNX runtime",
        maker=f"{_MAKERS}.onnx_graphs:PortableMaker",
        precisions=("fp32", "fp16", "int8"),
        opener=_OPEN_ONNX,
        runtime=ONNXRUNTIME,
        default_for=("fp32", "fp16"),
        int8="if nobody else takes it",
        splits=("fp32", "fp16"),
        taps="all",
        swap_refused={"int8": "was calibrated with the old bank"},
        places={"fp32": (50, 50, 30, 30, 20, 20), "int8": (60, 60, 60, 40, 40, 40)},
    ),
    Target(
        name="cpu",
        says="onnxruntime's CPU provider",
        maker=f"{_MAKERS}.onnx_graphs:CpuMaker",
        precisions=("fp32", "int8", "int4"),
        opener=_OPEN_ONNX,
        runtime=ONNXRUNTIME,
        provider=CPU_PROVIDER,
        default_for=("int8", "int4"),
        splits=("fp32", "int8", "int4"),
        taps="left",
        places={"fp32": (40, 40, 20, 20, 10, 10), "int8": (20, 10, 40, 10, 30, 30)},
        why={
            "x86-64 with VNNI": "int8 products are fast with VNNI",
            "x86-64 with AVX2": "onnxruntime's int8 is the fastest with AVX2 alone",
            "Arm with int8 dot products": "int8 products are fast with Arm's dot products",
        },
    ),
    Target(
        name="cuda",
        says="onnxruntime's CUDA provider",
        maker=f"{_MAKERS}.onnx_graphs:CudaMaker",
        precisions=("fp32", "fp16"),
        opener=_OPEN_ONNX,
        runtime=ONNXRUNTIME,
        provider=CUDA_PROVIDER,
        splits=("fp32", "fp16"),
        taps="left",
    ),
    Target(
        name="openvino",
        says="OpenVINO on x86",
        maker=f"{_MAKERS}.openvino_ir:OpenVinoMaker",
        precisions=("fp32", "int8", "int4"),
        opener="xadapter_export.sessions.openvino_session:open_openvino",
        runtime=_OPENVINO,
        provider=CPU_PROVIDER,
        # Its engine for Arm has no int8 kernels of its own.
        places={"fp32": (30, 30, 10, 50, 50, 50), "int8": (10, 20, 50, 60, 60, 60)},
        why={
            "x86-64 with VNNI": "OpenVINO's int8 is the fastest with VNNI",
            "x86-64 with AVX2": "OpenVINO's int8 is faster than fp32 for small models with AVX2",
        },
    ),
    Target(
        name="tensorrt-rtx",
        says="engines for NVIDIA GPUs, built without one",
        maker=f"{_MAKERS}.tensorrt_engines:TensorRtRtxMaker",
        precisions=tuple(_ENGINES),
        opener=_OPEN_ENGINE,
        runtime=_TENSORRT_RTX,
        made_from=_ENGINES,
        needs=("tensorrt_rtx", _TENSORRT_EXTRA),
        int8="if it gets nothing else",
        axes=AXES,
        reads=("compute-capability",),
    ),
    Target(
        name="tensorrt",
        says="a folder to build NVIDIA engines from",
        maker=f"{_MAKERS}.tensorrt_folder:TensorRtMaker",
        precisions=tuple(_ENGINES),
        opener=_OPEN_ENGINE,
        runtime=_TENSORRT,
        made_from=_ENGINES,
        needs=("polygraphy.json", _TENSORRT_EXTRA),
        int8="if it gets nothing else",
        axes=AXES,
    ),
    Target(
        name="mobile",
        says=".ort files for phones",
        maker=f"{_MAKERS}.mobile:MobileMaker",
        precisions=("fp32", "int8"),
        made_from={"fp32": VariantName("onnx", "fp32"), "int8": VariantName("cpu", "int8")},
    ),
    Target(
        name="triton",
        says="a model repository for Triton Inference Server",
        maker=f"{_MAKERS}.triton:TritonMaker",
        precisions=("fp32", "fp16", "int8"),
        made_from={
            "fp32": VariantName("onnx", "fp32"),
            "fp16": VariantName("onnx", "fp16"),
            "int8": VariantName("cpu", "int8"),
        },
        needs=("tritonclient.grpc.model_config_pb2", "xadapter-export[triton]"),
        largest_axes=("batch",),
    ),
)
TARGETS: Final[Registry[Target]] = Registry("xadapter_export.targets", "target", *_TABLE)


@cache
def all_targets() -> tuple[Target, ...]:
    """Return every target, ours first; one of another package that cannot be loaded is a warning."""
    found: list[Target] = []
    for name in TARGETS:
        try:
            found.append(TARGETS[name])
        except UnsupportedError as error:
            warnings.warn(str(error), UserWarning, stacklevel=2)
    return tuple(found)


@cache
def all_variants() -> Mapping[str, VariantName]:
    """Return every variant and deployment that can be asked for, by name."""
    return {str(name): name for target in all_targets() for name in target.variants}
