"""Puts another bank into a finished bundle: no PyTorch, no export.

Only the numbers of the bank change. In each graph they are a few weights of known names; everything else of
the graphs stays the bytes that it was, which the proof, repeated with the old bank's rows, shows again. That
the new rows are in the graphs is shown by a search of the bank on disk, with the query that the graph itself
computes: both must find the same pictures.

Dimensions: N bank size, D CLIP embedding size, K retrieved pictures.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

import numpy as np

from xadapter_export.bank.feature_bank import FeatureBank
from xadapter_export.bank.reader import BankReader
from xadapter_export.bundle.bank_rows import Float32, Int64
from xadapter_export.bundle.folder import (
    MANIFEST_NAME,
    PROJECTIONS_NAME,
    SIGNATURE_NAME,
    SWAPPED_NAME,
    Bundle,
    list_files,
    read_bundle,
    unlisted_files,
)
from xadapter_export.bundle.graph_check import beside, check_onnx
from xadapter_export.bundle.graph_file import GraphFile, extra_outputs
from xadapter_export.bundle.manifest import BankSpec, Manifest, ProvenBank
from xadapter_export.bundle.signature import BundleSigner
from xadapter_export.bundle.staging import staged_folder
from xadapter_export.errors import BundleError, ConfigError, OutputExistsError, ParityError, UnsupportedError
from xadapter_export.experts import V, reads_bank
from xadapter_export.parity.compare import TOLERANCES, Place, compare_retrieved
from xadapter_export.parity.prove import prove_bundle
from xadapter_export.parity.recorded import record
from xadapter_export.parity.reference import SCORES, read_reference, reference_feeds, sample_reference
from xadapter_export.sessions.onnx_session import open_onnx
from xadapter_export.sessions.open import open_variant
from xadapter_export.sessions.retrieval import open_retriever
from xadapter_export.sessions.session import Array, Opening
from xadapter_export.swap.files import SwappedFiles
from xadapter_export.swap.weights import BankWeights
from xadapter_export.targets import TARGETS

# Cosines that a lossy graph may be off: of float16 rows and queries; int8 rescores to 2e-5.
_LOSSY_SCORES = 5e-3


@dataclass(frozen=True)
class SwapResult:
    """A bundle with another bank.

    Attributes:
        num_cells: How many comparisons with PyTorch were repeated; 0 where the bundle has no fp32 variant.
        num_searched: How many retrievals of the new bank were compared with a search of it on disk.
        left_out: Names of the variants and deployments that were left out.
        lost_signature: Whether the old bundle was signed, and the new one is not.
    """

    folder: Path
    manifest: Manifest
    num_cells: int
    num_searched: int
    left_out: tuple[str, ...]
    lost_signature: bool = False


def swap_bank(
    bundle: str | Path | Bundle,
    bank: str | Path,
    output: str | Path | None = None,
    *,
    leave_out: Sequence[str] = (),
    assume_clip: bool = False,
    sign: str | Path | None = None,
    force: bool = False,
    say: Callable[[str], None] = lambda _stage: None,
) -> SwapResult:
    """Replace the bank of a bundle; a bundle that cannot take it stays as it is. Its signature is left out.

    Args:
        bundle: The bundle: its folder, its name on the Hub, or what ``read_bundle`` gave.
        bank: Folder of the new bank, of the same CLIP and width; it may have another number of rows.
        output: Folder of the new bundle; None replaces the bundle itself, if it is no bundle on the Hub.
        leave_out: Names of variants and deployments that read the bank and are not to be in the new bundle;
            a target stands for all of its deployments.
        assume_clip: Take a bank that does not say which CLIP it is of.
        sign: Private key to sign the new bundle with, see ``BundleSigner``; None to leave it unsigned.
        force: Replace a bundle that is already at ``output``.
        say: Told of each stage.

    Raises:
        BundleError: If the bundle is not whole, or has no bank.
        CheckpointError: If the bank cannot be read.
        ConfigError: If the bank does not fit the bundle, something to leave out is not there, ``output``
            is inside the bundle, or there is none for a bundle on the Hub.
        MissingExtraError: If it is to be signed, and model-signing is not installed.
        UnsupportedError: If something in the bundle depends on the bank in a way that cannot be redone.
        OutputExistsError: If something is in the way, or in a bundle to be replaced is a file that its
            manifest does not list.
        OutputWriteError: If the place cannot be written.
        ParityError: If the new bundle is not proven again.
    """
    in_place = output is None
    signer = None if sign is None else BundleSigner(sign)
    old = bundle if isinstance(bundle, Bundle) else read_bundle(bundle)
    lost = signer is None and (old.folder / SIGNATURE_NAME).exists()
    _check_graphs(old)
    reader = BankReader(bank)
    if in_place:
        _check_replaceable(old)
    kept = _keep(old.manifest, leave_out)
    spec = _check_fits(old, kept, reader, assume_clip=assume_clip)
    with staged_folder(old.folder if output is None else output, force=in_place or force) as staged:
        _check_outside(old, staged.final)
        say("write")
        make = BankWeights(FeatureBank.load(reader.folder), old)
        SwappedFiles(old, staged.path, kept, make).write(spec, reader, staged.final.name)
        new = read_bundle(staged.path, verify=False)
        num_cells, num_searched, manifest = _check_new(new, reader, say)
        if signer is not None:
            signer.sign(replace(new, manifest=manifest), staged.final.name)
    return SwapResult(staged.final, manifest, num_cells, num_searched, tuple(dict.fromkeys(leave_out)), lost)


def _check_new(new: Bundle, reader: BankReader, say: Callable[[str], None]) -> tuple[int, int, Manifest]:
    """Prove a new bundle, search its bank, and write what its graphs answer.

    Returns:
        How many comparisons with PyTorch and how many retrievals that were, and the manifest.
    """
    say("prove")
    num_cells = _prove_again(new)
    say("search")
    num_searched = _check_answers(new, reader)
    say("record")
    return num_cells, num_searched, _record_answers(new)


def _check_outside(bundle: Bundle, output: Path) -> None:
    """Refuse an output inside of the bundle that is read."""
    if bundle.folder.resolve() in output.parents:
        raise ConfigError(
            "the output lies inside the bundle", where=output, hint="choose a folder outside the bundle"
        )


def _prove_again(new: Bundle) -> int:
    """Compare the fp32 graphs with PyTorch, and return how many comparisons that were.

    Raises:
        ParityError: If one differs.
    """
    if all(variant.precision not in TOLERANCES for variant in new.manifest.variants):
        return 0
    report = prove_bundle(new.folder, verify=False)
    report.raise_if_failed()
    return len(report.cells)


def _check_graphs(old: Bundle) -> None:
    """Refuse a bundle with a graph that could do harm, before any is opened."""
    for variant in old.manifest.variants:
        for graph in variant.graph_files if variant.is_onnx else ():
            check_onnx(old.file(graph), beside(graph, variant.weight_files))


def _check_replaceable(bundle: Bundle) -> None:
    """Refuse to replace a bundle on the Hub, or one that holds files of somebody else, which would be gone.

    Raises:
        ConfigError: If it is on the Hub.
        OutputExistsError: If there are such files.
    """
    if bundle.repo is not None:
        raise ConfigError(
            "a bundle on the Hub is not replaced", where=bundle.name, hint="write the new one with -o FOLDER"
        )
    if unlisted := unlisted_files(bundle):
        raise OutputExistsError(
            "the bundle holds a file that its manifest does not list, which replacing it would remove",
            where=bundle.folder / unlisted[0],
            hint="move it away, or write to another folder with -o",
        )


def _keep(manifest: Manifest, leave_out: Sequence[str]) -> Manifest:
    """Return the manifest without what is to be left out.

    Raises:
        ConfigError: If it is not there, or an expert set would have no graph left.
    """
    variants = [v for v in manifest.variants if not reads_bank(v.expert_set) or v.name not in leave_out]
    deployments = [
        d
        for d in manifest.deployments
        if not reads_bank(d.expert_set) or {d.name, d.target}.isdisjoint(leave_out)
    ]
    gone = {v.name for v in manifest.variants if v not in variants}
    gone |= {name for d in manifest.deployments if d not in deployments for name in (d.name, d.target)}
    if unknown := [name for name in leave_out if name not in gone]:
        raise ConfigError("no variant or deployment of this name uses the bank", where=unknown[0])
    if lost := set(manifest.expert_sets) - {variant.expert_set for variant in variants}:
        raise ConfigError("this would leave an expert set without a graph", where=", ".join(sorted(lost)))
    return manifest.model_copy(update={"variants": tuple(variants), "deployments": tuple(deployments)})


def _check_fits(old: Bundle, kept: Manifest, reader: BankReader, *, assume_clip: bool) -> BankSpec:
    """Return what the manifest will say of the new bank.

    Raises:
        As ``swap_bank``.
    """
    bank = kept.bank
    if bank is None:
        raise BundleError("the bundle has no bank to swap", where=old.folder)
    if reader.dim != bank.dim:
        raise ConfigError(
            "the bank has another width", where=reader.folder, expected=bank.dim, got=reader.dim
        )
    if bank.retrieval == "topk" and reader.num_pictures < bank.k:
        raise ConfigError(
            "the bank has fewer images than the bundle retrieves",
            where=reader.folder,
            expected=f"at least {bank.k}",
            got=reader.num_pictures,
        )
    _check_clip(kept, bank, reader, assume_clip=assume_clip)
    if bank.retrieval == "static" and any(spec.explains(V.name) for spec in kept.expert_sets.values()):
        raise UnsupportedError(
            "explanations of a static bank have a place for each of its prototypes, so it cannot be swapped",
            where=old.folder,
            hint="export again with the new bank, or without explanations",
        )
    if bank.retrieval == "static" and not (old.folder / PROJECTIONS_NAME).is_file():
        raise UnsupportedError(
            "the static bank of this bundle cannot be swapped: its keys were learned for its prototypes, "
            f"or it was not folded, or the bundle is of a version without {PROJECTIONS_NAME}",
            where=old.folder,
            hint="train with the new bank, or export again",
        )
    for variant in kept.variants:
        why = TARGETS[variant.target].swap_refused.get(variant.precision)
        why = why if variant.is_onnx else "is no ONNX file"
        if reads_bank(variant.expert_set) and why is not None:
            raise UnsupportedError(
                f"variant {variant.name} {why} and cannot be swapped",
                hint=f"leave it out with --leave-out {variant.name}, or export again",
            )
    for deployment in kept.deployments:
        if reads_bank(deployment.expert_set):
            raise UnsupportedError(
                f"the deployment {deployment.name} contains the old bank",
                hint=f"leave it out with --leave-out {deployment.name}, or export again",
            )
    sha256 = reader.sha256()
    proven = bank.swapped_from or ProvenBank(num_pictures=bank.num_pictures, sha256=bank.sha256)
    return bank.model_copy(
        update={
            "num_pictures": reader.num_pictures,
            "sha256": sha256,
            "k": bank.k if bank.retrieval == "topk" else reader.num_pictures,
            "swapped_from": None if sha256 == proven.sha256 else proven,
        }
    )


def _check_clip(kept: Manifest, bank: BankSpec, reader: BankReader, *, assume_clip: bool) -> None:
    """Refuse a bank of another CLIP, and one of which that is not known.

    Raises:
        ConfigError: If it is one.
    """
    wanted = bank.clip_sha256
    if wanted is None and bank.retrieval == "topk" and kept.clip is not None:
        wanted = kept.clip.sha256
    if reader.clip is not None and wanted is not None:
        if reader.clip.sha256 != wanted:
            raise ConfigError(
                "the bank and the bundle were made with different CLIPs",
                where=reader.folder,
                expected=wanted[:12],
                got=reader.clip,
                hint="build the bank with the bundle's CLIP",
            )
    elif not assume_clip:
        silent = "the bank" if reader.clip is None else "the bundle"
        raise ConfigError(
            f"{silent} does not record which CLIP made its features",
            where=reader.folder,
            hint="build the bank again with xad-bank build, or accept it with --assume-clip",
        )


def _check_answers(new: Bundle, reader: BankReader) -> int:
    """Run every graph that reads the bank; what it retrieves must be what a search on disk finds.

    Returns:
        How many retrievals were compared.

    Raises:
        ParityError: If a graph retrieves something else, or gives no finite numbers.
    """
    manifest, num_searched = new.manifest, 0
    bank = manifest.bank
    assert bank is not None  # checked before
    reference = read_reference(new)
    for variant in [v for v in manifest.variants if reads_bank(v.expert_set)]:
        spec = manifest.expert_sets[variant.expert_set]
        outputs = [output.name for output in spec.outputs]
        file = new.file(variant.graph_files[0])  # the one that searches, or says what is searched for
        retriever = open_retriever(new, None) if spec.searches_outside else None
        searches = bank.retrieval == "topk" and retriever is None
        query = GraphFile(file.read_bytes(), file).query_of_bank() if searches else "query"
        asked = open_onnx(file, Opening(appended=extra_outputs([query] if searches else [])))
        session = asked if variant.query_file is None else open_variant(new, variant, retriever=retriever)
        for case, feed in reference_feeds(reference, spec).items():
            right = all(np.isfinite(array).all() for array in session.run(outputs, feed))
            if bank.retrieval == "topk":
                inputs = {value.name: feed[value.name] for value in asked.get_inputs()}
                queries = cast(Float32, asked.run([query], inputs)[0].astype(np.float32))
                if retriever is None:
                    rows, scores = asked.run(["retrieved", SCORES], inputs)
                else:
                    _, rows, scores = retriever.find(queries)
                place = Place(variant.expert_set, variant.name, case, "retrieved")
                right &= _finds(
                    cast(Int64, rows), cast(Float32, scores), *reader.stored.search(queries, bank.k), place
                )
                num_searched += len(queries)
            if not right:
                raise ParityError(
                    "the graph does not retrieve the new bank's rows, or its outputs contain NaN or infinity",
                    where=f"{variant.file}, case {case}",
                    hint="please report this",
                )
    return num_searched


def _record_answers(new: Bundle) -> Manifest:
    """Write what the graphs say with the new bank, so that a session can see whether they say it elsewhere.

    Where the app searches, it is asked with the bank of the proof instead.

    Returns:
        The manifest that was written.
    """
    manifest = new.manifest
    assert manifest.bank is not None  # checked before
    if manifest.bank.swapped_from is None or manifest.bank.features is not None:
        return manifest
    reference = read_reference(new)
    recorded: dict[str, Array] = {}
    for variant in [v for v in manifest.variants if reads_bank(v.expert_set)]:
        spec = manifest.expert_sets[variant.expert_set]
        recorded |= record(open_variant(new, variant), variant, spec, reference)
    np.savez_compressed(new.folder / SWAPPED_NAME, **sample_reference(recorded))  # type: ignore[arg-type]  # keywords are arrays, not flags
    manifest = manifest.model_copy(update={"files": list_files(new.folder)})
    (new.folder / MANIFEST_NAME).write_text(manifest.to_json(), encoding="utf-8")
    return manifest


def _finds(rows: Int64, scores: Float32, best_scores: Float32, best: Int64, place: Place) -> bool:
    """Whether rows and scores of a graph are those of a search on disk."""
    if place.variant.rpartition("-")[2] in TOLERANCES:
        return compare_retrieved(rows, best, scores, best_scores, place).passed
    return bool(np.abs(scores - best_scores).max() <= _LOSSY_SCORES)
