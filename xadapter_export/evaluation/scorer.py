"""What an evaluation asks of a model, whether PyTorch or onnxruntime computes it.

Everything but the forward pass is here, once: tokenizing, batching, candidates, the memory control. So a
checkpoint and a bundle made from it can differ by rounding only.

Dimensions: n texts, B batch, T PLM tokens, M masks, V vocabulary, C candidates, L labels,
K retrieved pictures.
"""

import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import cast

import numpy as np
from numpy.typing import NDArray

from xadapter_export.bundle.manifest import Candidate, ExpertSet, Task
from xadapter_export.bundle.pictures import Picture
from xadapter_export.errors import InputTextError, UnsupportedError
from xadapter_export.runtime.answers import RetrievedPicture
from xadapter_export.runtime.candidates import columns_of, find_candidates
from xadapter_export.runtime.text import (
    Int64Array,
    TextEncoder,
    TokenizedText,
    TruncationWarning,
    check_texts,
)
from xadapter_export.sessions.session import Array
from xadapter_export.tasks import FILL_MASK, TEXT_CLASSIFICATION

Float32Array = NDArray[np.float32]
OnBatch = Callable[[int, int], None]  # texts that are done, and all


@dataclass(frozen=True)
class TokenScores:
    """How well each token of a text was told from the others, one masked at a time.

    Attributes:
        log_probability: ``(t,) float64``. Natural logarithm, for the tokens that are not special.
        is_best: ``(t,) bool``. Whether no other token of the vocabulary was more probable.
    """

    log_probability: NDArray[np.float64]
    is_best: NDArray[np.bool_]


class Scorer(ABC):
    """A model that can be scored.

    Attributes:
        name: What to call it in a report: a folder's name, a hub id or ``builtin``.
        task: What it answers.
        labels: Label names in the order of the logits; empty unless it classifies.
        expert_sets: The expert sets that it can run, ``none`` first.
        default_experts: The set that it runs when nothing is said.
        candidates: The only words that it can answer, where its head was sliced; else None.
        pictures: The bank's pictures; empty where none are retrieved.
        encoder: Both tokenizers with their rules.
    """

    name: str
    task: Task
    labels: tuple[str, ...]
    expert_sets: tuple[ExpertSet, ...]
    default_experts: ExpertSet
    candidates: tuple[Candidate, ...] | None
    pictures: Sequence[Picture]
    encoder: TextEncoder
    batch_size: int = 32
    _has_warned: bool = False

    @abstractmethod
    def compute(
        self, inputs: Mapping[str, Int64Array], outputs: Sequence[str], experts: ExpertSet
    ) -> list[Array]:
        """Run the model on arrays as ``TextEncoder.encode`` makes them.

        Args:
            inputs: Arrays by name; what the expert set does not read is left aside.
            outputs: ``logits``; ``retrieved`` and ``retrieved_scores``, ``(B, K)``.
            experts: The expert set, one of ``expert_sets``.
        """

    @abstractmethod
    def check_experts(self, experts: ExpertSet) -> None:
        """Raise the model's own error, a leaf of ``XAdapterError``, unless it can run this expert set."""

    @abstractmethod
    def reads_clip(self, experts: ExpertSet) -> bool:
        """Whether what the experts look at depends on the text."""

    @abstractmethod
    def retrieves(self, experts: ExpertSet) -> bool:
        """Whether the expert set looks pictures up in a bank."""

    @property
    def mask_token(self) -> str:
        """Text of the mask token.

        Raises:
            UnsupportedError: If the model does not fill masks.
        """
        self.require_task(FILL_MASK.name)
        return str(self.encoder.mask_token)

    @property
    def separator_token(self) -> str | None:
        """The special token that ends a text, ``[SEP]`` or ``</s>``; None where the tokenizer adds none."""
        ends = self.encoder.tokenizer.encode("")
        return str(ends.tokens[-1]) if ends.tokens else None

    def require_task(self, task: Task) -> None:
        """Raise unless the model is for this task.

        Raises:
            UnsupportedError: If it is for another.
        """
        if self.task != task:
            raise UnsupportedError(
                "the model was made for another task", where=self.name, expected=task, got=self.task
            )

    def mask_logits(
        self,
        texts: Sequence[str],
        words: Sequence[str],
        experts: ExpertSet,
        *,
        memory_texts: Sequence[str] | None = None,
        on_batch: OnBatch | None = None,
    ) -> Float32Array:
        """Return how much each word fits the mask of each text.

        Args:
            texts: n texts with exactly one mask each.
            words: C words, each one token of the PLM.
            experts: The expert set.
            memory_texts: n texts that CLIP reads in their place; None for the texts themselves.
            on_batch: Called after each batch.

        Returns:
            ``(n, C) float32``.

        Raises:
            InputTextError: If a text is empty or has not exactly one mask.
            ConfigError: If a word is not one token, or the model cannot answer it.
            UnsupportedError: If the model does not fill masks.
        """
        for text in check_texts(texts):
            if (found := text.count(self.mask_token)) != 1:
                raise InputTextError(
                    "a text must have exactly one mask",
                    where=repr(text),
                    expected=f"one {self.mask_token}",
                    got=found,
                )
        columns = columns_of(find_candidates(self.encoder.tokenizer, words), self.candidates)
        logits = np.empty((len(texts), len(columns)), np.float32)
        for rows, inputs in self._batches(texts, None, memory_texts, on_batch):
            logits[rows] = self.compute(inputs, ("logits",), experts)[0][:, 0, columns]
        return logits

    def label_logits(
        self,
        texts: Sequence[str],
        pairs: Sequence[str] | None,
        experts: ExpertSet,
        *,
        memory_texts: Sequence[str] | None = None,
        on_batch: OnBatch | None = None,
    ) -> Float32Array:
        """Return the logits of every label, ``(n, L) float32``, for n texts or pairs of texts.

        Args:
            texts: n texts.
            pairs: n second texts, or None.
            experts: The expert set.
            memory_texts: n texts that CLIP reads in place of the text, or of the pair.
            on_batch: Called after each batch.

        Raises:
            InputTextError: If a text is empty, or there is not one pair to each text.
            UnsupportedError: If the model does not classify.
        """
        self.require_task(TEXT_CLASSIFICATION.name)
        logits = np.empty((len(check_texts(texts)), len(self.labels)), np.float32)
        for rows, inputs in self._batches(texts, pairs, memory_texts, on_batch):
            logits[rows] = self.compute(inputs, ("logits",), experts)[0]
        return logits

    def retrieve(self, texts: Sequence[str], experts: ExpertSet) -> list[list[RetrievedPicture]]:
        """Return the pictures that the model looks at for each of n texts, the nearest first.

        Raises:
            InputTextError: If a text is empty.
            UnsupportedError: If the expert set looks at no pictures.
        """
        if not self.retrieves(experts):
            raise UnsupportedError("this expert set uses no images", where=f"{self.name}, {experts}")
        found: list[list[RetrievedPicture]] = [[] for _ in check_texts(texts)]
        for rows, inputs in self._batches(texts, None, None, None):
            retrieved, scores = self.compute(inputs, ("retrieved", "retrieved_scores"), experts)
            for row, ids, cosines in zip(rows, retrieved.tolist(), scores.tolist(), strict=True):
                found[row] = [
                    RetrievedPicture(i, self.pictures[i].id, self.pictures[i].caption, cosine)
                    for i, cosine in zip(ids, cosines, strict=True)
                ]
        return found

    def token_scores(
        self,
        texts: Sequence[str],
        experts: ExpertSet,
        *,
        memory_texts: Sequence[str] | None = None,
        on_batch: OnBatch | None = None,
    ) -> list[TokenScores]:
        """Mask each token of each text in turn, and return what the model says of the token that was there.

        CLIP reads the text without the letters of the masked token, else it would give the answer away. Of
        a text that is too long only the beginning is read, with a warning.

        Args:
            texts: n texts without a mask.
            experts: The expert set.
            memory_texts: n texts that CLIP reads in their place.
            on_batch: Called after each batch, with counts of masked copies.

        Raises:
            InputTextError: If a text is empty or has a mask.
            UnsupportedError: If the model does not fill masks, or only with some candidates.

        Source:
            Pseudo-log-likelihood: Salazar et al. 2020 (arXiv 1910.14659), section 2.
        """
        if self.candidates is not None:
            raise UnsupportedError(
                "the model predicts only its candidates, so it has no probability for other tokens",
                where=self.name,
                hint="export the checkpoint without --candidates",
            )
        copies = self._masked_copies(texts, memory_texts)
        log_probability = np.empty(len(copies), np.float64)
        is_best = np.empty(len(copies), np.bool_)
        order = sorted(range(len(copies)), key=lambda i: len(copies[i].ids))
        for start in range(0, len(order), self.batch_size):
            rows = order[start : start + self.batch_size]
            with self._one_warning():
                inputs, wanted = self._copy_inputs([copies[row] for row in rows])
            logits = self.compute(inputs, ("logits",), experts)[0][:, 0].astype(np.float64)  # (B, V)
            shifted = logits - logits.max(1, keepdims=True)
            target = shifted[np.arange(len(rows)), wanted]
            log_probability[rows] = target - np.log(np.exp(shifted).sum(1))
            is_best[rows] = target == 0
            if on_batch is not None:
                on_batch(start + len(rows), len(order))
        owner = np.array([copy.text for copy in copies])
        return [TokenScores(log_probability[owner == i], is_best[owner == i]) for i in range(len(texts))]

    def _batches(
        self,
        texts: Sequence[str],
        pairs: Sequence[str] | None,
        memory_texts: Sequence[str] | None,
        on_batch: OnBatch | None,
    ) -> Iterator[tuple[list[int], dict[str, Int64Array]]]:
        """Yield the places of the texts and their arrays, the shortest texts first."""
        if pairs is not None and len(pairs) != len(texts):
            raise InputTextError(
                "the numbers of texts and second texts differ", expected=len(texts), got=len(pairs)
            )
        sizes = [len(text) + (len(pairs[i]) if pairs else 0) for i, text in enumerate(texts)]
        order = sorted(range(len(texts)), key=sizes.__getitem__)
        for start in range(0, len(order), self.batch_size):
            rows = order[start : start + self.batch_size]
            batch = [texts[row] for row in rows]
            seconds = None if pairs is None else [pairs[row] for row in rows]
            with self._one_warning():
                if memory_texts is None:
                    inputs = self.encoder.encode(batch, seconds)
                else:
                    inputs = self.encoder.without_clip().encode(batch, seconds)
                    inputs |= self._clip_inputs([memory_texts[row] for row in rows])
            yield rows, inputs
            if on_batch is not None:
                on_batch(start + len(rows), len(order))

    def _clip_inputs(self, texts: list[str]) -> dict[str, Int64Array]:
        """Return ``clip_input_ids`` of texts, ``(B, S) int64``; nothing where there is no CLIP."""
        encoded = self.encoder.encode(texts)
        return {name: encoded[name] for name in ("clip_input_ids",) if name in encoded}

    @contextmanager
    def _one_warning(self) -> Iterator[None]:
        """Say only once that texts are cut, and not again in every batch of every row."""
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            yield
        for warning in caught:
            if warning.category is not TruncationWarning:
                warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
            elif not self._has_warned:
                self._has_warned = True
                warnings.warn(
                    f"some texts were truncated; in the first such batch, {warning.message}",
                    TruncationWarning,
                    stacklevel=5,
                )

    def _masked_copies(self, texts: Sequence[str], memory_texts: Sequence[str] | None) -> list["_Copy"]:
        mask, copies, num_cut = self.mask_token, [], 0
        for number, text in enumerate(check_texts(texts)):
            if mask in text:
                raise InputTextError("a text already has a mask", where=repr(text))
            encoding = self.encoder.tokenizer.encode(text)
            special, ids = encoding.special_tokens_mask, list(encoding.ids)
            excess = len(ids) - self.encoder.max_seq
            kept = list(range(len(ids)))
            if excess > 0:
                num_cut += 1
                inner = [i for i in kept if not special[i]]
                kept = sorted(set(kept) - set(inner[-excess:]))
            for place, i in enumerate(kept):
                if special[i]:
                    continue
                start, end = encoding.offsets[i]
                read = text[:start] + mask + text[end:] if memory_texts is None else memory_texts[number]
                copies.append(_Copy(number, [ids[k] for k in kept], place, read))
        if num_cut:
            warnings.warn(
                f"{num_cut} of {len(texts)} texts are evaluated on their first {self.encoder.max_seq} tokens "
                "only",
                TruncationWarning,
                stacklevel=3,
            )
        return copies

    def _copy_inputs(self, copies: list["_Copy"]) -> tuple[dict[str, Int64Array], list[int]]:
        """Return the arrays of masked copies, and the id of the token that each mask hides."""
        encoder, mask_token_id = self.encoder.without_clip(), cast(int, self.encoder.mask_token_id)
        rows = [
            TokenizedText(
                [*copy.ids[: copy.place], mask_token_id, *copy.ids[copy.place + 1 :]],
                [0] * len(copy.ids),
                [],
                [copy.place],
            )
            for copy in copies
        ]
        inputs = encoder.collate(rows) | self._clip_inputs([copy.read for copy in copies])
        return inputs, [copy.ids[copy.place] for copy in copies]


@dataclass(frozen=True)
class _Copy:
    """A text with one token to be masked: its number, its ids, the token's place, and what CLIP reads."""

    text: int
    ids: list[int]
    place: int
    read: str
