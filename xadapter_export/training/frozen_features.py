"""What frozen models say about the examples: computed once, kept on disk, read back as memory maps.

Dimensions: n examples, T PLM tokens, S CLIP tokens, H hidden size, W CLIP text width, D CLIP embedding size,
K nearest pictures.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.lib.format import open_memmap
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from xadapter_export.bundle.staging import staged_folder
from xadapter_export.errors import OutputExistsError
from xadapter_export.experts import T, V, reads_bank, reads_text
from xadapter_export.model.pooling import unit_length
from xadapter_export.model.text_tower import TextTower
from xadapter_export.model.x_adapter_model import XAdapterModel
from xadapter_export.training.examples import Examples

_RECORD = "features.json"
_FORMAT = 1
_BATCH = 64

OnStage = Callable[[str, str], None]


@dataclass(frozen=True)
class Ragged:
    """Rows of different lengths, one after the other.

    Attributes:
        values: ``(total, width) float32``, a memory map.
        offsets: ``(n + 1,) int64``. Where each row begins.
    """

    values: NDArray[np.float32]
    offsets: NDArray[np.int64]

    def __getitem__(self, row: int) -> NDArray[np.float32]:
        return self.values[self.offsets[row] : self.offsets[row + 1]]


@dataclass(frozen=True)
class FrozenFeatures:
    """Outputs of frozen models for n examples; what the plug-in does not need is None.

    Attributes:
        hidden: n rows ``(T, H)``: what enters the first layer with a plug-in.
        retrieved: ``(n, K) int32``. Bank rows, nearest first.
        token_states: n rows ``(S, W)``: what the T-expert attends to.
        queries: ``(n, D) float32`` of length 1: CLIP's text features, for distillation.
    """

    hidden: Ragged | None
    retrieved: NDArray[np.int32] | None
    token_states: Ragged | None
    queries: NDArray[np.float32] | None


@dataclass(frozen=True)
class FeatureCache:
    """Where frozen features are kept.

    Attributes:
        folder: The folder.
        hashes: Of ``plm``, ``clip``, ``bank`` and ``teacher``, as far as there are such.
        on_stage: Told what goes on.
    """

    folder: Path
    hashes: Mapping[str, str]
    on_stage: OnStage = lambda *_: None


def frozen_features(
    model: XAdapterModel,
    examples: Examples,
    cache: FeatureCache,
    *,
    pool: int,
    with_hidden: bool,
    teacher: TextTower | None = None,
    title: str = "texts",
) -> FrozenFeatures:
    """Compute, or find on disk, what the frozen models say about the examples.

    Each kind is kept in a folder of its own, named by the hash of all that it depends on, so that a run which
    changes only K, say, computes only retrieval again.

    Args:
        model: Its PLM below the first adapter, CLIP and bank are run.
        examples: n tokenized examples.
        cache: Where results are kept.
        pool: K, pictures to find for each example.
        with_hidden: Whether to keep hidden states, ``T * H * 4`` bytes for each example.
        teacher: CLIP text tower whose text features are wanted as well.
        title: What the examples are called in messages.

    Raises:
        OutputWriteError: If the folder cannot be written.
    """
    kinds = _Kinds(model, examples, cache, title)
    experts = model.active_experts()
    layer = model.config.layers[0]
    retrieves = reads_bank(experts) and model.config.retrieval.mode == "topk"
    plm_rows = (examples.input_ids, examples.token_type_ids)
    clip_rows = (examples.clip_input_ids,)
    hidden = retrieved = states = queries = None
    if with_hidden:
        place = kinds.get("hidden", plm_rows, ["plm"], [layer], kinds.write_hidden)
        hidden = _read_ragged(place)
    if retrieves:
        place = kinds.get(
            "retrieved", clip_rows, ["clip", "bank"], [pool], partial(kinds.write_retrieved, pool=pool)
        )
        retrieved = np.load(place / "rows.npy", mmap_mode="r")
    if reads_text(experts):
        states = _read_ragged(kinds.get("token_states", clip_rows, ["clip"], [], kinds.write_token_states))
    if teacher is not None:
        place = kinds.get(
            "queries", clip_rows, ["teacher"], [], partial(kinds.write_queries, teacher=teacher)
        )
        queries = np.load(place / "rows.npy", mmap_mode="r")
    return FrozenFeatures(hidden, retrieved, states, queries)


@dataclass(frozen=True)
class _Kinds:
    """Finds or writes the folder of each kind of feature."""

    model: XAdapterModel
    examples: Examples
    cache: FeatureCache
    title: str

    def get(
        self,
        kind: str,
        rows: Sequence[Sequence[NDArray[np.int64]] | None],
        parts: Sequence[str],
        settings: Sequence[int],
        write: Callable[[Path], None],
    ) -> Path:
        digest = hashlib.sha256(
            json.dumps([_FORMAT, kind, [self.cache.hashes[part] for part in parts], list(settings)]).encode()
        )
        for column in rows:
            for row in column or ():
                digest.update(len(row).to_bytes(4, "little"))
                digest.update(np.ascontiguousarray(row).data)
            digest.update(b"|")
        key = digest.hexdigest()
        place = self.cache.folder / f"{kind}-{key[:16]}"
        if not (place / _RECORD).is_file():
            self.cache.on_stage("cache", f"{kind} of {len(self.examples)} {self.title}, into {place}")
            with (
                suppress(OutputExistsError),  # another run wrote the same meanwhile
                staged_folder(place, marker=_RECORD) as staged,
                torch.inference_mode(),
            ):
                write(staged.path)
                (staged.path / _RECORD).write_text(json.dumps({"key": key, "examples": len(self.examples)}))
        return place

    def write_hidden(self, place: Path) -> None:
        ids, types, layer = self.examples.input_ids, self.examples.token_type_ids, self.model.config.layers[0]
        target = _make_ragged(place, [len(row) for row in ids], self.model.plm.hidden_size)
        pad = self.model.plm.special["pad"]
        for rows in self._batches(ids):
            batch, mask = padded([ids[row] for row in rows], pad)
            type_ids = None if types is None else padded([types[row] for row in rows], 0)[0].to(self._device)
            states = self.model.hidden_before(
                layer, batch.to(self._device), mask.long().to(self._device), type_ids
            )
            _put(target, rows, states)

    def write_retrieved(self, place: Path, pool: int) -> None:
        target = _make_rows(place, (len(self.examples), pool), np.int32)
        for rows in self._batches(self._clip_ids):
            found = self.model.memory(self._clip_batch(rows), V.name, k=pool).retrieved
            target[rows] = found.cpu().numpy()  # type: ignore[union-attr]  # top-k gives them

    def write_token_states(self, place: Path) -> None:
        clip = self._clip
        lengths = [int(clip.token_mask(torch.from_numpy(row)[None]).sum()) for row in self._clip_ids]
        target = _make_ragged(place, lengths, clip.width)
        for rows in self._batches(self._clip_ids):
            _put(target, rows, self.model.memory(self._clip_batch(rows), T.name).t)  # type: ignore[arg-type]  # same

    def write_queries(self, place: Path, teacher: TextTower) -> None:
        target = _make_rows(place, (len(self.examples), teacher.feature_dim), np.float32)
        for rows in self._batches(self._clip_ids):
            ids = self._clip_batch(rows)
            target[rows] = unit_length(teacher.pool(teacher.token_states(ids), ids)).cpu().numpy()

    @property
    def _device(self) -> torch.device:
        return next(self.model.plm.parameters()).device

    @property
    def _clip(self) -> TextTower:
        assert self.model.clip is not None  # whoever reads CLIP has one
        return self.model.clip

    @property
    def _clip_ids(self) -> Sequence[NDArray[np.int64]]:
        assert self.examples.clip_input_ids is not None  # a model with a CLIP encodes them
        return self.examples.clip_input_ids

    def _clip_batch(self, rows: NDArray[np.int64]) -> Tensor:
        return padded([self._clip_ids[row] for row in rows], self._clip.pad_token_id)[0].to(self._device)

    def _batches(self, rows: Sequence[NDArray[np.int64]]) -> Iterator[NDArray[np.int64]]:
        """Rows of similar length together, so that little is padded."""
        n = len(rows)
        order = np.argsort([len(row) for row in rows], kind="stable")
        for start in range(0, n, _BATCH):
            yield order[start : start + _BATCH]
            done = min(start + _BATCH, n)
            if done * 4 // n > start * 4 // n:
                self.cache.on_stage("cache", f"{done} of {n} {self.title}")


def _read_ragged(place: Path) -> Ragged:
    return Ragged(np.load(place / "rows.npy", mmap_mode="r"), np.load(place / "offsets.npy"))


def _make_ragged(place: Path, lengths: Sequence[int], width: int) -> Ragged:
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    np.save(place / "offsets.npy", offsets)
    return Ragged(_make_rows(place, (int(offsets[-1]), width), np.float32), offsets)


def _make_rows(place: Path, shape: tuple[int, int], dtype: type[np.generic]) -> Any:
    """Make a file of rows whose space is taken now: a map of a file that finds the disk full is killed."""
    path = place / "rows.npy"
    rows = open_memmap(path, mode="w+", dtype=dtype, shape=shape)
    if hasattr(os, "posix_fallocate"):
        with path.open("rb+") as file:
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
    return rows


def _put(target: Ragged, rows: NDArray[np.int64], states: Tensor) -> None:
    for row, state in zip(rows, states.cpu().numpy(), strict=True):
        kept = target[int(row)]
        kept[:] = state[: len(kept)]


def padded(rows: Sequence[NDArray[Any]], value: int = 0) -> tuple[Tensor, Tensor]:
    """Pad rows of ``(n, ...)`` to ``(B, longest, ...)``; with it ``(B, longest) bool``, True where real."""
    batch = pad_sequence([torch.from_numpy(np.array(row)) for row in rows], True, value)
    lengths = torch.tensor([len(row) for row in rows])
    return batch, torch.arange(batch.shape[1]) < lengths[:, None]
