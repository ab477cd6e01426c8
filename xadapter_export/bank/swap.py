"""Puts another bank into a finished bundle: no PyTorch, no export.

Only the numbers of the bank change. In each graph they are a few weights of known names; everything else of
the graphs stays the bytes that it was, which the proof, repeated with the old bank's rows, shows again. That
the new rows are in the graphs is shown by a search of the bank on disk, with the query that the graph itself
computes: both must find the same pictures.

Dimensions: N bank size, D CLIP embedding size, K retrieved pictures.
"""

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, cast

import numpy as np
from numpy.typing import NDArray

from xadapter_export.bank.graph_rows import (
    load_projections,
    num_candidates,
    quantise_rows,
    to_half,
    unit_rows,
)
from xadapter_export.bank.nearest import find_nearest
from xadapter_export.bank.reader import BankReader
from xadapter_export.bank.rows import Float32
from xadapter_export.bundle.folder import (
    BANK_NAME,
    MANIFEST_NAME,
    PROJECTIONS_NAME,
    PROVEN_BANK_NAME,
    Bundle,
    list_files,
    read_bundle,
    staged_folder,
)
from xadapter_export.bundle.graph_file import GraphFile, Weight
from xadapter_export.bundle.manifest import BankSpec, ExpertSet, Manifest, ProvenBank, Variant
from xadapter_export.bundle.model_card import model_card
from xadapter_export.bundle.onnx_session import Array, open_variant
from xadapter_export.errors import BundleError, ConfigError, ParityError, UnsupportedError
from xadapter_export.parity import proven_bank
from xadapter_export.parity.compare import TOLERANCES, Place, compare_retrieved
from xadapter_export.parity.prove import SCORES, prove_bundle, read_reference
from xadapter_export.parity.taps import extra_outputs

_ALIGNMENT = 64  # bytes, as the exporter aligns weights
_COPY_BYTES = 2**24
# Cosines that a lossy graph may be off: of float16 rows and queries; int8 rescores to 2e-5.
_LOSSY_SCORES = 5e-3

AnyArray = NDArray[np.generic]


@dataclass(frozen=True)
class SwapResult:
    """A bundle with another bank.

    Attributes:
        num_cells: How many comparisons with PyTorch were repeated; 0 where the bundle has no fp32 variant.
        num_searched: How many retrievals of the new bank were compared with a search of it on disk.
        left_out: Names of the variants and deployments that were left out.
    """

    folder: Path
    manifest: Manifest
    num_cells: int
    num_searched: int
    left_out: tuple[str, ...]


def swap_bank(
    bundle: str | Path,
    bank: str | Path,
    output: str | Path | None = None,
    *,
    leave_out: Sequence[str] = (),
    assume_clip: bool = False,
    force: bool = False,
) -> SwapResult:
    """Replace the bank of a bundle; a bundle that cannot take it stays as it is.

    Args:
        bundle: The bundle.
        bank: Folder of the new bank, of the same CLIP and width; it may have another number of rows.
        output: Folder of the new bundle; the bundle itself is replaced if None.
        leave_out: Names of variants and deployments that read the bank and are not to be in the new bundle.
        assume_clip: Take a bank that does not say which CLIP it is of.
        force: Replace a bundle that is already at ``output``.

    Raises:
        BundleError: If the bundle is not whole, or has no bank.
        CheckpointError: If the bank cannot be read.
        ConfigError: If the bank does not fit the bundle, or something to leave out is not there.
        UnsupportedError: If something in the bundle depends on the bank in a way that cannot be redone.
        OutputExistsError: If something is in the way.
        OutputWriteError: If the place cannot be written.
        ParityError: If the new bundle is not proven again.
    """
    old = read_bundle(bundle)
    reader = BankReader(bank)
    kept = _keep(old.manifest, leave_out)
    spec = _check_fits(old, kept, reader, assume_clip=assume_clip)
    in_place = output is None
    with staged_folder(bundle if output is None else output, force=in_place or force) as staged:
        rows = unit_rows(reader.rows(0, reader.num_pictures))
        make = _Maker(rows, old)
        swapped = _Swap(old, staged.path, kept, make)
        manifest = swapped.write(spec, reader, staged.final.name)
        new = read_bundle(staged.path, verify=False)
        has_fp32 = any(variant.precision in TOLERANCES for variant in manifest.variants)
        cells = prove_bundle(staged.path, verify=False) if has_fp32 else None
        if cells is not None:
            cells.raise_if_failed()
        num_searched = _check_answers(new, reader)
    return SwapResult(
        staged.final,
        manifest,
        0 if cells is None else len(cells.cells),
        num_searched,
        tuple(dict.fromkeys(leave_out)),
    )


def _keep(manifest: Manifest, leave_out: Sequence[str]) -> Manifest:
    """Return the manifest without what is to be left out.

    Raises:
        ConfigError: If it is not there, or an expert set would have no graph left.
    """
    variants = [v for v in manifest.variants if "v" not in v.expert_set or v.name not in leave_out]
    deployments = [d for d in manifest.deployments if "v" not in d.expert_set or d.target not in leave_out]
    gone = {v.name for v in manifest.variants if v not in variants}
    gone |= {d.target for d in manifest.deployments if d not in deployments}
    if unknown := [name for name in leave_out if name not in gone]:
        raise ConfigError("there is nothing of this name that reads the bank", where=unknown[0])
    if lost := set(manifest.expert_sets) - {variant.expert_set for variant in variants}:
        raise ConfigError("an expert set would have no graph left", where=", ".join(sorted(lost)))
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
            "the bank is of another width", where=reader.folder, expected=bank.dim, got=reader.dim
        )
    if bank.retrieval == "topk" and reader.num_pictures < bank.k:
        raise ConfigError(
            "the bank has fewer pictures than are retrieved",
            where=reader.folder,
            expected=f"at least {bank.k}",
            got=reader.num_pictures,
        )
    _check_clip(kept, bank, reader, assume_clip=assume_clip)
    if bank.retrieval == "static" and not (old.folder / PROJECTIONS_NAME).is_file():
        raise UnsupportedError(
            "the static bank of this bundle cannot be swapped: its keys were learned for its prototypes "
            f"(query = sentence), or it was not folded or is of a version without {PROJECTIONS_NAME}",
            where=old.folder,
            mend="train with the new bank, or export again",
        )
    for variant in kept.variants:
        if "v" not in variant.expert_set or (variant.target != "openvino" and variant.name != "onnx-int8"):
            continue
        why = "is no ONNX file" if variant.target == "openvino" else "was calibrated with the old bank"
        raise UnsupportedError(
            f"variant {variant.name} {why} and cannot be swapped",
            mend=f"leave it out with --leave-out {variant.name}, or export again",
        )
    for deployment in kept.deployments:
        if "v" in deployment.expert_set:
            raise UnsupportedError(
                f"the deployment for {deployment.target} holds the old bank",
                mend=f"leave it out with --leave-out {deployment.target}, or export again",
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
                "the bank was made with another CLIP than the bundle's",
                where=reader.folder,
                expected=wanted[:12],
                got=reader.clip,
                mend="build the bank with the CLIP of the bundle",
            )
    elif not assume_clip:
        silent = "the bank" if reader.clip is None else "the bundle"
        raise ConfigError(
            f"{silent} does not say which CLIP its features are of",
            where=reader.folder,
            mend="build the bank again with xad-bank build, or vouch for it with --assume-clip",
        )


class _Maker:
    """Makes the weights of a graph that hold the bank, each once.

    Args:
        rows: ``(N, D) float32`` of length 1.
        old: The bundle, with its projections where the bank is static.
    """

    def __init__(self, rows: Float32, old: Bundle) -> None:
        self._rows = rows
        self._made: dict[tuple[str, str], AnyArray] = {}
        self._codes: dict[str, AnyArray] = {}
        self._folded: dict[str, AnyArray] = {}
        bank = old.manifest.bank
        assert bank is not None  # checked before
        self._k = bank.k
        if bank.retrieval == "static":
            for layer, projection in load_projections(old.file(PROJECTIONS_NAME)).items():
                keys, values = projection.fold(rows)
                self._folded |= {f"bank_keys_{layer}": keys, f"bank_values_{layer}": values}

    def __call__(self, weight: Weight) -> AnyArray | None:
        """Return what takes the place of a weight; None for one that does not depend on the bank.

        Raises:
            UnsupportedError: If a graph holds the bank in a form that is not known here.
        """
        if not weight.name.startswith("bank"):
            return None
        key = weight.name, weight.dtype
        if key not in self._made:
            made = self._make(weight)
            if made is None:
                return None
            self._made[key] = made
        return self._made[key]

    def _make(self, weight: Weight) -> AnyArray | None:
        name, n = weight.name, len(self._rows)
        if name == "bank_candidates":
            return np.array([num_candidates(n, self._k)], np.int64)
        if name in {"bank", "bank_search"} and weight.dtype in {"float32", "float16"}:
            return self._rows if weight.dtype == "float32" else to_half(self._rows)
        if name in self._folded and weight.dtype in {"float32", "float16"}:
            folded = cast(Float32, self._folded[name])
            return folded if weight.dtype == "float32" else to_half(folded)
        if (name, weight.dtype) in _INT8_WEIGHTS:
            if not self._codes:
                codes, rest, scales = quantise_rows(self._rows)
                self._codes = {"codes": codes, "rest": rest, "scales": scales}
            return self._codes[_INT8_WEIGHTS[name, weight.dtype]]
        if len(weight.shape) < 2:
            return None  # k, steps and shapes, which hold for any bank
        raise UnsupportedError(
            "a graph holds its bank in a form that cannot be swapped",
            where=f"{name} {weight.dtype} {weight.shape}",
            mend="export again",
        )


_INT8_WEIGHTS = {
    ("bank_search", "uint8"): "codes",
    ("bank_codes", "uint8"): "codes",
    ("bank_rest", "int8"): "rest",
    ("bank_scales", "float32"): "scales",
}


class _Swap:
    """Writes the new bundle into a folder.

    Args:
        old: The bundle.
        folder: Where the new one goes; empty.
        kept: The manifest without what is left out.
        make: Makes the new weights.
    """

    def __init__(
        self, old: Bundle, folder: Path, kept: Manifest, make: Callable[[Weight], AnyArray | None]
    ) -> None:
        self._old, self._folder, self._kept, self._make = old, folder, kept, make
        self._graphs = {
            v.file: GraphFile(old.file(v.file).read_bytes(), v.file)
            for v in kept.variants
            if v.target != "openvino"
        }

    def write(self, spec: BankSpec, reader: BankReader, name: str) -> Manifest:
        """Write every file, and return the manifest that was written."""
        old, kept = self._old, self._kept
        proven = self._proven_bank(spec)
        sizes = self._write_weights()
        for file, graph in self._graphs.items():
            self._place(file).write_bytes(graph.to_bytes())
        written = {MANIFEST_NAME, PROVEN_BANK_NAME, *self._graphs, *sizes}
        gone = _files_of(old.manifest) - _files_of(kept)
        for file in old.manifest.files:
            if file not in written | gone:
                shutil.copyfile(old.file(file), self._place(file))
        if BANK_NAME in old.manifest.files:
            with (self._folder / BANK_NAME).open("w", encoding="utf-8") as stream:
                stream.writelines(picture.model_dump_json() + "\n" for picture in reader.pictures())
        if proven is not None:
            proven.save(self._folder)
        manifest = kept.model_copy(
            update={
                "bank": spec,
                "expert_sets": self._recounted(spec),
                "variants": tuple(self._resized(variant) for variant in kept.variants),
            }
        )
        (self._folder / "README.md").write_text(model_card(manifest, name), encoding="utf-8")
        manifest = manifest.model_copy(update={"files": list_files(self._folder)})
        (self._folder / MANIFEST_NAME).write_text(manifest.to_json(), encoding="utf-8")
        return manifest

    def _place(self, file: str) -> Path:
        path = self._folder / file
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def _write_weights(self) -> Mapping[str, int]:
        """Write every file of weights, and let the graphs say where in it their weights are now.

        A file stays as it is but for the bytes of the bank; what follows moves, and stays aligned.
        """
        sizes: dict[str, int] = {}
        for file in {path for v in self._kept.variants if v.file in self._graphs for path in v.weight_files}:
            graphs = [
                self._graphs[v.file]
                for v in self._kept.variants
                if v.file in self._graphs and file in v.weight_files
            ]
            location = Path(file).name
            cuts: dict[int, tuple[int, AnyArray]] = {}  # by offset: bytes there, and what takes their place
            others: set[int] = set()
            for graph in graphs:
                for weight in [w for w in graph.weights.values() if w.location == location]:
                    array = self._make(weight)
                    if array is None:
                        others.add(weight.offset)
                    else:
                        cuts[weight.offset] = weight.size_bytes, array
            if others & set(cuts):
                raise UnsupportedError(
                    "a weight of the graphs shares its bytes with the bank", where=file, mend="export again"
                )
            starts = sorted(cuts)
            with self._old.file(file).open("rb") as source, self._place(file).open("wb") as target:
                moved = _splice(source, target, cuts)
                sizes[file] = target.tell()
            for graph in graphs:
                for weight in [w for w in graph.weights.values() if w.location == location]:
                    array = cuts[weight.offset][1] if weight.offset in cuts else None
                    shape = weight.shape if array is None else array.shape
                    size = weight.size_bytes if array is None else array.nbytes
                    shift = sum(moved[start] for start in starts if start < weight.offset)
                    graph.put_outside(weight.name, shape, weight.offset + shift, size)
        for graph in self._graphs.values():
            for weight in [w for w in graph.weights.values() if w.location is None]:
                if (array := self._make(weight)) is not None:
                    graph.put_inside(weight.name, array)
            if "bank_codes" in graph.weights:
                graph.set_attribute("bank_search", "N", graph.weights["bank_codes"].shape[0])
        return sizes

    def _resized(self, variant: Variant) -> Variant:
        if variant.file not in self._graphs:
            return variant
        places = {w.offset: w.size_bytes for w in self._graphs[variant.file].weights.values() if w.location}
        size = self._place(variant.file).stat().st_size + sum(places.values())
        return variant.model_copy(update={"size_bytes": size})

    def _recounted(self, spec: BankSpec) -> dict[ExpertSet, object]:
        """Return the expert sets with the numbers that their bank has now."""
        before = self._kept.bank
        assert before is not None  # checked before
        sets: dict[ExpertSet, object] = {}
        for name, of_set in self._kept.expert_sets.items():
            counts = dict(of_set.component_parameters)
            if "bank" in counts:
                counts["bank"] = counts["bank"] // before.num_pictures * spec.num_pictures
            sets[name] = of_set.model_copy(update={"component_parameters": counts})
        return sets

    def _proven_bank(self, spec: BankSpec) -> proven_bank.ProvenBank | None:
        """Return what of the proven bank the proof needs; None where that bank comes back."""
        fp32 = [v for v in self._kept.variants if "v" in v.expert_set and v.precision in TOLERANCES]
        if spec.swapped_from is None:
            return None
        if (found := proven_bank.read_proven_bank(self._old)) is not None:
            return found
        weights: dict[str, Array] = {}
        for variant in fp32:
            for weight in self._graphs[variant.file].weights.values():
                if weight.name == "bank" or weight.name.startswith(("bank_keys", "bank_values")):
                    weights[weight.name] = self._read(variant, weight)
        if "bank" not in weights:
            return proven_bank.ProvenBank(weights, None)
        reference = read_reference(self._old)
        used = [array.ravel() for key, array in reference.items() if key.endswith("/out/retrieved")]
        rows = np.unique(np.concatenate(used)).astype(np.int64)
        return proven_bank.ProvenBank({"bank": cast(Array, np.array(weights["bank"][rows]))}, rows)

    def _read(self, variant: Variant, weight: Weight) -> Array:
        """Return a weight as it is in the old bundle, memory-mapped where it is in a file.

        Raises:
            BundleError: If it is in no file of the variant.
        """
        (file,) = [path for path in variant.weight_files if Path(path).name == weight.location] or [""]
        if not file:
            raise BundleError("the bank is in no file of its graph", where=variant.file, mend="export again")
        dtype = np.dtype(weight.dtype)
        array: Array = np.memmap(self._old.file(file), dtype, "r", weight.offset, weight.shape)
        return array


def _splice(source: BinaryIO, target: BinaryIO, cuts: Mapping[int, tuple[int, AnyArray]]) -> dict[int, int]:
    """Copy a file with some of its bytes replaced; return by how much each pushes on what follows it."""
    end = source.seek(0, 2)
    source.seek(0)
    moved: dict[int, int] = {}
    for offset, (size, array) in sorted(cuts.items()):
        _copy(source, target, offset - source.tell())
        target.write(np.ascontiguousarray(array).data)
        next_start = min(end, offset + size + -(offset + size) % _ALIGNMENT)
        before = next_start - offset
        padding = -array.nbytes % _ALIGNMENT if next_start < end else 0
        target.write(b"\0" * padding)
        moved[offset] = array.nbytes + padding - before
        source.seek(next_start)
    _copy(source, target, end - source.tell())
    return moved


def _copy(source: BinaryIO, target: BinaryIO, size: int) -> None:
    while size > 0:
        piece = source.read(min(size, _COPY_BYTES))
        target.write(piece)
        size -= len(piece)


def _files_of(manifest: Manifest) -> set[str]:
    """Return the files that variants and deployments name."""
    named = {path for variant in manifest.variants for path in (variant.file, *variant.weight_files)}
    return named | {path for deployment in manifest.deployments for path in deployment.files}


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
    cases = sorted({key.split("/")[0] for key in reference if "/in/" in key})
    for variant in [v for v in manifest.variants if "v" in v.expert_set]:
        spec = manifest.expert_sets[variant.expert_set]
        names = [output.name for output in spec.outputs]
        query = []
        if bank.retrieval == "topk":
            query = [GraphFile(new.file(variant.file).read_bytes(), variant.file).query_of_bank()]
        session = open_variant(new, variant, appended=extra_outputs(query))
        for case in cases:
            feed = {tensor.name: reference[f"{case}/in/{tensor.name}"] for tensor in spec.inputs}
            got = dict(zip([*names, *query], session.run([*names, *query], feed), strict=True))
            place = Place(variant.expert_set, variant.name, case, "retrieved")
            finite = all(np.isfinite(array).all() for array in got.values())
            if not finite or (query and not _finds(got, got[query[0]], reader, bank.k, place)):
                raise ParityError(
                    "the graph does not retrieve what is in the new bank" if finite else "NaN or infinity",
                    where=f"{variant.file}, case {case}",
                    mend="please report this",
                )
            num_searched += len(got[query[0]]) if query else 0
    return num_searched


def _finds(got: Mapping[str, Array], query: Array, reader: BankReader, k: int, place: Place) -> bool:
    """Whether rows and scores of a graph are those of a search on disk."""
    best = find_nearest(reader, query.astype(np.float32), k)
    scores, rows = cast(Float32, got[SCORES]), cast("NDArray[np.int64]", got["retrieved"])
    if place.variant.rpartition("-")[2] in TOLERANCES:
        return compare_retrieved(rows, best.rows, scores, best.scores, place).passed
    return bool(np.abs(scores - best.scores).max() <= _LOSSY_SCORES)
