"""The layer ``gated``: what an expert adds to a token is scaled by a number that the token gives."""

import torch
from torch import Tensor, nn

from xadapter_export.model.x_adapter import LayerShape, TokenQueryLayer


class GatedLayer(TokenQueryLayer):
    """``sigmoid(W_g LN(h) + b_g)`` times what the library's layer adds, trained and in the graph alike."""

    def __init__(self, shape: LayerShape) -> None:
        super().__init__(shape)
        self.gate = nn.Linear(shape.hidden_size, 1)

    def contribute(self, hidden: Tensor, context: Tensor) -> Tensor:
        """``(B, T, H)`` states and ``(B, T, R)`` of what was attended to, to ``(B, T, H) float32``."""
        return torch.sigmoid(self.gate(self.norm(hidden))) * super().contribute(hidden, context)
