"""Sentences that ask for a color, and how an object is put into them.

``[ITEM]`` stands for the object, ``[PLURAL]`` for several, ``[DESCRIPTOR]`` for what goes before it ("a",
"the animal"), ``[MASK]`` for the PLM's mask token and ``[SEP]`` for its separator.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Final

from xadapter_export.errors import ConfigError, InputTextError
from xadapter_export.evaluation.objects import ColoredObject
from xadapter_export.evaluation.scorer import Scorer

# Wang et al. 2022 (VaLM, arXiv 2205.10178): Victorwz/VaLM, evaluation_scripts/verify_color_prediction.py. A
# left-to-right model continues them; for a PLM with masks the mask goes after the last word.
VALM: Final = (
    "Q: What is the color of [DESCRIPTOR] [ITEM]? A: It is",
    "What is the color of [DESCRIPTOR] [ITEM]? It is",
    "What is the usual color of [DESCRIPTOR] [ITEM]?",
    "What is the typical color of [DESCRIPTOR] [ITEM]?",
    "The color of [DESCRIPTOR] [ITEM] is",
    "The usual color of [DESCRIPTOR] [ITEM] is",
    "The common color of [DESCRIPTOR] [ITEM] is",
    "The typical color of [DESCRIPTOR] [ITEM] is",
    "[DESCRIPTOR] [ITEM] usually has the color of",
)
# Norlund et al. 2021 (arXiv 2109.11321): lovhag/measure-visual-commonsense-knowledge,
# memory_colors/data/results.csv.
NORLUND: Final = (
    "Q: What is the color of [DESCRIPTOR] [ITEM]? A: It is [MASK].",
    "Q: What is the color of [DESCRIPTOR] [ITEM]? [SEP] A: It is [MASK].",
    "Q: What is the colour of [DESCRIPTOR] [ITEM]? A: It is [MASK].",
    "What is the color of [DESCRIPTOR] [ITEM]? [MASK].",
    "What is the color of [DESCRIPTOR] [ITEM]? [SEP] [MASK].",
    "What is the colour of [DESCRIPTOR] [ITEM]? [MASK].",
    "The color of [DESCRIPTOR] [ITEM] is [MASK].",
    "The usual color of [DESCRIPTOR] [ITEM] is [MASK].",
    "[DESCRIPTOR] [ITEM] usually has the color of [MASK].",
    "What is the usual color of [DESCRIPTOR] [ITEM]? [MASK].",
    "What is the usual color of [DESCRIPTOR] [ITEM]? [SEP] [MASK].",
    "What is the typical color of [DESCRIPTOR] [ITEM]? [MASK].",
    "What is the typical color of [DESCRIPTOR] [ITEM]? [SEP] [MASK].",
)
# Ours, for CoDa.
CODA: Final = (
    "Most [PLURAL] are [MASK].",
    "The color of [DESCRIPTOR] [ITEM] is [MASK].",
    "The [ITEM] in the picture is [MASK].",
    "What color are [PLURAL]? They are [MASK].",
    "A typical [ITEM] looks [MASK].",
    "In the photo we see [PLURAL] that are [MASK].",
)
PROMPTS: Final = {"valm": VALM, "norlund": NORLUND, "coda": CODA}


@dataclass(frozen=True)
class Question:
    """A prompt filled in.

    Attributes:
        text: What the PLM reads, with its own mask and separator tokens.
        memory_text: What CLIP reads: the same without the separator, which only the PLM knows.
    """

    text: str
    memory_text: str


def read_prompts(value: str) -> tuple[str, ...]:
    """Return the prompts of a protocol by name, or those of a file: one a line, ``#`` starts a comment.

    Raises:
        ConfigError: If it is neither a name nor a file.
        InputTextError: If the file has no prompt, or one does not ask for a color of an object.
    """
    if value in PROMPTS:
        return PROMPTS[value]
    path = Path(value)
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            "the prompts cannot be read",
            where=value,
            expected=f"{', '.join(PROMPTS)}, or a UTF-8 file with one prompt per line",
            got=error,
        ) from error
    prompts = tuple(line.strip() for line in lines if line.strip() and not line.startswith("#"))
    if not prompts:
        raise InputTextError("the file has no prompt", where=path)
    for prompt in prompts:
        if "[ITEM]" not in prompt and "[PLURAL]" not in prompt:
            raise InputTextError("a prompt does not name the object", where=prompt, hint="write [ITEM] in it")
        if prompt.count("[MASK]") > 1:
            raise InputTextError("a prompt has more than one mask", where=prompt)
    return prompts


def ask(prompt: str, thing: ColoredObject, scorer: Scorer, *, ends_with_stop: bool = True) -> Question:
    """Put an object into a prompt.

    Args:
        prompt: The prompt; where it has no ``[MASK]``, the mask goes after its last word.
        thing: The object. Without a descriptor, none is put, and no space in its place.
        scorer: The model whose mask and separator tokens are put.
        ends_with_stop: Whether a full stop follows a mask that goes after the last word.

    Raises:
        UnsupportedError: If the model does not fill masks.
        ConfigError: If the prompt has a separator and the PLM has none.
    """
    if "[MASK]" not in prompt:
        prompt = f"{prompt} [MASK]{'.' if ends_with_stop else ''}"
    if not thing.descriptor:
        prompt = prompt.replace("[DESCRIPTOR] ", "")
    without_separator = prompt.replace("[SEP] ", "").replace("[MASK]", scorer.mask_token)
    separator = scorer.separator_token
    if "[SEP]" in prompt and separator is None:
        raise ConfigError("the PLM has no separator token", where=prompt, hint="choose other prompts")
    text = prompt.replace("[SEP]", separator or "").replace("[MASK]", scorer.mask_token)
    return Question(_name(text, thing), _name(without_separator, thing))


def _name(text: str, thing: ColoredObject) -> str:
    text = text.replace("[DESCRIPTOR]", thing.descriptor).replace("[PLURAL]", thing.plural)
    return text.replace("[ITEM]", thing.name)
