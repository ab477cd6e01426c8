"""BERT and its relatives: a norm comes after attention, and another after the feed-forward.

Dimensions: B batch, T PLM tokens, P tokens that are read, H hidden size.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, cast

import torch
from torch import Tensor, nn

from xadapter_export.model.export_layers import PackedAttention, PackedLayer
from xadapter_export.model.plm_family import PlmFamily
from xadapter_export.model.pooling import take_positions


@dataclass(frozen=True)
class LayerParts:
    """Paths from one layer to its parts, as BERT names them."""

    query: str = "attention.self.query"
    key: str = "attention.self.key"
    value: str = "attention.self.value"
    attention_out: str = "attention.output.dense"
    attention_norm: str = "attention.output.LayerNorm"
    up: str = "intermediate.dense"
    activation: str = "intermediate.intermediate_act_fn"
    down: str = "output.dense"
    norm: str = "output.LayerNorm"


class PostNormLayer(PackedLayer):
    """One post-norm layer as it goes into the graph.

    Args:
        layer: Where the weights are.
        parts: Where they are in it.
        num_heads: Attention heads.
        packed: See ``PackedAttention``.
        at_positions: See ``PackedAttention``.
    """

    def __init__(
        self, layer: nn.Module, parts: LayerParts, num_heads: int, *, packed: bool, at_positions: bool
    ) -> None:
        super().__init__()
        part = {name: layer.get_submodule(path) for name, path in vars(parts).items()}
        self.attention = PackedAttention(
            [cast(nn.Linear, part[name]) for name in ("query", "key", "value")],
            cast(nn.Linear, part["attention_out"]),
            num_heads,
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


class Bert(PlmFamily):
    """BERT.

    Attributes:
        layer_parts: Where the parts of a layer are.
    """

    name = "bert"
    model_types: ClassVar[tuple[str, ...]] = ("bert",)
    layer_parts: ClassVar[LayerParts] = LayerParts()

    @property
    def layers(self) -> Sequence[nn.Module]:
        """See ``PlmFamily.layers``."""
        return self.encoder.encoder.layer  # type: ignore[no-any-return]  # of transformers

    def embed(self, input_ids: Tensor, token_type_ids: Tensor | None = None) -> Tensor:
        """See ``PlmFamily.embed``."""
        types = torch.zeros_like(input_ids) if token_type_ids is None else token_type_ids
        return self.encoder.embeddings(input_ids=input_ids, token_type_ids=types)  # type: ignore[no-any-return]  # same

    def mlm_transform(self, hidden: Tensor) -> Tensor:
        """See ``PlmFamily.mlm_transform``."""
        return self.model.get_submodule("cls.predictions.transform")(hidden)  # type: ignore[no-any-return]  # nn.Module call

    def export_layer(self, index: int, *, packed: bool = True, at_positions: bool = False) -> nn.Module:
        """See ``PlmFamily.export_layer``."""
        layer = self.layers[index]
        return PostNormLayer(
            layer, self.layer_parts, self.num_heads, packed=packed, at_positions=at_positions
        )


class Roberta(Bert):
    """RoBERTa and its multilingual and French relatives; a text's first position is after that of padding."""

    name = "roberta"
    model_types = ("roberta", "xlm-roberta", "camembert")

    @property
    def max_seq(self) -> int:
        """See ``PlmFamily.max_seq``."""
        return super().max_seq - int(self.model.config.pad_token_id) - 1

    def mlm_transform(self, hidden: Tensor) -> Tensor:
        """See ``PlmFamily.mlm_transform``."""
        head = self.model.get_submodule("lm_head")
        return head.get_submodule("layer_norm")(nn.functional.gelu(head.get_submodule("dense")(hidden)))  # type: ignore[no-any-return]  # nn.Module call


class Electra(Bert):
    """ELECTRA's generator, which has the MLM head; embeddings may be narrower than states."""

    name = "electra"
    model_types = ("electra",)

    def embed(self, input_ids: Tensor, token_type_ids: Tensor | None = None) -> Tensor:
        """See ``PlmFamily.embed``."""
        hidden = super().embed(input_ids, token_type_ids)
        if hasattr(self.encoder, "embeddings_project"):
            hidden = self.encoder.embeddings_project(hidden)
        return hidden

    def mlm_transform(self, hidden: Tensor) -> Tensor:
        """See ``PlmFamily.mlm_transform``."""
        return self.model.get_submodule("generator_predictions")(hidden)  # type: ignore[no-any-return]  # nn.Module call


class DistilBert(Bert):
    """DistilBERT, which has no token types."""

    name = "distilbert"
    model_types = ("distilbert",)
    layer_parts = LayerParts(
        query="attention.q_lin",
        key="attention.k_lin",
        value="attention.v_lin",
        attention_out="attention.out_lin",
        attention_norm="sa_layer_norm",
        up="ffn.lin1",
        activation="ffn.activation",
        down="ffn.lin2",
        norm="output_layer_norm",
    )

    @property
    def layers(self) -> Sequence[nn.Module]:
        """See ``PlmFamily.layers``."""
        return self.encoder.transformer.layer  # type: ignore[no-any-return]  # of transformers

    def embed(self, input_ids: Tensor, token_type_ids: Tensor | None = None) -> Tensor:
        """See ``PlmFamily.embed``."""
        del token_type_ids
        return self.encoder.embeddings(input_ids=input_ids)  # type: ignore[no-any-return]  # of transformers

    def mlm_transform(self, hidden: Tensor) -> Tensor:
        """See ``PlmFamily.mlm_transform``."""
        hidden = self.model.get_submodule("activation")(self.model.get_submodule("vocab_transform")(hidden))
        return self.model.get_submodule("vocab_layer_norm")(hidden)  # type: ignore[no-any-return]  # nn.Module call
