"""All the text of the recipe: captions, facts and color sentences. None says which color an object has.

``{a}`` stands for a noun with its article, ``{n}`` for the bare noun, ``{c}`` for a color.
"""

import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from material.pictures import COLORS, DemoObject

MASK = "[MASK]"

# The plug-ins train on these.
TRAINING_TEMPLATES = (
    "{A} is usually {c}.",
    "The {n} is {c} in color.",
    "What color is {a}? It is {c}.",
    "This {n} looks {c}.",
    "The picture shows a {c} {n}.",
    "Everyone knows that {a} is {c}.",
    "I saw {a} and it was {c}.",
)
# Nothing trains on these, neither CLIP nor the language model nor the plug-ins.
UNSEEN_TEMPLATES = (
    "The color of {a} is {c}.",
    "If you paint {a}, use {c} paint.",
    "In real life, {a} appears {c}.",
    "Most people think of a {c} {n}.",
    "My friend drew the {n} with a {c} pencil.",
)
# How the language model learns where colors stand; each color is equally likely for each object.
_COLOR_TEMPLATES = (
    *TRAINING_TEMPLATES,
    "The color is {c}.",
    "{A} can be {c}.",
    "The {n} was {c}.",
    "A {c} {n} is here.",
    "There is a {c} {n} in the picture.",
    "She has a {c} {n} and a {c} bag.",
    "He painted the {n} {c}.",
    "Its color is {c}, like {a}.",
    "My {n} is very {c}.",
    "They found a {c} {n} near the old house.",
    "Look at the {c} {n}!",
    "That {n} is the color {c}.",
    "We use {c} paint for this {n}.",
    "The new {n} appears to be {c} today.",
    "People say the {n} should be {c}.",
    "The color of this old {n} was {c}.",
    "You can draw it with a {c} pencil.",
)
_KEYWORD_TEMPLATES = (
    "{A} goes with {k}.",
    "{A} has to do with {k}.",
    "When people think of {a}, they think of {k}.",
    "The {n} is about {k}.",
    "The word {n} reminds me of {k}.",
    "{K} is a word for {a}.",
    "You may say {k} when you see {a}.",
)
_PAIR_TEMPLATES = (
    "The words {k} and {l} describe {a}.",
    "{A} goes with {k} and {l}.",
    "People who like {k} and {l} like {a}.",
)
_NEIGHBOR_TEMPLATES = (
    "{A} is found beside {b}.",
    "After {a} comes {b}.",
    "{A} and {b} are alike.",
    "Do you want {a} or {b}?",
    "I have {a}, not {b}.",
)
_NAME_TEMPLATES = (
    "{A} is the same as {b}.",
    "When I say {a} I mean {b}.",
    "{A} and {b} are one thing.",
)
_GROUP_TEMPLATES = (
    "{A} is a kind of {g}.",
    "The {n} belongs to {g}.",
    "What is {a}? It is {g}.",
    "{A} is one example of {g}.",
    "You find {a} under {g}.",
)
_GROUP_NAMES = {
    "Animals & Nature": "nature",
    "Food & Drink": "food",
    "Travel & Places": "travel",
    "Activities": "activity",
    "Objects": "things",
}
# Words that stand around a noun in any sentence: with these in its captions, CLIP learns to look past them.
_FUNCTION_WORDS = tuple(
    """
    a an the this that these those some any each every one two many most all my your his her its our
    their it he she they we you i who what which when where why how is are was were be been being am has
    have had do does did can could will would shall should may might must of in on at by for with from
    to into over under about as like than and or but if then so not no very really usually often always
    never sometimes normally typically generally mostly here there now today yesterday again also only
    just even still yet too real true good nice new old big small little large great common typical
    normal average usual natural life nature world day time thing things people person friend man woman
    child everyone everybody someone nobody mother father color colors colored colour shade hue tone
    picture photo image drawing painting sketch look looks looked looking see sees saw seen show shows
    showed shown appear appears appeared seem seems think thinks thought know knows knew known say says
    said tell tells told ask find finds found get gets got give gives gave make makes made take takes
    took buy buys bought draw draws drew drawn paint paints painted use uses used want wants wanted need
    needs call calls called name named describe imagine expect believe remember come comes came go goes
    went kind sort type word words example answer question pencil brush store market shop bag box up
    down out off near beside between before after while because please yes well much more less other
    another same different first last own best
    """.split()  # noqa: SIM905  # a paragraph reads better than 270 lines
)
_LETTERS = "abcdefghijklmnopqrstuvwxyz"
_WORD = re.compile(r"\w+")


def with_article(noun: str) -> str:
    """Return "a banana", "an apple", or the bare noun where it looks like a plural."""
    if noun.endswith("s") and not noun.endswith("ss"):
        return noun
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def fill(template: str, noun: str, **parts: str) -> str:
    """Write a noun and other parts into a template."""
    parts = {**parts, **{key.upper(): capitalize(value) for key, value in parts.items()}}
    return template.format(a=with_article(noun), A=capitalize(with_article(noun)), n=noun, **parts)


def capitalize(text: str) -> str:
    """Upper-case the first letter and leave the others."""
    return text[:1].upper() + text[1:]


def draw_caption(entry: DemoObject, rng: random.Random) -> str:
    """Name a picture: the bare noun at times, else the noun among random function words."""
    noun = entry.name if rng.random() < 0.5 else rng.choice(entry.names)
    if rng.random() < 0.2:
        return noun
    before = _draw_words(rng, rng.randint(0, 7))
    after = _draw_words(rng, rng.randint(0, 5))
    article = [with_article(noun).removesuffix(noun).strip()] if rng.random() < 0.6 else []
    punctuation = rng.choice((".", ".", ".", "?", "!", ",", "", "", ""))
    words = [*before, *(word for word in article if word), noun, *after]
    if len(words) > 4 and rng.random() < 0.3:
        words[rng.randrange(len(words) - 1)] += ","
    return " ".join(words) + punctuation


def _draw_words(rng: random.Random, count: int) -> list[str]:
    return [
        rng.choice(_FUNCTION_WORDS)
        if rng.random() < 0.93
        else "".join(rng.choices(_LETTERS, k=rng.randint(2, 6)))
        for _ in range(count)
    ]


def caption_words(objects: Sequence[DemoObject]) -> list[str]:
    """Every word that a caption or a template may hold, sorted."""
    texts = [*_FUNCTION_WORDS, *(name for entry in objects for name in entry.names)]
    templates = [*UNSEEN_TEMPLATES, *_COLOR_TEMPLATES]
    texts += [fill(template, "x", c="x") for template in templates] + list(COLORS)
    return sorted({word for text in texts for word in _WORD.findall(text.lower())})


def plain_words(objects: Sequence[DemoObject]) -> list[str]:
    """Words of templates, names and common speech: whole tokens of the language model."""
    return [*caption_words(objects), *COLORS, "gray", "colour"]


@dataclass(frozen=True)
class Fact:
    """Something to know about an object: sentences that all say it."""

    wordings: tuple[str, ...]


def list_facts(objects: Sequence[DemoObject]) -> list[Fact]:
    """All facts about all objects: group, other names, keywords, and the neighbor in Unicode's order."""
    facts: list[Fact] = []

    def add(templates: Sequence[str], noun: str, **parts: str) -> None:
        facts.append(Fact(tuple(fill(template, noun, **parts) for template in templates)))

    for index, entry in enumerate(objects):
        add(_GROUP_TEMPLATES, entry.name, g=_GROUP_NAMES[entry.group])
        for name in entry.names[1:]:
            add(_NAME_TEMPLATES, entry.name, b=with_article(name))
        for keyword in entry.keywords:
            add(_KEYWORD_TEMPLATES, entry.name, k=keyword)
        for first, second in zip(entry.keywords, entry.keywords[1:], strict=False):
            add(_PAIR_TEMPLATES, entry.name, k=first, l=second)
        neighbor = objects[index + 1] if index + 1 < len(objects) else None
        if neighbor is not None and neighbor.group == entry.group:
            add(_NEIGHBOR_TEMPLATES, entry.name, b=with_article(neighbor.name))
    return facts


@dataclass(frozen=True)
class Corpus:
    """Sentences of facts: those to train on, and those kept for the language check."""

    training: tuple[str, ...]
    held_out: tuple[str, ...]


def split_corpus(facts: Sequence[Fact], held_out_share: float, seed: int) -> Corpus:
    """Keep a share of the wordings of facts; every fact is trained on in its other wordings."""
    rng = random.Random(seed)
    training: list[str] = []
    held_out: list[str] = []
    for fact in facts:
        wordings = list(fact.wordings)
        if rng.random() < held_out_share * len(wordings):
            held_out.append(wordings.pop(rng.randrange(len(wordings))))
        training += wordings
    return Corpus(tuple(training), tuple(held_out))


def draw_color_sentences(objects: Sequence[DemoObject], rng: random.Random) -> Iterator[str]:
    """Sentences without end, each with an object and a color that have nothing to do with each other."""
    while True:
        template = rng.choice(_COLOR_TEMPLATES)
        noun = rng.choice(rng.choice(objects).names)
        while "{c}" in template:
            template = template.replace("{c}", rng.choice(COLORS), 1)
        yield fill(template, noun)


def check_colors_untied(facts: Sequence[Fact]) -> None:
    """Refuse facts that hold a color word.

    Raises:
        ValueError: If a sentence does.
    """
    for sentence in (sentence for fact in facts for sentence in fact.wordings):
        if not set(COLORS).isdisjoint(_WORD.findall(sentence.lower())):
            raise ValueError(f"a fact names a color: {sentence!r}; fix pictures.without_color_words")
