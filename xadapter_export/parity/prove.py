"""Prove a bundle: run every graph on the inputs in ``reference.npz``, compare with PyTorch's outputs there.

Every output and tap that the manifest names must have a reference in every case, and there must be as many
cases as when the bundle was made, so that nothing passes by not being looked at.

Every fp32 variant is held to the same rule. The portable graph has every tap; a fused one has those that the
fusion left; a graph of OpenVINO gives its outputs only. A lossy variant cannot be proven like this: its
manifest says what it was measured to say, and ``check_lossy`` whether it still says that.

Of a bundle whose bank was swapped, the graphs with the V-expert are proven with the bank that the reference
is of; see ``parity.proven_bank``. Whether the new one is in the graph is checked when it is put there.
"""

import importlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import cast

import numpy as np
from numpy.typing import NDArray

from xadapter_export.bundle.folder import REFERENCE_NAME, Bundle, read_bundle
from xadapter_export.bundle.graph_file import extra_outputs
from xadapter_export.bundle.machine import read_machine
from xadapter_export.bundle.manifest import ExpertSet, ExpertSetSpec, TapSpec, Variant
from xadapter_export.errors import ConfigError, ParityError
from xadapter_export.experts import reads_bank
from xadapter_export.parity.compare import TIE, TOLERANCES, Cell, Place, Tolerance, compare, compare_retrieved
from xadapter_export.parity.proven_bank import ProvenBank, read_proven_bank
from xadapter_export.parity.recorded import Check, opened_record
from xadapter_export.parity.reference import (
    SCORES,
    look_up,
    read_reference,
    reference_feeds,
    take_columns,
)
from xadapter_export.parity.report import ParityReport
from xadapter_export.sessions.open import open_variant
from xadapter_export.sessions.session import Array, OnnxSession, Opening, Provider
from xadapter_export.targets import CPU_PROVIDER, TARGETS

OnVariant = Callable[[Variant], None]

IntArray = NDArray[np.int64]
FloatArray = NDArray[np.float32]


@dataclass(frozen=True)
class Expected:
    """What a session must give.

    Attributes:
        reference: What is compared with.
        keys: The reference's name, ``out/logits``, by the graph's.
        tolerances: How far a value may be, by the graph's name.
        tie: Retrieved rows whose scores are as near as this may swap places.
        bank: What stands for the bank in the session; None where it is the bundle's own.
    """

    reference: Mapping[str, Array]
    keys: Mapping[str, str]
    tolerances: Mapping[str, Tolerance]
    tie: float = TIE
    bank: ProvenBank | None = None


def prove_bundle(
    folder: Path | str,
    expert_sets: Sequence[ExpertSet] | None = None,
    *,
    variants: Sequence[str] | None = None,
    providers: Sequence[Provider] | None = None,
    num_threads: int | None = None,
    verify: bool = True,
    on_variant: OnVariant = lambda _variant: None,
) -> ParityReport:
    """Compare a bundle's fp32 graphs with the PyTorch outputs that it carries.

    The outputs come from the graph as it ships; only for the taps is it loaded a second time, with them
    added.

    Args:
        folder: The bundle.
        expert_sets: The sets to prove; all of them if None.
        variants: Names of the variants to prove, ``onnx-fp32``; every fp32 one if None.
        providers: Execution providers in order of preference; the CPU if None. On any other the graphs of
            targets that are made for it, or for any, are proven.
        num_threads: Threads inside one operator; the engine's choice if None.
        verify: Whether to check the files' hashes first.
        on_variant: Told of each variant that is done.

    Returns:
        The report. A difference that is too large is a cell that did not pass, not an exception.

    Raises:
        BundleError: If the bundle, or its reference, is incomplete, or it lacks a set or a variant.
        ConfigError: If a variant that is named is lossy.
        MissingExtraError: If the engine of a variant is not installed.
        ParityError: If there is nothing to compare, or less than when the bundle was made.
    """
    bundle = read_bundle(folder, verify=verify)
    chosen = [variant for variant in _choose(bundle, expert_sets, variants) if runs_on(variant, providers)]
    reference = read_reference(bundle)
    old_bank = read_proven_bank(bundle)
    cells: list[Cell] = []
    active: dict[str, None] = {}
    for variant in chosen:
        bank = old_bank if reads_bank(variant.expert_set) else None
        compared, used = _prove_variant(bundle, variant, reference, Opening(providers, num_threads), bank)
        active |= dict.fromkeys(used)
        cells += compared
        on_variant(variant)
    if not cells:
        got = None if chosen else "no fp32 variant that runs here"
        raise ParityError("there was nothing to compare", where=bundle.folder, got=got)
    return ParityReport(
        tolerances=TOLERANCES,
        created_with={"numpy": np.__version__} | _engine_versions(chosen),
        providers=tuple(active),
        processor=str(read_machine()),
        cells=tuple(cells),
    )


def _prove_variant(
    bundle: Bundle, variant: Variant, reference: Mapping[str, Array], how: Opening, bank: ProvenBank | None
) -> tuple[list[Cell], list[str]]:
    """Return a cell for each case and each output or tap of a variant, and the providers that were active.

    Raises:
        ParityError: If there are fewer than when the bundle was made.
    """
    spec, retriever = bundle.manifest.expert_sets[variant.expert_set], None
    if bank is not None:
        how = replace(how, weights=bank.weights_of(bundle, variant))
        retriever = bank.retriever(bundle)
    open_graph = partial(open_variant, bundle, variant, how, retriever=retriever)
    keys = {output.name: f"out/{output.name}" for output in spec.outputs}
    cells, used = _prove_values(open_graph, variant, spec, _exact(variant, reference, keys, bank))
    if taps := _find_taps(bundle, variant, spec):
        how = replace(how, appended=extra_outputs(tap.name for tap in taps))
        open_graph = partial(open_variant, bundle, variant, how, retriever=retriever)
        keys = {tap.name: f"tap/{tap.layer}.{tap.expert}" for tap in taps}
        cells += _prove_values(open_graph, variant, spec, _exact(variant, reference, keys, None))[0]
    if cells and variant.parity and len(cells) < variant.parity.num_cells:
        raise ParityError(
            "the reference lacks cases that were checked at export",
            where=f"{bundle.folder / REFERENCE_NAME}, set {variant.expert_set}",
            expected=f"{variant.parity.num_cells} cells",
            got=len(cells),
            hint="copy or export the bundle again",
        )
    return cells, used


def _exact(
    variant: Variant, reference: Mapping[str, Array], keys: Mapping[str, str], bank: ProvenBank | None
) -> Expected:
    """Return what is expected of a variant of fp32: the reference, by the rule of its precision."""
    return Expected(reference, keys, dict.fromkeys(keys, TOLERANCES[variant.precision]), bank=bank)


def _choose(
    bundle: Bundle, expert_sets: Sequence[ExpertSet] | None, names: Sequence[str] | None
) -> list[Variant]:
    """Return the variants to prove, in the order of the manifest."""
    manifest = bundle.manifest
    sets = tuple(manifest.expert_sets) if expert_sets is None else tuple(expert_sets)
    if names is None:
        chosen = [variant for name in sets for variant in manifest.variants_of(name)]
        chosen = [variant for variant in chosen if variant.precision in TOLERANCES]
    else:
        chosen = [manifest.variant(expert_set, name) for expert_set in sets for name in names]
    for variant in chosen:
        if variant.precision not in TOLERANCES:
            raise ConfigError(
                "a lossy variant cannot be checked with the fp32 tolerance",
                where=variant.name,
                hint="xad-inspect shows its agreement with fp32",
            )
    return [variant for variant in manifest.variants if variant in chosen]


def check_lossy(
    folder: Path | str,
    expert_sets: Sequence[ExpertSet] | None = None,
    *,
    variants: Sequence[str] | None = None,
    providers: Sequence[Provider] | None = None,
    num_threads: int | None = None,
    verify: bool = True,
    on_variant: OnVariant = lambda _variant: None,
) -> tuple[Check, ...]:
    """Ask a bundle's lossy graphs every case, and compare with what they said when the bundle was made.

    Args:
        folder: The bundle.
        expert_sets: The sets to check; all of them if None.
        variants: Names of variants; every one if None. Those of fp32 are left aside.
        providers: As ``prove_bundle``.
        num_threads: As ``prove_bundle``.
        verify: Whether to check the files' hashes first.
        on_variant: As ``prove_bundle``.

    Returns:
        A check for each case of each variant, by the rule of ``parity.recorded``; none where no lossy variant
        runs with these providers.

    Raises:
        BundleError: If the bundle, or its reference, is incomplete, or it lacks a set.
        MissingExtraError: If the engine of a variant is not installed.
    """
    bundle = read_bundle(folder, verify=verify)
    manifest = bundle.manifest
    held = [v for name in expert_sets or manifest.expert_sets for v in manifest.variants_of(name)]
    checks: list[Check] = []
    for variant in [
        v for v in held if v.precision not in TOLERANCES and (not variants or v.name in variants)
    ]:
        if not runs_on(variant, providers):
            continue
        session = open_variant(bundle, variant, Opening(providers, num_threads))
        with opened_record(bundle) as record:
            checks += [record.check(session, variant, case) for case in record.cases]
        on_variant(variant)
    return tuple(checks)


def runs_on(variant: Variant, providers: Sequence[Provider] | None) -> bool:
    """Whether a variant is made for these providers."""
    names = [name if isinstance(name, str) else name[0] for name in providers or [CPU_PROVIDER]]
    return TARGETS[variant.target].runs_with(names)


def _find_taps(bundle: Bundle, variant: Variant, spec: ExpertSetSpec) -> tuple[TapSpec, ...]:
    """Return the taps that can be read in a graph."""
    readable = TARGETS[variant.target].taps
    if readable != "left":
        return spec.taps if readable == "all" else ()
    # A node's output as protobuf writes it: NodeProto's field 2, length, name (onnx.proto, onnx 1.23).
    graph, tag = bundle.file(variant.file).read_bytes(), bytes([2 << 3 | 2])
    return tuple(tap for tap in spec.taps if tag + bytes([len(tap.name)]) + tap.name.encode() in graph)


def _engine_versions(variants: Iterable[Variant]) -> dict[str, str]:
    runtimes = [TARGETS[variant.target].runtime for variant in variants]  # each has just run
    modules = dict.fromkeys(runtime.module for runtime in runtimes if runtime is not None)
    return {name: str(importlib.import_module(name).__version__) for name in modules}


def _prove_values(
    open_graph: Callable[[], OnnxSession],
    variant: Variant,
    spec: ExpertSetSpec,
    expected: Expected,
) -> tuple[list[Cell], list[str]]:
    """Return a cell for each case and each named value, and the providers that were active.

    The session is gone before another is opened: each holds the weights.
    """
    session = open_graph()
    cells: list[Cell] = []
    for case, feed in reference_feeds(expected.reference, spec).items():
        cells += compare_case(session, variant, case, feed, expected)
    return cells, session.get_providers()


def compare_case(
    session: OnnxSession, variant: Variant, case: str, feed: Mapping[str, Array], expected: Expected
) -> list[Cell]:
    """Run one case and compare every named value.

    Args:
        session: What computes it.
        variant: The variant that it was made from.
        case: Name of the case.
        feed: Its inputs.
        expected: What it must give.

    Raises:
        ParityError: If the reference lacks a value, or the inputs cannot be computed.
    """
    cells: list[Cell] = []
    reference, keys, bank = expected.reference, expected.keys, expected.bank
    refs = {name: look_up(reference, f"{case}/{variant.expert_set}/{key}") for name, key in keys.items()}
    try:
        got = dict(zip(keys, session.run(list(keys), feed), strict=True))
    except Exception as error:  # the engines' own errors have no common base below Exception
        where = f"{variant.file}, case {case}"
        raise ParityError("the graph cannot compute the reference inputs", where=where, got=error) from error
    for name in keys:
        got[name] = take_columns(got[name], reference, f"{case}/{variant.expert_set}/{keys[name]}")
        place = Place(variant.expert_set, variant.name, case, name)
        if name == "retrieved":
            got[name] = bank.number(got[name]) if bank is not None else got[name]
            rows = cast("tuple[IntArray, IntArray]", (got[name], refs[name]))
            scores = cast("tuple[FloatArray, FloatArray]", (got[SCORES], refs[SCORES]))
            cells.append(compare_retrieved(*rows, *scores, place, tie=expected.tie))
        else:
            cells.append(compare(got[name], refs[name], expected.tolerances[name], place))
    return cells
