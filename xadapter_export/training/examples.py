"""What a plug-in learns from: texts with masked words, or texts with labels, as token ids.

Dimensions: n examples, T PLM tokens, S CLIP tokens, P masks of a text, A answers that a mask accepts.
"""

import json
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
from xadapter_export.runtime.candidates import find_candidates
from xadapter_export.runtime.text import TextEncoder, check_texts

GENERIC_MASK = "[MASK]"  # what files write; the PLM's own mask token takes its place
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
    """Tokenised examples.

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
    """Read texts: strings, or objects with ``text`` and ``answers`` of a ``.jsonl`` file.

    Args:
        source: A ``.txt``, ``.jsonl``, ``.csv``, ``.tsv`` or ``.parquet`` file, or ``hub:NAME`` for the
            train split of a ``datasets`` data set.
        text_column: Where the text is, if not in ``text``.

    Raises:
        InputTextError: If there is no text in it, or it cannot be read.
        ConfigError: If the column is missing.
    """
    column = text_column or "text"
    if source.startswith("hub:"):
        try:
            table = import_extra("datasets", "train").load_dataset(source.removeprefix("hub:"), split="train")
        except ImportError:
            raise
        except Exception as error:  # the hub client raises many kinds; each means the data cannot be had
            raise ConfigError("the data set cannot be had", where=source, got=str(error)[:200]) from error
        return _column(list(table), column, source)
    path = Path(source)
    if not path.is_file():
        raise ConfigError("there is no such file", where=path, expected="texts to train on")
    try:
        if path.suffix == ".parquet":
            table = import_extra("datasets", "train").Dataset.from_parquet(source, keep_in_memory=True)
            return _column(list(table), column, source)
        if path.suffix in (".csv", ".tsv"):
            import csv

            with path.open(encoding="utf-8", newline="") as file:
                return _column(
                    list(csv.DictReader(file, delimiter="\t" if path.suffix == ".tsv" else ",")),
                    column,
                    source,
                )
        lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        if path.suffix == ".jsonl":
            rows = [json.loads(line) for line in lines]
            for number, row in enumerate(rows, 1):
                if not isinstance(row, dict) or column not in row:
                    raise InputTextError(f"a line has no {column}", where=f"{path}, line {number}")
            lines = [row if "answers" in row else row[column] for row in rows]
    except (UnicodeDecodeError, json.JSONDecodeError, OSError) as error:
        raise InputTextError("the file cannot be read", where=path, got=error) from error
    if not lines:
        raise InputTextError("there is no text in the file", where=path)
    return lines


def _column(rows: list[dict[str, Any]], column: str, where: str) -> list[str]:
    if not rows:
        raise InputTextError("there is no text in the file", where=where)
    if column not in rows[0]:
        raise ConfigError(
            "the column of the text is missing", where=where, expected=column, got=", ".join(rows[0])
        )
    return [str(row[column]) for row in rows if str(row[column] or "").strip()]


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
            raise InputTextError("no text has a word that can be masked")
        return masked

    def _mask_one(self, text: str, rng: random.Random) -> MaskedText | None:
        if self._mask in text:
            return None
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

    def token_id(word: str) -> int:
        if word not in ids:
            ids[word] = find_candidates(encoder.tokenizer, [word])[0].token_id
        return ids[word]

    found = []
    for number, row in enumerate(rows, 1):
        text = str(row["text"]).replace(GENERIC_MASK, mask)
        given = row["answers"]
        given = given if isinstance(given, list) else [given]
        num_masks = text.count(mask)
        if not num_masks:
            raise InputTextError("a text has no mask", where=f"{where}, text {number}", mend=f"write {mask}")
        if given == [None]:
            found.append(MaskedText(text, ({},) * num_masks))
            continue
        if len(given) != num_masks:
            raise InputTextError(
                "not one answer to each mask",
                where=f"{where}, text {number}",
                expected=num_masks,
                got=len(given),
            )
        answers = []
        for answer in given:
            shares = {answer: 1.0} if isinstance(answer, str) else dict(answer)
            total = sum(shares.values())
            if not total > 0 or min(shares.values()) < 0:
                raise InputTextError(
                    "the shares of an answer must add up to more than 0", where=f"{where}, text {number}"
                )
            answers.append({token_id(word): share / total for word, share in shares.items() if share > 0})
        found.append(MaskedText(text, tuple(answers)))
    return found


def encode_masked(encoder: TextEncoder, texts: Sequence[MaskedText]) -> Examples:
    """Tokenise masked texts.

    Raises:
        InputTextError: If a text is empty, or loses a mask because its masks are too far apart.
    """
    examples = _encode(encoder, [entry.text for entry in texts], None, require_mask=True)
    for entry, positions in zip(texts, examples.mask_positions, strict=True):
        if len(positions) != len(entry.answers):
            raise InputTextError(
                "not one answer to each mask",
                where=entry.text[:80],
                expected=len(positions),
                got=len(entry.answers),
            )
    examples.answers.extend(entry.answers for entry in texts)
    return examples


def encode_labelled(
    encoder: TextEncoder,
    texts: Sequence[str],
    pairs: Sequence[str] | None,
    labels: Sequence[int] | Sequence[float],
    *,
    regression: bool,
) -> Examples:
    """Tokenise texts with labels.

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
        arrays = encoder.encode(
            texts[rows], None if pairs is None else pairs[rows], require_mask=require_mask
        )
        lengths = arrays["attention_mask"].sum(1)
        ids += [row[:length] for row, length in zip(arrays["input_ids"], lengths, strict=True)]
        if "token_type_ids" in arrays:
            types += [row[:length] for row, length in zip(arrays["token_type_ids"], lengths, strict=True)]
        if "clip_input_ids" in arrays:
            clip_ids += [row[: np.flatnonzero(row)[-1] + 1] for row in arrays["clip_input_ids"]]
        if require_mask:
            positions += [np.unique(row) for row in arrays["mask_positions"]]
    return Examples(ids, types or None, clip_ids or None, positions, [])
