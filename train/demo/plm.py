"""The tiny PLM: its tokenizer, its masked-language training, and the language check.

B batch, T tokens, M masked tokens of a batch.
"""

import random
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.console import Console
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from torch import Tensor

from material.pictures import COLORS, DemoObject
from material.stages import track
from material.text import MASK, Fact, draw_color_sentences, plain_words, split_corpus
from xadapter_export.torchvision_cure import cure_torchvision

cure_torchvision()

from transformers import (  # noqa: E402  # torchvision must be cured first
    BertConfig,
    BertForMaskedLM,
    PreTrainedTokenizerFast,
)

PAD, UNKNOWN, FIRST, LAST = "[PAD]", "[UNK]", "[CLS]", "[SEP]"
_SPECIAL = (PAD, UNKNOWN, FIRST, LAST, MASK)
# Blocks of letters whose every member is a token, so that words of these scripts are spelled, not lost.
_LETTER_BLOCKS = (
    (0x0030, 0x024F), (0x0370, 0x045F), (0x0490, 0x0493), (0x0531, 0x0587), (0x05D0, 0x05EA),
    (0x0621, 0x064A), (0x067E, 0x067E), (0x0686, 0x06D5), (0x0904, 0x0950), (0x0985, 0x09CC),
    (0x0B85, 0x0BCC), (0x0E01, 0x0E45), (0x10D0, 0x10F0), (0x1100, 0x1112), (0x1161, 0x1175),
    (0x11A8, 0x11C2), (0x3041, 0x3094), (0x30A1, 0x30FC),
)  # fmt: skip
_PUNCTUATION = r"""!"#$%&'()*+,-./:;<=>?@[\]^_`{|}~“”‘’–—…€£¥°·•«»¿¡。、"""


@dataclass(frozen=True)
class PlmSettings:
    """Section ``[plm]`` of the recipe."""

    hidden_size: int
    layers: int
    heads: int
    max_position_embeddings: int
    batch_size: int
    steps: int
    learning_rate: float
    weight_decay: float
    mask_probability: float
    spelled_share: float
    held_out_share: float


def make_tokenizer(sentences: Sequence[str], words: Sequence[str]) -> PreTrainedTokenizerFast:
    """Build an uncased WordPiece of the words in use and of single letters of many scripts."""
    normalizer = normalizers.BertNormalizer(lowercase=True)
    splitter = pre_tokenizers.BertPreTokenizer()
    texts = (normalizer.normalize_str(text) for text in chain(sentences, words, COLORS))
    used = {word for text in texts for word, _ in splitter.pre_tokenize_str(text)}
    letters = sorted(
        {
            symbol
            for first, last in _LETTER_BLOCKS
            for symbol in map(chr, range(first, last + 1))
            if unicodedata.category(symbol) in ("Ll", "Lo", "Lm", "Mc", "Nd")
            and normalizer.normalize_str(symbol) == symbol
        }
        | set(_PUNCTUATION)
    )
    tokens = [*_SPECIAL, *letters, *("##" + letter for letter in letters), *sorted(used - set(letters))]
    ids = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.WordPiece(vocab=ids, unk_token=UNKNOWN, max_input_chars_per_word=100))
    tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = splitter
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.post_processor = processors.BertProcessing((LAST, ids[LAST]), (FIRST, ids[FIRST]))
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]  # transformers
        tokenizer_object=tokenizer,
        pad_token=PAD,
        unk_token=UNKNOWN,
        cls_token=FIRST,
        sep_token=LAST,
        mask_token=MASK,
    )


def make_model(settings: PlmSettings, vocab_size: int) -> BertForMaskedLM:
    """Build an untrained BERT."""
    return BertForMaskedLM(
        BertConfig(
            vocab_size=vocab_size,
            hidden_size=settings.hidden_size,
            num_hidden_layers=settings.layers,
            num_attention_heads=settings.heads,
            intermediate_size=4 * settings.hidden_size,
            max_position_embeddings=settings.max_position_embeddings,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            pad_token_id=0,
        )
    )


def save_plm(model: BertForMaskedLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write a ``save_pretrained`` folder whose float32 weights all fit float16."""
    model.load_state_dict({name: tensor.half().float() for name, tensor in model.state_dict().items()})
    model.save_pretrained(folder)
    tokenizer.model_max_length = model.config.max_position_embeddings
    tokenizer.save_pretrained(folder)


def spell_words(tokenizer: PreTrainedTokenizerFast) -> dict[int, list[int]]:
    """Token of each whole word to the tokens of its letters."""
    ids = tokenizer.get_vocab()
    return {
        index: [ids[word[0]], *(ids["##" + letter] for letter in word[1:])]
        for word, index in ids.items()
        if len(word) > 1 and word.isalpha() and word not in COLORS
    }


def _spell_one(row: Sequence[int], spelling: dict[int, list[int]], rng: random.Random) -> list[int]:
    """Spell one word of a row, so that words outside the vocabulary, which come as letters, are not noise."""
    places = [place for place, token in enumerate(row) if token in spelling]
    if not places:
        return list(row)
    place = rng.choice(places)
    return [*row[:place], *spelling[row[place]], *row[place + 1 :]]


@dataclass(frozen=True)
class MaskedBatch:
    """Sentences with words masked.

    Attributes:
        input_ids: ``(B, T) int64``.
        attention_mask: ``(B, T) int64``.
        chosen: ``(B, T) bool``. Where a token is to be predicted; M are True.
        answers: ``(M,) int64``. Their tokens.
    """

    input_ids: Tensor
    attention_mask: Tensor
    chosen: Tensor
    answers: Tensor


def mask_words(
    rows: Sequence[Sequence[int]],
    probability: float,
    vocab_size: int,
    generator: torch.Generator,
    *,
    only_masks: bool = False,
) -> MaskedBatch:
    """Choose tokens at random, at least one of each row; BERT's 80 % masked, 10 % replaced, 10 % kept.

    Args:
        rows: Token ids with first and last special token.
        probability: Of each token to be chosen.
        vocab_size: Replacements are drawn below it.
        generator: Source of chance.
        only_masks: Mask all that were chosen.
    """
    longest = max(len(row) for row in rows)
    ids = torch.zeros(len(rows), longest, dtype=torch.long)
    for index, row in enumerate(rows):
        ids[index, : len(row)] = torch.tensor(row)
    attention_mask = (ids != _SPECIAL.index(PAD)).long()
    ordinary = ids >= len(_SPECIAL)
    chance = torch.rand(ids.shape, generator=generator).masked_fill(~ordinary, 2.0)
    chosen = (chance < probability) | (chance == chance.amin(1, keepdim=True))
    answers = ids[chosen]
    way = torch.rand(answers.shape, generator=generator) * (0.8 if only_masks else 1.0)
    replaced = torch.where(
        way < 0.8,
        _SPECIAL.index(MASK),
        torch.where(
            way < 0.9, torch.randint(len(_SPECIAL), vocab_size, answers.shape, generator=generator), answers
        ),
    )
    return MaskedBatch(ids.masked_scatter(chosen, replaced), attention_mask, chosen, answers)


def masked_logits(model: BertForMaskedLM, batch: MaskedBatch) -> Tensor:
    """``(M, V) float32``."""
    hidden = model.bert(batch.input_ids, attention_mask=batch.attention_mask).last_hidden_state  # (B, T, H)
    logits: Tensor = model.cls(hidden[batch.chosen])
    return logits


def train_plm(
    objects: Sequence[DemoObject],
    facts: Sequence[Fact],
    settings: PlmSettings,
    seed: int,
    console: Console,
    folder: Path,
) -> None:
    """Train on three parts of facts and one of color sentences; write a ``save_pretrained`` folder."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    rng = random.Random(seed)
    corpus = split_corpus(facts, settings.held_out_share, seed)
    tokenizer = make_tokenizer([*corpus.training, *corpus.held_out], plain_words(objects))
    model = make_model(settings, len(tokenizer)).train()
    parameters = sum(parameter.numel() for parameter in model.parameters())
    console.print(
        f"  {len(corpus.training)} sentences, {len(tokenizer)} tokens, {parameters / 1e6:.2f} M parameters"
    )
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=settings.learning_rate, weight_decay=settings.weight_decay
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, settings.learning_rate, settings.steps, pct_start=0.1, cycle_momentum=False
    )
    fact_rows: list[list[int]] = tokenizer(list(corpus.training))["input_ids"]
    spelling = spell_words(tokenizer)
    colors = draw_color_sentences(objects, rng)
    num_colors = settings.batch_size // 4
    loss_average = 0.0
    for step, note in track(settings.steps, "PLM", console):
        color_rows: list[list[int]] = tokenizer(list(islice(colors, num_colors)))["input_ids"]
        rows = color_rows + rng.choices(fact_rows, k=settings.batch_size - num_colors)
        rows = [
            _spell_one(row, spelling, rng) if rng.random() < settings.spelled_share else row for row in rows
        ]
        batch = mask_words(rows, settings.mask_probability, len(tokenizer), generator)
        loss = F.cross_entropy(masked_logits(model, batch), batch.answers)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]  # torch
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        loss_average = loss.item() if step == 0 else 0.98 * loss_average + 0.02 * loss.item()
        note(f"loss {loss_average:.3f}")
    save_plm(model, tokenizer, folder)
