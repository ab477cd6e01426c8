"""Layers of PLM and CLIP as they go into the graph: the same weights, fewer and larger operators.

Each takes the weights of a trained module and gives its results up to rounding. Query, key and value are one
product, the attention scale is inside the query's weights, and the last layer computes queries, feed-forward
and norms only where its result is read.

Dimensions: B batch, T tokens, P positions that are read, H hidden size, A attention heads, M memory items.
"""

from collections.abc import Iterable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from xadapter_export.model.clip_text import ClipTextTower
from xadapter_export.model.plm import FrozenPlm
from xadapter_export.model.pooling import take_positions


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


class PlmLayer(nn.Module):
    """One post-norm layer of any PLM family.

    Args:
        plm: The PLM.
        index: Number of the layer.
        packed: See ``PackedAttention``.
        at_positions: See ``PackedAttention``.
    """

    def __init__(
        self, plm: FrozenPlm, index: int, *, packed: bool = True, at_positions: bool = False
    ) -> None:
        super().__init__()
        layer, paths = plm.layers[index], plm.family.layer_parts
        part = {name: layer.get_submodule(path) for name, path in vars(paths).items()}
        self.attention = PackedAttention(
            [cast(nn.Linear, part[name]) for name in ("query", "key", "value")],
            cast(nn.Linear, part["attention_out"]),
            plm.num_heads,
            packed=packed,
            at_positions=at_positions,
        )
        self.attention_norm = part["attention_norm"]
        self.up, self.activation, self.down = part["up"], part["activation"], part["down"]
        self.norm = part["norm"]

    def forward(self, hidden: Tensor, mask: Tensor, positions: Tensor | None = None) -> Tensor:
        """``(B, T, H) float32`` to the same, or to ``(B, P, H)`` at ``positions`` ``(B, P) int64``."""
        rows = None if positions is None else take_positions(hidden, positions)
        attended = self.attention(hidden, mask, rows)
        rows = self.attention_norm(attended + (hidden if rows is None else rows))
        return self.norm(self.down(self.activation(self.up(rows))) + rows)  # type: ignore[no-any-return]  # nn.Module call


class ClipLayers(nn.Module):
    """The blocks of a CLIP text tower.

    Args:
        clip: The tower.
        packed: See ``PackedAttention``.
        last_at_end: Whether of the last block only end-of-text is wanted.
    """

    def __init__(self, clip: ClipTextTower, *, packed: bool = True, last_at_end: bool = False) -> None:
        super().__init__()
        self.blocks = cast(nn.ModuleList, clip.transformer["resblocks"])
        self.last_at_end = last_at_end
        self.attentions = nn.ModuleList(
            PackedAttention(
                [getattr(block.attn, name) for name in ("query", "key", "value")],
                block.attn.out_proj,
                clip.config.heads,
                packed=packed,
            )
            for block in cast(Iterable[Any], self.blocks)
        )

    def forward(self, x: Tensor, causal_mask: Tensor, token_mask: Tensor, end: Tensor) -> Tensor:
        """Runs all blocks.

        Args:
            x: ``(B, T, W) float32``.
            causal_mask: ``(T, T) float32`` added to the scores.
            token_mask: ``(B, 1, 1, T) float32`` added to those of end-of-text, which sees all real tokens.
            end: ``(B, 1) int64``, where end-of-text is.

        Returns:
            ``(B, T, W) float32``, or ``(B, 1, W)`` at end-of-text where only that is wanted.
        """
        blocks = cast(Iterable[Any], self.blocks)
        for number, (block, attention) in enumerate(zip(blocks, self.attentions, strict=True)):
            normed = block.ln_1(x)
            if self.last_at_end and number == len(self.blocks) - 1:
                x = take_positions(x, end)
                added = attention(normed, token_mask, positions=end)
            else:
                added = attention(normed, causal_mask)
            x = x + block.ls_1(added)
            x = x + block.ls_2(block.mlp["c_proj"](block.mlp["gelu"](block.mlp["c_fc"](block.ln_2(x)))))
        return x


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
