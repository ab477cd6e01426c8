"""Texts that a lossy variant is calibrated with, and compared on with the graph that it was derived from."""

import random
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, cycle
from pathlib import Path
from typing import Any, Final, Self

import numpy as np

from xadapter_export.bundle.manifest import Task, TensorSpec
from xadapter_export.errors import ConfigError, InputTextError
from xadapter_export.evaluation.labeled import GLUE_TASKS
from xadapter_export.evaluation.tables import parse_json_rows, read_lines, read_sentences, read_table
from xadapter_export.model.x_adapter_model import XAdapterModel
from xadapter_export.runtime.feed import keep_everything
from xadapter_export.runtime.text import GENERIC_MASK, TextEncoder, TruncationWarning, check_texts
from xadapter_export.sessions.session import Array
from xadapter_export.tasks import TASKS

MOST_MADE_WITH: Final = 300
MOST_COMPARED_ON: Final = 1000  # 1 of them is the 0.1 % that fp16 may differ in
CHECKPOINT_TEXTS: Final = "the checkpoint's own texts"
OWN_TEXTS: Final = "everyday sentences"
SENTENCES_FILE: Final = Path(__file__).with_name("sentences.txt")  # everyday facts, written for this
TEXT_COLUMNS: Final = ("sentence", "text")
PAIR_COLUMNS: Final = tuple(
    (text, pair) for task in GLUE_TASKS.values() for text in task.text for pair in task.pair
)
_Row = tuple[str, str | None]  # a text, and the second of a pair
_TABLES = (".csv", ".tsv", ".jsonl", ".json", ".parquet")
_BATCH_SIZES = (1, 4, 8, 2)
_MOST_MASKS = 3  # of one text, each in a copy of its own
_LEAST_SENTENCES = 2
_MOST_ROWS = 2 * (MOST_MADE_WITH + MOST_COMPARED_ON)  # of a file; sentences may be in it several times
_SEED = 7
_WORD = re.compile(r"\w+")

# Where a caption names a thing, it is put into one of these; ``{word}`` is what fill-mask is asked for.
_CAPTION_WORDS = 4
_CAPTION_SENTENCES = (
    "The {caption} in the picture is {word}.",
    "We saw a {word} {caption} near the old house.",
    "What color is this {caption}? It must be {word}.",
    "There is a {caption} beside the door, and it looks {word} today.",
    "Here you see a {caption} on the table.",
)
_WORDS = ("red", "small", "green", "old", "white", "new", "blue", "large", "brown", "yellow")


@dataclass(frozen=True)
class CalibrationTexts:
    """Texts, or pairs of texts.

    Attributes:
        texts: n texts; those for fill-mask have a mask.
        pairs: n second texts, or None.
    """

    texts: tuple[str, ...]
    pairs: tuple[str, ...] | None = None

    def __len__(self) -> int:
        return len(self.texts)

    def by_length(self) -> Self:
        """Return the same, from short to long, so that little of a batch is padding."""
        order = sorted(range(len(self)), key=lambda row: len(self.texts[row]) + len(self.pair(row) or ""))
        texts = tuple(self.texts[row] for row in order)
        return type(self)(texts, None if self.pairs is None else tuple(self.pairs[row] for row in order))

    def pair(self, row: int) -> str | None:
        """Return the second text of a pair; None of a single text."""
        return None if self.pairs is None else self.pairs[row]


@dataclass(frozen=True)
class Calibration:
    """Texts to make lossy variants with and others to judge them on; no sentence is in both.

    Attributes:
        made_with: At most ``MOST_MADE_WITH`` texts.
        compared_on: At most ``MOST_COMPARED_ON`` texts.
        source: Where they are from, for the manifest: the name of a file without its folder, or words.
    """

    made_with: CalibrationTexts
    compared_on: CalibrationTexts
    source: str


def read_calibration(
    model: XAdapterModel, source: Path | None, task: Task, *, candidates: Sequence[str] = ()
) -> Calibration:
    """Return texts of a file, or of our own, always the same ones in the same order.

    Our own are sentences about everyday things, and for a model with a bank as many that name its captions.
    They are single texts: a classifier of pairs needs a file.

    A sentence goes to one half or the other before anything of it is masked; pairs with the same first text
    go together. For fill-mask a random word of each text is then masked, unless it has a mask. Where there
    are fewer texts than are read at most, up to three copies of a text have a mask each.

    Args:
        model: The checkpoint; it gives the mask token, its own texts and the captions.
        source: Plain text, one text a line; or ``.csv``, ``.tsv``, ``.jsonl``, ``.json`` or ``.parquet`` with
            the text in ``sentence`` or ``text``, or a pair in two columns as a GLUE task calls them. A table
            without header has the text in its first column, and at most a label beside it. None for those
            that came with the checkpoint, or else our own.
        task: What the graph answers; second texts are read for ``text-classification`` only.
        candidates: Words that fill-mask chooses from; one of them is masked where a text has one.

    Raises:
        ConfigError: If it cannot be told which column has the text.
        InputTextError: If the file cannot be read or has fewer than two sentences, a text is empty or has no
            word to mask, or the PLM has no mask token.
        MissingExtraError: If a parquet file is given without the ``train`` extra.
    """
    rng = random.Random(_SEED)  # noqa: S311  # nothing is secret
    mask_token = model.text_encoder.mask_token if TASKS[task].reads_masks else ""
    if mask_token is None:
        raise InputTextError("this language model has no mask token, so it cannot fill a mask")
    rows, name = _read_rows(model, source, task)
    rng.shuffle(rows)
    sentences = _by_sentence(rows[:_MOST_ROWS], mask_token)
    if len(sentences) < _LEAST_SENTENCES:
        raise InputTextError(
            "too few different sentences: some are needed for calibration, others for comparison",
            where=name,
            expected=f"{_LEAST_SENTENCES} or more",
            got=len(sentences),
        )
    place = min(len(sentences) // 2, MOST_MADE_WITH)
    parts = sentences[:place], sentences[place:]
    halves = [list(dict.fromkeys(chain.from_iterable(part))) for part in parts]
    if mask_token:
        wanted = frozenset(word.casefold() for word in candidates)
        halves = [_mask_copies(half, mask_token, rng, wanted) for half in halves]
    made_with = halves[0][:MOST_MADE_WITH]
    compared_on = [row for row in halves[1] if row not in set(made_with)]  # alike once a word is masked
    return Calibration(_as_texts(made_with), _as_texts(compared_on[:MOST_COMPARED_ON]), name)


def _by_sentence(rows: Sequence[_Row], mask_token: str) -> list[list[_Row]]:
    """Return rows by sentence: those whose texts are equal, or differ only where one has a mask."""
    texts = [put_mask_token(text, mask_token or GENERIC_MASK).casefold().split() for text, _ in rows]
    known = {word: number for number, word in enumerate({word for text in texts for word in text}, 1)}
    masked = {word: 0 for word in known if mask_token and mask_token.casefold() in word}
    numbers = known | masked
    labels = np.arange(len(rows))  # of two rows the same where they are copies
    for length in {len(text) for text in texts}:
        places = np.array([place for place, text in enumerate(texts) if len(text) == length])
        words = np.array([[numbers[word] for word in texts[place]] for place in places])  # 0 for a mask
        for place, row in zip(places, words, strict=True):
            copies = places[((words == row) | (words == 0) | (row == 0)).all(1)]
            labels[np.isin(labels, labels[copies])] = labels[place]
    groups: dict[int, list[_Row]] = {}
    for label, found in zip(labels.tolist(), rows, strict=True):
        groups.setdefault(label, []).append(found)
    return list(groups.values())


def _as_texts(rows: Sequence[_Row]) -> CalibrationTexts:
    pairs = tuple(pair for _, pair in rows if pair is not None)
    return CalibrationTexts(tuple(text for text, _ in rows), pairs or None)


def _read_rows(model: XAdapterModel, source: Path | None, task: Task) -> tuple[list[_Row], str]:
    """Return texts, or pairs, and where they are from."""
    with_pairs = TASKS[task].takes_pairs
    if source is not None:
        return _read_texts(source, with_pairs=with_pairs), source.name
    if model.calibration is not None:
        table = parse_json_rows(model.calibration, "calibration.jsonl of the checkpoint")
        return _texts_of(
            table, "calibration.jsonl of the checkpoint", with_pairs=with_pairs
        ), CHECKPOINT_TEXTS
    return [(text, None) for text in _own_texts(model, with_mask=TASKS[task].reads_masks)], OWN_TEXTS


def _mask_copies(
    rows: Sequence[_Row], mask_token: str, rng: random.Random, wanted: frozenset[str]
) -> list[_Row]:
    """Return every text with a word masked, then every text with another, each copy once."""
    copies = (mask_word(text, mask_token, rng, wanted) for _ in range(_MOST_MASKS) for text, _ in rows)
    return [(text, None) for text in dict.fromkeys(copies)]


def mask_word(text: str, mask_token: str, rng: random.Random, wanted: frozenset[str] = frozenset()) -> str:
    """Return the text with one random whole word masked; one that has a mask keeps that and no other.

    Args:
        text: The text; ``[MASK]`` in it stands for the mask token.
        mask_token: The PLM's mask token.
        rng: Draws the word.
        wanted: Words, casefolded, of which one is masked where the text has any.

    Raises:
        InputTextError: If there is no word to mask.
    """
    text = put_mask_token(text, mask_token)
    if mask_token in text:
        return text
    words = list(_WORD.finditer(text))
    if not words:
        raise InputTextError("a text has no word to mask", where=repr(text[:80]))
    word = rng.choice([word for word in words if word.group().casefold() in wanted] or words)
    return text[: word.start()] + mask_token + text[word.end() :]


def put_mask_token(text: str, mask_token: str) -> str:
    """Return the text with the PLM's mask token in the place of ``[MASK]``."""
    return text.replace(GENERIC_MASK, mask_token)


def find_text_columns(columns: Sequence[str], where: object, *, with_pairs: bool) -> tuple[str, str | None]:
    """Return which column of a table has the text, and which the second text, if any.

    Raises:
        ConfigError: If no column is called as one with a text is.
    """
    for text, pair in PAIR_COLUMNS:
        if text in columns and pair in columns:
            return text, pair if with_pairs else None
    for name in TEXT_COLUMNS:
        if name in columns:
            return name, None
    if "0" in columns and len(columns) <= 2:  # no header: text, and perhaps a label
        return "0", None
    raise ConfigError(
        "no column with text was found",
        where=where,
        expected=f"a header with {' or '.join(TEXT_COLUMNS)}, or with the columns of a GLUE task of pairs",
        got=", ".join(columns[:12]),
    )


def read_text_table(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a table with texts, by column; a first row without a known name is no header.

    Raises:
        InputTextError: If the file cannot be read or has no rows.
        MissingExtraError: If it is parquet and the ``train`` extra is not installed.
    """
    rows = read_table(path, header_names={*TEXT_COLUMNS, *(name for pair in PAIR_COLUMNS for name in pair)})
    if not rows:
        raise InputTextError("the file has no rows", where=path)
    return rows


def calibration_feeds(
    encoder: TextEncoder, texts: CalibrationTexts, inputs: Sequence[TensorSpec]
) -> list[dict[str, Array]]:
    """Return the inputs of a graph for the texts, in their order, in batches of 1, 4, 8 and 2 in turn.

    Args:
        encoder: Both tokenizers, as the bundle will have them; what is too long is cut without a warning.
        texts: The texts.
        inputs: The graph's inputs.

    Raises:
        InputTextError: If a text is empty, has no mask where the graph takes ``mask_positions``, or has masks
            too far apart.
    """
    feeds: list[dict[str, Array]] = []
    require_mask = any(tensor.name == "mask_positions" for tensor in inputs)
    sizes, start = cycle(_BATCH_SIZES), 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", TruncationWarning)
        while start < len(texts):
            batch = slice(start, start + next(sizes))
            arrays = encoder.encode(
                texts.texts[batch],
                None if texts.pairs is None else texts.pairs[batch],
                require_mask=require_mask,
            )
            complete = keep_everything(arrays, inputs)
            feeds.append({tensor.name: complete[tensor.name] for tensor in inputs})
            start = batch.stop
    return feeds


def _own_texts(model: XAdapterModel, *, with_mask: bool) -> list[str]:
    """Return our sentences, and as many of the bank's captions as keep the balance."""
    sentences = read_lines(SENTENCES_FILE)
    pictures = model.bank.pictures if model.bank is not None else ()
    captions = list(dict.fromkeys(picture.caption.strip() for picture in pictures))
    captions = [caption for caption in captions if _WORD.search(caption)]
    rng = random.Random(_SEED)  # noqa: S311  # nothing is secret
    captions = rng.sample(captions, min(len(captions), len(sentences)))
    return [*sentences, *_caption_sentences(captions, with_mask=with_mask)]


def _caption_sentences(captions: Sequence[str], *, with_mask: bool) -> Iterator[str]:
    for caption, template, word in zip(captions, cycle(_CAPTION_SENTENCES), cycle(_WORDS)):
        if len(caption.split()) > _CAPTION_WORDS:  # a sentence by itself
            yield caption
        else:
            yield template.format(caption=caption, word=GENERIC_MASK if with_mask else word)


def _read_texts(path: Path, *, with_pairs: bool) -> list[_Row]:
    if path.suffix not in _TABLES:
        return [(text, None) for text in read_sentences(path)]
    return _texts_of(read_text_table(path), path, with_pairs=with_pairs)


def _texts_of(rows: Sequence[Mapping[str, Any]], where: object, *, with_pairs: bool) -> list[_Row]:
    if not rows:
        raise InputTextError("there is no text", where=where)
    text, pair = find_text_columns(list(rows[0]), where, with_pairs=with_pairs)
    found: list[_Row] = []
    for number, row in enumerate(rows, 1):
        columns = [text] if pair is None else [text, pair]
        cells = check_texts([row.get(column, "") for column in columns], f"{where}, row {number}: text")
        found.append((cells[0], None if pair is None else cells[1]))
    return found
