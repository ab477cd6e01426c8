"""What an X-adapter needs of a frozen PLM, and what a family of PLMs says for it.

Dimensions: B batch, T PLM tokens, P tokens that are read, H hidden size, E width before the decoder, V
vocabulary.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import partial
from typing import Any, ClassVar, cast

from tokenizers import Tokenizer
from torch import Tensor, nn

from xadapter_export.model.export_layers import Context, PlainLayer, additive_mask
from xadapter_export.model.identity import weights_sha256
from xadapter_export.torchvision_cure import cure_torchvision

cure_torchvision()

from optimum.utils import NormalizedConfigManager, NormalizedTextConfig  # noqa: E402  # cured first
from transformers import PreTrainedModel  # noqa: E402  # torchvision must be cured first


class PlmFamily(nn.Module, ABC):
    """A frozen PLM, seen through its family: one subclass for each, listed in ``model.plm.FAMILIES``.

    A family must say how tokens are embedded, what its layers are, and what the parts of its MLM head are.
    The rest has defaults: a layer takes the additive mask and gives the next states, nothing comes after the
    last layer, and a graph gets transformers' own layers.

    Args:
        model: The transformers model: with its MLM head for fill-mask, else the bare encoder.
        tokenizer: Its tokenizer.
        special: Ids of the tokens ``mask`` (absent where the PLM has none) and ``pad``.
        source: Hub id or path it came from; else what it is called in messages.

    Attributes:
        name: Name of the family, as checkpoints and manifests have it.
        model_types: transformers' ``config.model_type`` values that belong to it.
        settings_names: What a configuration says that the weights' names and shapes do not, and the result
            depends on.
        encoder: The model without its head.
        is_at_source: Whether ``load_plm(source)`` finds it again; a checkpoint stores it otherwise.
    """

    name: ClassVar[str]
    model_types: ClassVar[tuple[str, ...]]
    settings_names: ClassVar[tuple[str, ...]] = (
        "model_type",
        "num_attention_heads",
        "hidden_act",
        "activation",
        "layer_norm_eps",
        "pad_token_id",
    )

    def __init__(
        self, model: PreTrainedModel, tokenizer: Tokenizer, special: dict[str, int], source: str
    ) -> None:
        super().__init__()
        self.model = cast(PreTrainedModel, model.requires_grad_(False).train(False))
        self.tokenizer = tokenizer
        self.special = special
        self.source = source
        self.is_at_source = True
        try:
            sizes = NormalizedConfigManager.get_normalized_config_class(model.config.model_type)(model.config)
        except KeyError:  # optimum does not know the architecture
            sizes = NormalizedTextConfig(model.config)
        self.hidden_size = int(sizes.hidden_size)
        self.vocab_size = int(sizes.vocab_size)
        self.num_heads = int(sizes.num_attention_heads)

    @property
    def encoder(self) -> Any:
        """The model without its head; its parts are found by the names that transformers gives them."""
        return self.model.base_model

    @property
    def max_seq(self) -> int:
        """Longest input in tokens, special tokens included."""
        return int(self.model.config.max_position_embeddings)

    @property
    def has_token_type_ids(self) -> bool:
        """Whether it is given ``token_type_ids``."""
        return int(getattr(self.model.config, "type_vocab_size", 0)) > 1

    @property
    def settings(self) -> dict[str, object]:
        """Settings that belong to the identity of the PLM."""
        return {name: getattr(self.model.config, name, None) for name in self.settings_names}

    @property
    def sha256(self) -> str:
        """Hash of the weights in memory, the settings and the tokenizer."""
        return weights_sha256(self.model.state_dict(), self.settings, self.tokenizer)

    def train(self, mode: bool = True) -> "PlmFamily":
        """Stays in evaluation mode, whatever ``mode`` asks: a frozen PLM has no dropout."""
        del mode
        return super().train(False)

    @property
    @abstractmethod
    def layers(self) -> Sequence[nn.Module]:
        """The layers in their order; one that has its weights from another is there again."""

    @abstractmethod
    def embed(self, input_ids: Tensor, token_type_ids: Tensor | None = None) -> Tensor:
        """Embeds tokens.

        Args:
            input_ids: ``(B, T) int64``.
            token_type_ids: ``(B, T) int64``; zeros if None. Not used where the PLM has none.

        Returns:
            ``(B, T, H) float32``. What the first layer reads.
        """

    def prepare(self, hidden: Tensor, attention_mask: Tensor) -> Context:
        """Makes what all layers of one call need beside the states: masks, position biases, rotations.

        Args:
            hidden: ``(B, T, H) float32``. States that enter some layer, not always the first; only shape,
                dtype and device may matter.
            attention_mask: ``(B, T) int64``, 1 at real tokens.

        Returns:
            The additive mask ``(B, 1, 1, T)``; a family may give tensors, or tuples or dictionaries of them.
        """
        return additive_mask(attention_mask, hidden.dtype)

    def layer(self, index: int, hidden: Tensor, context: Context) -> Tensor:
        """Runs one layer: ``(B, T, H) float32``, with what ``prepare`` gave, to the same shape."""
        return self.layers[index](hidden, context)  # type: ignore[no-any-return]  # nn.Module call

    def finish(self, hidden: Tensor) -> Tensor:
        """Turns states after the last layer into the PLM's answer, such as by a final norm.

        It may be given some tokens only, ``(B, P, H) float32``, so each must be finished alone.
        """
        return hidden

    @abstractmethod
    def mlm_transform(self, hidden: Tensor) -> Tensor:
        """What the MLM head does before its decoder: ``(..., H) float32`` to ``(..., E)``."""

    @property
    def decoder(self) -> nn.Linear:
        """The linear decoder of the MLM head, E to V; candidates are some of its rows."""
        return cast(nn.Linear, self.model.get_output_embeddings())  # type: ignore[no-untyped-call]  # transformers

    def mlm_logits(self, hidden: Tensor) -> Tensor:
        """MLM head: ``(..., H) float32`` to ``(..., V) float32``."""
        return self.decoder(self.mlm_transform(hidden))  # type: ignore[no-any-return]  # nn.Module call

    def in_head(self, name: str) -> bool:
        """Whether a weight of ``model`` belongs to the MLM head and not to the encoder."""
        return self.encoder is not self.model and not name.startswith(f"{self.model.base_model_prefix}.")

    def export_layer(self, index: int, *, packed: bool = True, at_positions: bool = False) -> nn.Module:  # noqa: ARG002  # the default
        """Makes a layer as it goes into the graph, with the arguments and results of ``PlainLayer``.

        It must give what ``layer`` gives, up to rounding; the parity check holds it to that.

        Args:
            index: Number of the layer.
            packed: See ``PackedAttention``.
            at_positions: Whether it will be run at some positions only.
        """
        return PlainLayer(partial(self.layer, index))
