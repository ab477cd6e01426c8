"""What a task is to everything that has no PyTorch: manifest, gates, session, commands, documents.

Dimensions: B batch, T PLM tokens, M masks, C numbers of an answer.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from tokenizers import Tokenizer

    from xadapter_export.bundle.manifest import Candidate, Manifest

Reads = Literal["masks", "first", "all"]
Head = Literal["mlm", "labels"]


@dataclass(frozen=True)
class Output:
    """An output of the graph, float32.

    Attributes:
        name: Its name.
        axes: Its axes. The last one is ``words`` (the vocabulary, or the candidates), ``labels`` or
            ``hidden``, and has as many places as the bundle has of these; the others vary.
    """

    name: str
    axes: tuple[str, ...]


class Scored(Protocol):
    """One of several answers about a text, as ``xad-run`` prints it."""

    @property
    def word(self) -> str:
        """What is answered."""

    @property
    def score(self) -> float:
        """How probable it is, from 0 to 1; of a regression the value."""


@dataclass(frozen=True, eq=False)
class Asked:
    """What a session was asked, for one batch.

    Attributes:
        texts: B texts, the first of each pair.
        feed: The inputs of the graph.
        manifest: The bundle's.
        top_k: How many answers there are for each mask or text at most.
        candidates: The words to choose from; None for the whole vocabulary.
        columns: Where in the logits these words are; None where the logits have no others.
        tokenizer: The PLM's.
    """

    texts: Sequence[str]
    feed: "Mapping[str, NDArray[Any]]"
    manifest: "Manifest"
    top_k: int
    candidates: "Sequence[Candidate] | None"
    columns: Sequence[int] | None
    tokenizer: "Tokenizer"


class TaskSpec:
    """One task. What needs PyTorch (head, answer, loss) is in its other half, ``torch_half``.

    Attributes:
        name: The name that users give, and that manifests and checkpoints have.
        says: What it answers, in a few words.
        reads: Which tokens' last states the answer is made of: those at the masks, the first one, or all.
        head: What gives the answer: the PLM's MLM head, a trained head with a place for each label, or none.
        outputs: What the graph gives for it.
        compared: The output that is the answer; by it a variant in fewer bits is compared with fp32.
        takes_pairs: Whether a text may have a second one.
        most_texts: How many texts in a batch an engine is planned for.
        example: A text to try it with; ``{mask}`` stands for the mask token.
        pipeline_tag: What the Hub calls such tasks; None where it has no word for it.
        torch_half: Where its ``model.tasks.TaskHead`` is, as ``module:name``; imported where PyTorch is.
    """

    name: ClassVar[str]
    says: ClassVar[str]
    reads: ClassVar[Reads]
    head: ClassVar[Head | None]
    outputs: ClassVar[tuple[Output, ...]]
    compared: ClassVar[str]
    takes_pairs: ClassVar[bool] = False
    most_texts: ClassVar[int] = 32
    example: ClassVar[str] = "A banana is lying on the table."
    pipeline_tag: ClassVar[str | None] = None
    torch_half: ClassVar[str]

    @property
    def reads_masks(self) -> bool:
        """Whether a text must have a mask."""
        return self.reads == "masks"

    @property
    def fills_words(self) -> bool:
        """Whether it answers with words of the PLM, which candidates may restrict."""
        return self.head == "mlm"

    @property
    def has_labels(self) -> bool:
        """Whether a checkpoint for it names labels; exactly one is the name of a regression's value."""
        return self.head == "labels"

    @property
    def labels_texts(self) -> bool:
        """Whether each text, or pair, gets one label or value: then labeled texts train and judge it."""
        return any(output.axes == ("batch", "labels") for output in self.outputs)

    def rows(
        self,
        values: "NDArray[Any]",
        feed: "Mapping[str, NDArray[Any]]",  # noqa: ARG002  # for tasks that need it
    ) -> "NDArray[Any]":
        """Return the answers of a batch as ``(n, C)``, without those that only fill it up.

        Args:
            values: The output ``compared``, ``(B, ..., C)``.
            feed: The inputs that it was computed from.
        """
        return values

    def answers(
        self,
        values: "NDArray[Any]",
        asked: Asked,  # noqa: ARG002  # for tasks that need it
    ) -> list[Any]:
        """Return what an app is told of each text: a list of ``Scored`` records, or an array, as it is here.

        Args:
            values: The output ``compared``, ``(B, ..., C) float32``.
            asked: What it answers.
        """
        return list(values)


def best(logits: "NDArray[Any]", top_k: int) -> list[tuple[int, float]]:
    """Return the places of the largest of ``(n,) float32`` logits, best first, with their probabilities."""
    import numpy as np

    shifted = np.exp(logits.astype(np.float64) - float(logits.max()))
    scores = shifted / shifted.sum()
    top_k = min(top_k, scores.size)
    ahead = np.flatnonzero(scores >= np.partition(scores, -top_k)[-top_k])  # a whole vocabulary sorts slowly
    return [(int(i), float(scores[i])) for i in ahead[np.argsort(-scores[ahead], kind="stable")[:top_k]]]
