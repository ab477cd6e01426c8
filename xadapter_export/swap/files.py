"""Writes the files of a bundle whose bank is swapped: new numbers in graphs and weights, all else as is."""

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import BinaryIO, cast

import numpy as np

from xadapter_export.bank.reader import BankReader
from xadapter_export.bundle.bank_rows import BankRows
from xadapter_export.bundle.folder import (
    BANK_NAME,
    FEATURES_NAME,
    MANIFEST_NAME,
    PROVEN_BANK_NAME,
    SWAPPED_NAME,
    Bundle,
    list_files,
)
from xadapter_export.bundle.graph_file import GraphFile, Weight
from xadapter_export.bundle.manifest import BankSpec, ExpertSet, Manifest, Variant
from xadapter_export.bundle.model_card import model_card
from xadapter_export.errors import BundleError, UnsupportedError
from xadapter_export.experts import reads_bank
from xadapter_export.parity import proven_bank
from xadapter_export.parity.compare import TOLERANCES
from xadapter_export.parity.reference import read_reference, retrieved_rows
from xadapter_export.runtime.choose import choices_of
from xadapter_export.sessions.session import Array
from xadapter_export.swap.weights import AnyArray, BankWeights

_ALIGNMENT = 64  # bytes, as the exporter aligns weights
_COPY_BYTES = 2**24


class SwappedFiles:
    """Writes the new bundle into a folder.

    Args:
        old: The bundle.
        folder: Where the new one goes; empty.
        kept: The manifest without what is left out.
        make: Makes the new weights.
    """

    def __init__(self, old: Bundle, folder: Path, kept: Manifest, make: BankWeights) -> None:
        self._old, self._folder, self._kept, self._make = old, folder, kept, make
        self._graphs = {
            file: self._read_graph(file)
            for variant in kept.variants
            if variant.is_onnx
            for file in variant.graph_files
        }

    def write(self, spec: BankSpec, reader: BankReader, name: str) -> Manifest:
        """Write every file, and return the manifest that was written."""
        old, kept = self._old, self._kept
        proven = self._proven_bank(spec)
        written = {MANIFEST_NAME, PROVEN_BANK_NAME, SWAPPED_NAME, *self._graphs, *self._write_weights()}
        for file, graph in self._graphs.items():
            self._place(file).write_bytes(graph.to_bytes())
        if spec.features is not None:
            shutil.copyfile(reader.folder / FEATURES_NAME, self._place(spec.features))
            written.add(spec.features)
        gone = files_of(old.manifest) - files_of(kept)
        for file in old.manifest.files.keys() - written - gone:
            shutil.copyfile(old.file(file), self._place(file))
        if BANK_NAME in old.manifest.files:
            with (self._folder / BANK_NAME).open("w", encoding="utf-8") as stream:
                stream.writelines(picture.model_dump_json() + "\n" for picture in reader.pictures())
        if proven is not None:
            proven.save(self._folder)
        manifest = kept.model_copy(
            update={
                "bank": spec,
                "expert_sets": self._recounted(),
                "variants": tuple(self._resized(variant) for variant in kept.variants),
            }
        )
        (self._folder / "README.md").write_text(
            model_card(manifest, name, choices_of(manifest)), encoding="utf-8"
        )
        manifest = manifest.model_copy(update={"files": list_files(self._folder)})
        (self._folder / MANIFEST_NAME).write_text(manifest.to_json(), encoding="utf-8")
        return manifest

    def _place(self, file: str) -> Path:
        path = self._folder / file
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def _write_weights(self) -> set[str]:
        """Write every file of weights, and let the graphs say where in it their weights are now.

        A file stays as it is but for the bytes of the bank; what follows moves, and stays aligned.

        Returns:
            The files that were written.
        """
        swapped = [v for v in self._kept.variants if v.file in self._graphs]
        files = {path for variant in swapped for path in variant.weight_files}
        for file in files:
            graphs = [self._graphs[name] for v in swapped if file in v.weight_files for name in v.graph_files]
            cuts = self._cuts(file, graphs)
            with self._old.file(file).open("rb") as source, self._place(file).open("wb") as target:
                moved = _splice(source, target, cuts)
            for graph in graphs:
                for weight in _stored_in(file, graph):
                    array = cuts[weight.offset][1] if weight.offset in cuts else None
                    shape = weight.shape if array is None else array.shape
                    size = weight.size_bytes if array is None else array.nbytes
                    shift = sum(by for start, by in moved.items() if start < weight.offset)
                    graph.put_outside(weight.name, shape, weight.offset + shift, size)
        for graph in self._graphs.values():
            for weight in [weight for weight in graph.weights.values() if weight.location is None]:
                if (array := self._make(weight)) is not None:
                    graph.put_inside(weight.name, array)
            if "bank_codes" in graph.weights:
                graph.set_attribute("bank_search", "N", graph.weights["bank_codes"].shape[0])
        return files

    def _cuts(self, file: str, graphs: Sequence[GraphFile]) -> dict[int, tuple[int, AnyArray]]:
        """Return what is replaced in a file of weights: by offset, how many bytes, and by what.

        Raises:
            UnsupportedError: If a weight that is no bank is in the same bytes.
        """
        cuts: dict[int, tuple[int, AnyArray]] = {}
        others: set[int] = set()
        for variant in self._old.manifest.variants:  # the bank of a variant that is left out goes too
            if file in variant.weight_files and variant.file not in self._graphs:
                left_out = [self._read_graph(name) for name in variant.graph_files]
                for weight in [weight for graph in left_out for weight in _stored_in(file, graph)]:
                    if self._make(weight) is not None:
                        cuts[weight.offset] = weight.size_bytes, np.empty(0, np.int8)
        for graph in graphs:
            for weight in _stored_in(file, graph):
                if (array := self._make(weight)) is None:
                    others.add(weight.offset)
                else:
                    cuts[weight.offset] = weight.size_bytes, array
        if others & set(cuts):
            raise UnsupportedError(
                "a weight of the graphs shares its bytes with the bank", where=file, hint="export again"
            )
        return cuts

    def _read_graph(self, file: str) -> GraphFile:
        return GraphFile(self._old.file(file).read_bytes(), file)

    def _resized(self, variant: Variant) -> Variant:
        if variant.file not in self._graphs:
            return variant
        size = 0
        for file in variant.graph_files:
            weights = self._graphs[file].weights.values()
            places = {w.offset: w.size_bytes for w in weights if w.location}
            size += self._place(file).stat().st_size + sum(places.values())
        return variant.model_copy(update={"size_bytes": size})

    def _recounted(self) -> dict[ExpertSet, object]:
        """Return the expert sets with the numbers that their bank has now."""
        sets: dict[ExpertSet, object] = {}
        for name, of_set in self._kept.expert_sets.items():
            counts = dict(of_set.component_parameters)
            if "bank" in counts:
                counts["bank"] = self._make.num_parameters
            sets[name] = of_set.model_copy(update={"component_parameters": counts})
        return sets

    def _proven_bank(self, spec: BankSpec) -> proven_bank.ProvenBank | None:
        """Return what of the proven bank the proof needs; None where that bank comes back."""
        if spec.swapped_from is None:
            return None
        if (found := proven_bank.read_proven_bank(self._old)) is not None:
            return found
        if spec.retrieval == "static":
            return proven_bank.ProvenBank(self._proven_weights(), None)
        rows = retrieved_rows(read_reference(self._old))
        if spec.features is not None:
            taken = cast(Array, BankRows(self._old.file(spec.features)).take(rows))
        elif (bank := self._proven_weights().get("bank")) is not None:
            taken = cast(Array, np.array(bank[rows]))
        else:  # nothing is proven by tolerance
            return proven_bank.ProvenBank({}, None)
        return proven_bank.ProvenBank({"bank": taken}, rows)

    def _proven_weights(self) -> dict[str, Array]:
        """Return the weights of fp32 graphs that hold the bank, by name."""
        return {
            weight.name: self._read(variant, file, weight)
            for variant in self._kept.variants
            if reads_bank(variant.expert_set) and variant.precision in TOLERANCES
            for file in variant.graph_files
            for weight in self._graphs[file].weights.values()
            if weight.name == "bank" or weight.name.startswith(("bank_keys", "bank_values"))
        }

    def _read(self, variant: Variant, graph: str, weight: Weight) -> Array:
        """Return a weight as it is in the old bundle, memory-mapped where it is in a file.

        Raises:
            BundleError: If it is in no file of the variant.
        """
        if weight.location is None:
            return cast(Array, self._graphs[graph].array(weight.name))
        files = [path for path in variant.weight_files if Path(path).name == weight.location]
        if not files:
            raise BundleError("the bank is in no file of its graph", where=graph, hint="export again")
        file, dtype = self._old.file(files[0]), np.dtype(weight.dtype)
        return cast(Array, np.memmap(file, dtype, "r", weight.offset, weight.shape))


def _stored_in(file: str, graph: GraphFile) -> list[Weight]:
    return [weight for weight in graph.weights.values() if weight.location == Path(file).name]


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


def files_of(manifest: Manifest) -> set[str]:
    """Return the files that variants and deployments name."""
    named = {path for variant in manifest.variants for path in variant.all_files}
    return named | {path for deployment in manifest.deployments for path in deployment.files}
