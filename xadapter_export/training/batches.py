"""Which example comes when, and how examples become a batch.

Everything drawn is a function of the seed and the draw's number alone, so that a run that was resumed, or is
spread over processes, sees exactly the examples of one that was not.

Dimensions: B batch, T PLM tokens, S CLIP tokens, H hidden size, W CLIP text width, K pictures, P masks,
A answers.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from xadapter_export.training.examples import Examples
from xadapter_export.training.frozen_features import FrozenFeatures, padded


@dataclass(frozen=True)
class Source:
    """Examples of one file with what the frozen models say about them; drawn ``weight`` times a round."""

    examples: Examples
    features: FrozenFeatures
    weight: int = 1


@dataclass(frozen=True)
class Draw:
    """One example of one source, and which of its nearest pictures it is answered from."""

    source: Source
    row: int
    pictures: NDArray[np.int64] | None


class TrainingOrder(Dataset[Draw]):
    """Draws without end: round robin over the sources, each in a new random order in each epoch.

    Args:
        sources: Files with their weights.
        num_draws: How many draws the run takes.
        k: Pictures of each draw.
        seed: Of orders and pictures.
    """

    def __init__(self, sources: Sequence[Source], num_draws: int, k: int, seed: int) -> None:
        self._sources = sources
        self._num_draws = num_draws
        self._k = k
        self._seed = seed
        self._round = [number for number, source in enumerate(sources) for _ in range(source.weight)]
        self._before = [self._round[:place].count(source) for place, source in enumerate(self._round)]
        self._permutation = lru_cache(maxsize=2 * len(sources))(self._make_permutation)

    def __len__(self) -> int:
        return self._num_draws

    def __getitem__(self, draw: int) -> Draw:
        rounds, place = divmod(draw, len(self._round))
        number = self._round[place]
        source = self._sources[number]
        epoch, position = divmod(rounds * source.weight + self._before[place], len(source.examples))
        row = int(self._permutation(number, epoch)[position])
        retrieved = source.features.retrieved
        pictures = None
        if retrieved is not None:
            rng = np.random.default_rng((self._seed, draw))
            pictures = rng.permutation(retrieved.shape[1])[: self._k]
        return Draw(source, row, pictures)

    def _make_permutation(self, source: int, epoch: int) -> NDArray[np.int64]:
        rng = np.random.default_rng((self._seed, source, epoch, 1))
        return rng.permutation(len(self._sources[source].examples))


class EvaluationOrder(Dataset[Draw]):
    """Every example once, from its K nearest pictures."""

    def __init__(self, source: Source, k: int) -> None:
        self._source = source
        self._pictures = None if source.features.retrieved is None else np.arange(k)

    def __len__(self) -> int:
        return len(self._source.examples)

    def __getitem__(self, row: int) -> Draw:
        return Draw(self._source, row, self._pictures)


class Collator:
    """Makes a batch of draws: the arguments of ``TrainingModel.forward`` by name.

    Args:
        pad_token_id: What ``input_ids`` are padded with.
    """

    def __init__(self, pad_token_id: int) -> None:
        self._pad = pad_token_id

    def __call__(self, draws: Sequence[Draw]) -> dict[str, Tensor]:
        """Return the batch; which arguments it has depends on the examples and their features."""
        examples = [(draw.source.examples, draw.row) for draw in draws]
        features = [(draw.source.features, draw.row) for draw in draws]
        ids, mask = padded([entry.input_ids[row] for entry, row in examples], self._pad)
        batch = {"input_ids": ids, "attention_mask": mask.long()}
        if examples[0][0].token_type_ids is not None:
            rows = [entry.token_type_ids[row] for entry, row in examples if entry.token_type_ids is not None]
            batch["token_type_ids"] = padded(rows)[0]
        if examples[0][0].labels is not None:
            batch["labels"] = torch.from_numpy(
                np.array([entry.labels[row] for entry, row in examples if entry.labels is not None])
            )
        else:
            batch |= _answers([(entry.mask_positions[row], entry.answers[row]) for entry, row in examples])
        if features[0][0].hidden is not None:
            batch["hidden"] = padded([f.hidden[row] for f, row in features if f.hidden])[0]
        if features[0][0].token_states is not None:
            states = [f.token_states[row] for f, row in features if f.token_states]
            batch["t"], batch["t_mask"] = padded(states)
        if features[0][0].retrieved is not None:
            rows = [
                f.retrieved[row][draw.pictures]
                for (f, row), draw in zip(features, draws, strict=True)
                if f.retrieved is not None and draw.pictures is not None
            ]
            batch["retrieved"] = torch.from_numpy(np.stack(rows).astype(np.int64))
        if features[0][0].queries is not None:
            queries = [f.queries[row] for f, row in features if f.queries is not None]
            batch["queries"] = torch.from_numpy(np.stack(queries))
        return batch


def _answers(rows: Sequence[tuple[NDArray[np.int64], Any]]) -> dict[str, Tensor]:
    """Positions ``(B, P) int64``, answers and shares ``(B, P, A)`` int64 and float32; zeros where none."""
    most = max(len(positions) for positions, _ in rows)
    widest = max(1, *(len(answer) for _, answers in rows for answer in answers))
    positions = torch.zeros((len(rows), most), dtype=torch.int64)
    ids = torch.zeros((len(rows), most, widest), dtype=torch.int64)
    shares = torch.zeros((len(rows), most, widest))
    for number, (places, answers) in enumerate(rows):
        positions[number, : len(places)] = torch.from_numpy(places)
        for mask, answer in enumerate(answers):
            for place, (token, share) in enumerate(answer.items()):
                ids[number, mask, place] = token
                shares[number, mask, place] = share
    return {"mask_positions": positions, "answers": ids, "shares": shares}
