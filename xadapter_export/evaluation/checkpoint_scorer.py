"""Scores a checkpoint with PyTorch; the only module of the evaluation that imports it."""

from collections.abc import Mapping, Sequence

import torch

from xadapter_export.bundle.manifest import ExpertSet
from xadapter_export.evaluation.scorer import Scorer
from xadapter_export.experts import EXPERT_SETS, experts_of, reads_bank, reads_text
from xadapter_export.model.x_adapter_model import XAdapterModel
from xadapter_export.runtime.text import Int64Array
from xadapter_export.sessions.session import Array


class CheckpointScorer(Scorer):
    """A checkpoint, or a model in memory, to be scored.

    Args:
        model: The model; it is switched to evaluation mode.
        name: What to call it in a report.
    """

    def __init__(self, model: XAdapterModel, name: str) -> None:
        self._model = model.eval()
        self._device = next(model.plm.model.parameters()).device
        held = set(model.config.experts)
        self.name = name
        self.task = model.config.task
        self.labels = model.config.labels
        self.expert_sets = tuple(s for s in EXPERT_SETS if set(experts_of(s)) <= held)
        self.default_experts = model.config.experts
        self.candidates = None
        self.encoder = model.text_encoder
        retrieves = self.retrieves(self.default_experts) and model.bank is not None
        self.pictures = model.bank.pictures if retrieves and model.bank else ()

    def compute(
        self, inputs: Mapping[str, Int64Array], outputs: Sequence[str], experts: ExpertSet
    ) -> list[Array]:
        """Run the model; see ``Scorer.compute``."""
        tensors = {name: torch.from_numpy(array).to(self._device) for name, array in inputs.items()}
        with torch.inference_mode():
            if "logits" in outputs:
                output = self._model(**tensors, experts=experts)
                logits, memory = output.logits, output.memory
            else:
                logits, memory = None, self._model.memory(tensors.get("clip_input_ids"), experts)
        found = {
            "logits": logits,
            "retrieved": memory.retrieved,
            "retrieved_scores": memory.retrieved_scores,
        }
        return [found[name].cpu().numpy() for name in outputs]

    def check_experts(self, experts: ExpertSet) -> None:
        """See ``Scorer.check_experts``.

        Raises:
            CheckpointError: If the plug-in does not hold one of the experts.
        """
        self._model.active_experts(experts)

    def reads_clip(self, experts: ExpertSet) -> bool:
        """See ``Scorer.reads_clip``."""
        return reads_text(experts) or self.retrieves(experts)

    def retrieves(self, experts: ExpertSet) -> bool:
        """See ``Scorer.retrieves``."""
        return reads_bank(experts) and self._model.config.retrieval.mode == "topk"
