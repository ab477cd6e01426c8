"""Contributions taken apart in PyTorch, and answers with memory items left out."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tests.layers.test_layers import KINDS as BASE_KINDS
from tests.layers.test_layers import NULLS, A, C, H, R, fresh, rows
from tests.tiny_checkpoint import TEXTS, N
from xadapter_export.errors import UnsupportedError
from xadapter_export.layers import NULL_ROWS, TOKEN_QUERY, LayerKind
from xadapter_export.model.explanation import Reading, measure_lengths
from xadapter_export.model.export_layers import additive_mask
from xadapter_export.model.pooling import take_positions
from xadapter_export.model.x_adapter import LayerShape, Projected, TokenQueryLayer, XAdapterLayer
from xadapter_export.model.x_adapter_model import Memory, XAdapterModel


class GatedLayer(TokenQueryLayer):
    """What it adds depends on the token that asks, as a gate does."""

    def contribute(self, hidden: Tensor, context: Tensor) -> Tensor:
        return torch.sigmoid(hidden[..., :1]) * super().contribute(hidden, context)


KINDS = (*BASE_KINDS, LayerKind("gated", "has a gate", "tests.model.test_explanation:GatedLayer"))
MASK = torch.tensor([[1] * 5, [1, 1, 1, 0, 0]])
TOKENS = additive_mask(MASK)
POSITIONS = torch.tensor([[1, 4], [2, 2]])


def asked(kind: LayerKind) -> tuple[XAdapterLayer, Tensor, Projected]:
    """A layer, hidden states, and a memory with items that are left out."""
    layer = fresh(kind)
    keep = additive_mask(torch.arange(N)[None] != torch.tensor([[3], [7]]))
    memory = rows()[None] if kind.learns_rows else torch.stack([rows(1), rows(2)])
    return layer, torch.randn(2, 5, H), layer.project_memory(memory, keep)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
@torch.no_grad()
def test_the_parts_add_up_to_the_contribution(kind: LayerKind) -> None:
    layer, hidden, memory = asked(kind)
    whole = take_positions(layer.attend(hidden, memory, TOKENS), POSITIONS)
    weights = layer.weigh(hidden, memory, TOKENS, POSITIONS)
    parts, bias = layer.split(take_positions(hidden, POSITIONS), weights, memory.values)
    assert parts.shape[2] == memory.values.shape[1]
    assert whole.abs().max() > 0.1
    torch.testing.assert_close((parts.sum(2) + bias).expand_as(whole), whole, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(weights.sum(-1), torch.ones_like(weights[..., 0]))
    assert not weights[0, ..., 3].any()
    assert not weights[1, ..., 7].any()


@pytest.mark.parametrize("positions", [POSITIONS, None], ids=["at positions", "mean"])
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
@torch.no_grad()
def test_lengths_add_up_to_the_length_of_what_is_added(kind: LayerKind, positions: Tensor | None) -> None:
    layer, hidden, memory = asked(kind)
    added = layer.attend(hidden, memory, TOKENS)
    items, rest = measure_lengths(layer, hidden, memory, added, N, Reading(MASK, TOKENS, positions))
    if positions is None:
        read = torch.stack([added[0].mean(0), added[1, :3].mean(0)])[:, None]
    else:
        read = take_positions(added, positions)
    assert items.shape == (2, read.shape[1], N)
    torch.testing.assert_close(items.sum(-1) + rest.sum(-1), read.norm(dim=-1), rtol=1e-4, atol=1e-4)
    assert bool(rest[..., 0].any()) == (kind is NULL_ROWS)


@torch.no_grad()
def test_rows_beside_the_memory_are_no_items() -> None:
    layer, hidden, memory = asked(NULL_ROWS)
    added = layer.attend(hidden, memory, TOKENS)
    reading = Reading(MASK, TOKENS, POSITIONS)
    items, rest = measure_lengths(layer, hidden, memory, added, N, reading)
    everything, nothing = measure_lengths(layer, hidden, memory, added, N + NULLS, reading)
    torch.testing.assert_close(items, everything[..., :N])
    torch.testing.assert_close(rest[..., 0], everything[..., N:].sum(-1))
    assert not nothing[..., 0].any()


@torch.no_grad()
def test_what_adds_nothing_has_no_lengths() -> None:
    layer, hidden, memory = asked(TOKEN_QUERY)
    for parameter in layer.out.parameters():
        parameter.zero_()
    added = layer.attend(hidden, memory)
    items, rest = measure_lengths(layer, hidden, memory, added, N, Reading(MASK, TOKENS, POSITIONS))
    assert not items.any()
    assert not rest.any()


def test_a_layer_that_does_not_say_is_one_clear_error() -> None:
    class Silent(XAdapterLayer):
        def attend(self, hidden: Tensor, memory: Projected, token_mask: Tensor | None = None) -> Tensor:
            return hidden

    layer, hidden = Silent(LayerShape(H, C, R, A)), torch.zeros(1, 2, H)
    memory = layer.project_memory(rows()[None])
    with pytest.raises(UnsupportedError, match=r"this kind of layer cannot be explained.*: Silent;"):
        layer.weigh(hidden, memory)


@torch.no_grad()
def test_an_item_that_is_left_out_is_as_good_as_gone(tiny_model: XAdapterModel) -> None:
    inputs = tiny_model.encode(TEXTS)
    memory = tiny_model.memory(inputs["clip_input_ids"])
    assert memory.v is not None and memory.t is not None and memory.t_mask is not None  # noqa: PT018
    for item in range(memory.v.shape[1]):
        keep = torch.arange(memory.v.shape[1]) != item
        left_out = replace(memory, keep={"v": keep.expand(len(TEXTS), -1).to(torch.int64)})
        gone = replace(memory, v=memory.v[:, keep])
        compare(tiny_model, inputs, left_out, gone)
    keep = torch.ones_like(memory.t_mask)
    keep[:, 1] = False
    gone_mask = memory.t_mask & keep
    compare(tiny_model, inputs, replace(memory, keep={"t": keep}), replace(memory, t_mask=gone_mask))


def compare(model: XAdapterModel, inputs: dict[str, Tensor], one: Memory, other: Memory) -> None:
    got, wanted = (model(**inputs, memory=memory).logits for memory in (one, other))
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)
    assert (got - model(**inputs).logits).abs().max() > 1e-3


@torch.no_grad()
def test_an_expert_without_items_adds_nothing(tiny_model: XAdapterModel) -> None:
    inputs = tiny_model.encode(TEXTS)
    memory = tiny_model.memory(inputs["clip_input_ids"])
    assert memory.v is not None and memory.t_mask is not None  # noqa: PT018
    nothing = {"v": torch.zeros(memory.v.shape[:2]), "t": torch.zeros_like(memory.t_mask)}
    for left_out, rest in (("v", "t"), ("t", "v"), ("vt", "none")):
        kept = replace(memory, keep={expert: nothing[expert] for expert in left_out})
        torch.testing.assert_close(
            tiny_model(**inputs, memory=kept).logits, tiny_model(**inputs, experts=rest).logits
        )
