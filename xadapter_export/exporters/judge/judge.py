"""The judge of an export: compares lossy variants with fp32, and says which are left out."""

import warnings
from dataclasses import dataclass, field
from pathlib import Path

from xadapter_export.bundle.machine import read_machine
from xadapter_export.bundle.manifest import Agreement, ExpertSet, ExpertSetSpec, JudgedOn, Task
from xadapter_export.errors import ParityError
from xadapter_export.exporters.judge import agreement
from xadapter_export.exporters.judge.calibration import Calibration, read_calibration
from xadapter_export.exporters.plan import Plan
from xadapter_export.exporters.request import ExportRequest
from xadapter_export.model.x_adapter_model import XAdapterModel
from xadapter_export.runtime.text import TextEncoder
from xadapter_export.sessions.session import OnnxSession
from xadapter_export.targets import VariantName


class LeftOutWarning(UserWarning):
    """A variant that was asked for is below its gate and is not in the bundle."""


@dataclass(frozen=True)
class Gates:
    """What lossy variants are made and judged with; no texts where there are none.

    Attributes:
        request: Whoever asks for other gates than the default ones says so there.
        calibration: The texts.
        questions: Questions with a known answer.
    """

    request: ExportRequest
    calibration: Calibration | None = None
    questions: agreement.Questions | None = None

    def judged_on(self, processor: str) -> JudgedOn | None:
        """Return what a manifest says of the texts and questions; None where there are none."""
        if self.calibration is None:
            return None
        asked = None if self.questions is None else self.questions.source
        return JudgedOn(texts=self.calibration.source, questions=asked, processor=processor)


def read_gates(model: XAdapterModel, plan: Plan, request: ExportRequest) -> Gates:
    """Return the gates that were asked for, with texts and questions where there are lossy variants.

    Raises:
        XAdapterError: If they cannot be read.
    """
    if not request.wanted.is_lossy:
        return Gates(request)
    words = [candidate.word for candidate in plan.candidates or ()]
    source = None if request.calibration is None else Path(request.calibration)
    asked = None if request.evaluate is None else Path(request.evaluate)
    return Gates(
        request,
        read_calibration(model, source, plan.task, candidates=words),
        agreement.read_questions(model, asked, plan.task, plan.candidates),
    )


@dataclass
class Judge:
    """What lossy variants are compared with, set by set.

    Args:
        gates: What they are judged with.

    Attributes:
        left_out: A line for each variant that was below its gate, where those are left out.
    """

    gates: Gates
    left_out: list[str] = field(default_factory=list)
    _answers: dict[ExpertSet, tuple[agreement.Probe, agreement.Answers]] = field(default_factory=dict)

    def ask_fp32(
        self,
        session: OnnxSession,
        encoder: TextEncoder,
        expert_set: ExpertSet,
        spec: ExpertSetSpec,
        task: Task,
    ) -> None:
        """Ask the portable graph of a set what lossy ones will be asked."""
        assert self.gates.calibration is not None  # there are lossy ones
        texts = self.gates.calibration.compared_on
        probe = agreement.make_probe(encoder, spec, task, texts, self.gates.questions)
        self._answers[expert_set] = probe, agreement.collect(agreement.as_runner(session), probe, "fp32")

    def compare(self, session: OnnxSession, expert_set: ExpertSet, name: VariantName) -> Agreement:
        """Return how a lossy variant agrees with the portable graph of its set."""
        probe, reference = self._answers[expert_set]
        return agreement.compare(
            reference,
            agreement.collect(agreement.as_runner(session), probe, name.precision),
            probe,
            name.precision,
            min_agreement=self.gates.request.min_agreement,
            max_points_lost=self.gates.request.max_points_lost,
            judged_on=self.gates.judged_on(str(read_machine())),
        )

    def leaves_out(self, measured: Agreement | None, expert_set: ExpertSet, name: VariantName) -> bool:
        """Whether a variant is below its gate and is to be left out; then a warning says so."""
        if measured is None or not self.gates.request.skip_failed:
            return False
        try:
            agreement.check(measured, f"{name}, experts {expert_set}")
        except ParityError as error:
            self.left_out.append(f"left out: {error}")
            warnings.warn(self.left_out[-1], LeftOutWarning, stacklevel=2)
            return True
        return False
