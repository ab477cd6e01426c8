"""The target ``tensorrt-rtx``: engines for GPUs that need not be present."""

from pathlib import Path

from xadapter_export.bundle.manifest import Deployment, DeploymentTarget, Manifest, Variant
from xadapter_export.errors import UnsupportedError
from xadapter_export.exporters.axis_profile import plan_axes, profile_facts, profile_shapes
from xadapter_export.exporters.deploy import DeployOptions, Say
from xadapter_export.exporters.engines import EngineJob, build_engine, import_library, split_capabilities

_TARGET: DeploymentTarget = "tensorrt-rtx"


def deploy(
    folder: Path, manifest: Manifest, variant: Variant, options: DeployOptions, say: Say
) -> Deployment:
    """Builds the engines of a variant, one after another, so that memory is for one.

    Raises:
        MissingExtraError: If TensorRT-RTX is not installed.
        ProviderError: If one is for the GPU of this machine, and there is none.
        ConfigError: If it does not know a compute capability, or a range goes beyond what the models read.
        UnsupportedError: If it refuses every engine.
    """
    library = import_library(_TARGET)
    spec = manifest.expert_sets[variant.expert_set]
    axes = plan_axes(manifest, options.profile)
    facts = {"library": f"{library.__name__} {library.__version__}", **profile_facts(spec.inputs, axes)}
    files: list[str] = []
    refused: list[str] = []
    seconds = 0.0
    size_bytes = 0
    for capabilities in split_capabilities(options.compute_capabilities, library):
        label = "+".join(capabilities)
        file = engine_file(variant, capabilities)
        job = EngineJob(
            library=library.__name__,
            graph=folder / variant.file,
            engine=folder / file,
            shapes=profile_shapes(spec.inputs, axes),
            compute_capabilities=capabilities,
        )
        say(f"{file}")
        built = build_engine(job, say)
        seconds += built.seconds
        if built.refused is not None:
            refused.append(f"{label}, {variant.name}, experts {variant.expert_set}: {built.refused}")
            continue
        files.append(file)
        size_bytes += built.size_bytes
        facts[f"engine {label}"] = file
        facts[f"seconds {label}"] = f"{built.seconds:.1f}"
        if built.peak_bytes is not None:
            facts[f"peak bytes {label}"] = str(built.peak_bytes)
    if not files:
        raise UnsupportedError("TensorRT-RTX refuses every engine", got="; ".join(refused))
    return Deployment(
        target=_TARGET,
        expert_set=variant.expert_set,
        precision=variant.precision,
        source=variant.name,
        files=tuple(files),
        size_bytes=size_bytes,
        seconds=seconds,
        facts=facts,
        refused=tuple(refused),
        prove_with=f"xad-parity . --engine {_TARGET} --experts {variant.expert_set} --variant {variant.name}",
    )


def engine_file(variant: Variant, capabilities: tuple[str, ...]) -> str:
    """Path of an engine: the graph's name, its precision, and the GPUs that it is for."""
    stem = Path(variant.file).stem.removesuffix(f"_{variant.precision}")
    return f"{_TARGET}/{stem}_{variant.precision}_{'-'.join(capabilities)}.engine"
