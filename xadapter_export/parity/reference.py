"""``reference.npz``: inputs of every case, and PyTorch's outputs for them.

Keys: ``{case}/in/{input}``, ``{case}/{set}/out/{output}``, ``{case}/{set}/tap/{layer}.{expert}``.

It stays small: of a large array only some columns of its last axis are kept. The exporter proves every
number; what a bundle carries is enough to repeat the proof anywhere. Beside the kept columns of ``KEY`` stand
``KEY#columns``, their numbers, and ``KEY#shape``, the shape of the whole array.

Dimensions: R rows of the bank that were retrieved.
"""

import zipfile
import zlib
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Final, cast

import numpy as np
from numpy.typing import NDArray

from xadapter_export.bundle.folder import REFERENCE_NAME, Bundle
from xadapter_export.bundle.manifest import ExpertSetSpec
from xadapter_export.errors import BundleError, ParityError
from xadapter_export.sessions.session import Array

SCORES: Final = "retrieved_scores"

_UNREADABLE: Final = (OSError, ValueError, zipfile.BadZipFile, zlib.error)
_NUM_KEPT = 256  # numbers of an array, about
_MIN_COLUMNS = 4
_WHOLE = ("/out/retrieved", "/out/retrieved_scores")  # every row counts: a swap proves graphs with just these


class Archive(Mapping[str, Array]):
    """The arrays of an npz file, each read when it is looked at."""

    def __init__(self, path: Path, archive: "np.lib.npyio.NpzFile") -> None:
        self._path, self._archive = path, archive

    @classmethod
    def open(cls, path: Path, stack: ExitStack) -> "Archive":
        """Open a file for as long as the stack is.

        Raises:
            BundleError: If it cannot be read, or is no npz file; also when an array is looked at.
        """
        try:
            archive = np.load(path, allow_pickle=False)
        except _UNREADABLE as error:
            raise _unreadable(path, error) from error
        if not isinstance(archive, np.lib.npyio.NpzFile):
            raise _unreadable(path, "no npz file")
        return cls(path, stack.enter_context(archive))

    def __getitem__(self, key: str) -> Array:
        try:
            return cast(Array, self._archive[key])
        except _UNREADABLE as error:
            raise _unreadable(self._path, error) from error

    def __contains__(self, key: object) -> bool:
        return key in self._archive

    def __iter__(self) -> Iterator[str]:
        return iter(self._archive)

    def __len__(self) -> int:
        return len(self._archive)


def _unreadable(path: Path, got: object) -> BundleError:
    return BundleError("the reference cannot be read", where=path, got=got)


def read_arrays(path: Path) -> dict[str, Array]:
    """Read an npz file, by key.

    Raises:
        BundleError: If it is not a plain npz file.
    """
    with ExitStack() as stack:
        return dict(Archive.open(path, stack))


def read_reference(bundle: Bundle) -> dict[str, Array]:
    """Read ``reference.npz``, by key.

    Raises:
        BundleError: If it is missing, or not a plain npz file.
    """
    return read_arrays(bundle.file(REFERENCE_NAME))


def cases_of(reference: Mapping[str, Array]) -> list[str]:
    """Return the names of the cases, in their order."""
    return sorted({key.split("/")[0] for key in reference if "/in/" in key})


def feed_of(reference: Mapping[str, Array], spec: ExpertSetSpec, case: str) -> dict[str, Array]:
    """Return the inputs of an expert set in one case; see ``look_up``."""
    return {tensor.name: look_up(reference, f"{case}/in/{tensor.name}") for tensor in spec.inputs}


def reference_feeds(reference: Mapping[str, Array], spec: ExpertSetSpec) -> dict[str, dict[str, Array]]:
    """Return the inputs of an expert set, by name, in every case of the reference; see ``look_up``."""
    return {case: feed_of(reference, spec, case) for case in cases_of(reference)}


def retrieved_rows(reference: Mapping[str, Array]) -> NDArray[np.int64]:
    """Return the rows of the bank that were retrieved in any case, ``(R,) int64``, each once."""
    used = [reference[key].ravel() for key in reference if key.endswith("/out/retrieved")]
    return np.unique(np.concatenate(used)).astype(np.int64)


def look_up(reference: Mapping[str, Array], key: str) -> Array:
    """Return an array.

    Raises:
        ParityError: If it lacks.
    """
    try:
        return reference[key]
    except KeyError as error:
        raise ParityError(
            "the reference lacks an array",
            where=key,
            hint=f"export the bundle again: {REFERENCE_NAME} is incomplete",
        ) from error


def sample_reference(arrays: Mapping[str, Array]) -> dict[str, Array]:
    """Keeps some columns of every large output, the largest of each row of the logits among them.

    Args:
        arrays: Inputs and outputs by their keys; see ``prove_bundle``.

    Returns:
        The same with columns left out, and the keys that say which were kept.
    """
    sampled: dict[str, Array] = {}
    for key, array in arrays.items():
        num_columns = array.shape[-1]
        num_rows = max(1, array.size // num_columns)
        num_kept = max(_MIN_COLUMNS, _NUM_KEPT // num_rows)
        if "/in/" in key or key.endswith(_WHOLE) or num_kept >= num_columns:
            sampled[key] = array
            continue
        columns = np.linspace(0, num_columns - 1, num_kept).astype(np.int64)
        if key.endswith("/out/logits"):
            columns = np.append(columns, array.argmax(-1).ravel())
        columns = np.unique(columns)
        sampled[key] = cast(Array, np.ascontiguousarray(array[..., columns]))
        sampled[f"{key}#columns"] = columns
        sampled[f"{key}#shape"] = np.array(array.shape, dtype=np.int64)
    return sampled


def take_columns(got: Array, reference: Mapping[str, Array], key: str) -> Array:
    """Takes the columns that the reference kept of a graph's output; one of another shape stays whole."""
    if f"{key}#columns" not in reference or got.shape != tuple(reference[f"{key}#shape"]):
        return got
    return cast(Array, np.ascontiguousarray(got[..., reference[f"{key}#columns"]]))
