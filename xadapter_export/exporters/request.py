"""What an export was asked to write, and what the options alone rule out; PyTorch is not needed to tell."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from xadapter_export.errors import ConfigError

if TYPE_CHECKING:
    from xadapter_export.bundle.manifest import DeploymentTarget, Precision, Target

    GraphName = tuple[Target, Precision]
    DeploymentName = tuple[DeploymentTarget, Precision]

# The precisions that a target takes. Of a deployment also the target whose graph it is made from.
TARGETS: Final[dict["Target", tuple["Precision", ...]]] = {
    "onnx": ("fp32", "fp16", "int8"),
    "cpu": ("fp32", "int8", "int4"),
    "cuda": ("fp32", "fp16"),
    "openvino": ("fp32", "int8", "int4"),
}
_ENGINES: Final[dict["Precision", "Target"]] = {"fp32": "onnx", "fp16": "onnx", "int8": "onnx"}
DEPLOYMENTS: Final[dict["DeploymentTarget", dict["Precision", "Target"]]] = {
    "tensorrt-rtx": _ENGINES,
    "tensorrt": _ENGINES,
    "mobile": {"fp32": "onnx", "int8": "cpu"},
    "triton": {"fp32": "onnx", "fp16": "onnx", "int8": "cpu"},
}
PRECISIONS: Final[tuple["Precision", ...]] = ("fp32", "fp16", "int8", "int4")
# Every variant that can be asked for by its name.
_GRAPHS: Final[dict[str, "GraphName"]] = {f"{t}-{p}": (t, p) for t, takes in TARGETS.items() for p in takes}
_DEPLOYMENTS: Final[dict[str, "DeploymentName"]] = {
    f"{t}-{p}": (t, p) for t, takes in DEPLOYMENTS.items() for p in takes
}
VARIANTS: Final = (*_GRAPHS, *_DEPLOYMENTS)

_DEFAULT_TARGETS: Final[dict["Precision", "Target"]] = {
    "fp32": "onnx",
    "fp16": "onnx",
    "int8": "cpu",
    "int4": "cpu",
}
# Who takes int8 where several of the targets do: the first of these groups that was named.
_INT8_FIRST: Final = (("cpu", "openvino", "mobile", "triton"), ("tensorrt-rtx", "tensorrt"), ("onnx",))
# What is made from two graphs as well as from one: nothing here is calibrated on a graph's inputs.
_SPLIT: Final = ("onnx-fp32", "onnx-fp16", "cpu-fp32", "cpu-int8", "cpu-int4", "cuda-fp32", "cuda-fp16")


@dataclass(frozen=True)
class Request:
    """What to write, each once.

    Attributes:
        graphs: The graphs that the bundle holds, those that deployments are made from among them.
        deployments: What is made from them for other runtimes.
    """

    graphs: tuple["GraphName", ...]
    deployments: tuple["DeploymentName", ...] = ()

    def source(self, deployment: "DeploymentName") -> "GraphName":
        """Return the graph that a deployment is made from."""
        target, precision = deployment
        return DEPLOYMENTS[target][precision], precision

    @property
    def is_lossy(self) -> bool:
        """Whether a graph is in fewer bits than fp32."""
        return any(precision != "fp32" for _, precision in self.graphs)


def check_names(kind: str, names: Iterable[str], known: Sequence[str]) -> None:
    """Refuse names that are not known, which Python callers can misspell.

    Raises:
        ConfigError: If there is one.
    """
    for name in names:
        if name not in known:
            raise ConfigError(f"unknown {kind}", where=name, expected=f"one of {', '.join(known)}")


def make_request(
    variants: Sequence[str] = (),
    precisions: Sequence["Precision"] = (),
    targets: Sequence["Target | DeploymentTarget"] = (),
) -> Request:
    """Return what to write: the variants that were named, and what precisions and targets stand for.

    Every target gets each of the precisions that it takes, but int8 is not written for all: it goes to
    ``cpu``, ``openvino``, ``mobile`` and ``triton`` where one of them is named, else to TensorRT, else to
    ``onnx``. TensorRT gets it alongside them if it would get nothing else. Without targets fp32 and fp16 are
    written for ``onnx``, int8 and int4 for ``cpu``; without precisions it is fp32; without anything
    ``onnx-fp32``.

    Args:
        variants: Whole names, as ``cpu-int8`` or ``tensorrt-rtx-fp16``; some of ``VARIANTS``.
        precisions: Precisions, with ``targets``.
        targets: Targets, with ``precisions``.

    Raises:
        ConfigError: If a name is not known, or a precision, or a target, is left without the other.
    """
    check_names("variant", variants, VARIANTS)
    check_names("precision", precisions, PRECISIONS)
    check_names("target", targets, (*TARGETS, *DEPLOYMENTS))
    names = list(variants)
    if precisions or targets or not variants:
        names = [*_read_shorthand(precisions or ("fp32",), targets), *names]
    deployments = tuple(dict.fromkeys(_DEPLOYMENTS[name] for name in names if name in _DEPLOYMENTS))
    graphs = [_GRAPHS[name] for name in names if name in _GRAPHS]
    request = Request((), deployments)
    graphs += [request.source(deployment) for deployment in deployments]
    return Request(tuple(dict.fromkeys(graphs)), deployments)


def check_gate_options(min_agreement: float | None, max_points_lost: float | None) -> None:
    """Refuse gates that make no sense.

    Raises:
        ConfigError: If ``min_agreement`` is not from 0 to 1, or ``max_points_lost`` not from 0 to 100.
    """
    for name, value, most in (("min_agreement", min_agreement, 1), ("max_points_lost", max_points_lost, 100)):
        if value is not None and not 0 <= value <= most:
            raise ConfigError(f"{name} is out of range", expected=f"0 to {most}", got=value)


def check_request(request: Request, *, split: bool, judging: Mapping[str, object]) -> None:
    """Refuse what no checkpoint could make right.

    Args:
        request: What to write.
        split: Whether graphs are split.
        judging: The options that are for lossy variants alone, by name; None or False where not given.

    Raises:
        ConfigError: If options do not go together.
    """
    given = [name for name, value in judging.items() if value is not None and value is not False]
    if given and not request.is_lossy:
        raise ConfigError(
            "only variants below fp32 are calibrated and judged, and none was asked for",
            got=", ".join(given),
            mend="leave this out, or ask for fp16, int8 or int4",
        )
    if split and request.deployments:
        raise ConfigError(
            "deployments are made from whole graphs",
            got=", ".join("-".join(name) for name in request.deployments),
            mend="export twice: once for them, and once with split graphs",
        )
    whole = [name for name in map("-".join, request.graphs) if name not in _SPLIT]
    if split and whole:
        raise ConfigError(
            "this is not made from split graphs",
            got=", ".join(whole),
            expected=f"some of {', '.join(_SPLIT)}",
            mend="choose one of those, or leave --split and --retrieval external out",
        )


def _read_shorthand(
    precisions: Sequence["Precision"], targets: Sequence["Target | DeploymentTarget"]
) -> list[str]:
    if not targets:
        return [f"{_DEFAULT_TARGETS[precision]}-{precision}" for precision in precisions]
    named = [target for target in (*TARGETS, *DEPLOYMENTS) if target in targets]
    asked = [(t, p) for p in precisions for t in named if f"{t}-{p}" in VARIANTS]
    found = [(t, p) for t, p in asked if p != "int8" or _takes_int8(t, asked)]
    for precision in precisions:
        if precision not in [done for _, done in asked]:
            raise ConfigError(
                f"precision {precision} is not written for target {', '.join(named)}",
                expected=f"one of {', '.join(_takers(precision))}",
                mend=f"add --target {_DEFAULT_TARGETS[precision]}",
            )
    for target in named:
        if target not in [done for done, _ in asked]:
            takes = [precision for precision in PRECISIONS if f"{target}-{precision}" in VARIANTS]
            raise ConfigError(
                f"target {target} does not take precision {', '.join(precisions)}",
                expected=f"one of {', '.join(takes)}",
                mend=f"add --precision {takes[0]}",
            )
    return [f"{target}-{precision}" for target, precision in found]


def _takers(precision: str) -> list[str]:
    return [target for target in (*TARGETS, *DEPLOYMENTS) if f"{target}-{precision}" in VARIANTS]


def _takes_int8(target: str, asked: Sequence[tuple[str, str]]) -> bool:
    """Whether a target that can take int8 does, beside the others that were asked for."""
    takers = {other for other, precision in asked if precision == "int8"}
    first = next(group for group in _INT8_FIRST if not takers.isdisjoint(group))
    alone = all(precision == "int8" for other, precision in asked if other == target)
    return target in first or (alone and target != "onnx")
