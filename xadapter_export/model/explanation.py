"""How far each memory item carries a contribution: what a graph gives that is exported with explanations.

A contribution is a sum of vectors: a part for each item that an expert attends to, and a bias. A part is
measured by the length of its projection on the whole contribution, so that the lengths of all parts add up
to the length of the contribution. One that points the other way is negative.

Dimensions: B batch, T PLM tokens, P tokens that the task reads, H hidden size, A attention heads, M memory
items.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from xadapter_export.model.pooling import take_positions
from xadapter_export.model.x_adapter import Projected, XAdapterLayer

_TINY = 1e-6  # a contribution of nothing has no direction; a number below 1e-8 would be optimized away


class Lengths(NamedTuple):
    """How far the parts of a contribution carry it.

    Attributes:
        items: ``(B, P, M) float32``, of each memory item.
        rest: ``(B, P, 2) float32``, of the layer's rows beside the memory, and of its bias.
    """

    items: Tensor
    rest: Tensor


@dataclass(frozen=True, eq=False)
class Reading:
    """Which tokens a task reads.

    Attributes:
        attention_mask: ``(B, T) int64``, 1 at real tokens.
        token_mask: The same as a layer takes it; see ``additive_mask``.
        positions: ``(B, P) int64``; None where the task reads the mean of all real tokens, which is 1 for P.
    """

    attention_mask: Tensor
    token_mask: Tensor
    positions: Tensor | None


def is_on(keep: Tensor) -> Tensor:
    """Which texts keep an item of an expert's memory, ``(B, M)``: ``(B, 1, 1) float32``, 1 or 0."""
    return (keep.to(torch.float32).sum(1) > 0).to(torch.float32)[:, None, None]


def measure_lengths(
    layer: XAdapterLayer,
    hidden: Tensor,
    memory: Projected,
    contribution: Tensor,
    num_items: int,
    reading: Reading,
) -> Lengths:
    """Splits a contribution at the tokens that the task reads, and measures its parts.

    Args:
        layer: What made it.
        hidden: ``(B, T, H) float32``. What it was made from.
        memory: Keys and values, those of rows beside the memory after the ``num_items`` of its items.
        contribution: ``(B, T, H) float32``.
        num_items: M.
        reading: What the task reads.

    Raises:
        UnsupportedError: If the layer cannot tell.
    """
    weights = layer.weigh(hidden, memory, reading.token_mask, reading.positions)
    if reading.positions is not None:
        hidden, contribution = (take_positions(x, reading.positions) for x in (hidden, contribution))
        parts, bias = layer.split(hidden, weights, memory.values)  # (B, P or 1, M, H), (B, P or 1, H)
    else:
        mean = (reading.attention_mask / reading.attention_mask.sum(1, keepdim=True))[:, :, None]  # (B, T, 1)
        contribution = (contribution * mean).sum(1, keepdim=True)
        parts, bias = _split_mean(layer, hidden, weights, memory.values, mean)
    length = (contribution * contribution).sum(-1, keepdim=True).sqrt()
    direction = contribution / (length + _TINY)  # (B, P, H)
    items = (parts * direction[:, :, None]).sum(-1)
    of_bias = (bias * direction).sum(-1)
    beside, of_rows = memory.values.shape[1] - num_items, torch.zeros_like(of_bias)
    if beside:
        items, of_rows = items[..., :-beside], items[..., -beside:].sum(-1)
    return Lengths(items, torch.stack([of_rows, of_bias], -1))


def _split_mean(
    layer: XAdapterLayer, hidden: Tensor, weights: Tensor, values: Tensor, mean: Tensor
) -> tuple[Tensor, Tensor]:
    """As ``XAdapterLayer.split``, of the mean of all tokens, of which each counts ``(B, T, 1) float32``."""
    if type(layer).contribute is XAdapterLayer.contribute:  # linear, so the weights can be averaged
        return layer.split(hidden[:, :1], (weights * mean[:, None]).sum(2, keepdim=True), values)
    parts, bias = layer.split(hidden, weights, values)  # (B, T, M, H), (B, T, H)
    return (parts * mean[..., None]).sum(1, keepdim=True), (bias * mean).sum(1, keepdim=True)
