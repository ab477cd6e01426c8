"""The way from checkpoint to bundle: load, merge, trace, check, pack, prove."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from xadapter_export.bundle.folder import (
    MANIFEST_NAME,
    PARITY_NAME,
    REFERENCE_NAME,
    list_files,
    staged_folder,
)
from xadapter_export.bundle.manifest import Candidate, ExpertSet, ExpertSetSpec, Manifest, Task, Variant
from xadapter_export.bundle.onnx_session import Array
from xadapter_export.bundle.opsets import check_opset
from xadapter_export.errors import ConfigError, ParityError, UnsupportedError
from xadapter_export.exporters import pack
from xadapter_export.exporters.check import check_graph
from xadapter_export.exporters.merge import MergedModel
from xadapter_export.exporters.reference import reference_inputs, reference_outputs
from xadapter_export.exporters.trace import trace
from xadapter_export.model.builtin import BUILTIN
from xadapter_export.model.x_adapter_model import XAdapterModel
from xadapter_export.parity.prove import prove_bundle
from xadapter_export.parity.reference import sample_reference
from xadapter_export.parity.report import ParityReport
from xadapter_export.runtime.candidates import find_candidates

Stage = Literal["load", "merge", "trace", "check", "pack", "prove"]
OnStage = Callable[[Stage, str], None]

_TASKS: dict[Task, tuple[Task, ...]] = {
    "fill-mask": ("fill-mask", "feature-extraction"),
    "text-classification": ("text-classification", "feature-extraction"),
    "feature-extraction": ("feature-extraction",),
}
_MIN_SEQ = 8  # tokens; the example that is traced needs them


def _say_nothing(stage: Stage, detail: str) -> None:
    del stage, detail


@dataclass(frozen=True)
class ExportResult:
    """A finished bundle: where it is, what it says of itself, and the proof."""

    folder: Path
    manifest: Manifest
    parity: ParityReport


def export(
    model: XAdapterModel | str | Path = BUILTIN,
    output: str | Path = "bundle",
    experts: ExpertSet | Sequence[ExpertSet] | None = None,
    opset: int = 17,
    *,
    task: Task | None = None,
    candidates: Sequence[str] | None = None,
    max_seq: int | None = None,
    force: bool = False,
    on_stage: OnStage = _say_nothing,
) -> ExportResult:
    """Makes a proven bundle.

    Args:
        model: A model, a checkpoint folder, a hub id, or ``"builtin"`` for the checkpoint that is shipped.
        output: Folder of the bundle.
        experts: Expert set or sets; the first is the bundle's default. None for all the checkpoint holds.
        opset: ONNX opset, 17 to 21.
        task: What the graphs answer; the checkpoint's task if None.
        candidates: Words that fill-mask chooses from; the MLM head is sliced to them.
        max_seq: Longest input in tokens; the PLM's limit if None.
        force: Replace a bundle that is already there.
        on_stage: Called as each stage begins, with its name and what it works on.

    Raises:
        CheckpointError: If the checkpoint cannot be read, or does not hold an expert that was asked for.
        ConfigError: If options do not fit the checkpoint.
        UnsupportedError: If the opset, PLM or CLIP is not supported.
        OutputExistsError: If the folder is in the way.
        OutputWriteError: If it cannot be written.
        ParityError: If a graph does not say what PyTorch says; the bundle is kept beside as ``.rejected``.
    """
    check_opset(opset)
    with staged_folder(Path(output), force=force) as staged:
        if not isinstance(model, XAdapterModel):
            on_stage("load", str(model))
            source, model = str(model), XAdapterModel.from_pretrained(model)
        else:
            source = type(model).__name__
        plan = _plan(model, experts, task, candidates, max_seq)
        was_training = model.training
        try:
            manifest, report = _build(
                model.eval(), source, plan, opset, staged.path, staged.final.name, on_stage
            )
        finally:
            model.train(was_training)
        if not report.passed:
            rejected = staged.keep_as_rejected()
            try:
                report.raise_if_failed()
            except ParityError as error:
                raise ParityError(f"{error}; the bundle was rejected and kept in {rejected}") from error
    return ExportResult(staged.final, manifest, report)


@dataclass(frozen=True)
class _Plan:
    """What was asked for, checked against the checkpoint."""

    expert_sets: tuple[ExpertSet, ...]
    task: Task
    candidates: tuple[Candidate, ...] | None
    max_seq: int

    @property
    def candidate_ids(self) -> list[int] | None:
        return None if self.candidates is None else [candidate.token_id for candidate in self.candidates]


def _plan(
    model: XAdapterModel,
    experts: ExpertSet | Sequence[ExpertSet] | None,
    task: Task | None,
    candidates: Sequence[str] | None,
    max_seq: int | None,
) -> _Plan:
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
    return _Plan(expert_sets, task, found, max_seq or longest)


def _build(
    model: XAdapterModel, source: str, plan: _Plan, opset: int, folder: Path, name: str, on_stage: OnStage
) -> tuple[Manifest, ParityReport]:
    """Fills a staged folder and proves it."""
    default = plan.expert_sets[0]
    cases = reference_inputs(model.make_text_encoder(plan.max_seq), with_masks=plan.task == "fill-mask")
    reference: dict[str, Array] = {}
    specs: dict[ExpertSet, ExpertSetSpec] = {}
    variants: list[Variant] = []
    (folder / "onnx").mkdir()
    weights = pack.SharedWeights(folder / pack.WEIGHTS_FILE)
    for expert_set in plan.expert_sets:
        on_stage("merge", expert_set)
        merged = MergedModel(model, expert_set, plan.task, plan.candidate_ids).eval()
        on_stage("trace", expert_set)
        graph = trace(merged, _example(model), opset, plan.max_seq)
        on_stage("check", expert_set)
        check_graph(graph, merged, opset)
        reference |= reference_outputs(model, merged, expert_set, plan.task, plan.candidate_ids, cases)
        reference |= {f"{c}/in/{n}": cases[c][n] for c in cases for n in merged.input_names}
        on_stage("pack", expert_set)
        pack.hide_taps(graph, merged)
        specs[expert_set] = pack.expert_set_spec(graph, merged)
        weight_bytes = weights.take(graph)
        path = pack.graph_file(expert_set, default)
        pack.write_graph(graph, folder / path)
        size_bytes = (folder / path).stat().st_size + weight_bytes
        variants.append(
            Variant(
                expert_set=expert_set,
                precision="fp32",
                target="onnx",
                file=path,
                weight_files=(pack.WEIGHTS_FILE,),
                size_bytes=size_bytes,
                parity=None,
            )
        )
    weights.close()
    components = {component for spec in specs.values() for component in spec.component_parameters}
    retrieves = any(output.name == "retrieved" for spec in specs.values() for output in spec.outputs)
    pack.write_companions(model, folder, with_clip="clip" in components, with_rows=retrieves)
    manifest = pack.make_manifest(
        model, source, plan.task, opset, plan.max_seq, plan.candidates, specs, tuple(variants)
    )

    on_stage("prove", ", ".join(plan.expert_sets))
    _write_reference(folder, reference)
    _write_manifest(folder, manifest)
    report = prove_bundle(folder, verify=False)
    proven = tuple(v.model_copy(update={"parity": report.variant_parity(v.expert_set)}) for v in variants)
    manifest = manifest.model_copy(update={"variants": proven})
    _write_reference(folder, sample_reference(reference))
    (folder / PARITY_NAME).write_text(report.to_json(), encoding="utf-8")
    (folder / "README.md").write_text(pack.model_card(manifest, name), encoding="utf-8")
    return _write_manifest(folder, manifest), report


def _write_manifest(folder: Path, manifest: Manifest) -> Manifest:
    complete = manifest.model_copy(update={"files": list_files(folder)})
    (folder / MANIFEST_NAME).write_text(complete.to_json(), encoding="utf-8")
    return complete


def _write_reference(folder: Path, arrays: dict[str, Array]) -> None:
    np.savez_compressed(folder / REFERENCE_NAME, **arrays)  # type: ignore[arg-type]  # keywords are arrays, not flags


def _example(model: XAdapterModel) -> dict[str, Tensor]:
    """Inputs to trace with: two rows, every axis of another length, all ids real."""
    ids = torch.arange(14).reshape(2, 7) % model.plm.vocab_size
    example = {
        "input_ids": ids,
        "attention_mask": torch.tensor([[1] * 7, [1] * 6 + [0]]),
        "token_type_ids": torch.zeros_like(ids),
        "mask_positions": torch.tensor([[1, 2, 3], [2, 2, 2]]),
    }
    if model.clip is not None:
        example["clip_input_ids"] = torch.tensor([[1, 2, 3, 4, model.clip.end_token_id]] * 2)
    return example
