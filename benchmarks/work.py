"""How much there is to compute: operations and weights of a cell, by formula from the model's shapes.

Dimensions: B batch, T PLM tokens, S CLIP tokens, P positions that are answered, H hidden size, W CLIP text
width, R adapter width, K retrieved pictures, N bank size, D CLIP embedding size.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from benchmarks.feeds import CANDIDATES, Head
from xadapter_export.bundle.manifest import ExpertSet

if TYPE_CHECKING:
    from torch import nn

    from xadapter_export.model.x_adapter_model import XAdapterModel

BYTES = {"fp32": 4.0, "fp16": 2.0, "bf16": 2.0, "int8": 1.0, "int4": 0.5}


@dataclass(frozen=True)
class Work:
    """What a run computes.

    Attributes:
        gflop: 1e9 operations, two to a multiply-add, of matrix products and attention.
        weights: Weights that are multiplied with, each once.
        bank: Numbers of the bank that is searched; not counted in ``weights``, as they stay fp32.
    """

    gflop: float
    weights: int
    bank: int

    def weight_bytes(self, precision: str) -> float:
        """Bytes that must be read at least once."""
        return self.weights * BYTES[precision] + 4.0 * self.bank


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a model's matrices, in weights.

    Attributes:
        hidden: H.
        layers: Number of PLM layers.
        layer: Weights of the matrices of one PLM layer.
        transform: Those of the MLM head without its decoder.
        decoder: Those of its decoder.
        clip_width: W; 0 without CLIP.
        clip_layers: Number of CLIP layers.
        clip_layer: Weights of the matrices of one CLIP layer.
        projection: Those of CLIP's projection.
        clip_context: CLIP's context length.
        adapter_layers: Number of PLM layers with experts.
        adapter_width: R.
        per_token: Weights of an expert's query and output matrices.
        per_memory: Those of its key and value matrices, by expert.
        k: K.
        bank: N D.
    """

    hidden: int
    layers: int
    layer: int
    transform: int
    decoder: int
    clip_width: int
    clip_layers: int
    clip_layer: int
    projection: int
    clip_context: int | None
    adapter_layers: int
    adapter_width: int
    per_token: int
    per_memory: dict[str, int]
    k: int
    bank: int

    @classmethod
    def of(cls, model: "XAdapterModel") -> "ModelShape":
        """Read the sizes off a model with top-k retrieval."""
        plm, clip, config = model.plm, model.clip, model.config
        fills = model.task.fills_words
        decoder = _weights(plm.decoder) if fills else 0
        return cls(
            hidden=plm.hidden_size,
            layers=len(plm.layers),
            layer=_weights(plm.layers[0]),
            transform=_weights(plm.model) - _weights(plm.encoder) - decoder if fills else 0,
            decoder=decoder,
            clip_width=clip.width if clip else 0,
            clip_layers=len(clip.layers) if clip else 0,
            clip_layer=sum(w.numel() for w in clip.layers[0].parameters() if w.ndim == 2) if clip else 0,
            projection=clip.width * clip.feature_dim if clip else 0,
            clip_context=clip.context_length if clip else None,
            adapter_layers=len(config.layers),
            adapter_width=config.adapter_width,
            per_token=2 * plm.hidden_size * config.adapter_width,
            per_memory={
                "v": 2
                * (model.bank_features.shape[1] if "v" in config.experts else 0)
                * config.adapter_width,
                "t": 2 * (clip.width if clip else 0) * config.adapter_width,
            },
            k=config.retrieval.k,
            bank=model.bank_features.numel() if "v" in config.experts else 0,
        )

    def work(
        self,
        experts: ExpertSet,
        head: Head,
        *,
        batch: int,
        seq: int,
        clip_seq: int,
        positions: int,
        is_least: bool,
    ) -> Work:
        """Count the work of one run.

        Args:
            experts: Expert set.
            head: What is answered; ``candidates`` counts a decoder of 11 rows.
            batch: B.
            seq: T.
            clip_seq: S as it is fed.
            positions: P, at which the decoder runs.
            is_least: Count the least that gives the answer: the last layers compute only what is read.
        """
        active = [] if experts == "none" else list(experts)
        hidden, only_read = self.hidden, is_least and head != "features"
        # Multiply-adds for each text.
        adds = self.layers * (self.layer * seq + 2 * hidden * seq * seq)
        if only_read:  # keys and values of the last layer at every token, the rest at the P positions
            unread = seq - positions
            adds -= (self.layer - 2 * hidden * hidden) * unread + 2 * hidden * seq * unread
        decoder = hidden * len(CANDIDATES) if head == "candidates" and is_least else self.decoder
        decoder = 0 if head == "features" else decoder
        adds += (self.transform + decoder) * positions
        weights = self.layers * self.layer + self.transform + decoder
        if active:
            width = self.clip_width
            adds += self.clip_layers * (self.clip_layer * clip_seq + 2 * width * clip_seq * clip_seq)
            if is_least and active == ["v"]:
                unread = clip_seq - 1
                adds -= (self.clip_layer - 2 * width * width) * unread + 2 * width * clip_seq * unread
            weights += self.clip_layers * self.clip_layer
        for expert in active:
            items = self.k if expert == "v" else clip_seq
            each = (
                self.per_token * seq + self.per_memory[expert] * items + 2 * self.adapter_width * seq * items
            )
            adds += self.adapter_layers * each
            weights += self.adapter_layers * (self.per_token + self.per_memory[expert])
        if "v" in active:
            adds += self.bank + self.projection
            weights += self.projection
        return Work(2e-9 * batch * adds, weights, self.bank if "v" in active else 0)


def _weights(module: "nn.Module") -> int:
    from torch import nn

    return sum(part.weight.numel() for part in module.modules() if isinstance(part, nn.Linear))
