"""Scores a bundle with onnxruntime; nothing here imports PyTorch."""

from collections.abc import Mapping, Sequence

from xadapter_export.bundle.manifest import ExpertSet
from xadapter_export.evaluation.scorer import Scorer
from xadapter_export.experts import EXPERT_SETS
from xadapter_export.runtime.encoders import load_encoders
from xadapter_export.runtime.session import XAdapterSession
from xadapter_export.runtime.text import Int64Array
from xadapter_export.sessions.session import Array


class BundleScorer(Scorer):
    """A bundle to be scored.

    Args:
        session: The loaded bundle.
    """

    def __init__(self, session: XAdapterSession) -> None:
        manifest = session.manifest
        self._session = session
        self.name = session.bundle.name
        self.task = manifest.task
        self.labels = manifest.labels or ()
        self.expert_sets = tuple(name for name in EXPERT_SETS if name in manifest.expert_sets)
        self.default_experts = manifest.default_expert_set
        self.candidates = manifest.candidates
        self.pictures = session.pictures
        self.encoder = load_encoders(session.bundle)[1]

    def compute(
        self, inputs: Mapping[str, Int64Array], outputs: Sequence[str], experts: ExpertSet
    ) -> list[Array]:
        """Run the graph of the expert set; see ``Scorer.compute``.

        Raises:
            BundleError: If onnxruntime cannot compute it.
        """
        computed = self._session.run(inputs, outputs=outputs, experts=experts)
        return [computed[name] for name in outputs]

    def check_experts(self, experts: ExpertSet) -> None:
        """See ``Scorer.check_experts``.

        Raises:
            BundleError: If the bundle does not hold the expert set.
        """
        self._session.manifest.variants_of(experts)

    def reads_clip(self, experts: ExpertSet) -> bool:
        """See ``Scorer.reads_clip``."""
        spec = self._session.manifest.expert_sets[experts]
        return any(tensor.name == "clip_input_ids" for tensor in spec.inputs)

    def retrieves(self, experts: ExpertSet) -> bool:
        """See ``Scorer.retrieves``."""
        return self._session.retrieves(experts)
