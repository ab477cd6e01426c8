"""The target ``tensorrt``: what it takes to build and prove an engine with the full TensorRT, elsewhere.

The folder ``tensorrt/`` stands on its own: graphs, weights, shapes, real inputs, and a script of one command
of NVIDIA's Polygraphy that builds an engine and compares it with onnxruntime. Where the full TensorRT and a
GPU are here, the engine for that GPU is built too. (The package ``tensorrt`` of PyPI only fetches it.)
"""

import importlib
import json
import shlex
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType

import onnx_ir as ir

from xadapter_export.bundle.folder import Bundle
from xadapter_export.errors import MissingExtraError, ProviderError, import_extra
from xadapter_export.exporters.makers.axis_profile import plan_axes, profile_facts, profile_shapes
from xadapter_export.exporters.makers.engines import EngineJob, build_engine
from xadapter_export.exporters.makers.maker import Deployed, Deployer, DeployJob, Say
from xadapter_export.exporters.onnx_files import write_alone
from xadapter_export.parity.compare import TOLERANCES, Tolerance
from xadapter_export.parity.engines import measure_graph
from xadapter_export.parity.reference import read_reference, reference_feeds
from xadapter_export.sessions.session import Array
from xadapter_export.sessions.tensorrt_session import find_gpu

Shapes = Mapping[str, tuple[list[int], list[int], list[int]]]


class TensorRtMaker(Deployer):
    """Writes the folder of a variant, and builds its engine where that can be done here."""

    def deploy(self, job: DeployJob) -> Deployed:
        """Write it.

        Raises:
            MissingExtraError: If Polygraphy is not installed.
            ConfigError: If a range goes beyond what the models read.
            ParityError: If a lossy graph cannot compute the reference inputs.
        """
        variant, stem = job.variant, Path(job.variant.file).stem
        place = job.folder / self.target.name
        job.say(f"{self.target.name}/{stem}.onnx")
        spec = job.manifest.expert_sets[variant.expert_set]
        axes = plan_axes(job.manifest, job.options.profile)
        shapes = profile_shapes(spec.inputs, axes)
        feeds, held = _cases(job, shapes)
        place.mkdir(exist_ok=True)
        # Weights of its own: those that the sets share have the bank in them, which not every set reads.
        write_alone(ir.load(job.folder / variant.file), place / f"{stem}.onnx")
        (place / f"{stem}.shapes.json").write_text(json.dumps(dict(shapes), indent=1) + "\n", "utf-8")
        save_json = import_extra("polygraphy.json", "tensorrt").save_json
        save_json(list(feeds.values()), str(place / f"{stem}.inputs.json"))
        script = f"{stem}.parity.sh"
        (place / script).write_text(_script(stem, shapes, held), encoding="utf-8")
        names = [f"{stem}.onnx", f"{stem}.onnx_data", f"{stem}.shapes.json", f"{stem}.inputs.json", script]

        facts = profile_facts(spec.inputs, axes) | {"cases": ", ".join(feeds)}
        facts |= {f"tolerance {name}": f"{one.atol:.1e} + {one.rtol:.0e} |ref|" for name, one in held.items()}
        built, reason = _build(place, stem, shapes, job.say)
        if built:
            facts |= built
            names.append(f"{stem}.engine")
        refused = (
            [] if reason is None else [f"engine, {variant.name}, experts {variant.expert_set}: {reason}"]
        )
        files = tuple(f"{self.target.name}/{name}" for name in names)
        return Deployed(files, facts, tuple(refused), f"sh {self.target.name}/{script}")


def _cases(job: DeployJob, shapes: Shapes) -> tuple[dict[str, dict[str, Array]], dict[str, Tolerance]]:
    """The inputs of the proof that an engine is planned for, and how far each output may be off."""
    bundle, variant = Bundle(job.folder, job.manifest), job.variant
    spec = job.manifest.expert_sets[variant.expert_set]
    reference = read_reference(bundle)
    feeds = {case: feed for case, feed in reference_feeds(reference, spec).items() if _within(feed, shapes)}
    assert feeds  # ``check_cases`` refused such a profile
    # Rows retrieved are left out: of two that tie either may come first, and their scores tell.
    held = {output.name: TOLERANCES["fp32"] for output in spec.outputs if output.name != "retrieved"}
    if variant.precision not in TOLERANCES:
        measured, _ = measure_graph(bundle, variant, feeds, reference)
        held = {name: measured[name] for name in held}
    return feeds, held


def _build(place: Path, stem: str, shapes: Shapes, say: Say) -> tuple[dict[str, str], str | None]:
    """Builds the engine for the GPU here, if there are one and the library.

    Returns:
        What is to be known of it, empty where there is none; and why it was refused, if it was.
    """
    library = find_library()
    if library is None:
        return {}, None
    job = EngineJob(library.__name__, place / f"{stem}.onnx", place / f"{stem}.engine", shapes, ())
    try:
        gpu = find_gpu()
        reason = build_engine(job, say).refused
    except (ProviderError, MissingExtraError) as error:
        reason = str(error)
    if reason is not None:
        return {}, reason
    engine = f"{place.name}/{stem}.engine"
    return {"library": f"tensorrt {library.__version__}", f"engine {gpu}": engine}, None


def find_library() -> ModuleType | None:
    """The full TensorRT, or None where it is not installed, or only a package of its name."""
    try:
        library = importlib.import_module("tensorrt")
    except ImportError:
        return None
    return library if hasattr(library, "Builder") else None


def _within(feed: Mapping[str, Array], shapes: Shapes) -> bool:
    return all(
        least <= length <= largest
        for name, array in feed.items()
        for least, length, largest in zip(shapes[name][0], array.shape, shapes[name][2], strict=True)
    )


def _script(stem: str, shapes: Shapes, held: Mapping[str, Tolerance]) -> str:
    """The command that builds an engine on a GPU and compares it with onnxruntime, output by output."""
    by_size = zip(("min", "opt", "max"), zip(*shapes.values(), strict=True), strict=True)
    words = ["polygraphy", "run", f"{stem}.onnx", "--onnxrt", "--trt", "--strongly-typed"]
    words += ["--load-inputs", f"{stem}.inputs.json"]
    for size, lengths in by_size:
        words.append(f"--trt-{size}-shapes")
        words += [
            f"{name}:[{','.join(map(str, shape))}]" for name, shape in zip(shapes, lengths, strict=True)
        ]
    for kind in ("onnx", "trt"):
        words += [f"--{kind}-outputs", *held]
    words += ["--atol", *(f"{name}:{tolerance.atol:.3g}" for name, tolerance in held.items())]
    words += ["--rtol", *(f"{name}:{tolerance.rtol:.3g}" for name, tolerance in held.items())]
    return (
        "#!/bin/sh\n"
        "# Needs a GPU, the full TensorRT, polygraphy and onnxruntime. Arguments are added to the command.\n"
        'cd "$(dirname "$0")" || exit 1\n'
        f'exec {shlex.join(words)} "$@"\n'
    )
