"""What of a task needs PyTorch: its trained head, its answer and its loss.

Dimensions: B batch, T PLM tokens, P tokens that the task reads (all, where none were taken), H hidden size,
V vocabulary, L labels, A answers that a mask accepts.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xadapter_export.errors import UnsupportedError
from xadapter_export.model.pooling import mean_pool
from xadapter_export.registry import load_named
from xadapter_export.tasks import TaskSpec


@dataclass(frozen=True, eq=False)
class States:
    """What a task answers with.

    Attributes:
        hidden: ``(B, P, H) float32``. Last states of the tokens that the task reads, or of all tokens.
        attention_mask: ``(B, T) int64``, 1 at real tokens.
        mlm: The PLM's MLM head: ``(B, P, H)`` to ``(B, P, V)``, or to the candidates alone.
        head: What ``TaskHead.make_head`` gave.
    """

    hidden: Tensor
    attention_mask: Tensor
    mlm: Callable[[Tensor], Tensor]
    head: nn.Module | None


class TaskHead(ABC):
    """The other half of a ``TaskSpec``; it has no state."""

    def make_head(self, hidden_size: int, num_labels: int) -> nn.Module | None:  # noqa: ARG002  # the default
        """Return a fresh head, to be trained with the plug-in; None where there is nothing to train."""
        return None

    @abstractmethod
    def answer(self, states: States) -> tuple[Tensor, ...]:
        """Return the outputs of the task, in the order of ``TaskSpec.outputs``; the graph is traced of it."""

    def loss(
        self,
        values: Tensor,  # noqa: ARG002  # of tasks that are trained
        batch: Mapping[str, Tensor | None],  # noqa: ARG002
    ) -> Tensor:
        """Return the loss of a batch, a number.

        Args:
            values: The output ``TaskSpec.compared``.
            batch: Where the task labels texts ``labels`` ``(B,) int64``, or ``float32`` of a regression;
                where it fills masks ``answers`` ``(B, P, A) int64`` and ``shares`` ``(B, P, A) float32``.

        Raises:
            UnsupportedError: If nothing can be trained for the task.
        """
        raise UnsupportedError("nothing can be trained for this task", where=type(self).__name__)


def task_head(task: TaskSpec) -> TaskHead:
    """Return the half of a task that needs PyTorch."""
    head: TaskHead = load_named(task.torch_half)()
    return head


class ClassificationHead(nn.Module):
    """Trained head on the first token: dense, tanh, projection to the labels."""

    def __init__(self, hidden_size: int, num_labels: int) -> None:
        super().__init__()
        self.dense = nn.Linear(hidden_size, hidden_size)
        self.out_proj = nn.Linear(hidden_size, num_labels)

    def forward(self, hidden: Tensor) -> Tensor:
        """``(B, T, H) float32`` to ``(B, L) float32``."""
        return self.out_proj(torch.tanh(self.dense(hidden[:, 0])))  # type: ignore[no-any-return]  # nn.Module call


class FillMaskHead(TaskHead):
    """The PLM's MLM head at the masks: ``logits`` ``(B, P, V)``."""

    def answer(self, states: States) -> tuple[Tensor, ...]:
        """See ``TaskHead.answer``."""
        return (states.mlm(states.hidden),)

    def loss(self, values: Tensor, batch: Mapping[str, Tensor | None]) -> Tensor:
        """Cross-entropy with shares: mean over the texts of each text's mean over its masks, in nats.

        Args:
            values: ``(B, P, V)``.
            batch: ``answers`` and ``shares``, which add up to 1 over A, or to 0 where nothing is asked.
        """
        answers, shares = batch["answers"], batch["shares"]
        assert answers is not None and shares is not None  # noqa: PT018  # the collator gives both
        logits = values.float()
        log_probability = logits.gather(2, answers) - logits.logsumexp(-1, keepdim=True)  # (B, P, A)
        asked = shares.sum((1, 2))  # (B,): masks of each text
        return (-(log_probability * shares).sum((1, 2)) / asked.clamp(min=1)).mean()


class TextClassificationHead(TaskHead):
    """A trained head on the first token: ``logits`` ``(B, L)``."""

    def make_head(self, hidden_size: int, num_labels: int) -> nn.Module:
        """See ``TaskHead.make_head``."""
        return ClassificationHead(hidden_size, num_labels)

    def answer(self, states: States) -> tuple[Tensor, ...]:
        """See ``TaskHead.answer``."""
        assert states.head is not None  # make_head gave one
        return (states.head(states.hidden),)

    def loss(self, values: Tensor, batch: Mapping[str, Tensor | None]) -> Tensor:
        """Cross-entropy of the labels; of a regression the mean squared error."""
        labels = batch["labels"]
        assert labels is not None  # the collator gives them
        if labels.is_floating_point():
            return F.mse_loss(values[:, 0].float(), labels)
        return F.cross_entropy(values.float(), labels)


class FeatureExtractionHead(TaskHead):
    """``last_hidden_state`` ``(B, T, H)``, and its mean as ``sentence_embedding`` ``(B, H)``."""

    def answer(self, states: States) -> tuple[Tensor, ...]:
        """See ``TaskHead.answer``."""
        return states.hidden, mean_pool(states.hidden, states.attention_mask)
