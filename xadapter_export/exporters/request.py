"""What an export is asked for, and what the options alone rule out; PyTorch is not needed to tell."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Final, Literal, TypedDict, get_args

from xadapter_export.bundle.manifest import ExpertSet, Task
from xadapter_export.bundle.opsets import check_opset
from xadapter_export.errors import ConfigError
from xadapter_export.experts import EXPERT_SETS
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

# Exact optimizations that can be left out.
Step = Literal["packed_projections", "last_layer_at_positions", "clip_last_block_at_end", "folded_bank"]
STEPS: Final[tuple[Step, ...]] = get_args(Step)
Retrieval = Literal["in-graph", "external"]
RETRIEVALS: Final[tuple[Retrieval, ...]] = get_args(Retrieval)
_INT8: Final[tuple[Int8, ...]] = get_args(Int8)  # who comes first, to who comes last


class ExportOptions(TypedDict, total=False):
    """The keywords of ``export`` for a type checker; ``ExportRequest`` says what each does."""

    opset: int
    task: Task | None
    candidates: Sequence[str] | None
    max_seq: int | None
    variants: Sequence[str]
    precisions: Sequence[Precision]
    targets: Sequence[str]
    profile: Mapping[str, tuple[int, int]]
    compute_capabilities: Sequence[str]
    calibration: str | Path | None
    evaluate: str | Path | None
    min_agreement: float | None
    max_points_lost: float | None
    skip_failed: bool
    without: Collection[Step]
    retrieval: Retrieval
    split: bool
    with_explanations: bool
    sign: str | Path | None
    force: bool


@dataclass(frozen=True, kw_only=True)
class ExportRequest:
    """What to export, and how.

    Attributes:
        experts: Expert set or sets; the first is the bundle's default. None for all the checkpoint holds.
        opset: ONNX opset, 17 to 21.
        task: What the graphs answer; the checkpoint's task if None.
        candidates: Words that fill-mask chooses from; the MLM head is sliced to them.
        max_seq: Longest input in tokens; the PLM's limit if None.
        variants: Exactly these, as ``cpu-int8`` or ``tensorrt-rtx-fp16``; the bundle also has the graphs that
            deployments among them are made from.
        precisions: With ``targets``, shorthand for more variants; see ``wanted_variants``.
        targets: Likewise; without any of the three the bundle has ``onnx-fp32``.
        profile: Least and largest length of an axis that deployments must fit, by its name in the graph:
            ``batch``, ``seq``, ``masks``, ``clip_seq``.
        compute_capabilities: NVIDIA architectures, an entry for each engine: ``sm89``, or ``sm86+sm89``.
        calibration: Texts, one a line or in a table, that lossy variants are made and compared with; those
            that came with the checkpoint if None, or else sentences of our own and the bank's captions.
        evaluate: Questions with known answers that lossy variants are held to; see ``read_questions``.
        min_agreement: Gate for the share of equal answers; the default of the precision if None.
        max_points_lost: Gate for the accuracy; the default of the precision if None.
        skip_failed: Leave out lossy variants that are below a gate, with a warning, and write the others.
        without: Exact optimizations to leave out, some of ``STEPS``.
        retrieval: Where the bank is searched: ``in-graph``, or ``external``, by the app, with an index of its
            choice; every set that reads CLIP is then split.
        split: Make two graphs of every set that reads CLIP: what a text asks CLIP and the bank, and the
            answer, so that a session can keep the first for texts that come again.
        with_explanations: Let the graphs also say how much each picture and each CLIP token counted, and
            answer without some of them, for ``XAdapterSession.explain``.
        sign: Private key to sign the bundle with, see ``BundleSigner``; None to leave it unsigned.
        force: Replace a bundle that is already there.

    Raises:
        ConfigError: If a name is not known, a number is out of range, or options do not go together, whatever
            the checkpoint.
        UnsupportedError: If the opset is not supported.
    """

    experts: ExpertSet | Sequence[ExpertSet] | None = None
    opset: int = 17
    task: Task | None = None
    candidates: Sequence[str] | None = None
    max_seq: int | None = None
    variants: Sequence[str] = ()
    precisions: Sequence[Precision] = ()
    targets: Sequence[str] = ()
    profile: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    compute_capabilities: Sequence[str] = ()
    calibration: str | Path | None = None
    evaluate: str | Path | None = None
    min_agreement: float | None = None
    max_points_lost: float | None = None
    skip_failed: bool = False
    without: Collection[Step] = ()
    retrieval: Retrieval = "in-graph"
    split: bool = False
    with_explanations: bool = False
    sign: str | Path | None = None
    force: bool = False

    def __post_init__(self) -> None:
        check_opset(self.opset)
        check_names("expert set", self.expert_sets, EXPERT_SETS)
        check_names("retrieval", (self.retrieval,), RETRIEVALS)
        check_names("optimization of the merge", self.without, STEPS)
        for name, most in (("min_agreement", 1), ("max_points_lost", 100)):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= most:
                raise ConfigError(f"{name} is out of range", expected=f"0 to {most}", got=value)
        self._check_judging()
        if self.is_split:
            self._check_split()
        if self.with_explanations and self.wanted.deployments:
            raise ConfigError(
                "deployments cannot be made from graphs with explanations",
                got=", ".join(map(str, self.wanted.deployments)),
                hint="export twice: once for the deployments, and once with explanations",
            )

    @property
    def expert_sets(self) -> tuple[ExpertSet, ...]:
        """The expert sets that were named."""
        return (self.experts,) if isinstance(self.experts, str) else tuple(self.experts or ())

    @property
    def is_split(self) -> bool:
        """Whether sets that read CLIP become two graphs."""
        return self.split or self.retrieval == "external"

    @cached_property
    def wanted(self) -> "WantedVariants":
        """What to write."""
        return wanted_variants(self.variants, self.precisions, self.targets)

    def _check_judging(self) -> None:
        """Refuse options that are for lossy variants alone where there are none."""
        names = ("calibration", "evaluate", "min_agreement", "max_points_lost")
        given = [name for name in names if getattr(self, name) is not None]
        given += ["skip_failed"] if self.skip_failed else []
        if not self.wanted.is_lossy and given:
            raise ConfigError(
                "only fp16, int8 and int4 variants are calibrated and judged, and none was requested",
                got=", ".join(given),
                hint="remove this, or add --precision fp16, int8 or int4",
            )

    def _check_split(self) -> None:
        """Refuse variants that cannot be made from split graphs."""
        if self.wanted.deployments:
            raise ConfigError(
                "deployments cannot be made from split graphs",
                got=", ".join(map(str, self.wanted.deployments)),
                hint="export twice: once for the deployments, and once with split graphs",
            )
        can = [name for name in all_variants().values() if name.precision in TARGETS[name.target].splits]
        whole = [name for name in self.wanted.graphs if name not in can]
        if whole:
            raise ConfigError(
                "this variant cannot be made from split graphs",
                got=", ".join(map(str, whole)),
                expected=f"some of {', '.join(map(str, can))}",
                hint="choose one of those, or remove --split and --retrieval external",
            )


@dataclass(frozen=True)
class WantedVariants:
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


def wanted_variants(
    variants: Sequence[str] = (),
    precisions: Sequence[Precision] = (),
    targets: Sequence[str] = (),
) -> WantedVariants:
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
    return WantedVariants(tuple(dict.fromkeys(graphs)), tuple(deployments))


def made_from(name: VariantName) -> VariantName:
    """Return the variant that a deployment is made from."""
    return TARGETS[name.target].made_from[name.precision]


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
