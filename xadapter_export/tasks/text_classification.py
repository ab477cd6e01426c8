"""Which label, or which value, a text or a pair of texts has."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Final

from xadapter_export.tasks.spec import Asked, Head, Output, Reads, TaskSpec, best

if TYPE_CHECKING:
    from numpy.typing import NDArray


@dataclass(frozen=True)
class LabelAnswer:
    """One label with its probability among the labels, and the number that the graph gave.

    A regression has one label, the name of the value, and that value is score and logit alike.
    """

    label: str
    score: float
    logit: float

    @property
    def word(self) -> str:
        """The label."""
        return self.label


class TextClassification(TaskSpec):
    """See the module."""

    name = pipeline_tag = "text-classification"
    says = "which label or value a text has, or a pair of texts"
    reads: ClassVar[Reads] = "first"
    head: ClassVar[Head | None] = "labels"
    outputs = (Output("logits", ("batch", "labels")),)
    compared = "logits"
    takes_pairs = True
    torch_half = "xadapter_export.model.tasks:TextClassificationHead"

    def answers(self, values: "NDArray[Any]", asked: Asked) -> list[list[LabelAnswer]]:
        """Return for each text the labels, the most probable first."""
        labels = asked.manifest.labels or ()
        found = []
        for row in values:
            ranked = best(row, asked.top_k) if len(labels) > 1 else [(0, float(row[0]))]  # a regression
            found.append([LabelAnswer(labels[i], score, float(row[i])) for i, score in ranked])
        return found


TEXT_CLASSIFICATION: Final = TextClassification()
