"""The target ``tensorrt-rtx``: engines for GPUs that need not be present."""

from collections.abc import Sequence
from pathlib import Path

from xadapter_export.bundle.manifest import Variant
from xadapter_export.errors import ConfigError, UnsupportedError
from xadapter_export.exporters.makers.axis_profile import plan_axes, profile_facts, profile_shapes
from xadapter_export.exporters.makers.engines import (
    NO_FP32,
    EngineJob,
    build_engine,
    split_capabilities,
)
from xadapter_export.exporters.makers.maker import Deployed, Deployer, DeployJob
from xadapter_export.exporters.request import ExportRequest
from xadapter_export.sessions.tensorrt_session import import_library
from xadapter_export.targets import Precision


class TensorRtRtxMaker(Deployer):
    """Builds the engines of a variant, one after another, so that memory is for one."""

    def check(self, options: ExportRequest, precisions: Sequence[Precision]) -> None:
        """Refuse GPUs that no engine can be built for, before there is a graph to build from.

        Raises:
            ConfigError: As ``split_capabilities``, or if every engine of a precision would be refused.
            ProviderError: If one is ``current`` and there is no GPU.
        """
        asked = options.compute_capabilities
        groups = split_capabilities(asked, import_library(self.target.name))
        if "fp32" in precisions and all("sm75" in group for group in groups):
            raise ConfigError(NO_FP32, got=", ".join(asked))

    def deploy(self, job: DeployJob) -> Deployed:
        """Build them.

        Raises:
            MissingExtraError: If TensorRT-RTX is not installed.
            ProviderError: If one is for the GPU of this machine, and there is none.
            ConfigError: If it does not know a compute capability, or a range goes beyond what the models
                read.
            UnsupportedError: If it refuses every engine.
        """
        library, variant = import_library(self.target.name), job.variant
        spec = job.manifest.expert_sets[variant.expert_set]
        axes = plan_axes(job.manifest, job.options.profile)
        facts = {"library": f"{library.__name__} {library.__version__}", **profile_facts(spec.inputs, axes)}
        files: list[str] = []
        refused: list[str] = []
        for capabilities in split_capabilities(job.options.compute_capabilities, library):
            label = "+".join(capabilities)
            file = f"{self.target.name}/{_engine_name(variant, capabilities)}"
            engine = EngineJob(
                library=library.__name__,
                graph=job.folder / variant.file,
                engine=job.folder / file,
                shapes=profile_shapes(spec.inputs, axes),
                compute_capabilities=capabilities,
            )
            job.say(file)
            built = build_engine(engine, job.say)
            if built.refused is not None:
                refused.append(f"{label}, {variant.name}, experts {variant.expert_set}: {built.refused}")
                continue
            files.append(file)
            facts[f"engine {label}"] = file
            facts[f"seconds {label}"] = f"{built.seconds:.1f}"
            if built.peak_bytes is not None:
                facts[f"peak bytes {label}"] = str(built.peak_bytes)
        if not files:
            raise UnsupportedError("TensorRT-RTX could not build any engine", got="; ".join(refused))
        which = f"--experts {variant.expert_set} --variant {variant.name}"
        proof = f"xad-parity . --engine {self.target.name} {which}"
        return Deployed(tuple(files), facts, tuple(refused), proof)


def _engine_name(variant: Variant, capabilities: tuple[str, ...]) -> str:
    """Name of an engine: the graph's, its precision, and the GPUs that it is for."""
    stem = Path(variant.file).stem.removesuffix(f"_{variant.precision}")
    return f"{stem}_{variant.precision}_{'-'.join(capabilities)}.engine"
