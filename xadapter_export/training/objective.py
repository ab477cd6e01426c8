"""The loss of a batch: that of its task, and attention where CLIP would search.

Dimensions: B batch, T PLM tokens, S CLIP tokens, H hidden size, V vocabulary, K pictures, N bank rows,
P masks, A answers, L labels, D CLIP embedding size, W CLIP text width.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import cast

import torch.nn.functional as F
from torch import Tensor, nn

from xadapter_export.bundle.manifest import ExpertSet
from xadapter_export.experts import V, reads_bank
from xadapter_export.model.export_layers import additive_mask
from xadapter_export.model.tasks import task_head
from xadapter_export.model.x_adapter import XAdapterLayer
from xadapter_export.model.x_adapter_model import Memory, XAdapterModel


class TrainingModel(nn.Module):
    """An X-adapter with its loss; what the frozen parts gave may come from the cache.

    Args:
        model: The X-adapter.
        distill_weight: Weight of the distillation loss; 0 for none.
        distill_temperature: Cosines are divided by it.
    """

    accepts_loss_kwargs = False  # of transformers' Trainer: the loss here is a mean over the texts

    def __init__(
        self, model: XAdapterModel, *, distill_weight: float = 0.0, distill_temperature: float = 0.05
    ) -> None:
        super().__init__()
        self.model = model
        self._distill_weight = distill_weight
        self._distill_temperature = distill_temperature

    def forward(  # house: transformers' Trainer gives a batch's arrays by these names
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        token_type_ids: Tensor | None = None,
        mask_positions: Tensor | None = None,
        answers: Tensor | None = None,
        shares: Tensor | None = None,
        labels: Tensor | None = None,
        hidden: Tensor | None = None,
        retrieved: Tensor | None = None,
        t: Tensor | None = None,
        t_mask: Tensor | None = None,
        queries: Tensor | None = None,
        experts: ExpertSet | None = None,
        only_distill: bool = False,
    ) -> dict[str, Tensor]:
        """Compute the loss of a batch.

        Args:
            input_ids: ``(B, T) int64``.
            attention_mask: ``(B, T) int64``.
            token_type_ids: ``(B, T) int64``.
            mask_positions: ``(B, P) int64``.
            answers: ``(B, P, A) int64``. Tokens that are right.
            shares: ``(B, P, A) float32``. How right; a mask whose shares are all zero is not there.
            labels: ``(B,) int64``, or ``float32`` for a regression.
            hidden: ``(B, T, H) float32``. What enters the first layer with a plug-in; computed if None.
            retrieved: ``(B, K) int64``. Bank rows.
            t: ``(B, S, W) float32``. CLIP token states.
            t_mask: ``(B, S) bool``.
            queries: ``(B, D) float32``. CLIP text features to imitate.
            experts: Expert set; all if None.
            only_distill: Whether only the first layer's search is taught; no PLM layer is run then.

        Returns:
            ``loss``, a number: the mean over the texts of each text's mean over its masks, so that the
            gradients of several processes average to those of the whole batch. With labels
            ``logits`` ``(B, L)`` too.
        """
        model = self.model
        active = model.active_experts(experts)
        if only_distill:
            assert hidden is not None and queries is not None  # noqa: PT018  # what this phase is for
            layer = cast(nn.ModuleDict, model.adapters[str(model.config.layers[0])])[V.name]
            return {"loss": self._distillation(cast(XAdapterLayer, layer), hidden, queries, attention_mask)}
        v = None
        if reads_bank(active):
            v = model.bank_features[None] if retrieved is None else model.bank_features[retrieved]
        shown = (input_ids, attention_mask, token_type_ids, None, mask_positions)
        with self._watching(queries is not None and reads_bank(active)) as attended:
            output = model(*shown, experts=experts, memory=Memory(v, t, t_mask), first_layer_input=hidden)
        values = output.answers[model.task.compared]
        loss = task_head(model.task).loss(values, {"labels": labels, "answers": answers, "shares": shares})
        for taught, states in attended:
            assert queries is not None  # nothing is watched otherwise
            loss = loss + self._distill_weight * self._distillation(taught, states, queries, attention_mask)
        return {"loss": loss} if labels is None else {"loss": loss, "logits": values}

    @contextmanager
    def _watching(self, can_distill: bool) -> Iterator[list[tuple[XAdapterLayer, Tensor]]]:
        """Collect what enters each V-expert while the body runs the model, if that is needed to distill."""
        attended: list[tuple[XAdapterLayer, Tensor]] = []
        handles = []
        if can_distill and self.training and self._distill_weight:
            for layer in self.model.adapters.values():
                expert = layer[V.name]  # type: ignore[index]  # a ModuleDict of experts
                handles.append(
                    expert.register_forward_pre_hook(lambda m, args: attended.append((m, args[0])))
                )
        try:
            yield attended
        finally:
            for handle in handles:
                handle.remove()

    def _distillation(
        self, layer: XAdapterLayer, hidden: Tensor, queries: Tensor, attention_mask: Tensor
    ) -> Tensor:
        """Kullback-Leibler divergence from CLIP's search of the bank to each token's attention, in nats."""
        bank = self.model.bank_features
        target = F.log_softmax(queries @ bank.T / self._distill_temperature, dim=-1)  # (B, N)
        mask = additive_mask(attention_mask)
        attention = layer.log_attention(hidden, bank[None], mask)  # (B, heads, T or 1, N)
        heads = attention.logsumexp(1) - math.log(attention.shape[1])  # mean of the heads
        divergence = (target.exp()[:, None] * (target[:, None] - heads)).sum(-1)  # (B, T or 1)
        if divergence.shape[1] == 1:  # one query of the whole sentence
            return divergence.mean()
        real = attention_mask.to(divergence.dtype)
        return ((divergence * real).sum(1) / real.sum(1)).mean()
