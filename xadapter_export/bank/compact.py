"""Makes a few prototypes of a large bank: small enough for a static bank, which needs no CLIP to search it.

Dimensions: N pictures, M prototypes, D CLIP embedding size.
"""

import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from xadapter_export.bank.convert import sample_rows
from xadapter_export.bank.output import staged_bank
from xadapter_export.bank.reader import BankReader
from xadapter_export.bank.record import BankRecord
from xadapter_export.bank.rows import Float32, OnRows, ignore_rows
from xadapter_export.bank.writer import BankWriter
from xadapter_export.bundle.pictures import Picture
from xadapter_export.errors import ConfigError, import_extra

_EPOCHS = 3
_CHUNK_ROWS = 128  # rows of one class often stand together, so a batch is put together from many places
_CHUNKS_PER_BATCH = 16
_CAPTIONS = 3  # how many make the caption of a prototype
_COUNTED_CAPTIONS = 256  # counters kept for a prototype: captions beyond are counted approximately


@dataclass(frozen=True)
class Prototype:
    """One prototype: how many pictures it serves, and how near they are on average (cosine)."""

    picture: Picture
    num_pictures: int
    mean_cosine: float


@dataclass(frozen=True)
class Compacted:
    """A bank of prototypes that was written."""

    record: BankRecord
    prototypes: tuple[Prototype, ...]


def compact_bank(
    folder: Path,
    output: Path,
    num_prototypes: int,
    *,
    seed: int = 0,
    force: bool = False,
    on_rows: OnRows = ignore_rows,
) -> Compacted:
    """Cluster a bank and write the middles of its clusters, the largest first, as a bank in fp32.

    A cluster that ends up without pictures is left out with a warning. ``on_rows`` is told of the rows that
    are clustered: each counts once for each epoch.

    Raises:
        ConfigError: If there are fewer pictures than prototypes.
        CheckpointError: If the bank cannot be read.
        MissingExtraError: If scikit-learn is not installed.
        OutputExistsError: If something is at ``output``.
        OutputWriteError: If it cannot be written.
    """
    bank = BankReader(folder)
    if num_prototypes > bank.num_pictures:
        raise ConfigError(
            "more prototypes than images", where=folder, expected=f"at most {bank.num_pictures}",
            got=num_prototypes,
        )  # fmt: skip
    centers = _mean_of_members(bank, _cluster(bank, num_prototypes, seed, on_rows))
    counts = np.zeros(len(centers), dtype=np.int64)
    cosines = np.zeros(len(centers), dtype=np.float64)
    captions = [_CommonCaptions() for _ in centers]
    for block in bank.blocks():
        nearest, scores = _assign(block.features, centers)
        counts += np.bincount(nearest, minlength=len(centers))
        cosines += np.bincount(nearest, weights=scores, minlength=len(centers))
        for center, picture in zip(nearest.tolist(), block.pictures, strict=True):
            captions[center].add(picture.caption)
    order = [center for center in np.argsort(-counts, kind="stable").tolist() if counts[center]]
    if len(order) < num_prototypes:
        warnings.warn(
            f"{num_prototypes - len(order)} of {num_prototypes} prototypes had no images and were left out",
            stacklevel=2,
        )
    prototypes = tuple(
        Prototype(
            Picture(id=f"prototype-{number:04}", caption=captions[center].text()),
            int(counts[center]),
            float(cosines[center] / counts[center]),
        )
        for number, center in enumerate(order, start=1)
    )
    with (
        staged_bank(output, force=force) as staged,
        BankWriter(staged.path, dtype="fp32", dim=bank.dim) as writer,
    ):
        writer.append(centers[order], [prototype.picture for prototype in prototypes])
        record = writer.finish(clip=bank.clip, kind="prototypes", num_skipped=bank.num_skipped)
    return Compacted(record, prototypes)


class _CommonCaptions:
    """Counts captions with a bounded number of counters; exact while no more are needed.

    Source:
        Misra and Gries, Finding repeated elements, 1982.
    """

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()

    def add(self, caption: str) -> None:
        if caption in self._counts or len(self._counts) < _COUNTED_CAPTIONS:
            self._counts[caption] += 1
        else:
            self._counts = Counter({name: count - 1 for name, count in self._counts.items() if count > 1})

    def text(self) -> str:
        """Return the commonest captions, with commas."""
        return ", ".join(name for name, _ in self._counts.most_common(_CAPTIONS) if name)


def _cluster(bank: BankReader, num_prototypes: int, seed: int, on_rows: OnRows) -> Float32:
    """Return ``(M, D) float32`` centers of length 1, by mini-batch k-means."""
    cluster: Any = import_extra("sklearn.cluster", "bank")
    rows = sample_rows(bank, max(10 * num_prototypes, _CHUNKS_PER_BATCH * _CHUNK_ROWS), seed)
    start = np.concatenate([bank.rows(row, row + 1) for row in rows])
    kmeans = cluster.MiniBatchKMeans(num_prototypes, random_state=seed, n_init=1)
    kmeans.partial_fit(start)
    done = 0
    for batch in _shuffled_batches(bank, seed):
        kmeans.partial_fit(batch)
        done += len(batch)
        on_rows(done, _EPOCHS * bank.num_pictures)
    return _unit_length(kmeans.cluster_centers_.astype(np.float32))


def _shuffled_batches(bank: BankReader, seed: int) -> Iterator[Float32]:
    rng = np.random.default_rng(seed)
    starts = np.arange(0, bank.num_pictures, _CHUNK_ROWS)
    for _ in range(_EPOCHS):
        rng.shuffle(starts)
        for first in range(0, len(starts), _CHUNKS_PER_BATCH):
            chunk = starts[first : first + _CHUNKS_PER_BATCH].tolist()
            yield np.concatenate([bank.rows(row, min(row + _CHUNK_ROWS, bank.num_pictures)) for row in chunk])


def _mean_of_members(bank: BankReader, centers: Float32) -> Float32:
    """Return the centers moved to the middle of what is nearest by cosine; k-means went by distance."""
    sums = np.zeros(centers.shape, dtype=np.float64)
    for _, rows in bank.row_blocks():
        nearest, _ = _assign(rows, centers)
        np.add.at(sums, nearest, rows)
    empty = np.linalg.norm(sums, axis=1) < 1e-6
    sums[empty] = centers[empty]
    return _unit_length(sums.astype(np.float32))


def _assign(rows: Float32, centers: Float32) -> tuple[NDArray[np.int64], Float32]:
    scores = rows @ centers.T  # (rows, M)
    nearest = scores.argmax(axis=1)
    return nearest, scores[np.arange(len(rows)), nearest]


def _unit_length(rows: Float32) -> Float32:
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    normalized: Float32 = rows / np.maximum(lengths, np.finfo(np.float32).tiny)
    return normalized
