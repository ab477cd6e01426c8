"""Deployments: what other runtimes need, made from the proven graphs of a bundle, one module each.

A module of ``_MODULES`` has ``deploy(folder, manifest, variant, options, say)``: it writes below ``folder``,
the bundle that is being made, and returns what it wrote as a ``Deployment``.
"""

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from xadapter_export.bundle.manifest import Deployment, DeploymentTarget, Manifest, Precision
from xadapter_export.errors import ConfigError, import_extra
from xadapter_export.exporters.axis_profile import AXES, check_axes, parse_profile
from xadapter_export.exporters.request import Request

__all__ = ["DeployOptions", "Say", "check_options", "deploy", "parse_profile"]

Say = Callable[[str], None]

_MODULES: dict[DeploymentTarget, str] = {
    "tensorrt-rtx": "xadapter_export.exporters.deploy_tensorrt_rtx",
    "tensorrt": "xadapter_export.exporters.deploy_tensorrt",
    "mobile": "xadapter_export.exporters.mobile",
    "triton": "xadapter_export.exporters.triton",
}
# The axes of a profile that a deployment is planned for; Triton takes only the largest batch.
_AXES: dict[DeploymentTarget, tuple[str, ...]] = {
    "tensorrt-rtx": AXES,
    "tensorrt": AXES,
    "triton": ("batch",),
    "mobile": (),
}
# What must be installed, and the extra that brings it.
_NEEDS: dict[DeploymentTarget, tuple[str, str]] = {
    "tensorrt-rtx": ("tensorrt_rtx", "tensorrt"),
    "tensorrt": ("polygraphy.json", "tensorrt"),
    "triton": ("tritonclient.grpc.model_config_pb2", "triton"),
}


@dataclass(frozen=True)
class DeployOptions:
    """What deployments were asked to fit.

    Attributes:
        profile: Least and largest length of an axis, by its name in the graph: ``batch``, ``seq``, ``masks``,
            ``clip_seq``.
        compute_capabilities: NVIDIA architectures, an entry for each engine: ``sm89``, or ``sm86+sm89``.

    Raises:
        ConfigError: If an axis, or its range, is not one.
    """

    profile: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    compute_capabilities: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_axes(self.profile)


def check_options(deployments: Sequence[tuple[DeploymentTarget, Precision]], options: DeployOptions) -> None:
    """Refuses options that no deployment reads, GPUs that no engine can be for, and what is not installed.

    Raises:
        ConfigError: If there is one.
        MissingExtraError: If what a deployment needs is not installed.
    """
    targets = list(dict.fromkeys(target for target, _ in deployments))
    for target in targets:
        if target in _NEEDS:
            import_extra(*_NEEDS[target])
    read = {axis for target in targets for axis in _AXES[target]}
    for axis, (least, largest) in options.profile.items():
        if axis not in read:
            raise ConfigError(
                "no target that was asked for is planned for lengths of this axis",
                where=f"profile {axis}",
                mend="leave it out, or add --target tensorrt-rtx or tensorrt"
                + (", or triton" if axis == "batch" else ""),
            )
        if least > 1 and not any(_AXES[target] == AXES for target in targets):
            raise ConfigError(
                "target triton takes batches from 1 on",
                where=f"profile {axis}",
                expected=f"1..{largest}",
                got=f"{least}..{largest}",
            )
    if "tensorrt-rtx" in targets:
        engines = importlib.import_module("xadapter_export.exporters.engines")
        precisions = [precision for target, precision in deployments if target == "tensorrt-rtx"]
        engines.check_capabilities(options.compute_capabilities, precisions)
    elif options.compute_capabilities:
        raise ConfigError(
            "compute capabilities are for the target tensorrt-rtx",
            got=", ".join(options.compute_capabilities),
            mend="leave them out, or add --target tensorrt-rtx",
        )


def deploy(
    folder: Path, manifest: Manifest, request: Request, options: DeployOptions, say: Say
) -> tuple[Deployment, ...]:
    """Writes every deployment that was asked for, of every expert set whose graph is there.

    Args:
        folder: The bundle, with its graphs; still being made.
        manifest: What it says so far.
        request: What was asked for.
        options: What they must fit.
        say: Called as each begins, with what it is.

    Raises:
        XAdapterError: If one cannot be made.
    """
    return tuple(
        importlib.import_module(_MODULES[target]).deploy(folder, manifest, variant, options, say)
        for target, precision in request.deployments
        for variant in manifest.variants
        if (variant.target, variant.precision) == request.source((target, precision))
    )
