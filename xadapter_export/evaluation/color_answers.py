"""What one row answers to every prompt about every object.

Dimensions: P prompts, n objects, C colors.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray

from xadapter_export.evaluation.objects import ColoredObject
from xadapter_export.evaluation.prompts import ask
from xadapter_export.evaluation.readings import SEED, OnProgress, Reading, derangement
from xadapter_export.runtime.answers import RetrievedPicture

SHOWN_PICTURES = 4


@dataclass(frozen=True, eq=False)
class ColorAnswers:
    """The answers of one row.

    Attributes:
        reading: The row.
        objects: n objects.
        colors: C colors that could be said.
        logits: ``(P, n, C) float32``.
    """

    reading: Reading
    objects: tuple[ColoredObject, ...]
    colors: tuple[str, ...]
    logits: NDArray[np.float32]

    @property
    def said(self) -> NDArray[np.intp]:
        """``(P, n)``. Index of the color that fits best."""
        best: NDArray[np.intp] = self.logits.argmax(-1)
        return best

    @property
    def is_right(self) -> NDArray[np.bool_]:
        """``(P, n)``. Whether that color is the one that most people say, or one of several at the top."""
        shares = np.array([[o.shares.get(color, 0.0) for color in self.colors] for o in self.objects])
        is_top = shares == shares.max(1, keepdims=True)  # (n, C)
        right: NDArray[np.bool_] = is_top[np.arange(len(self.objects)), self.said]
        return right

    def details(self, prompts: Sequence[str]) -> dict[str, object]:
        """Return what the report keeps of the row: the accuracy of each prompt, and every answer."""
        per_prompt = self.is_right.mean(1).tolist()
        return {
            "accuracy_per_prompt": dict(zip(prompts, per_prompt, strict=True)),
            "answers": self.by_object(),
        }

    def by_object(self) -> dict[str, list[str]]:
        """Return what was said of each object, prompt by prompt; equal names are told apart by a number."""
        said, seen = self.said, Counter[str]()
        answers = {}
        for i, thing in enumerate(self.objects):
            seen[thing.name] += 1
            name = thing.name if seen[thing.name] == 1 else f"{thing.name} ({seen[thing.name]})"
            answers[name] = [self.colors[c] for c in said[:, i]]
        return answers


def answer_colors(
    reading: Reading,
    objects: Sequence[ColoredObject],
    prompts: Sequence[str],
    colors: Sequence[str],
    *,
    ends_with_stop: bool,
    on_progress: OnProgress,
) -> ColorAnswers:
    """Ask a model every prompt about every object.

    With a shuffled memory, CLIP reads the same prompt about another object, the same one in all prompts.

    Raises:
        ConfigError: If a color is not one token of the PLM, a prompt wants a separator that the PLM lacks,
            or the memory of a single object is to be shuffled.
        InputTextError: If a question is empty.
        UnsupportedError: If the model does not fill masks.
    """
    scorer = reading.scorer
    sources = derangement(len(objects), SEED) if reading.is_shuffled else range(len(objects))
    texts, memory_texts = [], []
    for prompt in prompts:
        questions = [ask(prompt, thing, scorer, ends_with_stop=ends_with_stop) for thing in objects]
        texts += [question.text for question in questions]
        memory_texts += [questions[source].memory_text for source in sources]
    logits = scorer.mask_logits(
        texts,
        colors,
        reading.experts,
        memory_texts=memory_texts,
        on_batch=partial(on_progress, reading.name),
    )
    shape = len(prompts), len(objects), len(colors)
    return ColorAnswers(reading, tuple(objects), tuple(colors), logits.reshape(shape))


def look_up_pictures(
    answers: ColorAnswers, prompts: Sequence[str], *, ends_with_stop: bool
) -> tuple[tuple[RetrievedPicture, ...], ...]:
    """Return for each of n objects the pictures that its prompts looked at most often, at most four.

    Empty for each where the row looks at no pictures, or at those of other objects.
    """
    reading, objects = answers.reading, answers.objects
    if reading.is_shuffled or not reading.scorer.retrieves(reading.experts):
        return ((),) * len(objects)
    questions = [
        ask(prompt, thing, reading.scorer, ends_with_stop=ends_with_stop).memory_text
        for prompt in prompts
        for thing in objects
    ]
    retrieved = reading.scorer.retrieve(questions, reading.experts)
    chosen = []
    for i in range(len(objects)):
        seen = [picture for found in retrieved[i :: len(objects)] for picture in found]
        count = Counter(picture.row for picture in seen)
        best: dict[int, RetrievedPicture] = {}
        for picture in seen:
            if picture.row not in best or picture.score > best[picture.row].score:
                best[picture.row] = picture
        ranked = sorted(best.values(), key=lambda picture: (-count[picture.row], -picture.score))
        chosen.append(tuple(ranked[:SHOWN_PICTURES]))
    return tuple(chosen)
