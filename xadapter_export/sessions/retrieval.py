"""The search of the bank where the app does it: any index proposes rows, exact cosines choose among them.

Dimensions: N pictures, D CLIP embedding size, Q queries, K rows wanted, C candidates.
"""

from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np

from xadapter_export.bundle.bank_rows import BankRows, Float32, Int64
from xadapter_export.bundle.folder import Bundle
from xadapter_export.bundle.manifest import BankSpec
from xadapter_export.errors import BundleError, ConfigError, XAdapterError


@runtime_checkable
class PictureIndex(Protocol):
    """Whatever can be searched: an index of faiss, one that ``xad-bank index`` made, or an object of yours.

    ``search(queries, k)`` takes ``(Q, D) float32`` of length 1 and returns ``(Q, C) float32`` scores and
    ``(Q, C) int64`` rows of the bank, as faiss does; C is k or more, a row below 0 means none, and one that
    comes again counts once. It may
    return the rows' features, ``(Q, C, D) float32`` of length 1, as a third: then the bundle's own are not
    read. The scores are not used: cosines are computed from the features.
    """

    def search(self, queries: Float32, k: int, /) -> Any:  # two arrays, or three
        """Propose rows."""
        ...


class Retrieved(NamedTuple):
    """What was found, the nearest first.

    Attributes:
        features: ``(Q, K, D) float32``.
        rows: ``(Q, K) int64``.
        scores: ``(Q, K) float32`` cosines.
    """

    features: Float32
    rows: Int64
    scores: Float32


class Retriever:
    """Finds the K rows of a bank that are nearest to a query.

    Args:
        bank: What the manifest says of the bank.
        stored: Its features; None where the index returns them.
        index: What proposes rows; None for an exact search of ``stored``.

    Raises:
        ConfigError: If the index is of another bank, or cannot be searched.
        BundleError: If there are no features and no index.
    """

    def __init__(self, bank: BankSpec, stored: BankRows | None, index: PictureIndex | None) -> None:
        if stored is None and index is None:
            raise BundleError(
                "the bundle has no features to search",
                hint="load it with an index of its bank that returns features: index= (--index)",
            )
        if stored is not None and (stored.num_pictures, stored.dim) != (bank.num_pictures, bank.dim):
            raise BundleError(
                "the features differ from the manifest",
                expected=(bank.num_pictures, bank.dim),
                got=(stored.num_pictures, stored.dim),
            )
        if index is not None:
            check_index(index, bank)
        self._bank, self._stored, self._index = bank, stored, index

    def find(self, queries: Float32) -> Retrieved:
        """Search.

        Args:
            queries: ``(Q, D) float32`` of length 1.

        Raises:
            ConfigError: If the index fails, or returns too few rows or what no index should.
        """
        k, features = self._bank.k, None
        absent = np.zeros((len(queries), 1), bool)
        if self._index is None:
            assert self._stored is not None  # __init__ has looked
            rows = self._stored.search(queries, k)[1]
        else:
            rows, features = self._propose(self._index, queries)
            absent = rows < 0
            rows = np.where(absent, 0, rows)
        if features is None:
            if self._stored is None:
                raise BundleError(
                    "neither the bundle nor the index has features",
                    hint="use an index that returns features, or export the bundle with its bank",
                )
            features = self._stored.take(rows)
        scores = np.einsum("qd,qcd->qc", queries, features)
        scores[np.broadcast_to(absent, scores.shape)] = -np.inf
        # Of rows that are equal the first comes first, as in a graph.
        best = np.lexsort((rows, -scores))[:, :k]
        return Retrieved(
            np.take_along_axis(features, best[..., None], 1),
            np.take_along_axis(rows, best, 1),
            np.take_along_axis(scores, best, 1),
        )

    def _propose(self, index: PictureIndex, queries: Float32) -> tuple[Int64, Float32 | None]:
        bank = self._bank
        try:
            answer = index.search(np.ascontiguousarray(queries), bank.k)
        except XAdapterError:
            raise
        except Exception as error:  # of somebody else's code
            raise ConfigError("the index failed", where=type(index).__name__, got=repr(error)) from error
        if not isinstance(answer, tuple | list) or len(answer) not in (2, 3):
            raise _wrong(index, "(scores, rows) or (scores, rows, features)", type(answer).__name__)
        rows = np.asarray(answer[1])
        expected = f"({len(queries)}, {bank.k} or more) integers"
        if rows.dtype.kind not in "iu" or rows.ndim != 2 or len(rows) != len(queries):
            raise _wrong(index, f"rows as {expected}", f"{rows.shape} {rows.dtype}")
        if (rows >= bank.num_pictures).any():
            raise _wrong(index, f"rows below {bank.num_pictures}", int(rows.max()))
        rows = _distinct(rows.astype(np.int64))
        least = int((rows >= 0).sum(axis=1).min(initial=rows.shape[1]))
        if least < bank.k:  # faiss says -1 where it found no more
            raise ConfigError(
                "the index found too few images",
                where=type(index).__name__,
                expected=f"{bank.k} different ones for each query",
                got=least,
                hint="search more of it: raise its nprobe",
            )
        if len(answer) == 2 or answer[2] is None:
            return rows, None
        features = np.asarray(answer[2], np.float32)
        if features.shape != (*rows.shape, bank.dim):
            raise _wrong(index, f"features {(*rows.shape, bank.dim)}", features.shape)
        return rows, features


def check_index(index: object, bank: BankSpec) -> None:
    """Refuse an index that says it is of another bank.

    Raises:
        ConfigError: If it is, or cannot be searched.
    """
    if not isinstance(index, PictureIndex):
        raise ConfigError("an index needs a method search(queries, k)", got=type(index).__name__)
    # What faiss calls them, and what an index of ours knows besides.
    for name, expected in (("ntotal", bank.num_pictures), ("d", bank.dim), ("bank_sha256", bank.sha256)):
        found = getattr(index, name, None)
        if found is not None and found != expected:
            raise ConfigError(
                "the index was made from another bank",
                where=f"{type(index).__name__}.{name}",
                expected=expected,
                got=found,
                hint="make one with: xad-bank index BUNDLE -o INDEX",
            )


def open_retriever(bundle: Bundle, index: PictureIndex | None) -> Retriever:
    """Open the search of a bundle's bank.

    Raises:
        ConfigError: As ``Retriever``.
        BundleError: As ``Retriever``, or if the features cannot be read.
    """
    bank = bundle.manifest.bank
    assert bank is not None  # a manifest whose sets retrieve has a bank
    stored = None if bank.features is None else BankRows(bundle.file(bank.features))
    return Retriever(bank, stored, index)


def _distinct(rows: Int64) -> Int64:
    """Return ``(Q, C)`` rows with -1 where a query has the row already: a picture is looked at once."""
    order = np.argsort(rows, axis=1, kind="stable")
    ordered = np.take_along_axis(rows, order, 1)
    ordered[:, 1:][ordered[:, 1:] == ordered[:, :-1]] = -1
    distinct = np.empty_like(rows)
    np.put_along_axis(distinct, order, ordered, 1)
    return distinct


def _wrong(index: object, expected: object, got: object) -> ConfigError:
    return ConfigError(
        "the index returned a wrong result", where=type(index).__name__, expected=expected, got=got
    )
