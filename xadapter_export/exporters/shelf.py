"""Where the graphs of a bundle are put: their names, and the files of weights that they share."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import onnx_ir as ir

from xadapter_export.bundle.manifest import ExpertSet
from xadapter_export.exporters.makers.maker import GraphJob, MadeGraph
from xadapter_export.exporters.onnx_files import SharedWeights, write_graph
from xadapter_export.exporters.portable.merge import Part

_PARTS: Final[tuple[Part, ...]] = ("whole", "query", "answer")
_ONNX_FOLDER: Final = "onnx"


@dataclass(frozen=True)
class Placed:
    """Where a variant is in the bundle; for each see ``manifest.Variant``."""

    file: str
    query_file: str | None
    weight_files: tuple[str, ...]
    size_bytes: int


@dataclass
class Shelf:
    """The graphs of a bundle.

    Args:
        folder: The bundle that is being made.
        default: The expert set whose files have no set in their names: those that transformers.js and optimum
            look for.
    """

    folder: Path
    default: ExpertSet
    _weights: dict[str, SharedWeights] = field(default_factory=dict)

    def stems(self, expert_set: ExpertSet) -> dict[Part, str]:
        """Return what the name of each graph's file starts with."""
        end = "" if expert_set == self.default else f"_{expert_set}"
        return {part: ("query" if part == "query" else "model") + end for part in _PARTS}

    def save(self, made: MadeGraph, job: GraphJob) -> dict[Part, Path]:
        """Write the graphs of a try where they can be opened, and return the files."""
        if made.files:
            return dict(made.files)
        folder = job.empty_scratch()
        files: dict[Part, Path] = {}
        for part, graph in made.graphs.items():
            files[part] = folder / f"{part}.onnx"
            ir.save(graph, files[part], external_data=f"{part}.onnx_data")
        return files

    def put(self, made: MadeGraph, expert_set: ExpertSet, target: str) -> Placed:
        """Put a try in its place."""
        return self._put_onnx(made, expert_set) if made.graphs else self._move(made, target)

    def _put_onnx(self, made: MadeGraph, expert_set: ExpertSet) -> Placed:
        (self.folder / _ONNX_FOLDER).mkdir(exist_ok=True)
        shared = f"{_ONNX_FOLDER}/model{made.weights}.onnx_data"
        if shared not in self._weights:
            self._weights[shared] = SharedWeights(self.folder / shared)
        stems, files, size = self.stems(expert_set), dict[Part, str](), 0
        for part, graph in made.graphs.items():
            files[part] = f"{_ONNX_FOLDER}/{stems[part]}{made.suffix}.onnx"
            size += self._weights[shared].take(graph)
            write_graph(graph.clone(), self.folder / files[part])
            size += (self.folder / files[part]).stat().st_size
        return _place(files, (shared,), size)

    def _move(self, made: MadeGraph, target: str) -> Placed:
        (self.folder / target).mkdir(exist_ok=True)
        files = {part: f"{target}/{file.name}" for part, file in made.files.items()}
        others: list[str] = []
        for file in sorted(next(iter(made.files.values())).parent.iterdir()):
            place = f"{target}/{file.name}"
            file.rename(self.folder / place)
            if place not in files.values():
                others.append(place)
        size = sum((self.folder / place).stat().st_size for place in (*files.values(), *others))
        return _place(files, tuple(others), size)

    def close(self) -> None:
        """End the files of weights."""
        for weights in self._weights.values():
            weights.close()


def _place(files: dict[Part, str], weights: tuple[str, ...], size_bytes: int) -> Placed:
    return Placed(files.get("answer") or files["whole"], files.get("query"), weights, size_bytes)
