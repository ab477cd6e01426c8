"""One expert at one PLM layer: attention from the PLM's hidden states to what CLIP knows.

Dimensions: B batch, T PLM tokens, H hidden size, R adapter width, A attention heads, M memory items
(K retrieved pictures, S CLIP tokens or the N rows of a static bank), P tokens that are looked at, C memory
width.
"""

import copy
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xadapter_export.errors import UnsupportedError
from xadapter_export.layers.kind import LayerKind
from xadapter_export.model.export_layers import attend
from xadapter_export.model.pooling import take_positions
from xadapter_export.registry import load_named


@dataclass(frozen=True)
class LayerShape:
    """What a layer is made for.

    Attributes:
        hidden_size: H.
        memory_width: C.
        adapter_width: R, a multiple of A.
        num_heads: A.
        num_rows: N, where the memory is a static bank.
        num_null_rows: Null rows of a kind that has them.
    """

    hidden_size: int
    memory_width: int
    adapter_width: int
    num_heads: int
    num_rows: int | None = None
    num_null_rows: int = 0


class Projected(NamedTuple):
    """A memory as keys and values; behind its items may be rows beside the memory, such as null rows.

    Attributes:
        keys: ``(B, M, R) float32``, or ``(1, M, R)`` for a memory that the whole batch shares.
        values: Like ``keys``.
        mask: ``(B, 1, 1, M) float32``, 0 at real items and very negative at padding, or None.
    """

    keys: Tensor
    values: Tensor
    mask: Tensor | None = None


def make_layer(kind: LayerKind, shape: LayerShape) -> "XAdapterLayer":
    """Makes a fresh layer of a kind.

    Raises:
        ConfigError: If the kind names a module that is not there.
    """
    layer: XAdapterLayer = load_named(kind.torch_half)(shape)
    return layer


class XAdapterLayer(nn.Module, ABC):
    """Attention of width R over a memory; its output is added to the hidden states that enter a PLM layer.

    ``W_o`` starts at zero, so a fresh layer contributes exactly nothing.

    Attributes:
        is_fused: Whether the attention of ``attend_in_graph`` is ``export_layers.attend``, with the keys,
            values and mask that it is given. onnxruntime has an operator for that, and an export that misses
            it fails. Else nobody knows what can be fused.
        num_null_rows: How many of the last rows that ``project_memory`` gives are null rows, and no item of
            the memory.

    Source:
        X-adapter (arXiv 2305.07358), abstract: a plug-in with an image and a text sub-module, only added
        parameters train. The layer equation is ours, see docs/design.md.
    """

    is_fused: ClassVar[bool] = False
    num_null_rows: int = 0

    def __init__(self, shape: LayerShape) -> None:
        super().__init__()
        self.num_heads = shape.num_heads
        self.norm = nn.LayerNorm(shape.hidden_size)
        self.memory_norm = nn.LayerNorm(shape.memory_width)
        self.query = nn.Linear(shape.hidden_size, shape.adapter_width)
        self.key = nn.Linear(shape.memory_width, shape.adapter_width)
        self.value = nn.Linear(shape.memory_width, shape.adapter_width)
        self.out = nn.Linear(shape.adapter_width, shape.hidden_size)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def project_memory(self, memory: Tensor, mask: Tensor | None = None) -> Projected:
        """Turns memory items into keys and values; depends on the memory alone, so a bank can be folded.

        Args:
            memory: ``(B or 1, M, C) float32``.
            mask: See ``Projected``.

        Returns:
            M items, or more where a kind has rows beside the memory.
        """
        memory = self.memory_norm(memory)
        return Projected(self.key(memory), self.value(memory), mask)

    @torch.no_grad()
    def fold(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """``project_memory`` of a static bank, which the graph then holds in the bank's place.

        It is computed in float64, so that ``LayerKind.fold`` can give the same numbers without PyTorch.

        Args:
            rows: ``(N, C) float32``.

        Returns:
            Keys and values, each ``(1, N, R) float32``, or with more rows where a kind adds some.
        """
        wide = copy.deepcopy(self)
        for parameter in wide.parameters():
            parameter.data = parameter.data.double()  # .double() cannot where only shapes are computed
        folded = wide.project_memory(rows[None].double())
        return folded.keys.float(), folded.values.float()

    @abstractmethod
    def attend(self, hidden: Tensor, memory: Projected, token_mask: Tensor | None = None) -> Tensor:
        """Computes the expert's contribution.

        Args:
            hidden: ``(B, T, H) float32``. Hidden states that enter the PLM layer.
            memory: What ``project_memory`` or ``fold`` gave.
            token_mask: ``(B, 1, 1, T) float32``, 0 at real tokens and very negative at padding.

        Returns:
            ``(B, T, H) float32``, to be added to ``hidden``.
        """

    def attend_in_graph(self, hidden: Tensor, memory: Projected, token_mask: Tensor | None = None) -> Tensor:
        """``attend`` as the graph is traced from it: the same, unless fewer operators can do it."""
        return self.attend(hidden, memory, token_mask)

    def contribute(self, hidden: Tensor, context: Tensor) -> Tensor:
        """Turns what was attended to into the contribution.

        Args:
            hidden: ``(B, T, H) float32``. Hidden states that enter the PLM layer.
            context: ``(B, T or 1, R) float32``.

        Returns:
            ``(B, T or 1, H) float32``.
        """
        del hidden
        return self.out(context)  # type: ignore[no-any-return]  # nn.Module call

    def weigh(
        self,
        hidden: Tensor,
        memory: Projected,
        token_mask: Tensor | None = None,
        positions: Tensor | None = None,
    ) -> Tensor:
        """Computes how much ``attend`` takes of each value.

        Args:
            hidden: ``(B, T, H) float32``.
            memory: As for ``attend``.
            token_mask: As for ``attend``.
            positions: ``(B, P) int64``, the tokens that are looked at; None for all.

        Returns:
            ``(B, A, P or T, M) float32``, which add up to 1 over M; with 1 for P where every token gets the
            same.

        Raises:
            UnsupportedError: If contributions of this kind are no weighted sums of values.
        """
        del hidden, memory, token_mask, positions
        raise UnsupportedError(
            "this kind of layer cannot be explained: it does not say how much it takes of each memory item",
            where=type(self).__name__,
            hint="export without explanations, or give the layer a method weigh",
        )

    def split(self, hidden: Tensor, weights: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Splits contributions into a part for each value, ``W_o (a_k V_k)``, and what is always added.

        Args:
            hidden: ``(B, P, H) float32``. Hidden states of the tokens that are looked at.
            weights: ``(B, A, P or 1, M) float32``. What ``weigh`` gave.
            values: ``(B or 1, M, R) float32``. Of ``Projected``.

        Returns:
            The parts, ``(B, P or 1, M, H) float32``, and the bias, ``(B, P or 1, H)``: together the
            contribution.
        """
        weighted = weights[..., None] * self._split_heads(values)[:, :, None]  # (B, A, P, M, R/A)
        contexts = weighted.permute(0, 2, 3, 1, 4).flatten(3)  # (B, P, M, R)
        bias = self.contribute(hidden[:, :, None], torch.zeros_like(contexts[:, :, :1]))
        return self.contribute(hidden[:, :, None], contexts) - bias, bias.squeeze(2)

    def forward(
        self,
        hidden: Tensor,
        memory: Tensor,
        memory_mask: Tensor | None = None,
        token_mask: Tensor | None = None,
    ) -> Tensor:
        """``attend`` over an unprojected memory ``(B or 1, M, C) float32``; shapes as there."""
        return self.attend(hidden, self.project_memory(memory, memory_mask), token_mask)

    def log_attention(self, hidden: Tensor, memory: Tensor, token_mask: Tensor) -> Tensor:
        """How much is attended to each memory item: what training a static memory looks at.

        Args:
            hidden: ``(B, T, H) float32``.
            memory: ``(B or 1, M, C) float32``.
            token_mask: ``(B, 1, 1, T) float32``, 0 at real tokens and very negative at padding.

        Returns:
            ``(B, A, T, M) float32``, logarithms whose exponentials add up to 1 over M; with 1 for T where
            the whole sentence asks.
        """
        del token_mask
        scores = self._scores(hidden, self.project_memory(memory).keys)
        return F.log_softmax(scores[..., : memory.shape[1]], dim=-1)  # rows beside the memory are left out

    def _scores(self, hidden: Tensor, keys: Tensor) -> Tensor:
        """``(B, A, T, M)``: each token's query times each key."""
        query = self._split_heads(self.query(self.norm(hidden)))  # (B, A, T, R/A)
        keys = self._split_heads(keys)  # (B or 1, A, M, R/A)
        scores: Tensor = query @ keys.transpose(2, 3) / query.shape[-1] ** 0.5
        return scores

    def _split_heads(self, x: Tensor) -> Tensor:
        heads = torch.unflatten(x, -1, (self.num_heads, -1))  # (B, M, A, R/A)
        return heads.transpose(1, 2)


class TokenQueryLayer(XAdapterLayer):
    """Each token asks for itself."""

    is_fused = True

    def attend(self, hidden: Tensor, memory: Projected, token_mask: Tensor | None = None) -> Tensor:
        """See ``XAdapterLayer.attend``."""
        del token_mask
        batch = hidden.shape[0]
        query = self._split_heads(self.query(self.norm(hidden)))  # (B, A, T, R/A)
        keys, values = self._split_heads(memory.keys), self._split_heads(memory.values)  # (B or 1, A, M, R/A)
        if keys.shape[0] == 1:
            keys, values = keys.expand(batch, -1, -1, -1), values.expand(batch, -1, -1, -1)
        context = F.scaled_dot_product_attention(query, keys, values, attn_mask=memory.mask)
        return self.contribute(hidden, context.transpose(1, 2).flatten(2))

    def attend_in_graph(self, hidden: Tensor, memory: Projected, token_mask: Tensor | None = None) -> Tensor:
        """See ``XAdapterLayer.attend_in_graph``."""
        del token_mask
        keys, values, mask = memory
        query = self.query(self.norm(hidden)) * (keys.shape[-1] / self.num_heads) ** -0.5
        return self.contribute(hidden, attend(query, keys, values, self.num_heads, mask))

    def weigh(
        self,
        hidden: Tensor,
        memory: Projected,
        token_mask: Tensor | None = None,
        positions: Tensor | None = None,
    ) -> Tensor:
        """See ``XAdapterLayer.weigh``."""
        del token_mask
        scores = self._scores(hidden if positions is None else take_positions(hidden, positions), memory.keys)
        return torch.softmax(scores if memory.mask is None else scores + memory.mask, dim=-1)


class NullRowsLayer(TokenQueryLayer):
    """Each token asks for itself, and may look away, at null rows.

    A softmax over pictures alone gives them all of its weight, whatever the sentence is about. Null rows are
    keys and values that are learned, the same for every text; they share the softmax with the memory.
    """

    def __init__(self, shape: LayerShape) -> None:
        super().__init__(shape)
        self.num_null_rows = shape.num_null_rows
        size = (shape.num_null_rows, shape.adapter_width)
        spread = 3**-0.5  # that of what fresh key and value matrices make of a normalized memory
        self.null_keys = nn.Parameter(spread * torch.randn(size))
        self.null_values = nn.Parameter(spread * torch.randn(size))

    def project_memory(self, memory: Tensor, mask: Tensor | None = None) -> Projected:
        """As ``XAdapterLayer.project_memory``, then the null rows, which no mask hides."""
        keys, values, mask = super().project_memory(memory, mask)
        batch = keys.shape[0]
        nulls = [rows.expand(batch, -1, -1) for rows in (self.null_keys, self.null_values)]
        if mask is not None:
            mask = torch.cat([mask, mask.new_zeros(batch, 1, 1, self.num_null_rows)], dim=-1)
        return Projected(torch.cat([keys, nulls[0]], dim=1), torch.cat([values, nulls[1]], dim=1), mask)


class SentenceQueryLayer(XAdapterLayer):
    """One query of the whole sentence over M prototypes, each with a key of its own that is learned.

    One softmax runs over all pairs of token and prototype, so that the one token which names the object
    decides, and every token gets the same contribution. It does what CLIP's search does, without CLIP: a
    linear query alone cannot, because most tokens do not know the object, and features of CLIP lie
    differently from states of the PLM.
    """

    is_fused = True  # it reads a static bank alone, which no operator takes

    def __init__(self, shape: LayerShape) -> None:
        super().__init__(shape)
        assert shape.num_rows is not None  # the kind says that it learns them
        self.prototype_keys = nn.Parameter(torch.randn(shape.num_rows, shape.adapter_width))

    def project_memory(self, memory: Tensor, mask: Tensor | None = None) -> Projected:
        """As ``XAdapterLayer.project_memory``, for all M prototypes ``(1, M, C)`` in their order."""
        projected = super().project_memory(memory, mask)
        return projected._replace(keys=projected.keys + self.prototype_keys)

    def attend(self, hidden: Tensor, memory: Projected, token_mask: Tensor | None = None) -> Tensor:
        """As ``XAdapterLayer.attend``; ``token_mask`` keeps padding from asking."""
        weights = self.weigh(hidden, memory, token_mask)
        context = weights @ self._split_heads(memory.values)  # (B, A, 1, R/A)
        return self.contribute(hidden, context.transpose(1, 2).flatten(2)).expand_as(hidden)

    def weigh(
        self,
        hidden: Tensor,
        memory: Projected,
        token_mask: Tensor | None = None,
        positions: Tensor | None = None,
    ) -> Tensor:
        """As ``XAdapterLayer.weigh``, of the sentence: ``(B, A, 1, M)``."""
        del positions
        scores = self._scores(hidden, memory.keys)  # (B, A, T, M)
        if memory.mask is not None:
            scores = scores + memory.mask
        if token_mask is not None:
            scores = scores + token_mask.transpose(2, 3)
        pairs = torch.softmax(scores.flatten(2), dim=-1).view(scores.shape)  # one softmax over T * M
        return pairs.sum(2, keepdim=True)

    def log_attention(self, hidden: Tensor, memory: Tensor, token_mask: Tensor) -> Tensor:
        """As ``XAdapterLayer.log_attention``, of the sentence: ``(B, A, 1, M)``."""
        scores = self._scores(hidden, self.project_memory(memory).keys) + token_mask.transpose(2, 3)
        return F.log_softmax(scores.logsumexp(2, keepdim=True), dim=-1)
