"""What of the task ``mean-classification`` needs PyTorch."""

from torch import Tensor, nn

from xadapter_export.model.pooling import mean_pool
from xadapter_export.model.tasks import States, TextClassificationHead


class MeanHead(TextClassificationHead):
    """One projection of the mean of all tokens; it is trained with the loss of text classification."""

    def make_head(self, hidden_size: int, num_labels: int) -> nn.Module:
        """Return a fresh head."""
        return nn.Linear(hidden_size, num_labels)

    def answer(self, states: States) -> tuple[Tensor, ...]:
        """Return ``logits`` ``(B, L) float32``."""
        assert states.head is not None  # make_head gave one
        return (states.head(mean_pool(states.hidden, states.attention_mask)),)
