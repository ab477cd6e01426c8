"""From text to the integer inputs of the graph, the same for the training code and for the app.

Dimensions: B batch, T PLM tokens, S CLIP tokens, M masks. Every array is int64. Rows are padded to the
longest of the batch; those of a text tower for which padding matters are as long as it can read.
"""

import copy
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import NDArray
from tokenizers import Encoding, Tokenizer

from xadapter_export.bundle.manifest import TowerFacts
from xadapter_export.errors import ConfigError, InputTextError, panics_as

Int64Array = NDArray[np.int64]
GENERIC_MASK = "[MASK]"  # what files write; the PLM's own mask token takes its place


class TruncationWarning(UserWarning):
    """A text was longer than the model can read, and only a part of it was used."""


def clip_text(text: str, mask_token: str | None, text_pair: str | None = None) -> str:
    """Return the sentence that CLIP reads: no mask token, whitespace collapsed, a pair joined by a space.

    Args:
        text: The sentence as the PLM gets it.
        mask_token: The PLM's mask token, or None where it has none.
        text_pair: The second sentence, where the task takes two.
    """
    joined = text if text_pair is None else f"{text} {text_pair}"
    if mask_token:
        joined = joined.replace(mask_token, " ")
    return " ".join(joined.split())


def _clip_text_before(text: str, mask_token: str | None, text_pair: str | None) -> tuple[str, str]:
    """Return what of ``clip_text`` stands before the first mask and before the last; nothing without one."""
    joined = text if text_pair is None else f"{text} {text_pair}"
    if not mask_token or mask_token not in joined:
        return "", ""
    first, last = joined.split(mask_token, 1)[0], joined.rsplit(mask_token, 1)[0]
    return clip_text(first, mask_token), clip_text(last, mask_token)


@dataclass(frozen=True)
class TokenizedText:
    """The tokens of one text, or pair of texts, cut to what the models can read.

    Attributes:
        input_ids: The PLM's tokens, special ones included.
        token_type_ids: As many.
        clip_input_ids: CLIP's tokens, start and end included; none where there is no CLIP tokenizer.
        mask_positions: Where in ``input_ids`` the masks are.
    """

    input_ids: list[int]
    token_type_ids: list[int]
    clip_input_ids: list[int]
    mask_positions: list[int]


class TowerTokens:
    """A text tower's tokenizer, with the rules for cutting and padding.

    Args:
        tokenizer: It adds the special tokens: one at the end, and the same ones before every text.
        facts: The tower's.

    Raises:
        ConfigError: If they do not belong together.
    """

    def __init__(self, tokenizer: Tokenizer, facts: TowerFacts) -> None:
        self._tokenizer = without_limits(tokenizer)
        self._facts = facts
        with panics_as(ConfigError, "the CLIP tokenizer gives up on an empty text"):
            empty = self._tokenizer.encode("").ids
        self._num_special = len(empty)
        if empty[-1:] != [facts.end_token_id] or facts.context_length < len(empty):
            raise ConfigError(
                "the CLIP tokenizer does not end a text with its end token, or leaves no room for a text",
                where=f"context length {facts.context_length}",
                expected=f"for an empty text some ids, the last {facts.end_token_id}",
                got=empty,
            )

    def encode(self, texts: Sequence[str], before: Sequence[tuple[str, str]] = ()) -> list[list[int]]:
        """Return the ids of each text: special tokens, text or a window of it, end; a text cut is a warning.

        Args:
            texts: B texts, without masks.
            before: What of each stands before its first mask and before its last; nothing if not given.
        """
        facts, tokenizer = self._facts, self._tokenizer
        limit, num_first = facts.context_length, self._num_special - 1
        rows = [encoding.ids for encoding in tokenizer.encode_batch(list(texts))]
        _warn_if_cut([len(row) for row in rows], limit, "CLIP")
        size = limit - self._num_special
        for i, row in enumerate(rows):
            if len(row) <= limit:
                continue
            first, last = (
                len(tokenizer.encode(text, add_special_tokens=False))
                for text in (before[i] if before else ("", ""))
            )
            if last - first > size:  # no window holds both
                last = first
            start = 0
            if last >= size:
                start = min((first + last - size) // 2, len(row) - self._num_special - size)
            start += num_first
            rows[i] = [*row[:num_first], *row[start : start + size], facts.end_token_id]
        if facts.exact_at_true_length:
            return rows
        return [row + [facts.pad_token_id] * (limit - len(row)) for row in rows]

    def name_tokens(self, ids: Sequence[int]) -> tuple[str, ...]:
        """Return the text of each token up to the end token; of what is no whole letter the token's name."""
        end = self._facts.end_token_id
        real = ids[: ids.index(end) + 1] if end in ids else ids
        decoded = [self._tokenizer.decode([token], skip_special_tokens=False).strip() for token in real]
        names = [self._tokenizer.id_to_token(token) for token in real]
        return tuple(text or name or "" for text, name in zip(decoded, names, strict=True))

    def pad(self, rows: Sequence[Sequence[int]]) -> Int64Array:
        """Return B rows of ids as one array, padded to the longest of them."""
        return _padded(rows, self._facts.pad_token_id)


class TextEncoder:
    """Both tokenizers of a model, with the rules for padding, truncation and masks.

    Args:
        tokenizer: The PLM's tokenizer, whose post-processor adds the special tokens.
        clip: CLIP's tokenizer with its rules, or None where no expert needs CLIP.
        max_seq: Longest PLM input in tokens, special tokens included.
        mask_token: Text of the mask token, ``"[MASK]"`` or ``"<mask>"``, or None where the PLM has none.
        pad_token_id: What ``input_ids`` are padded with.
        has_token_type_ids: Whether the PLM takes ``token_type_ids``.

    Raises:
        ConfigError: If the numbers and the tokenizers do not belong together.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        clip: TowerTokens | None,
        *,
        max_seq: int,
        mask_token: str | None,
        pad_token_id: int,
        has_token_type_ids: bool,
    ) -> None:
        self.tokenizer = without_limits(tokenizer)
        self.max_seq = max_seq
        self.mask_token = mask_token
        self.pad_token_id = pad_token_id
        self.has_token_type_ids = has_token_type_ids

        self.mask_token_id: int | None = None
        if mask_token is not None:
            self.mask_token_id = tokenizer.token_to_id(mask_token)
            if self.mask_token_id is None:
                raise ConfigError("the PLM's tokenizer does not know the mask token", where=mask_token)
        num_special = tokenizer.num_special_tokens_to_add(False)
        if max_seq <= num_special:
            raise ConfigError("max_seq leaves no room", expected=f"more than {num_special}", got=max_seq)
        self._clip = clip

    def without_clip(self) -> Self:
        """Return the same for the PLM alone, so that nothing is said of a text which CLIP does not read."""
        other = copy.copy(self)
        other._clip = None
        return other

    def clip_tokens(self, clip_input_ids: Sequence[int]) -> tuple[str, ...]:
        """Return the text of each CLIP token of a row, without padding; nothing where there is no CLIP."""
        return () if self._clip is None else self._clip.name_tokens(clip_input_ids)

    def encode(
        self,
        texts: str | Sequence[str],
        text_pairs: str | Sequence[str] | None = None,
        *,
        require_mask: bool = False,
    ) -> dict[str, Int64Array]:
        """Turn texts into the arrays that the model and the graph take.

        Args:
            texts: B texts, or one.
            text_pairs: As many second texts, or None.
            require_mask: Whether a text without a mask is an error.

        Returns:
            ``input_ids`` and ``attention_mask``, ``(B, T) int64``; ``token_type_ids`` likewise where the PLM
            has them; ``clip_input_ids``, ``(B, S) int64``, padded after end-of-text, where there is a CLIP
            tokenizer; ``mask_positions``, ``(B, M) int64``, where the PLM has a mask token: the positions of
            the masks in each row, unused slots repeating the first. M is at least 1; a row with no mask has
            zeros.

        Raises:
            InputTextError: As ``tokenize``.
        """
        return self.collate(self.tokenize(texts, text_pairs, require_mask=require_mask))

    def tokenize(
        self,
        texts: str | Sequence[str],
        text_pairs: str | Sequence[str] | None = None,
        *,
        require_mask: bool = False,
    ) -> list[TokenizedText]:
        """Return the tokens of each text, to be put into batches by ``collate``.

        A text that is too long is cut to one window of it with a warning. The window is the beginning where
        that holds every mask, and otherwise slides until it does, with as much text on the left of the masks
        as on the right. CLIP reads no mask, but its window follows the same rule about where the masks were;
        if they are too far apart for it, it slides to the first.

        Args:
            texts: B texts, or one.
            text_pairs: As many second texts, or None.
            require_mask: Whether a text without a mask is an error.

        Raises:
            InputTextError: If a text is empty, is not a string, has no mask where one is required, or has
                masks too far apart to be read together; or the tokenizer gives up on it.

        Source:
            Without a mask beyond the limit, the ids are those of tokenizers 0.23 with its ``longest_first``
            truncation; sliding the window to the masks is ours.
        """
        firsts = check_texts(texts, "text")
        seconds = None if text_pairs is None else check_texts(text_pairs, "text pair")
        if seconds is not None and len(seconds) != len(firsts):
            raise InputTextError(
                "the numbers of texts and second texts differ", expected=len(firsts), got=len(seconds)
            )

        with panics_as(InputTextError, "the tokenizer gives up on a text", where=_quoted(firsts[0])):
            return self._tokenize(firsts, seconds, require_mask=require_mask)

    def _tokenize(
        self, firsts: list[str], seconds: list[str] | None, *, require_mask: bool
    ) -> list[TokenizedText]:
        sources = firsts if seconds is None else list(zip(firsts, seconds, strict=True))
        encodings = self.tokenizer.encode_batch(sources)
        cut = [self._cut(encoding, text) for encoding, text in zip(encodings, firsts, strict=True)]
        _warn_if_cut([len(encoding) for encoding in encodings], self.max_seq, "the language model")

        clip_rows: list[list[int]] = [[] for _ in firsts]
        if self._clip is not None:
            pairs = [None] * len(firsts) if seconds is None else seconds
            sentences = [clip_text(a, self.mask_token, b) for a, b in zip(firsts, pairs, strict=True)]
            before = [_clip_text_before(a, self.mask_token, b) for a, b in zip(firsts, pairs, strict=True)]
            clip_rows = self._clip.encode(sentences, before)
        masks = self._find_masks([row for row, _ in cut], firsts, require_mask=require_mask)
        return [
            TokenizedText(ids, type_ids, clip_ids, positions)
            for (ids, type_ids), clip_ids, positions in zip(cut, clip_rows, masks, strict=True)
        ]

    def collate(self, texts: Sequence[TokenizedText]) -> dict[str, Int64Array]:
        """Put B tokenized texts into arrays, padded to the longest of them; see ``encode``."""
        ids = [text.input_ids for text in texts]
        arrays = {
            "input_ids": _padded(ids, self.pad_token_id),
            "attention_mask": _padded([[1] * len(row) for row in ids], 0),
        }
        if self.has_token_type_ids:
            arrays["token_type_ids"] = _padded([text.token_type_ids for text in texts], 0)
        if self._clip is not None:
            arrays["clip_input_ids"] = self._clip.pad([text.clip_input_ids for text in texts])
        if self.mask_token_id is not None:
            rows = [text.mask_positions for text in texts]
            most = max(1, *(len(row) for row in rows))
            arrays["mask_positions"] = np.array(
                [row + (row[:1] or [0]) * (most - len(row)) for row in rows], dtype=np.int64
            )
        return arrays

    def _cut(self, encoding: Encoding, text: str) -> tuple[list[int], list[int]]:
        """Return ids and type ids: all, or those of the special tokens and of a window of each text."""
        ids, type_ids = encoding.ids, encoding.type_ids
        if len(ids) <= self.max_seq:
            return ids, type_ids
        # Positions of the special tokens, of the first text and of the second.
        spans: dict[int | None, list[int]] = {sequence: [] for sequence in (None, 0, 1)}
        for position, sequence in enumerate(encoding.sequence_ids):
            spans[sequence].append(position)
        masks = [[i for i in spans[s] if ids[i] == self.mask_token_id] for s in (0, 1)]
        needs = [m[-1] - m[0] + 1 if m else 0 for m in masks]
        budget = self.max_seq - len(spans[None])
        if sum(needs) > budget:
            raise InputTextError(
                "the masks of a text are too far apart for one input",
                where=_quoted(text),
                expected=f"within {budget} tokens",
                got=sum(needs),
                hint="shorten the text between them, or use one mask at a time",
            )
        # The longer text gives way first, but never so far that it loses a mask.
        lengths = len(spans[0]), len(spans[1])
        half = budget // 2 if lengths[0] <= lengths[1] else budget - budget // 2
        first = min(lengths[0], max(budget - lengths[1], half))
        first = min(max(first, needs[0]), budget - needs[1])
        kept = spans[None]
        for span, mask, size in ((spans[0], masks[0], first), (spans[1], masks[1], budget - first)):
            start = 0
            if mask and mask[-1] >= span[0] + size:
                centered = (mask[0] + mask[-1] + 1 - size) // 2 - span[0]
                start = min(centered, len(span) - size)
            kept = kept + span[start : start + size]
        kept.sort()
        return [ids[i] for i in kept], [type_ids[i] for i in kept]

    def _find_masks(self, ids: list[list[int]], texts: list[str], *, require_mask: bool) -> list[list[int]]:
        if require_mask and self.mask_token_id is None:
            raise InputTextError("this language model has no mask token, so it cannot fill a mask")
        rows = [[i for i, token in enumerate(row) if token == self.mask_token_id] for row in ids]
        for row, text in zip(rows, texts, strict=True):
            if require_mask and not row:
                raise InputTextError(
                    "the text has no mask to fill",
                    where=_quoted(text),
                    hint=f"write {self.mask_token} where the word should go",
                )
        return rows


def without_limits(tokenizer: Tokenizer) -> Tokenizer:
    """Return the tokenizer without its own padding and truncation, which would hide what was cut."""
    if tokenizer.padding is None and tokenizer.truncation is None:
        return tokenizer
    unlimited = Tokenizer.from_str(tokenizer.to_str())
    unlimited.no_padding()
    unlimited.no_truncation()
    return unlimited


def check_texts(texts: str | Sequence[str], name: str = "text") -> list[str]:
    """Return the texts as a list, a single one as a list of one.

    Raises:
        InputTextError: If there is none, or one is empty, is not a string or is not valid Unicode.
    """
    rows = [texts] if isinstance(texts, str) else list(texts)
    if not rows:
        raise InputTextError(f"no {name} was given")
    for number, row in enumerate(rows, 1):
        which = f"{name} {number} of {len(rows)}"
        if not isinstance(row, str):
            raise InputTextError(f"{which} is not a string", got=type(row).__name__)
        if not row.strip():
            raise InputTextError(f"{which} is empty", hint="write a sentence")
        try:
            row.encode("utf-8")
        except UnicodeEncodeError as error:
            raise InputTextError(f"{which} is not valid Unicode", got=error) from error
    return rows


def _warn_if_cut(lengths: list[int], limit: int, reader: str) -> None:
    cut = [length for length in lengths if length > limit]
    if cut:
        warnings.warn(
            f"{len(cut)} of {len(lengths)} texts (longest: {max(cut)} tokens) were truncated to the {limit} "
            f"tokens that {reader} can read",
            TruncationWarning,
            stacklevel=3,
        )


def _padded(rows: Sequence[Sequence[int]], pad_id: int) -> Int64Array:
    """Return ``(rows, longest) int64``, padded on the right."""
    padded = np.full((len(rows), max(len(row) for row in rows)), pad_id, dtype=np.int64)
    for i, row in enumerate(rows):
        padded[i, : len(row)] = row
    return padded


def _quoted(text: str) -> str:
    """Return the text in quotes, shortened so that an error stays one readable line."""
    return repr(text if len(text) <= 80 else f"{text[:77]}...")
