"""Texts that a lossy variant is calibrated with, and compared on with the graph that it was derived from."""

import random
import re
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import Any, Final, Self

from xadapter_export.bundle.manifest import Task
from xadapter_export.bundle.onnx_session import Array
from xadapter_export.errors import ConfigError, InputTextError
from xadapter_export.evaluation.labelled import GLUE_TASKS
from xadapter_export.evaluation.tables import read_lines, read_table
from xadapter_export.model.x_adapter_model import XAdapterModel
from xadapter_export.runtime.text import TextEncoder, TruncationWarning, check_texts

SENTENCES_FILE: Final = Path(__file__).with_name("sentences.txt")  # everyday facts, written for this
TEXT_COLUMNS: Final = ("sentence", "text")
PAIR_COLUMNS: Final = tuple(
    (text, pair) for task in GLUE_TASKS.values() for text in task.text for pair in task.pair
)
_GENERIC_MASK = "[MASK]"  # what files write; the PLM's own mask token takes its place
_TABLES = (".csv", ".tsv", ".jsonl", ".json", ".parquet")
_BATCH_SIZES = (1, 4, 8, 2)
_MOST_MASKS = 3  # of one text, each in a copy of its own
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

    def split(self) -> tuple[Self, Self]:
        """Return every second text, and the others: some to calibrate with, some to compare on.

        Raises:
            InputTextError: If there are fewer than two.
        """
        if len(self) < 2:
            raise InputTextError(
                "too few texts to calibrate with some and compare on others",
                expected="2 or more",
                got=len(self),
            )
        first, second = (
            type(self)(self.texts[start::2], None if self.pairs is None else self.pairs[start::2])
            for start in (0, 1)
        )
        return first, second


def calibration_texts(
    model: XAdapterModel,
    source: Path | None,
    task: Task,
    limit: int = 300,
    *,
    candidates: Sequence[str] = (),
) -> CalibrationTexts:
    """Return texts of a file, or of our own, always the same ones in the same order.

    Our own are sentences about everyday things, and for a model with a bank as many that name its captions.
    They are single texts: a classifier of pairs needs a file. For fill-mask one random word of a text is
    masked, unless it has a mask; where there are fewer texts than ``limit``, up to three copies of a text
    have a mask each.

    Args:
        model: The checkpoint; it gives the mask token and the captions.
        source: Plain text, one text a line; or ``.csv``, ``.tsv``, ``.jsonl``, ``.json`` or ``.parquet`` with
            the text in ``sentence`` or ``text``, or a pair in two columns as a GLUE task calls them. A table
            without header has the text in its first column, and at most a label beside it. None for those
            that came with the checkpoint, or else our own.
        task: What the graph answers; second texts are read for ``text-classification`` only.
        limit: How many texts at most; of more, some are drawn.
        candidates: Words that fill-mask chooses from; one of them is masked where a text has one.

    Raises:
        ConfigError: If ``limit`` is below 1, or it cannot be told which column has the text.
        InputTextError: If the file cannot be read or has no text, a text is empty or has no word to mask, or
            the PLM has no mask token.
        MissingExtraError: If a parquet file is given without the ``train`` extra.
    """
    if limit < 1:
        raise ConfigError("the limit of calibration texts must be at least 1", got=limit)
    rng = random.Random(_SEED)  # noqa: S311  # nothing is secret
    rows: list[tuple[str, str | None]]
    source = source or model.calibration_file
    if source is None:
        rows = [(text, None) for text in _own_texts(model, rng, with_mask=task == "fill-mask")]
    else:
        rows = _read_texts(source, with_pairs=task == "text-classification")
        rng.shuffle(rows)
    if task == "fill-mask":
        mask_token = model.text_encoder.mask_token
        if mask_token is None:
            raise InputTextError("this language model has no mask token, so it cannot fill a mask")
        wanted = frozenset(word.casefold() for word in candidates)
        copies = (mask_word(text, mask_token, rng, wanted) for _ in range(_MOST_MASKS) for text, _ in rows)
        distinct: dict[str, None] = {}
        for text in copies:
            distinct[text] = None
            if len(distinct) == limit:
                break
        return CalibrationTexts(tuple(distinct))
    rows = rows[:limit]
    pairs = tuple(pair for _, pair in rows if pair is not None)
    return CalibrationTexts(tuple(text for text, _ in rows), pairs or None)


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
    return text.replace(_GENERIC_MASK, mask_token)


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
        "it cannot be told which column has the text",
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
    encoder: TextEncoder, texts: CalibrationTexts, input_names: Sequence[str]
) -> list[dict[str, Array]]:
    """Return the inputs of a graph for the texts, in their order, in batches of 1, 4, 8 and 2 in turn.

    Args:
        encoder: Both tokenizers, as the bundle will have them; what is too long is cut without a warning.
        texts: The texts.
        input_names: The graph's inputs.

    Raises:
        InputTextError: If a text is empty, has no mask where the graph takes ``mask_positions``, or has masks
            too far apart.
    """
    feeds: list[dict[str, Array]] = []
    sizes, start = cycle(_BATCH_SIZES), 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", TruncationWarning)
        while start < len(texts):
            batch = slice(start, start + next(sizes))
            arrays = encoder.encode(
                texts.texts[batch],
                None if texts.pairs is None else texts.pairs[batch],
                require_mask="mask_positions" in input_names,
            )
            feeds.append({name: arrays[name] for name in input_names})
            start = batch.stop
    return feeds


def _own_texts(model: XAdapterModel, rng: random.Random, *, with_mask: bool) -> list[str]:
    """Return our sentences, mixed with as many of the bank's captions as keep the balance."""
    sentences = read_lines(SENTENCES_FILE)
    pictures = model.bank.pictures if model.bank is not None else ()
    captions = list(dict.fromkeys(picture.caption.strip() for picture in pictures))
    captions = [caption for caption in captions if _WORD.search(caption)]
    captions = rng.sample(captions, min(len(captions), len(sentences)))
    texts = [*sentences, *_caption_sentences(captions, with_mask=with_mask)]
    rng.shuffle(texts)
    return texts


def _caption_sentences(captions: Sequence[str], *, with_mask: bool) -> Iterator[str]:
    for caption, template, word in zip(captions, cycle(_CAPTION_SENTENCES), cycle(_WORDS)):
        if len(caption.split()) > _CAPTION_WORDS:  # a sentence by itself
            yield caption
        else:
            yield template.format(caption=caption, word=_GENERIC_MASK if with_mask else word)


def _read_texts(path: Path, *, with_pairs: bool) -> list[tuple[str, str | None]]:
    if path.suffix not in _TABLES:
        lines = [line.strip() for line in read_lines(path)]
        if not lines:
            raise InputTextError("the file has no text", where=path, mend="give a file with one text a line")
        return [(line, None) for line in lines]
    rows = read_text_table(path)
    text, pair = find_text_columns(list(rows[0]), path, with_pairs=with_pairs)
    found: list[tuple[str, str | None]] = []
    for number, row in enumerate(rows, 1):
        columns = [text] if pair is None else [text, pair]
        cells = check_texts([row.get(column, "") for column in columns], f"text of {path}, row {number},")
        found.append((cells[0], None if pair is None else cells[1]))
    return found
