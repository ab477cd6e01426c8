"""What a maker of a target is given, and what it gives back.

A ``GraphMaker`` makes variants: graphs that are measured or proven against PyTorch. It yields its tries from
the smallest and fastest to the most exact, and the exporter keeps the first that passes its gate. A
``Deployer`` makes files for another runtime from a variant that is in the bundle and proven.
"""

import shutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import onnx_ir as ir

from xadapter_export.bundle.manifest import ExpertSet, Manifest, Optimization, Variant
from xadapter_export.errors import ConfigError, import_installed
from xadapter_export.exporters.makers.axis_profile import check_axes
from xadapter_export.exporters.passes.quantize import Ranges, Rounding
from xadapter_export.exporters.portable.merge import MergedModel, Part
from xadapter_export.exporters.request import ExportRequest
from xadapter_export.registry import load_named
from xadapter_export.sessions.session import Array
from xadapter_export.targets import TARGETS, Precision, Target, all_targets

Say = Callable[[str], None]
Graphs = dict[Part, ir.Model]


@dataclass
class Material:
    """What every variant of an expert set is made from.

    Attributes:
        expert_set: The set.
        folder: The bundle that is being made.
        variant: The portable variant, which is there already.
        graphs: Its graph, or both where it is split; not to be changed.
        merged: What each was traced from.
        rounding: What graphs with the same weights have in common.
        longest: The most tokens of ``seq`` and ``clip_seq``, by axis; the other axes have no limit.
        calibrate: Returns inputs of texts to calibrate with.
        measure: Returns what goes into the products of each graph.
    """

    expert_set: ExpertSet
    folder: Path
    variant: Variant
    graphs: Graphs
    merged: Mapping[Part, MergedModel]
    rounding: Rounding
    longest: Mapping[str, int]
    calibrate: Callable[[], list[dict[str, Array]]]
    measure: Callable[[], dict[Part, Ranges]]

    @cached_property
    def ranges(self) -> dict[Part, Ranges]:
        """What goes into the products of each graph: measured when it is first asked for."""
        return self.measure()


@dataclass(frozen=True)
class GraphJob:
    """A variant to make.

    Attributes:
        precision: Its precision.
        material: What it is made from.
        stems: The name that the file of each graph starts with, as ``model_vt``.
        scratch: A folder for files that may not be kept.
        say: Called with what is tried.
    """

    precision: Precision
    material: Material
    stems: Mapping[Part, str]
    scratch: Path
    say: Say

    def empty_scratch(self) -> Path:
        """Return the folder for the files of one try, without those of the last."""
        shutil.rmtree(self.scratch, ignore_errors=True)
        self.scratch.mkdir()
        return self.scratch


@dataclass(frozen=True)
class MadeGraph:
    """One try of a variant: ONNX graphs, or files in the scratch folder of another form.

    Attributes:
        steps: What was done to the portable graph, but for its own steps.
        graphs: ONNX graphs; the exporter writes them, and they share weights with those of other sets.
        suffix: What the names of their files end with, as ``_quantized``.
        weights: The same of the file of weights, which variants may share too.
        files: Files of another form, in ``GraphJob.scratch``: the one that each graph is opened by. Whatever
            else is in the folder goes with them.
    """

    steps: Sequence[Optimization] = ()
    graphs: Graphs = field(default_factory=dict)
    suffix: str = ""
    weights: str = ""
    files: Mapping[Part, Path] = field(default_factory=dict)


@dataclass(frozen=True)
class DeployJob:
    """A deployment to make.

    Attributes:
        folder: The bundle that is being made: the graph, its weights and the reference are there.
        manifest: What the bundle says so far.
        variant: The variant that it is made from.
        options: What was asked for: ``profile`` and ``compute_capabilities`` are what it must fit.
        say: Called with what is written.
    """

    folder: Path
    manifest: Manifest
    variant: Variant
    options: ExportRequest
    say: Say


@dataclass(frozen=True)
class Deployed:
    """What a deployer wrote; for each see ``manifest.Deployment``."""

    files: tuple[str, ...]
    facts: Mapping[str, str] = field(default_factory=dict)
    refused: tuple[str, ...] = ()
    prove_with: str | None = None


class Maker:
    """What makes the files of a target.

    Args:
        target: Its row of the table.
    """

    def __init__(self, target: Target) -> None:
        self.target = target

    def check(self, options: ExportRequest, precisions: Sequence[Precision]) -> None:
        """Refuse what could not be made, before anything is traced.

        Args:
            options: The options.
            precisions: What was asked for of this target.

        Raises:
            XAdapterError: If there is something.
        """
        del options, precisions  # there is nothing of the kind in most targets


class GraphMaker(Maker, ABC):
    """Makes the variants of a target."""

    @abstractmethod
    def tries(self, job: GraphJob) -> Iterator[MadeGraph]:
        """Yield tries, from the smallest and fastest to the most exact; at least one.

        Raises:
            XAdapterError: If one cannot be made.
        """


class Deployer(Maker, ABC):
    """Makes the deployments of a target."""

    @abstractmethod
    def deploy(self, job: DeployJob) -> Deployed:
        """Write files into a folder of the bundle, and prove them if that can be done here.

        Raises:
            XAdapterError: If it cannot be made.
        """


def load_maker(target: Target) -> Maker:
    """Return the maker of a target.

    Raises:
        ConfigError: If the table names something else.
    """
    found = load_named(target.maker)
    wanted = Deployer if target.is_deployment else GraphMaker
    if not (isinstance(found, type) and issubclass(found, wanted)):
        raise ConfigError(
            "the table of targets names no maker", where=target.maker, expected=f"a {wanted.__name__}"
        )
    return found(target)


def check_options(options: ExportRequest) -> None:
    """Refuse options that no target reads, what no maker can do, and what is not installed.

    Args:
        options: What was asked for: variants, deployments, and what they must fit.

    Raises:
        XAdapterError: If there is one.
    """
    names = (*options.wanted.graphs, *options.wanted.deployments)
    check_axes(options.profile)
    targets = [TARGETS[name] for name in dict.fromkeys(name.target for name in names)]
    for target in targets:
        if target.needs is not None:
            import_installed(*target.needs)
    _check_profile(targets, options)
    if options.compute_capabilities and not any(_CAPABILITY in target.reads for target in targets):
        readers = [target.name for target in all_targets() if _CAPABILITY in target.reads]
        raise ConfigError(
            f"compute capabilities are for the target {', '.join(readers)}",
            got=", ".join(options.compute_capabilities),
            hint=f"remove them, or add --target {readers[0]}",
        )
    for target in targets:
        load_maker(target).check(options, [n.precision for n in names if n.target == target.name])


_CAPABILITY = "compute-capability"


def _check_profile(targets: Sequence[Target], options: ExportRequest) -> None:
    for axis, (least, largest) in options.profile.items():
        readers = [target for target in targets if axis in (*target.axes, *target.largest_axes)]
        if not readers:
            known = [t.name for t in all_targets() if axis in (*t.axes, *t.largest_axes)]
            raise ConfigError(
                "none of the chosen targets uses a profile for this axis",
                where=f"profile {axis}",
                hint=f"leave it out, or add --target {' or '.join(known)}",
            )
        if least > 1 and not any(axis in target.axes for target in readers):
            raise ConfigError(
                f"target {readers[0].name} accepts every length of this axis, starting at 1",
                where=f"profile {axis}",
                expected=f"1..{largest}",
                got=f"{least}..{largest}",
            )
