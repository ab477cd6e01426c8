"""What an export was asked to write, and what the options alone rule out; PyTorch is not needed to tell."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, get_args

from xadapter_export.errors import ConfigError
from xadapter_export.targets import (
    PRECISIONS,
    TARGETS,
    Int8,
    Precision,
    Target,
    VariantName,
    all_targets,
    all_variants,
)

_INT8: Final[tuple[Int8, ...]] = get_args(Int8)  # who comes first, to who comes last


@dataclass(frozen=True)
class Request:
    """What to write, each once.

    Attributes:
        graphs: The graphs that the bundle holds, those that deployments are made from among them.
        deployments: What is made from them for other runtimes.
    """

    graphs: tuple[VariantName, ...]
    deployments: tuple[VariantName, ...] = ()

    @property
    def is_lossy(self) -> bool:
        """Whether a graph is in fewer bits than fp32."""
        return any(name.precision != "fp32" for name in self.graphs)


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
    precisions: Sequence[Precision] = (),
    targets: Sequence[str] = (),
) -> Request:
    """Return what to write: the variants that were named, and what precisions and targets stand for.

    Every target gets each of the precisions that it takes, but int8 is not written for all: see
    ``Target.int8``. Without targets each precision is written for its default one; without precisions it is
    fp32; without anything ``onnx-fp32``.

    Args:
        variants: Whole names, as ``cpu-int8`` or ``tensorrt-rtx-fp16``; some of ``all_variants``.
        precisions: Precisions, with ``targets``.
        targets: Targets, with ``precisions``.

    Raises:
        ConfigError: If a name is not known, or a precision, or a target, is left without the other.
    """
    check_names("variant", variants, tuple(all_variants()))
    check_names("precision", precisions, PRECISIONS)
    check_names("target", targets, tuple(TARGETS))
    names = list(variants)
    if precisions or targets or not variants:
        names = [*_read_shorthand(precisions or ("fp32",), targets), *names]
    asked = dict.fromkeys(all_variants()[name] for name in names)
    deployments = [name for name in asked if TARGETS[name.target].is_deployment]
    graphs = [name for name in asked if name not in deployments] + [made_from(name) for name in deployments]
    return Request(tuple(dict.fromkeys(graphs)), tuple(deployments))


def made_from(name: VariantName) -> VariantName:
    """Return the variant that a deployment is made from."""
    return TARGETS[name.target].made_from[name.precision]


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
            "only fp16, int8 and int4 variants are calibrated and judged, and none was requested",
            got=", ".join(given),
            hint="remove this, or add --precision fp16, int8 or int4",
        )
    if split and request.deployments:
        raise ConfigError(
            "deployments cannot be made from split graphs",
            got=", ".join(map(str, request.deployments)),
            hint="export twice: once for the deployments, and once with split graphs",
        )
    can = [name for name in all_variants().values() if name.precision in TARGETS[name.target].splits]
    whole = [name for name in request.graphs if name not in can]
    if split and whole:
        raise ConfigError(
            "this variant cannot be made from split graphs",
            got=", ".join(map(str, whole)),
            expected=f"some of {', '.join(map(str, can))}",
            hint="choose one of those, or remove --split and --retrieval external",
        )


def default_target(precision: Precision) -> str:
    """Return the target that a precision is made for where none is named."""
    return next(target.name for target in all_targets() if precision in target.default_for)


def _read_shorthand(precisions: Sequence[Precision], targets: Sequence[str]) -> list[str]:
    if not targets:
        return [f"{default_target(precision)}-{precision}" for precision in precisions]
    named = [target for target in all_targets() if target.name in targets]
    for precision in precisions:
        if not any(precision in target.precisions for target in named):
            takers = [target.name for target in all_targets() if precision in target.precisions]
            raise ConfigError(
                f"precision {precision} is not available for target {', '.join(t.name for t in named)}",
                expected=f"one of {', '.join(takers)}",
                hint=f"add --target {default_target(precision)}",
            )
    for target in named:
        if set(target.precisions).isdisjoint(precisions):
            raise ConfigError(
                f"target {target.name} does not take precision {', '.join(precisions)}",
                expected=f"one of {', '.join(target.precisions)}",
                hint=f"add --precision {target.precisions[0]}",
            )
    return [
        f"{target.name}-{precision}"
        for precision in precisions
        for target in named
        if precision in target.precisions and (precision != "int8" or _takes_int8(target, named, precisions))
    ]


def _takes_int8(target: Target, named: Sequence[Target], precisions: Sequence[Precision]) -> bool:
    """Whether a target that can take int8 does, beside the others that were named."""
    first = min(_INT8.index(other.int8) for other in named if "int8" in other.precisions)
    alone = set(target.precisions) & set(precisions) == {"int8"}
    return _INT8.index(target.int8) == first or (alone and target.int8 != _INT8[-1])
