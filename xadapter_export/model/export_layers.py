"""Layers of PLM and CLIP as they go into the graph.

A family or a tower makes them: as its library has them, or with the same weights in fewer and larger
operators. Then query, key and value are one product, the attention scale is inside the query's
weights, and the last layer computes queries, feed-forward and norms only where its result is read.

Dimensions: B batch, T tokens, P positions that are read, H hidden size, A attention heads.
"""

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from xadapter_export.model.pooling import take_positions

Context = Any  # what the layers of one call have in common, as tensors, or tuples or dictionaries of them


def additive_mask(attention_mask: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Makes the mask that attention adds to its scores.

    Args:
        attention_mask: ``(B, T)``, 1 or True at real tokens.
        dtype: Floating-point type of the result.

    Returns:
        ``(B, 1, 1, T)``, 0 at real tokens and the dtype's lowest value at padding.
    """
    return (1.0 - attention_mask[:, None, None, :].to(dtype)) * torch.finfo(dtype).min


class PlainLayer(nn.Module):
    """A layer as its library has it: right for every model, and as fast as it traces.

    Args:
        run: The layer: ``(hidden, context)`` to ``hidden``, all ``(B, T, H) float32``.
    """

    def __init__(self, run: Callable[[Tensor, Context], Tensor]) -> None:
        super().__init__()
        self._run = run

    def forward(self, hidden: Tensor, context: Context, positions: Tensor | None = None) -> Tensor:
        """``(B, T, H) float32`` to the same, or to ``(B, P, H)`` at ``positions`` ``(B, P) int64``."""
        hidden = self._run(hidden, context)
        return hidden if positions is None else take_positions(hidden, positions)


class PackedLayer(nn.Module):
    """A layer of which the passes for a target know every part: if they miss one, that is an error.

    Its attention is a ``PackedAttention``, and its only activation is GELU or its quick form.
    """

    attention: "PackedAttention"


def attend(query: Tensor, key: Tensor, value: Tensor, num_heads: int, mask: Tensor | None) -> Tensor:
    """Multi-head attention whose queries are scaled already.

    Args:
        query: ``(B, T, H) float32``.
        key: ``(B or 1, M, H) float32``.
        value: Like ``key``.
        num_heads: A, a divisor of H.
        mask: ``(B or 1, 1, T or 1, M) float32`` added to the scores, or None.

    Returns:
        ``(B, T, H) float32``.
    """
    query, key, value = (torch.unflatten(x, -1, (num_heads, -1)) for x in (query, key, value))
    query, value = query.transpose(1, 2), value.transpose(1, 2)  # (B, A, T or M, H/A)
    key = key.permute(0, 2, 3, 1)  # (B, A, H/A, M)
    scores = query @ key
    if mask is not None:
        scores = scores + mask
    return (torch.softmax(scores, dim=-1) @ value).transpose(1, 2).flatten(2)


class PackedAttention(nn.Module):
    """Self-attention with one product for query, key and value.

    Args:
        projections: Linear layers of query, key and value.
        out: Linear layer after the attention.
        num_heads: A.
        packed: Whether to make one product of the three.
        at_positions: Whether queries are wanted at some positions only; then keys and values are one product.
    """

    def __init__(
        self,
        projections: Sequence[nn.Linear],
        out: nn.Linear,
        num_heads: int,
        *,
        packed: bool = True,
        at_positions: bool = False,
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        query, key, value = projections
        query = _linear([query], scale=(query.out_features / num_heads) ** -0.5)
        groups = [[query], [key, value]] if at_positions else [[query, key, value]]
        if not packed:
            groups = [[query], [key], [value]]
        self.projections = nn.ModuleList(_linear(group) for group in groups)
        self.out = out

    def forward(
        self, x: Tensor, mask: Tensor, rows: Tensor | None = None, positions: Tensor | None = None
    ) -> Tensor:
        """Attends to ``x`` ``(B, T, H)`` from all of it, or from some of it.

        Args:
            x: ``(B, T, H) float32``.
            mask: Added to the scores; see ``attend``.
            rows: ``(B, P, H) float32``, the rows of ``x`` to attend from, where made with ``at_positions``.
            positions: ``(B, P) int64``, where to attend from. The product is still of all rows, so that its
                weights are those that other expert sets have.

        Returns:
            ``(B, T or P, H) float32``.
        """
        width = self.out.in_features
        parts: list[Tensor] = []
        for number, projection in enumerate(self.projections):
            source = x if rows is None or number > 0 else rows
            wide = cast(nn.Linear, projection)(source)
            parts += [
                wide[..., at : at + width] for at in range(0, wide.shape[-1], width)
            ]  # Split has no opset 17
        query, key, value = parts
        if positions is not None:
            query = take_positions(query, positions)
        return self.out(attend(query, key, value, self.num_heads, mask))  # type: ignore[no-any-return]  # nn.Module call


def _linear(parts: Sequence[nn.Linear], scale: float = 1.0) -> nn.Linear:
    """One linear layer that gives the outputs of ``parts`` side by side, times ``scale``."""
    if len(parts) == 1 and scale == 1.0:
        return parts[0]
    size = sum(part.out_features for part in parts)
    packed = nn.Linear(parts[0].in_features, size, bias=parts[0].bias is not None)
    with torch.no_grad():
        packed.weight.copy_(torch.cat([part.weight for part in parts]) * scale)
        if packed.bias is not None:
            packed.bias.copy_(torch.cat([part.bias for part in parts]) * scale)
    return packed.requires_grad_(False)
