"""Prove a bundle: run every graph on the inputs in ``reference.npz``, compare with PyTorch's outputs there.

Keys of ``reference.npz``: ``{case}/in/{input}``, ``{case}/{set}/out/{output}``, ``{case}/{set}/tap/{l}.{e}``.
Every output and tap that the manifest names must have a reference in every case, and there must be as many
cases as when the bundle was made, so that nothing passes by not being looked at.
"""

import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import cast

import numpy as np
from numpy.typing import NDArray

from xadapter_export.bundle.folder import REFERENCE_NAME, read_bundle
from xadapter_export.bundle.manifest import ExpertSet, ExpertSetSpec, Variant
from xadapter_export.bundle.onnx_session import Array, OnnxSession, Provider, create_session
from xadapter_export.errors import BundleError, ParityError, import_extra
from xadapter_export.parity.compare import TOLERANCES, Cell, Place, compare, compare_retrieved
from xadapter_export.parity.reference import take_columns
from xadapter_export.parity.report import ParityReport
from xadapter_export.parity.taps import extra_outputs

SCORES = "retrieved_scores"

IntArray = NDArray[np.int64]
FloatArray = NDArray[np.float32]


def prove_bundle(
    folder: Path | str,
    expert_sets: Sequence[ExpertSet] | None = None,
    *,
    providers: Sequence[Provider] | None = None,
    num_threads: int | None = None,
    verify: bool = True,
) -> ParityReport:
    """Compare a bundle's graphs with the PyTorch outputs that it carries.

    The outputs come from the graph as it ships; only for the taps is it loaded a second time, with them
    added.

    Args:
        folder: The bundle.
        expert_sets: The sets to prove; all of them if None.
        providers: Execution providers in order of preference; the CPU if None.
        num_threads: Threads inside one operator; onnxruntime's choice if None.
        verify: Whether to check the files' hashes first.

    Returns:
        The report. A difference that is too large is a cell that did not pass, not an exception.

    Raises:
        BundleError: If the bundle, or its reference, is not whole.
        ParityError: If there is nothing to compare, or less than when the bundle was made.
    """
    bundle = read_bundle(folder, verify=verify)
    manifest = bundle.manifest
    wanted = set(manifest.expert_sets if expert_sets is None else expert_sets)
    for name in wanted:
        manifest.variant(name)  # says clearly that a set is not there
    reference = _read_reference(bundle.file(REFERENCE_NAME))
    cells: list[Cell] = []
    active: list[str] = []
    for variant in manifest.variants:
        if variant.expert_set not in wanted:
            continue
        file = bundle.file(variant.file)
        spec = manifest.expert_sets[variant.expert_set]
        session = create_session(file, providers=providers, num_threads=num_threads)
        active = session.get_providers()
        keys = {output.name: f"out/{output.name}" for output in spec.outputs}
        cells += _prove_values(session, variant, spec, reference, keys)
        if spec.taps:
            appended = extra_outputs(tap.name for tap in spec.taps)
            session = create_session(file, providers=providers, num_threads=num_threads, appended=appended)
            keys = {tap.name: f"tap/{tap.layer}.{tap.expert}" for tap in spec.taps}
            cells += _prove_values(session, variant, spec, reference, keys)
    if not cells:
        raise ParityError("nothing to compare, which proves nothing", where=bundle.folder)
    for variant in manifest.variants:
        num_cells = sum(cell.expert_set == variant.expert_set for cell in cells)
        if variant.expert_set in wanted and variant.parity and num_cells < variant.parity.num_cells:
            raise ParityError(
                "the reference lacks cases that the bundle was proven with",
                where=f"{bundle.folder / REFERENCE_NAME}, set {variant.expert_set}",
                expected=f"{variant.parity.num_cells} cells",
                got=num_cells,
                mend="copy or export the bundle again",
            )
    return ParityReport(
        tolerances=TOLERANCES,
        created_with={
            "numpy": np.__version__,
            "onnxruntime": str(import_extra("onnxruntime", "cpu", "gpu").__version__),
        },
        providers=tuple(active),
        cells=tuple(cells),
    )


def _prove_values(
    session: OnnxSession,
    variant: Variant,
    spec: ExpertSetSpec,
    reference: Mapping[str, Array],
    keys: Mapping[str, str],
) -> Iterator[Cell]:
    """Yield a cell for each case and each named value; ``keys`` maps the graph's name to the reference's."""
    for case in sorted({key.split("/")[0] for key in reference if "/in/" in key}):
        feed = {tensor.name: _look_up(reference, f"{case}/in/{tensor.name}") for tensor in spec.inputs}
        refs = {name: _look_up(reference, f"{case}/{variant.expert_set}/{key}") for name, key in keys.items()}
        try:
            got = dict(zip(keys, session.run(list(keys), feed), strict=True))
        except Exception as error:  # onnxruntime's own errors have no common base below Exception
            where = f"{variant.file}, case {case}"
            raise ParityError(
                "the graph cannot compute the reference inputs", where=where, got=error
            ) from error
        for name in keys:
            got[name] = take_columns(got[name], reference, f"{case}/{variant.expert_set}/{keys[name]}")
            place = Place(variant.expert_set, variant.precision, case, name)
            if name == "retrieved":
                rows = cast("tuple[IntArray, IntArray]", (got[name], refs[name]))
                scores = cast("tuple[FloatArray, FloatArray]", (got[SCORES], refs[SCORES]))
                yield compare_retrieved(*rows, *scores, place)
            else:
                yield compare(got[name], refs[name], TOLERANCES[variant.precision], place)


def _read_reference(path: Path) -> dict[str, Array]:
    """Read ``reference.npz``, by key.

    Raises:
        BundleError: If it is not a plain npz file.
    """
    try:
        with np.load(path, allow_pickle=False) as archive:
            return {key: archive[key] for key in archive.files}
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise BundleError("the reference cannot be read", where=path, got=error) from error


def _look_up(reference: Mapping[str, Array], key: str) -> Array:
    try:
        return reference[key]
    except KeyError as error:
        raise ParityError(
            "the reference lacks an array",
            where=key,
            mend=f"export the bundle again: {REFERENCE_NAME} is not whole",
        ) from error
