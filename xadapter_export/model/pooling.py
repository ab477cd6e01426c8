"""From the states of tokens to what is answered with: some of them, or their mean.

Dimensions: B batch, T tokens, P positions, H hidden size, D any width.
"""

from torch import Tensor


def take_positions(hidden: Tensor, positions: Tensor) -> Tensor:
    """Takes tokens: ``(B, T, H)`` at ``(B, P) int64`` to ``(B, P, H)``."""
    return hidden.gather(1, positions[:, :, None].expand(-1, -1, hidden.shape[-1]))


def mean_pool(hidden: Tensor, attention_mask: Tensor) -> Tensor:
    """Sentence embedding of length 1: mean of ``(B, T, H)`` over real tokens of ``(B, T)``: ``(B, H)``."""
    weights = attention_mask.to(hidden.dtype)[:, :, None]
    return unit_length((hidden * weights).sum(1) / weights.sum(1))


def unit_length(x: Tensor) -> Tensor:
    """Scales ``(..., D) float32`` rows to length 1, by operators that are the same in every opset."""
    return x / (x * x).sum(-1, keepdim=True).sqrt()
