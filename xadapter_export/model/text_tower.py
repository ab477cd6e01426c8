"""What an X-adapter, the exporter and the search of a bank need of a frozen text tower.

Dimensions: B batch, S tower tokens, P tokens that are read, W width of states, D width of features.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import ClassVar, Self

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn

from xadapter_export.model.export_layers import Context, PlainLayer
from xadapter_export.model.identity import weights_sha256
from xadapter_export.model.pooling import take_positions


class TextTower(nn.Module, ABC):
    """A frozen text tower: one subclass for each kind, listed in ``model.towers.TEXT_TOWERS``.

    Its tokens, padding and pooling are facts that it states here; nothing else assumes them. A graph gets the
    tower's own layers until ``export_layer`` gives faster ones.

    Args:
        tokenizer: Its tokenizer; it puts as many special tokens around a text as around an empty one.
        source: Folder, hub id or the like that it came from; else what it is called in messages.

    Attributes:
        name: Name of its kind, as checkpoints have it.
        is_at_source: Whether ``load_clip`` finds it by its source again; a checkpoint stores it otherwise.
        context_length: Longest input in tokens, special tokens included.
        width: W.
        feature_dim: D.
        end_token_id: The last token of a text, which truncation keeps.
        pad_token_id: What comes after it.
        exact_at_true_length: Whether padding changes nothing, so that a text is read at its true length and
            padded to the longest of its batch. Otherwise every text is padded to ``context_length``.
        pools_one_token: Whether the feature is made of the state at ``end_position`` alone.
    """

    name: ClassVar[str]
    context_length: int
    width: int
    feature_dim: int
    end_token_id: int
    pad_token_id: int = 0
    exact_at_true_length: bool = True
    pools_one_token: bool = True

    def __init__(self, tokenizer: Tokenizer, source: str) -> None:
        super().__init__()
        self.tokenizer = tokenizer
        self.source = source
        self.is_at_source = True

    @classmethod
    @abstractmethod
    def load(cls, source: str | Path | nn.Module) -> Self:
        """Loads a tower of this kind from a folder, a hub id, or what else it is known by.

        Raises:
            CheckpointError: If it is not found, or is broken.
            UnsupportedError: If it is of another kind.
        """

    @abstractmethod
    def save(self, folder: Path, dtype: torch.dtype = torch.float32) -> None:
        """Writes a folder that ``load`` reads; nobody asks for a dtype in which a weight changes."""

    @property
    @abstractmethod
    def settings(self) -> dict[str, object]:
        """Settings that belong to the identity of the tower: what its weights do not say, as JSON has it."""

    @property
    def weights(self) -> Mapping[str, Tensor]:
        """The weights by the names that belong to the identity of the tower."""
        return self.state_dict()

    @property
    def sha256(self) -> str:
        """Hash of the weights in memory, the settings and the tokenizer."""
        return weights_sha256(self.weights, self.settings, self.tokenizer)

    def train(self, mode: bool = True) -> Self:
        """Stays in evaluation mode, whatever ``mode`` asks: a frozen tower has no dropout."""
        del mode
        return super().train(False)

    @property
    @abstractmethod
    def layers(self) -> Sequence[nn.Module]:
        """The layers in their order."""

    @abstractmethod
    def embed(self, clip_input_ids: Tensor) -> Tensor:
        """Embeds tokens: ``(B, S) int64`` to ``(B, S, W) float32``; S is at most the context length."""

    @abstractmethod
    def prepare(self, clip_input_ids: Tensor) -> Context:
        """Makes what all layers of one call need beside the states, such as masks, of ``(B, S) int64``."""

    @abstractmethod
    def layer(self, index: int, hidden: Tensor, context: Context) -> Tensor:
        """Runs one layer: ``(B, S, W) float32``, with what ``prepare`` gave, to the same shape."""

    def finish(self, hidden: Tensor) -> Tensor:
        """Turns states after the last layer into those that experts read and that are pooled.

        It may be given one token only, ``(B, 1, W) float32``, so each must be finished alone.
        """
        return hidden

    @abstractmethod
    def token_mask(self, clip_input_ids: Tensor) -> Tensor:
        """Real tokens, which come first, the last one included: ``(B, S) int64`` to ``(B, S) bool``."""

    @abstractmethod
    def end_position(self, clip_input_ids: Tensor) -> Tensor:
        """Index of the token whose state is pooled: ``(B, S) int64`` to ``(B,) int64``."""

    @abstractmethod
    def project(self, pooled: Tensor) -> Tensor:
        """Feature from the pooled state: ``(B, W) float32`` to ``(B, D) float32``."""

    def pool(self, token_states: Tensor, clip_input_ids: Tensor) -> Tensor:
        """Feature from all states: ``(B, S, W) float32`` and ``(B, S) int64`` to ``(B, D) float32``."""
        end = self.end_position(clip_input_ids)[:, None]
        return self.project(take_positions(token_states, end).squeeze(1))

    def token_states(self, clip_input_ids: Tensor) -> Tensor:
        """Finished states of all tokens: ``(B, S) int64`` to ``(B, S, W) float32``."""
        hidden, context = self.embed(clip_input_ids), self.prepare(clip_input_ids)
        for index in range(len(self.layers)):
            hidden = self.layer(index, hidden, context)
        return self.finish(hidden)

    def export_layer(self, index: int, *, packed: bool = True) -> nn.Module:  # noqa: ARG002  # the default
        """Makes a layer as it goes into the graph, with the arguments and results of ``PlainLayer``.

        It must give what ``layer`` gives, up to rounding; the parity check holds it to that. Where positions
        are asked for, they are ``end_position``.

        Args:
            index: Number of the layer.
            packed: See ``PackedAttention``.
        """
        return PlainLayer(partial(self.layer, index))
