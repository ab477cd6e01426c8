"""What was asked for, checked against the checkpoint, before anything is made."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from xadapter_export.bundle.manifest import Candidate, ExpertSet, Precision, Target, Task
from xadapter_export.errors import ConfigError, UnsupportedError
from xadapter_export.exporters import agreement
from xadapter_export.exporters.calibration import CalibrationTexts, calibration_texts
from xadapter_export.exporters.merge import Retrieval
from xadapter_export.model.x_adapter_model import XAdapterModel
from xadapter_export.runtime.candidates import find_candidates

_TASKS: dict[Task, tuple[Task, ...]] = {
    "fill-mask": ("fill-mask", "feature-extraction"),
    "text-classification": ("text-classification", "feature-extraction"),
    "feature-extraction": ("feature-extraction",),
}
# What is made from two graphs as well as from one: nothing here is calibrated on a graph's inputs.
_SPLIT: tuple[tuple[Target, Precision], ...] = (
    ("onnx", "fp32"),
    ("onnx", "fp16"),
    ("cuda", "fp32"),
    ("cuda", "fp16"),
    ("cpu", "fp32"),
    ("cpu", "int8"),
    ("cpu", "int4"),
)
_NUM_TEXTS = 600  # half to calibrate with, half to compare on
_MIN_SEQ = 8  # tokens; the example that is traced needs them


def check_names(kind: str, names: Iterable[str], known: Sequence[str]) -> None:
    """Refuses names that are not known, which Python callers can misspell.

    Raises:
        ConfigError: If there is one.
    """
    for name in names:
        if name not in known:
            raise ConfigError(f"unknown {kind}", where=name, expected=f"one of {', '.join(known)}")


@dataclass(frozen=True)
class Plan:
    """What was asked for, checked against the checkpoint."""

    expert_sets: tuple[ExpertSet, ...]
    task: Task
    candidates: tuple[Candidate, ...] | None
    max_seq: int
    retrieval: Retrieval
    split: bool

    @property
    def candidate_ids(self) -> list[int] | None:
        """Token ids of the candidates."""
        return None if self.candidates is None else [candidate.token_id for candidate in self.candidates]


def make_plan(
    model: XAdapterModel,
    experts: ExpertSet | Sequence[ExpertSet] | None,
    task: Task | None,
    candidates: Sequence[str] | None,
    max_seq: int | None,
    retrieval: Retrieval,
    *,
    split: bool,
) -> Plan:
    """Checks what ``export`` was asked for against a checkpoint.

    Raises:
        XAdapterError: If an option does not fit it.
    """
    wanted: Sequence[ExpertSet] = (
        (experts,) if isinstance(experts, str) else experts or (model.config.experts,)
    )
    expert_sets = tuple(dict.fromkeys(wanted))
    for expert_set in expert_sets:
        model.active_experts(expert_set)
    task = task or model.config.task
    if task not in _TASKS[model.config.task]:
        raise UnsupportedError(
            f"task {task}: this checkpoint was trained for {model.config.task} and can be exported for "
            f"{' or '.join(_TASKS[model.config.task])}"
        )
    if candidates is not None and task != "fill-mask":
        raise ConfigError(f"candidates go with fill-mask, not with {task}; leave them out")
    longest = model.plm.max_seq
    if max_seq is not None and not _MIN_SEQ <= max_seq <= longest:
        raise ConfigError(f"max_seq {max_seq}: PLM {model.plm.source} takes {_MIN_SEQ} to {longest} tokens")
    found = None if candidates is None else tuple(find_candidates(model.plm.tokenizer, candidates))
    return Plan(expert_sets, task, found, max_seq or longest, retrieval, split)


def check_split(model: XAdapterModel, plan: Plan, wanted: Sequence[tuple[Target, Precision]]) -> None:
    """Refuses what cannot be split.

    Raises:
        ConfigError: If nothing can be, or a variant that was asked for is made from a whole graph.
    """
    if not plan.split:
        return
    searched = "v" in model.config.experts and model.config.retrieval.mode == "topk"
    if plan.retrieval == "external" and not (searched and any("v" in name for name in plan.expert_sets)):
        raise ConfigError(
            "there is no search of a bank to be moved out of the graph",
            where=f"experts {', '.join(plan.expert_sets)}",
            got="a static bank, all of which is read"
            if "v" in model.config.experts and not searched
            else None,
            mend="leave --retrieval external out; --split alone splits what reads CLIP",
        )
    if not any(reads_clip(model, name) for name in plan.expert_sets):
        raise ConfigError(
            "no graph reads CLIP, so there is nothing to split",
            where=f"experts {', '.join(plan.expert_sets)}",
            mend="leave --split out",
        )
    whole = [f"{target}-{precision}" for target, precision in wanted if (target, precision) not in _SPLIT]
    if whole:
        raise ConfigError(
            "this is not made from split graphs",
            got=", ".join(whole),
            expected=f"some of {', '.join('-'.join(pair) for pair in _SPLIT)}",
            mend="choose one of those, or leave --split and --retrieval external out",
        )


def reads_clip(model: XAdapterModel, expert_set: ExpertSet) -> bool:
    """Whether the graph of a set has CLIP's text tower in it."""
    return "t" in expert_set or ("v" in expert_set and model.config.retrieval.mode == "topk")


@dataclass(frozen=True)
class Gates:
    """What lossy variants are made and judged with; no texts where there are none."""

    made_with: CalibrationTexts | None = None
    compared_on: CalibrationTexts | None = None
    questions: agreement.Questions | None = None
    min_agreement: float | None = None
    max_points_lost: float | None = None

    @classmethod
    def make(
        cls,
        model: XAdapterModel,
        plan: Plan,
        wanted: Sequence[tuple[Target, Precision]],
        calibration: str | Path | None,
        evaluate: str | Path | None,
        min_agreement: float | None,
        max_points_lost: float | None,
    ) -> Self:
        """Reads the texts and questions; none where every graph is fp32.

        Raises:
            XAdapterError: If they cannot be read, or were given and every graph is fp32.
        """
        if all(precision == "fp32" for _, precision in wanted):
            if any(option is not None for option in (calibration, evaluate, min_agreement, max_points_lost)):
                raise ConfigError(
                    "calibration, evaluate and the gates are for precisions below fp32",
                    expected="fp16, int8 or int4 among the precisions",
                    got="fp32 alone",
                )
            return cls()
        words = [candidate.word for candidate in plan.candidates or ()]
        source = None if calibration is None else Path(calibration)
        texts = calibration_texts(model, source, plan.task, _NUM_TEXTS, candidates=words)
        made_with, compared_on = texts.split()
        questions = agreement.read_questions(
            model, None if evaluate is None else Path(evaluate), plan.task, plan.candidates
        )
        return cls(made_with, compared_on, questions, min_agreement, max_points_lost)
