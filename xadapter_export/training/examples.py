"""What a plug-in learns from: texts with masked words, or texts with labels, as token ids.

Dimensions: n examples, T PLM tokens, S CLIP tokens, P masks of a text, A answers that a mask accepts.
"""

import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from xadapter_export.errors import ConfigError, InputTextError, import_extra
from xadapter_export.evaluation.tables import read_lines, read_table
from xadapter_export.runtime.candidates import find_candidates
from xadapter_export.runtime.text import GENERIC_MASK, TextEncoder, check_texts

_WORD = re.compile(r"\w+")
_CHUNK = 1024


@dataclass(frozen=True)
class MaskedText:
    """A text with masks, and for each mask the tokens that are right.

    Attributes:
        text: Holds the PLM's mask token P times.
        answers: P maps from token id to how right it is, each adding up to 1; empty where nothing is to be
            answered, and the text only shows where to look.
    """

    text: str
    answers: tuple[Mapping[int, float], ...]


@dataclass(frozen=True)
class Examples:
    """Tokenized examples.

    Attributes:
        input_ids: n rows of T ids.
        token_type_ids: n rows of T, or None where the PLM has none.
        clip_input_ids: n rows of S ids, or None without a CLIP.
        mask_positions: n rows of P positions; empty rows for task examples.
        answers: n rows of P maps from token id to share.
        labels: ``(n,) int64`` or ``float32``, or None for masked texts.
    """

    input_ids: list[NDArray[np.int64]]
    token_type_ids: list[NDArray[np.int64]] | None
    clip_input_ids: list[NDArray[np.int64]] | None
    mask_positions: list[NDArray[np.int64]]
    answers: list[tuple[Mapping[int, float], ...]]
    labels: NDArray[np.int64] | NDArray[np.float32] | None = None

    def __len__(self) -> int:
        return len(self.input_ids)


def read_texts(source: str, text_column: str | None = None) -> list[Any]:
    """Read texts: strings, or maps with ``text`` and ``answers`` where a row has answers.

    Args:
        source: A ``.txt``, ``.jsonl``, ``.csv``, ``.tsv`` or ``.parquet`` file, or ``hub:NAME`` for the
            train split of a ``datasets`` data set.
        text_column: Where the text is, if not in ``text``.

    Raises:
        InputTextError: If there is no text in it, one is empty, or it cannot be read.
        ConfigError: If there is no such file or data set, or the column is missing.
    """
    column = text_column or "text"
    if source.startswith("hub:"):
        datasets = import_extra("datasets", "train")
        try:
            rows = list(datasets.load_dataset(source.removeprefix("hub:"), split="train"))
        except Exception as error:  # the hub client raises many kinds; each means the data cannot be had
            raise ConfigError("the dataset cannot be loaded", where=source, got=str(error)[:200]) from error
        return _column(rows, column, source)
    path = Path(source)
    if not path.is_file():
        raise ConfigError("no such file", where=path, expected="texts to train on")
    if path.suffix in (".csv", ".tsv", ".jsonl", ".json", ".parquet"):
        return _column(read_table(path, header_names=(column,)), column, source)
    lines = read_lines(path)
    if not lines:
        raise InputTextError("the file has no text", where=path)
    return list(lines)


def _column(rows: list[dict[str, Any]], column: str, where: str) -> list[Any]:
    if not rows:
        raise InputTextError("the file has no text", where=where)
    texts: list[Any] = []
    for number, row in enumerate(rows, 1):
        if column not in row:
            raise ConfigError(
                "the column with the text is missing",
                where=f"{where}, row {number}",
                expected=column,
                got=", ".join(row)[:80],
            )
        if not isinstance(row[column], str) or not row[column].strip():
            raise InputTextError(
                "a text is empty or not a string", where=f"{where}, row {number}", got=repr(row[column])[:40]
            )
        texts.append({"text": row[column], "answers": row["answers"]} if "answers" in row else row[column])
    return texts


class Masker:
    """Masks words of texts; the same seed masks the same words.

    A word is masked whole: as many mask tokens as it has pieces. All chosen words become masks; none is kept
    or replaced at random, because the PLM that would learn from that is frozen.

    Args:
        encoder: The model's text encoder.
        share: Of a text's words, at least one.
        ways: How many maskings of each text.
        favored: Words that are masked alone, in ``favored_share`` of the maskings of a text that has one.
        favored_share: See ``favored``.
        seed: Of all choices.
    """

    def __init__(
        self,
        encoder: TextEncoder,
        *,
        share: float = 0.15,
        ways: int = 1,
        favored: Sequence[str] = (),
        favored_share: float = 0.0,
        seed: int = 0,
    ) -> None:
        if encoder.mask_token is None:
            raise ConfigError("this PLM has no mask token, so it cannot learn to fill masks")
        self._tokenizer: Tokenizer = encoder.tokenizer
        self._mask = encoder.mask_token
        self._longest = encoder.max_seq - encoder.tokenizer.num_special_tokens_to_add(False)
        self._share, self._ways = share, ways
        self._favored, self._favored_share = {word.lower() for word in favored}, favored_share
        self._seed = seed

    def mask(self, texts: Sequence[str]) -> list[MaskedText]:
        """Mask every text in each of its ways; texts without a word are left out.

        Raises:
            InputTextError: If no text has a word.
        """
        masked = [
            found
            for number, text in enumerate(texts)
            for way in range(self._ways)
            if (found := self._mask_one(text, _chance(self._seed, number, way))) is not None
        ]
        if not masked:
            raise InputTextError(
                "no text has a word to mask",
                hint=f"give sentences without {self._mask}, or .jsonl with text and answers",
            )
        return masked

    def _mask_one(self, text: str, rng: random.Random) -> MaskedText | None:
        if self._mask in text:
            return None
        encoding = self._tokenizer.encode(text, add_special_tokens=False)
        if len(encoding.ids) > self._longest:  # what the PLM reads of it
            text = text[: encoding.offsets[self._longest - 1][1]]
            encoding = self._tokenizer.encode(text, add_special_tokens=False)
        words: dict[int, list[int]] = {}
        for place, word in enumerate(encoding.word_ids):
            start, end = encoding.offsets[place]
            if word is not None and _WORD.search(text[start:end]):
                words.setdefault(word, []).append(place)
        spans = []
        for places in words.values():
            start, end = encoding.offsets[places[0]][0], encoding.offsets[places[-1]][1]
            start += len(text[start:end]) - len(text[start:end].lstrip())
            spans.append((start, end, [encoding.ids[place] for place in places]))
        if not spans:
            return None
        favored = [span for span in spans if text[span[0] : span[1]].lower() in self._favored]
        if favored and rng.random() < self._favored_share:
            chosen = [rng.choice(favored)]
        else:
            chosen = sorted(rng.sample(spans, max(1, round(self._share * len(spans)))))
        pieces, answers, last = [], [], 0
        for start, end, ids in chosen:
            pieces += [text[last:start], self._mask * len(ids)]
            answers += [{token: 1.0} for token in ids]
            last = end
        return MaskedText("".join(pieces) + text[last:], tuple(answers))


def _chance(*seeds: int) -> random.Random:
    return random.Random(":".join(map(str, seeds)))  # noqa: S311  # masks are no secrets


def answered_texts(rows: Sequence[Mapping[str, Any]], encoder: TextEncoder, where: str) -> list[MaskedText]:
    """Take texts whose masks and answers stand in the file.

    Args:
        rows: Each has ``text`` with ``[MASK]`` or the PLM's own mask token, and ``answers``: a word, a map
            from words to shares, a list of these with one for each mask, or null where the text only shows
            where to look.
        encoder: The model's text encoder.
        where: The file, for messages.

    Raises:
        InputTextError: If a text has no mask, or not as many answers as masks.
        ConfigError: If an answer is not one token of the PLM.
    """
    mask = encoder.mask_token or GENERIC_MASK
    ids: dict[str, int] = {}

    def shares_of(answer: object, place: str) -> dict[int, float]:
        words = {answer: 1.0} if isinstance(answer, str) else answer
        if not isinstance(words, dict) or not all(
            isinstance(share, int | float) and share >= 0 for share in words.values()
        ):
            raise InputTextError(
                "an answer is neither a word nor a map from words to shares",
                where=place,
                got=repr(answer)[:80],
            )
        total = sum(words.values())
        if not 0 < total < float("inf"):
            raise InputTextError("the shares of an answer must add up to more than 0", where=place)
        shares: dict[int, float] = {}
        for word, share in words.items():
            if word not in ids:
                try:
                    ids[word] = find_candidates(encoder.tokenizer, [word])[0].token_id
                except (ConfigError, InputTextError) as error:
                    raise ConfigError("an answer cannot be learned", where=place, got=error) from error
            if share > 0:
                shares[ids[word]] = shares.get(ids[word], 0.0) + share / total
        return shares

    found = []
    for number, row in enumerate(rows, 1):
        place = f"{where}, text {number} with answers"
        text = str(row["text"]).replace(GENERIC_MASK, mask)
        given = row["answers"]
        given = given if isinstance(given, list) else [given]
        num_masks = text.count(mask)
        if not num_masks:
            raise InputTextError("a text has no mask", where=place, hint=f"write {mask}")
        if given == [None]:
            found.append(MaskedText(text, ({},) * num_masks))
            continue
        if len(given) != num_masks:
            raise InputTextError(
                "the numbers of masks and answers differ", where=place, expected=num_masks, got=len(given)
            )
        found.append(MaskedText(text, tuple(shares_of(answer, place) for answer in given)))
    return found


def encode_masked(encoder: TextEncoder, texts: Sequence[MaskedText]) -> Examples:
    """Tokenize masked texts.

    Raises:
        InputTextError: If a text is empty, or loses a mask because its masks are too far apart.
    """
    examples = _encode(encoder, [entry.text for entry in texts], None, require_mask=True)
    for entry, positions in zip(texts, examples.mask_positions, strict=True):
        if len(positions) != len(entry.answers):
            raise InputTextError(
                "the numbers of masks and answers differ",
                where=entry.text[:80],
                expected=len(positions),
                got=len(entry.answers),
            )
    examples.answers.extend(entry.answers for entry in texts)
    return examples


def encode_labeled(
    encoder: TextEncoder,
    texts: Sequence[str],
    pairs: Sequence[str] | None,
    labels: Sequence[int] | Sequence[float],
    *,
    regression: bool,
) -> Examples:
    """Tokenize texts with labels.

    Raises:
        InputTextError: If a text is empty.
    """
    examples = _encode(encoder, texts, pairs, require_mask=False)
    values: NDArray[np.int64] | NDArray[np.float32] = (
        np.array(labels, np.float32) if regression else np.array(labels, np.int64)
    )
    return Examples(
        examples.input_ids,
        examples.token_type_ids,
        examples.clip_input_ids,
        [np.zeros(0, np.int64)] * len(values),
        [()] * len(values),
        values,
    )


def _encode(
    encoder: TextEncoder, texts: Sequence[str], pairs: Sequence[str] | None, *, require_mask: bool
) -> Examples:
    texts = check_texts(texts)
    ids, types, clip_ids, positions = [], [], [], []
    for start in range(0, len(texts), _CHUNK):
        rows = slice(start, start + _CHUNK)
        found = encoder.tokenize(
            texts[rows], None if pairs is None else pairs[rows], require_mask=require_mask
        )
        ids += [np.array(text.input_ids) for text in found]
        if encoder.has_token_type_ids:
            types += [np.array(text.token_type_ids) for text in found]
        clip_ids += [np.array(text.clip_input_ids) for text in found if text.clip_input_ids]
        if require_mask:
            positions += [np.array(text.mask_positions) for text in found]
    return Examples(ids, types or None, clip_ids or None, positions, [])
