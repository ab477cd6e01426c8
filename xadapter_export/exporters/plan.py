"""What was asked for, checked against the checkpoint, before anything is made."""

from collections.abc import Mapping
from dataclasses import dataclass

from xadapter_export.bundle.manifest import Candidate, ExpertSet, Task
from xadapter_export.errors import ConfigError, UnsupportedError
from xadapter_export.experts import reads_bank, reads_text
from xadapter_export.exporters.request import ExportRequest, Retrieval
from xadapter_export.model.x_adapter_model import XAdapterModel
from xadapter_export.runtime.candidates import find_candidates
from xadapter_export.tasks import FEATURE_EXTRACTION, TASKS

_MIN_SEQ = 8  # tokens; the example that is traced needs them


@dataclass(frozen=True)
class Plan:
    """What was asked for, checked against the checkpoint.

    ``longest`` has the most tokens of ``seq``, and of ``clip_seq`` where the checkpoint has a CLIP, by axis.
    """

    expert_sets: tuple[ExpertSet, ...]
    task: Task
    candidates: tuple[Candidate, ...] | None
    longest: Mapping[str, int]
    retrieval: Retrieval
    split: bool
    explains: bool = False

    @property
    def max_seq(self) -> int:
        """The most tokens of the PLM."""
        return self.longest["seq"]

    @property
    def candidate_ids(self) -> list[int] | None:
        """Token ids of the candidates."""
        return None if self.candidates is None else [candidate.token_id for candidate in self.candidates]


def make_plan(model: XAdapterModel, request: ExportRequest) -> Plan:
    """Checks what ``export`` was asked for against a checkpoint.

    Raises:
        XAdapterError: If an option does not fit it.
    """
    wanted = request.expert_sets or (model.config.experts,)
    expert_sets = tuple(dict.fromkeys(wanted))
    for expert_set in expert_sets:
        model.active_experts(expert_set)
    task = request.task or model.config.task
    if task != model.config.task and TASKS[task].head is not None:
        raise UnsupportedError(
            f"task {task}: this checkpoint was trained for {model.config.task} and can be exported for that, "
            f"or for a task without a head, such as {FEATURE_EXTRACTION.name}"
        )
    if request.candidates is not None and not TASKS[task].fills_words:
        raise ConfigError(f"{task} does not use candidates; remove them")
    limit, max_seq = model.plm.max_seq, request.max_seq
    if max_seq is not None and not _MIN_SEQ <= max_seq <= limit:
        raise ConfigError(f"max_seq {max_seq}: PLM {model.plm.source} takes {_MIN_SEQ} to {limit} tokens")
    longest = {"seq": max_seq or limit}
    if model.clip is not None:
        longest["clip_seq"] = model.clip.context_length
    candidates = None
    if request.candidates is not None:
        candidates = tuple(find_candidates(model.plm.tokenizer, request.candidates))
    explains = request.with_explanations
    plan = Plan(
        expert_sets, task, candidates, longest, request.retrieval, request.is_split, explains=explains
    )
    _check_split(model, plan)
    if explains and not any(map(model.active_experts, expert_sets)):
        raise ConfigError(
            "there is nothing to explain without experts",
            where=f"experts {', '.join(expert_sets)}",
            hint="remove --with-explanations, or add --experts v, t or vt",
        )
    return plan


def _check_split(model: XAdapterModel, plan: Plan) -> None:
    """Refuses to split where nothing can be.

    Raises:
        ConfigError: If no graph reads CLIP, or no search can be moved out of one.
    """
    if not plan.split:
        return
    searched = reads_bank(model.config.experts) and model.config.retrieval.mode == "topk"
    if plan.retrieval == "external" and not (searched and any(reads_bank(name) for name in plan.expert_sets)):
        raise ConfigError(
            "these graphs do not search a bank, so there is nothing to move out of them",
            where=f"experts {', '.join(plan.expert_sets)}",
            got="a static bank, all of which is read"
            if reads_bank(model.config.experts) and not searched
            else None,
            hint="remove --retrieval external; use --split alone to split a graph that uses CLIP",
        )
    if not any(reads_clip(model, name) for name in plan.expert_sets):
        raise ConfigError(
            "no graph uses CLIP, so there is nothing to split",
            where=f"experts {', '.join(plan.expert_sets)}",
            hint="remove --split",
        )


def reads_clip(model: XAdapterModel, expert_set: ExpertSet) -> bool:
    """Whether the graph of a set has CLIP's text tower in it."""
    return reads_text(expert_set) or (reads_bank(expert_set) and model.config.retrieval.mode == "topk")
