"""One expert at one PLM layer: attention from the PLM's hidden states to what CLIP knows.

Dimensions: B batch, T PLM tokens, H hidden size, R adapter width, A attention heads, M memory items
(K retrieved pictures, S CLIP tokens or the prototypes of a static bank), C memory width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class XAdapterLayer(nn.Module):
    """Attention of width R over a memory; its output is added to the hidden states that enter a PLM layer.

    ``W_o`` starts at zero, so a fresh layer contributes exactly nothing.

    Source:
        X-adapter (arXiv 2305.07358), abstract: a plug-in with an image and a text sub-module, only added
        parameters train. The layer equation is ours, see docs/design.md.
    """

    def __init__(self, hidden_size: int, memory_width: int, adapter_width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm = nn.LayerNorm(hidden_size)
        self.memory_norm = nn.LayerNorm(memory_width)
        self.query = nn.Linear(hidden_size, adapter_width)
        self.key = nn.Linear(memory_width, adapter_width)
        self.value = nn.Linear(memory_width, adapter_width)
        self.out = nn.Linear(adapter_width, hidden_size)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def project_memory(self, memory: Tensor) -> tuple[Tensor, Tensor]:
        """Turns memory items into keys and values; depends on the memory alone, so a bank can be folded.

        Args:
            memory: ``(..., M, C) float32``.

        Returns:
            Keys and values, each ``(..., M, R) float32``.
        """
        memory = self.memory_norm(memory)
        return self.key(memory), self.value(memory)

    def attend(
        self,
        hidden: Tensor,
        keys: Tensor,
        values: Tensor,
        memory_mask: Tensor | None,
        token_mask: Tensor | None = None,
    ) -> Tensor:
        """Computes the expert's contribution.

        Args:
            hidden: ``(B, T, H) float32``. Hidden states that enter the PLM layer.
            keys: ``(B, M, R) float32``, or ``(1, M, R)`` for a memory that the whole batch shares.
            values: Like ``keys``.
            memory_mask: ``(B, 1, 1, M) float32``, 0 at real items and very negative at padding, or None.
            token_mask: ``(B, 1, 1, T) float32``, likewise of the PLM tokens; not used here, where each token
                asks for itself.

        Returns:
            ``(B, T, H) float32``, to be added to ``hidden``.
        """
        del token_mask
        batch = hidden.shape[0]
        query = self._split_heads(self.query(self.norm(hidden)))  # (B, A, T, R/A)
        keys, values = self._split_heads(keys), self._split_heads(values)  # (B or 1, A, M, R/A)
        if keys.shape[0] == 1:
            keys, values = keys.expand(batch, -1, -1, -1), values.expand(batch, -1, -1, -1)
        context = F.scaled_dot_product_attention(query, keys, values, attn_mask=memory_mask)
        return self.out(context.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]  # nn.Module call

    def forward(
        self,
        hidden: Tensor,
        memory: Tensor,
        memory_mask: Tensor | None = None,
        token_mask: Tensor | None = None,
    ) -> Tensor:
        """``attend`` over an unprojected memory ``(B, M, C) float32``; shapes as there."""
        return self.attend(hidden, *self.project_memory(memory), memory_mask, token_mask)

    def log_attention(self, hidden: Tensor, memory: Tensor, token_mask: Tensor) -> Tensor:
        """How much is attended to each memory item: what training a static memory looks at.

        Args:
            hidden: ``(B, T, H) float32``.
            memory: ``(B or 1, M, C) float32``.
            token_mask: ``(B, 1, 1, T) float32``, 0 at real tokens and very negative at padding.

        Returns:
            ``(B, A, T, M) float32``, logarithms whose exponentials add up to 1 over M.
        """
        del token_mask
        return F.log_softmax(self._scores(hidden, self.project_memory(memory)[0]), dim=-1)

    def _scores(self, hidden: Tensor, keys: Tensor) -> Tensor:
        """``(B, A, T, M)``: each token's query times each key."""
        query = self._split_heads(self.query(self.norm(hidden)))  # (B, A, T, R/A)
        keys = self._split_heads(keys)  # (B or 1, A, M, R/A)
        scores: Tensor = query @ keys.transpose(2, 3) / query.shape[-1] ** 0.5
        return scores

    def _split_heads(self, x: Tensor) -> Tensor:
        heads = torch.unflatten(x, -1, (self.num_heads, -1))  # (B, M, A, R/A)
        return heads.transpose(1, 2)


class SentenceXAdapterLayer(XAdapterLayer):
    """One query of the whole sentence over M prototypes, each with a key of its own that is learned.

    One softmax runs over all pairs of token and prototype, so that the one token which names the object
    decides, and every token gets the same contribution. It does what CLIP's search does, without CLIP: a
    linear query alone cannot, because most tokens do not know the object, and features of CLIP lie
    differently from states of the PLM.
    """

    def __init__(
        self, hidden_size: int, memory_width: int, adapter_width: int, num_heads: int, num_prototypes: int
    ) -> None:
        super().__init__(hidden_size, memory_width, adapter_width, num_heads)
        self.prototype_keys = nn.Parameter(torch.randn(num_prototypes, adapter_width))

    def project_memory(self, memory: Tensor) -> tuple[Tensor, Tensor]:
        """As ``XAdapterLayer.project_memory``, for all M prototypes ``(1, M, C)`` in their order."""
        keys, values = super().project_memory(memory)
        return keys + self.prototype_keys, values

    def attend(
        self,
        hidden: Tensor,
        keys: Tensor,
        values: Tensor,
        memory_mask: Tensor | None,
        token_mask: Tensor | None = None,
    ) -> Tensor:
        """As ``XAdapterLayer.attend``; ``token_mask`` keeps padding from asking."""
        del memory_mask
        scores = self._scores(hidden, keys)  # (B, A, T, M)
        if token_mask is not None:
            scores = scores + token_mask.transpose(2, 3)
        pairs = torch.softmax(scores.flatten(2), dim=-1).view(scores.shape)  # one softmax over T * M
        context = pairs.sum(2, keepdim=True) @ self._split_heads(values)  # (B, A, 1, R/A)
        return self.out(context.transpose(1, 2).flatten(2)).expand_as(hidden)  # type: ignore[no-any-return]  # nn.Module call

    def log_attention(self, hidden: Tensor, memory: Tensor, token_mask: Tensor) -> Tensor:
        """As ``XAdapterLayer.log_attention``, of the sentence: ``(B, A, 1, M)``."""
        scores = self._scores(hidden, self.project_memory(memory)[0]) + token_mask.transpose(2, 3)
        return F.log_softmax(scores.logsumexp(2, keepdim=True), dim=-1)
