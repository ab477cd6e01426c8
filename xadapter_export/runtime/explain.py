"""Why a bundle answers as it does: what each picture and each CLIP token carried, and the answer without it.

Everything about a text is asked in one go: the text as it is, and once for each item and each expert that is
left out. docs/explaining.md says what the numbers mean.

Dimensions: n ways to ask, P tokens that the task reads, L layers with a plug-in, M memory items of an expert,
C numbers of an answer.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from xadapter_export.bundle.manifest import Expert, ExpertSet, ExpertSetSpec
from xadapter_export.errors import UnsupportedError
from xadapter_export.experts import experts_of, keep_name, length_names
from xadapter_export.sessions.session import Array
from xadapter_export.tasks import TASKS
from xadapter_export.tasks.spec import Asked, Scored

Run = Callable[[Mapping[str, Array], Sequence[str]], Mapping[str, Array]]


@dataclass(frozen=True)
class Without:
    """What would be answered if something were left out.

    Attributes:
        answer: The best answer then, of the type that the task gives; None of an embedding.
        first: The word or label that comes first with everything; None of an embedding.
        score: Its score then; of an embedding its cosine with the one that has everything.
        changes: Whether another answer comes first.
    """

    answer: Any | None
    first: str | None
    score: float
    changes: bool

    @property
    def summary(self) -> str:
        """The same in a few words; in parentheses what became of the answer that came first."""
        if self.answer is None:
            return f"cosine {self.score:.3f}"
        said = f"{self.answer.word} {self.answer.score:.1%}"
        return f"{said} ({self.first} {self.score:.1%})" if self.changes else said


@dataclass(frozen=True)
class MemoryItem:
    """A picture, a prototype or a CLIP token that an expert attends to.

    Attributes:
        name: The caption of a picture, or its id where it has none; the text of a token.
        row: The picture's row in the bank; None of a token.
        id: The picture's id; None of a token.
        cosine: What the picture was retrieved by; None of a token, and of a static bank, which is read whole.
    """

    name: str
    row: int | None = None
    id: str | None = None
    cosine: float | None = None


@dataclass(frozen=True, kw_only=True)
class ExplainedItem(MemoryItem):
    """What an item of a memory did.

    Attributes:
        share: How much of the expert's contributions this item makes up, over all layers.
        by_layer: The same in each layer with a plug-in.
        without: The answer without it.
    """

    share: float
    by_layer: tuple[float, ...]
    without: Without


@dataclass(frozen=True)
class ExplainedExpert:
    """What an expert did. The shares of its items, its null rows and its bias add up to 1.

    Attributes:
        expert: Its letter.
        layers: The PLM layers before which it adds something.
        lengths: The length of what it adds there, in the units of the PLM's hidden states.
        items: What it attended to: pictures as they were retrieved, tokens as they stand in the text.
        null_share: What the layers' own rows beside the memory make up; 0 where there are none.
        bias_share: What is added whatever is attended to.
        without: The answer without this expert.
    """

    expert: Expert
    layers: tuple[int, ...]
    lengths: tuple[float, ...]
    items: tuple[ExplainedItem, ...]
    null_share: float
    bias_share: float
    without: Without


@dataclass(frozen=True)
class ExplainedAnswer:
    """The answers for one mask, or for the text where the task reads no masks, and why.

    Attributes:
        mask: Which mask of the text, counted from 0; None where the task reads none.
        answers: The answers, the best first; of an embedding nothing.
        experts: What each expert did.
    """

    mask: int | None
    answers: tuple[Any, ...]
    experts: tuple[ExplainedExpert, ...]


@dataclass(frozen=True)
class Explanation:
    """Why a text has the answers that it has.

    Attributes:
        text: The text.
        experts: The expert set.
        variant: Name of the variant that answered.
        answers: One entry for each mask, or one in all.
    """

    text: str
    experts: ExpertSet
    variant: str
    answers: tuple[ExplainedAnswer, ...]


_LeftOut = tuple[Expert, int | None]  # one item of an expert, or all of it


def check_explains(spec: ExpertSetSpec, experts: ExpertSet) -> None:
    """Refuse a set that cannot be explained.

    Raises:
        UnsupportedError: If it has no experts, or was exported without explanations.
    """
    if not experts_of(experts):
        raise UnsupportedError("an expert set without experts has nothing to explain", where=experts)
    if not all(map(spec.explains, experts_of(experts))):
        raise UnsupportedError(
            "the bundle was exported without explanations",
            where=f"experts {experts}",
            hint="export it again with xad-export --with-explanations",
        )


def explain(
    run: Run,
    asked: Asked,
    spec: ExpertSetSpec,
    experts: Sequence[Expert],
    look: Callable[[Expert, Mapping[str, Array]], Sequence[MemoryItem]],
    batch_size: int,
) -> tuple[ExplainedAnswer, ...]:
    """Explain one text.

    Args:
        run: Runs the graph: inputs, and names of outputs, to these outputs.
        asked: The text, and how it is asked.
        spec: The contract of the expert set.
        experts: Its experts.
        look: Says what an expert attends to, from its letter and all outputs of the text as it is.
        batch_size: How many ways to ask there are in a run at most.
    """
    task = TASKS[asked.manifest.task]
    whole = run(asked.feed, [tensor.name for tensor in spec.outputs])
    looked = {expert: look(expert, whole) for expert in experts}
    ways = list(_ways(looked))
    values = np.concatenate([whole[task.compared], *_ask(run, asked, ways, task.compared, batch_size)])
    judge = _Judge(values, asked, ways)
    explained = []
    for place in range(judge.num_places):
        found = tuple(
            _explain_expert(expert, looked[expert], place, whole, spec, judge) for expert in experts
        )
        explained.append(ExplainedAnswer(judge.mask(place), judge.answers(place), found))
    return tuple(explained)


def _ways(looked: Mapping[Expert, Sequence[MemoryItem]]) -> Iterator[_LeftOut]:
    """Yield what is left out: each item of each expert, and each expert."""
    for expert, items in looked.items():
        yield from ((expert, number) for number in range(len(items)))
        yield expert, None


def _ask(run: Run, asked: Asked, ways: Sequence[_LeftOut], output: str, batch_size: int) -> Iterator[Array]:
    """Yield the answers to the ways to ask, ``(up to batch_size, ...)``, in their order."""
    for start in range(0, len(ways), batch_size):
        batch = ways[start : start + batch_size]
        feed = {name: np.repeat(array, len(batch), axis=0) for name, array in asked.feed.items()}
        for row, (expert, item) in enumerate(batch):
            feed[keep_name(expert)][row, slice(None) if item is None else item] = 0
        yield run(feed, [output])[output]


class _Judge:
    """Reads what was answered to every way to ask.

    Args:
        values: ``(n, [P,] C) float32``, first of the text as it is.
        asked: How the text is asked.
        ways: The other n - 1 ways.
    """

    def __init__(self, values: Array, asked: Asked, ways: Sequence[_LeftOut]) -> None:
        self._reads_masks = TASKS[asked.manifest.task].reads_masks
        self._values = values if self._reads_masks else values[:, None]  # (n, P, C)
        self._row_of = {way: row for row, way in enumerate(ways, 1)}
        feed = {name: np.repeat(array, len(values), axis=0) for name, array in asked.feed.items()}
        first = replace(asked, top_k=1, texts=list(asked.texts) * len(values), feed=feed)
        task = TASKS[asked.manifest.task]
        self._best = task.answers(values, first)
        self._all = task.answers(values[:1], asked)[0]
        self._columns = slice(None) if asked.columns is None else list(asked.columns)
        masks = asked.feed["mask_positions"][0].tolist() if self._reads_masks else [0]
        self.num_places = len(set(masks))

    def mask(self, place: int) -> int | None:
        """Return which mask a place is."""
        return place if self._reads_masks else None

    def answers(self, place: int) -> tuple[Scored, ...]:
        """Return the answers at a place with everything, the best first."""
        return self._at(self._all, place)

    def without(self, place: int, way: _LeftOut) -> Without:
        """Return what is answered at a place one way."""
        row = self._row_of[way]
        whole, values = (self._values[r, place].astype(np.float64) for r in (0, row))
        best = self._at(self._best[row], place)
        if not best:  # an embedding
            cosine = float(whole @ values / np.sqrt((whole @ whole) * (values @ values)))
            return Without(None, None, cosine, changes=False)
        whole, values = whole[self._columns], values[self._columns]
        answer = int(whole.argmax())
        score = float(np.exp(values[answer] - values.max()) / np.exp(values - values.max()).sum())
        if len(values) == 1:  # a regression, whose score is its value
            score = best[0].score
        first = self.answers(place)[0].word
        return Without(best[0], first, score, changes=answer != int(values.argmax()))

    def _at(self, answers: Any, place: int) -> tuple[Scored, ...]:
        if not isinstance(answers, list):
            return ()
        return tuple(answer for answer in answers if getattr(answer, "mask", place) == place)


def _explain_expert(
    expert: Expert,
    looked: Sequence[MemoryItem],
    place: int,
    whole: Mapping[str, Array],
    spec: ExpertSetSpec,
    judge: _Judge,
) -> ExplainedExpert:
    items, rest = (
        whole[name][0, place].astype(np.float64) for name in length_names(expert)
    )  # (L, M), (L, 2)
    lengths = items.sum(-1) + rest.sum(-1)  # (L,)
    return ExplainedExpert(
        expert=expert,
        layers=tuple(tap.layer for tap in spec.taps if tap.expert == expert),
        lengths=tuple(lengths.tolist()),
        items=tuple(
            ExplainedItem(
                **vars(item),
                share=_share(items[:, number].sum(), lengths.sum()),
                by_layer=tuple(map(_share, items[:, number], lengths)),
                without=judge.without(place, (expert, number)),
            )
            for number, item in enumerate(looked)
        ),
        null_share=_share(rest[:, 0].sum(), lengths.sum()),
        bias_share=_share(rest[:, 1].sum(), lengths.sum()),
        without=judge.without(place, (expert, None)),
    )


def _share(part: float, whole: float) -> float:
    """Return a part of a length; 0 of nothing."""
    return float(part / whole) if whole > 0 else 0.0
