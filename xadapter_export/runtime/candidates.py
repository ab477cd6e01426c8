"""Words that a fill-mask answer may be restricted to: each must be one token of the language model."""

from collections.abc import Sequence

from tokenizers import Tokenizer

from xadapter_export.bundle.manifest import Candidate
from xadapter_export.errors import ConfigError, panics_as
from xadapter_export.runtime.text import check_texts, without_limits


def find_candidates(tokenizer: Tokenizer, words: Sequence[str]) -> tuple[Candidate, ...]:
    """Return each word with its token, in the order given.

    A word is looked up as it stands inside a sentence, after a space: byte-level and SentencePiece
    vocabularies hold that as a token of its own.

    Args:
        tokenizer: The PLM's tokenizer.
        words: The words; surrounding whitespace is ignored, and so is an empty word.

    Raises:
        ConfigError: If ``words`` is one string, there is no word, one is not exactly one known token, or two
            are the same token.
        InputTextError: If a word is not a string or is not valid Unicode.
    """
    if isinstance(words, str):
        raise ConfigError(
            "the candidates must be a list",
            expected="a list of words",
            got=repr(words),
            hint=f"write [{words!r}]",
        )
    words = [word for word in words if not isinstance(word, str) or word.strip()]
    if not words:
        raise ConfigError("no candidate was given", hint="give at least one word")
    tokenizer = without_limits(tokenizer)
    unknown = {"[UNK]", "<unk>", getattr(tokenizer.model, "unk_token", None)}
    found: dict[int, Candidate] = {}
    for word in (word.strip() for word in check_texts(words, "candidate")):
        with panics_as(ConfigError, "the tokenizer gives up on a candidate", where=repr(word)):
            encoding = tokenizer.encode(f" {word}", add_special_tokens=False)
        if len(encoding.ids) != 1 or encoding.tokens[0] in unknown:
            raise ConfigError(
                "a candidate is not one token of the language model",
                where=repr(word),
                got=" + ".join(encoding.tokens) or "no token",
                hint="remove it, or choose a word that is one token",
            )
        token_id = encoding.ids[0]
        if token_id in found:
            raise ConfigError(
                "two candidates are the same token", where=f"{found[token_id].word!r}, {word!r}"
            )
        found[token_id] = Candidate(word=word, token_id=token_id)
    return tuple(found.values())


def columns_of(chosen: Sequence[Candidate], sliced: Sequence[Candidate] | None) -> list[int]:
    """Return the column of the logits for each word.

    Args:
        chosen: The words.
        sliced: The words that the head was sliced to, or None where it has the whole vocabulary.

    Raises:
        ConfigError: If the head lacks a word.
    """
    if sliced is None:
        return [candidate.token_id for candidate in chosen]
    column_of = {candidate.token_id: column for column, candidate in enumerate(sliced)}
    if absent := [candidate.word for candidate in chosen if candidate.token_id not in column_of]:
        raise ConfigError(
            "the bundle was exported for other candidates",
            where=", ".join(absent),
            expected=f"some of {', '.join(candidate.word for candidate in sliced)}",
        )
    return [column_of[candidate.token_id] for candidate in chosen]
