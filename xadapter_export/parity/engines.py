"""Prove the engines of a bundle on the GPU of this machine.

An fp32 engine is held to the rule that every fp32 graph is held to. A lossy one is compared with its own
graph in onnxruntime: the two compute the same in other orders, so an engine may be as far from its graph as
``LOSSY_FACTOR`` times what the graph itself is from PyTorch on the same inputs.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from xadapter_export.bundle.folder import Bundle, read_bundle
from xadapter_export.bundle.manifest import Deployment, ExpertSet, Variant
from xadapter_export.errors import BundleError, ParityError
from xadapter_export.parity.compare import TIE, TOLERANCES, Cell, Tolerance
from xadapter_export.parity.prove import Expected, compare_case
from xadapter_export.parity.reference import SCORES, read_reference, reference_feeds
from xadapter_export.parity.report import ParityReport
from xadapter_export.sessions.open import open_variant
from xadapter_export.sessions.session import Array, OnnxSession
from xadapter_export.sessions.tensorrt_session import engine_file_for, find_gpu, open_engine

LOSSY_FACTOR = 2.0


def prove_engines(
    folder: Path | str,
    target: str,
    expert_sets: Sequence[ExpertSet] | None = None,
    *,
    variants: Sequence[str] | None = None,
    verify: bool = True,
) -> ParityReport:
    """Run the engines for this machine's GPU on the inputs that the bundle carries, and compare.

    Args:
        folder: The bundle.
        target: A target of engines, as ``tensorrt-rtx``.
        expert_sets: The sets to prove; all that have an engine if None.
        variants: Names of the graphs whose engines are proven, ``onnx-fp16``; all if None.
        verify: Whether to check the files' hashes first.

    Returns:
        The report; a cell for each output of each case that the engine was planned for.

    Raises:
        BundleError: If the bundle is not whole, has no such engine, or one cannot be loaded.
        MissingExtraError: If the library is not installed.
        ProviderError: If there is no GPU, or no engine for it.
        ParityError: If there is nothing to compare.
    """
    bundle = read_bundle(folder, verify=verify)
    wanted = [
        made
        for made in bundle.manifest.deployments
        if made.target == target
        and made.engines
        and (expert_sets is None or made.expert_set in expert_sets)
        and (variants is None or made.source in variants)
    ]
    if not wanted:
        raise BundleError(
            "the bundle does not have this engine",
            where=f"{target}, experts {', '.join(expert_sets or ['any'])}, {', '.join(variants or ['any'])}",
            hint=f"export it with --target {target}",
        )
    gpu = find_gpu()
    chosen = [(made, engine_file_for(made, gpu)) for made in wanted]
    reference = read_reference(bundle)
    cells: list[Cell] = []
    tolerances: dict[str, Tolerance] = dict(TOLERANCES)
    libraries: dict[str, None] = {}
    for made, file in chosen:
        session = open_engine(bundle.file(file), target)
        compared, used = compare_engine(bundle, made, session, session.fits, reference)
        cells += compared
        tolerances |= used
        libraries |= dict.fromkeys(session.get_providers())
    return ParityReport(
        tolerances=tolerances,
        created_with={"numpy": np.__version__} | dict(name.split(" ") for name in libraries),
        providers=tuple(f"{name} on {gpu}" for name in libraries),
        cells=tuple(cells),
    )


def compare_engine(
    bundle: Bundle,
    made: Deployment,
    session: OnnxSession,
    fits: Callable[[Mapping[str, Array]], bool],
    reference: Mapping[str, Array],
) -> tuple[list[Cell], dict[str, Tolerance]]:
    """Compare what an engine says with PyTorch, or with its graph where that is lossy.

    Args:
        bundle: Its bundle.
        made: The deployment that it belongs to.
        session: The engine.
        fits: Whether it was planned for inputs of these shapes.
        reference: ``reference.npz``, by key.

    Returns:
        The cells, and the tolerances that a lossy engine was held to, by name and output.

    Raises:
        ParityError: If no case has shapes that it was planned for, or the graph cannot be computed.
    """
    variant = bundle.manifest.variant(made.expert_set, made.source)
    spec = bundle.manifest.expert_sets[variant.expert_set]
    keys = {output.name: f"out/{output.name}" for output in spec.outputs}
    feeds = {case: feed for case, feed in reference_feeds(reference, spec).items() if fits(feed)}
    if not feeds:
        raise ParityError(
            "no reference input fits the input sizes of the engine",
            where=f"{made.target}, experts {made.expert_set}, {made.source}",
            hint="export again with a wider --profile",
        )
    held = dict.fromkeys(keys, TOLERANCES["fp32"])
    tie = TIE
    used: dict[str, Tolerance] = {}
    if variant.precision not in TOLERANCES:
        held, reference = measure_graph(bundle, variant, feeds, reference)
        tie = max(TIE, held[SCORES].atol) if SCORES in held else TIE
        used = {f"{made.name}/{name}": tolerance for name, tolerance in held.items()}
    expected = Expected(reference, keys, held, tie=tie)
    cells = [c for case, feed in feeds.items() for c in compare_case(session, variant, case, feed, expected)]
    return [cell.model_copy(update={"variant": made.name}) for cell in cells], used


def measure_graph(
    bundle: Bundle,
    variant: Variant,
    feeds: Mapping[str, Mapping[str, Array]],
    reference: Mapping[str, Array],
) -> tuple[dict[str, Tolerance], dict[str, Array]]:
    """Run a lossy graph in onnxruntime, and measure how far it is from PyTorch.

    Returns:
        ``LOSSY_FACTOR`` times that, for each output, and what the graph says, as a reference of its own.

    Raises:
        ParityError: If the graph cannot compute an input.
    """
    spec = bundle.manifest.expert_sets[variant.expert_set]
    keys = {output.name: f"out/{output.name}" for output in spec.outputs}
    fp32 = TOLERANCES["fp32"]
    session = open_variant(bundle, variant)
    measured = dict.fromkeys(keys, 0.0)
    said: dict[str, Array] = {}
    expected = Expected(reference, keys, dict.fromkeys(keys, fp32))
    for case, feed in feeds.items():
        for cell in compare_case(session, variant, case, feed, expected):
            if cell.problem:
                raise ParityError("the graph's own output is wrong", where=cell.output, got=cell.problem)
            measured[cell.output] = max(measured[cell.output], cell.smallest_atol or 0.0)
        for name, array in zip(keys, session.run(list(keys), feed), strict=True):
            said[f"{case}/{variant.expert_set}/{keys[name]}"] = array
    held = {
        name: Tolerance(atol=max(fp32.atol, LOSSY_FACTOR * distance), rtol=fp32.rtol)
        for name, distance in measured.items()
    }
    return held, said
