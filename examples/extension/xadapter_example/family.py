"""The family ``albert``: language models whose layers share their weights."""

from collections.abc import Sequence
from typing import cast

from torch import Tensor, nn

from xadapter_export.model.plm_family import PlmFamily


class Albert(PlmFamily):
    """ALBERT: narrow embeddings, and groups of layers that are run again and again."""

    name = "albert"
    model_types = ("albert",)
    settings_names = (*PlmFamily.settings_names, "num_hidden_layers", "num_hidden_groups")

    @property
    def layers(self) -> Sequence[nn.Module]:
        """Every layer; one that has the weights of another is there again."""
        config, groups = self.model.config, self.encoder.encoder.albert_layer_groups
        share = config.num_hidden_layers / config.num_hidden_groups
        return [groups[int(index / share)] for index in range(config.num_hidden_layers)]

    def embed(self, input_ids: Tensor, token_type_ids: Tensor | None = None) -> Tensor:
        """``(B, T) int64`` to ``(B, T, H) float32``."""
        hidden = self.encoder.embeddings(input_ids, token_type_ids)
        return cast(Tensor, self.encoder.encoder.embedding_hidden_mapping_in(hidden))

    def mlm_transform(self, hidden: Tensor) -> Tensor:
        """``(..., H) float32`` to ``(..., E)``, which the decoder reads."""
        head = self.model.get_submodule("predictions")
        dense, norm = head.get_submodule("dense"), head.get_submodule("LayerNorm")
        return cast(Tensor, norm(head.get_submodule("activation")(dense(hidden))))
