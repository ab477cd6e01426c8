"""The way from checkpoint to bundle: load, merge, trace, check, derive, pack, prove, compare."""

import gc
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal, get_args

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

from xadapter_export.bundle.bank_rows import BankRows
from xadapter_export.bundle.folder import (
    FEATURES_NAME,
    MANIFEST_NAME,
    PARITY_NAME,
    REFERENCE_NAME,
    Bundle,
    list_files,
    staged_folder,
)
from xadapter_export.bundle.machine import read_machine
from xadapter_export.bundle.manifest import (
    Agreement,
    DeploymentTarget,
    ExpertSet,
    ExpertSetSpec,
    Manifest,
    Optimisation,
    Precision,
    Target,
    Task,
    Variant,
)
from xadapter_export.bundle.model_card import model_card
from xadapter_export.bundle.onnx_session import Array, OnnxSession, create_session, open_variant
from xadapter_export.bundle.opsets import check_opset
from xadapter_export.bundle.retrieval import Retriever
from xadapter_export.bundle.split_session import SplitSession
from xadapter_export.errors import ParityError, XAdapterError
from xadapter_export.experts import EXPERT_SETS, reads_bank
from xadapter_export.exporters import agreement, pack
from xadapter_export.exporters.axis_profile import check_cases, check_limits
from xadapter_export.exporters.calibration import calibration_feeds
from xadapter_export.exporters.check import check_graph
from xadapter_export.exporters.deploy import DeployOptions, check_options, deploy
from xadapter_export.exporters.derive import add_up, derive, variant_file, weights_file
from xadapter_export.exporters.merge import STEPS, MergedModel, Part, Retrieval, Step
from xadapter_export.exporters.plan import Gates, Plan, check_split, make_plan, reads_clip
from xadapter_export.exporters.quantise import (
    RECIPES,
    Ranges,
    Recipe,
    Rounding,
    measure_products,
    round_products,
)
from xadapter_export.exporters.reference import reference_inputs, reference_outputs
from xadapter_export.exporters.request import (
    Request,
    check_gate_options,
    check_names,
    check_request,
    make_request,
)
from xadapter_export.exporters.savings import count_savings
from xadapter_export.exporters.trace import trace
from xadapter_export.model.builtin import BUILTIN
from xadapter_export.model.x_adapter_model import XAdapterModel
from xadapter_export.parity.prove import prove_bundle
from xadapter_export.parity.recorded import noise, record
from xadapter_export.parity.reference import sample_reference
from xadapter_export.parity.report import ParityReport
from xadapter_export.runtime.choose import choices_of
from xadapter_export.tasks import TASKS

Stage = Literal["load", "merge", "trace", "check", "calibrate", "derive", "prove", "compare", "deploy"]
OnStage = Callable[[Stage, str], None]
Graphs = dict[Part, ir.Model]

# From the fastest to the most exact; the exporter takes the first that passes its gate.
OPENVINO_RECIPES: dict[Precision, tuple[str | Recipe, ...]] = {
    "int8": ("int8_calibrated", "int8_weights_only", *RECIPES["int8"][-2:]),
    "int4": ("int4_weights",),
}


def _say_nothing(stage: Stage, detail: str) -> None:
    del stage, detail


@dataclass(frozen=True)
class ExportResult:
    """A finished bundle: where it is, what it says of itself, and the proof.

    ``left_out`` has a line for each variant that was below its gate, and so is not in the bundle.
    """

    folder: Path
    manifest: Manifest
    parity: ParityReport
    left_out: tuple[str, ...] = ()


class LeftOutWarning(UserWarning):
    """A variant that was asked for is below its gate and is not in the bundle."""


def export(
    model: XAdapterModel | str | Path = BUILTIN,
    output: str | Path = "bundle",
    experts: ExpertSet | Sequence[ExpertSet] | None = None,
    opset: int = 17,
    *,
    task: Task | None = None,
    candidates: Sequence[str] | None = None,
    max_seq: int | None = None,
    variants: Sequence[str] = (),
    precisions: Sequence[Precision] = (),
    targets: Sequence[Target | DeploymentTarget] = (),
    calibration: str | Path | None = None,
    evaluate: str | Path | None = None,
    min_agreement: float | None = None,
    max_points_lost: float | None = None,
    skip_failed: bool = False,
    without: Collection[Step] = (),
    deploy_options: DeployOptions | None = None,
    retrieval: Retrieval = "in-graph",
    split: bool = False,
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
        variants: Exactly these, as ``cpu-int8`` or ``tensorrt-rtx-fp16``; the bundle also has the graphs that
            deployments among them are made from.
        precisions: With ``targets``, shorthand for more variants; see ``request.make_request``.
        targets: Likewise; without any of the three the bundle has ``onnx-fp32``.
        calibration: Texts, one a line or in a table, that lossy variants are made and compared with; those
            that came with the checkpoint if None, or else sentences of our own and the bank's captions.
        evaluate: Questions with known answers that lossy variants are held to; see ``read_questions``.
        min_agreement: Gate for the share of equal answers; the default of the precision if None.
        max_points_lost: Gate for the accuracy; the default of the precision if None.
        skip_failed: Leave out lossy variants that are below a gate, with a warning, and write the others.
        without: Exact optimisations to leave out.
        deploy_options: What deployments must fit.
        retrieval: Where the bank is searched: ``in-graph``, or ``external``, by the app, with an index of its
            choice; every set that reads CLIP is then split.
        split: Make two graphs of every set that reads CLIP: what a text asks CLIP and the bank, and the
            answer, so that a session can keep the first for texts that come again.
        force: Replace a bundle that is already there.
        on_stage: Called as each stage begins, with its name and what it works on.

    Raises:
        CheckpointError: If the checkpoint cannot be read, or does not hold an expert that was asked for.
        ConfigError: If options do not fit the checkpoint.
        UnsupportedError: If the opset, PLM or CLIP is not supported.
        OutputExistsError: If the folder is in the way.
        OutputWriteError: If it cannot be written.
        ParityError: If a graph does not say what PyTorch says, or a lossy one is below its gate; the bundle
            is kept beside as ``.rejected``. With ``skip_failed``, if of an expert set no variant is left.
        XAdapterError: If a deployment cannot be made; the bundle is kept there too.
    """
    check_opset(opset)
    check_gate_options(min_agreement, max_points_lost)
    check_names("expert set", (experts,) if isinstance(experts, str) else experts or (), EXPERT_SETS)
    check_names("retrieval", (retrieval,), get_args(Retrieval))
    check_names("optimisation of the merge", without, STEPS)
    request = make_request(variants, precisions, targets)
    split = split or retrieval == "external"
    judging: dict[str, object] = {
        "calibration": calibration,
        "evaluate": evaluate,
        "skip_failed": skip_failed,
    }
    judging |= {"min_agreement": min_agreement, "max_points_lost": max_points_lost}
    check_request(request, split=split, judging=judging)
    deploy_options = deploy_options or DeployOptions()
    check_options(request.deployments, deploy_options)
    with staged_folder(Path(output), force=force) as staged:
        if not isinstance(model, XAdapterModel):
            on_stage("load", str(model))
            source, model = str(model), XAdapterModel.from_pretrained(model)
        else:
            source = type(model).__name__
        plan = make_plan(model, experts, task, candidates, max_seq, retrieval, split=split)
        check_split(model, plan)
        context = model.clip.config.context_length if model.clip is not None else None
        check_limits(deploy_options.profile, max_seq=plan.max_seq, context_length=context)
        reads_masks = TASKS[plan.task].reads_masks
        cases = reference_inputs(model.make_text_encoder(plan.max_seq), with_masks=reads_masks)
        unread = set() if reads_masks else {"mask_positions"}
        if not any(reads_clip(model, expert_set) for expert_set in plan.expert_sets):
            unread.add("clip_input_ids")
        read = [{name: case[name] for name in case if name not in unread} for case in cases.values()]
        check_cases(deploy_options.profile, read)
        gates = Gates(min_agreement=min_agreement, max_points_lost=max_points_lost, skip_failed=skip_failed)
        if request.is_lossy:
            gates = gates.read(model, plan, calibration, evaluate)
        was_training = model.training
        try:
            builder = _Builder(model.eval(), source, plan, opset, staged.path, frozenset(without), on_stage)
            manifest, report = builder.build(request.graphs, gates, cases, staged.final.name)
        finally:
            model.train(was_training)
        try:
            report.raise_if_failed()
            for variant in manifest.variants:
                if variant.agreement is not None:
                    agreement.check(variant.agreement, f"{variant.name}, experts {variant.expert_set}")
            say = partial(on_stage, "deploy")
            made = deploy(staged.path, manifest, request, deploy_options, say)
        except OSError:  # one about the output, which keeps nothing
            raise
        except XAdapterError as error:
            rejected = staged.keep_as_rejected()
            raise type(error)(f"{error}; the bundle was rejected and kept in {rejected}") from error
        if made:
            manifest = manifest.model_copy(update={"deployments": made})
            manifest = _write_manifest(staged.path, manifest, staged.final.name)
    left_out = [*builder.left_out, *_not_deployed(request, manifest)]
    for line in left_out[len(builder.left_out) :]:
        warnings.warn(line, LeftOutWarning, stacklevel=2)
    return ExportResult(staged.final, manifest, report, tuple(left_out))


@dataclass
class _Builder:
    """Fills a staged folder."""

    model: XAdapterModel
    source: str
    plan: Plan
    opset: int
    folder: Path
    without: frozenset[Step]
    on_stage: OnStage
    specs: dict[ExpertSet, ExpertSetSpec] = field(default_factory=dict)
    variants: list[Variant] = field(default_factory=list)
    reference: dict[str, Array] = field(default_factory=dict)
    weights: dict[str, pack.SharedWeights] = field(default_factory=dict)
    rounding: Rounding = field(default_factory=Rounding)
    answers: dict[ExpertSet, tuple[agreement.Probe, agreement.Answers]] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)

    def build(
        self,
        wanted: Sequence[tuple[Target, Precision]],
        gates: Gates,
        cases: dict[str, dict[str, Array]],
        name: str,
    ) -> tuple[Manifest, ParityReport]:
        """Writes and proves every variant of every expert set."""
        plan, folder = self.plan, self.folder
        (folder / "onnx").mkdir()
        if plan.retrieval == "external" and self.model.bank is not None:
            self.model.bank.save_features(folder / FEATURES_NAME)
        try:
            for expert_set in plan.expert_sets:
                self._write_set(expert_set, wanted, cases, gates)
        finally:
            for weights in self.weights.values():
                weights.close()
        for expert_set in plan.expert_sets:
            for target, precision in wanted:
                if target == "openvino":
                    self._write_ir(expert_set, precision, gates)
        self._check_remaining(wanted)

        components = {component for spec in self.specs.values() for component in spec.component_parameters}
        retrieves = any(output.name == "retrieved" for spec in self.specs.values() for output in spec.outputs)
        pack.write_companions(self.model, folder, with_clip="clip" in components, with_rows=retrieves)
        manifest = pack.make_manifest(
            self.model,
            self.source,
            plan.task,
            self.opset,
            plan.max_seq,
            plan.candidates,
            self.specs,
            tuple(self.variants),
        )
        self.on_stage("prove", ", ".join(plan.expert_sets))
        gc.collect()  # what was traced has cycles, and holds copies of most weights
        _write_reference(folder, self.reference)
        _write_manifest(folder, manifest, name)
        report = prove_bundle(folder, verify=False)
        self._record_lossy(manifest)
        proven = [
            v.model_copy(update={"parity": report.variant_parity(v.expert_set, v.name)})
            if v.agreement is None
            else v
            for v in self.variants
        ]
        kept = tuple(variant for variant in proven if (variant.target, variant.precision) in wanted)
        manifest = manifest.model_copy(update={"variants": kept})
        _remove_unnamed(folder, self.variants, kept)
        _write_reference(folder, sample_reference(self.reference))
        (folder / PARITY_NAME).write_text(report.to_json(), encoding="utf-8")
        return _write_manifest(folder, manifest, name), report

    def _write_set(
        self,
        expert_set: ExpertSet,
        wanted: Sequence[tuple[Target, Precision]],
        cases: dict[str, dict[str, Array]],
        gates: Gates,
    ) -> None:
        """Writes the portable graph of a set, wanted or not, and what is derived from it for onnxruntime."""
        model, plan = self.model, self.plan
        self.on_stage("merge", expert_set)
        merge = partial(MergedModel, model, expert_set, plan.task, plan.candidate_ids, self.without)
        whole = merge().eval()
        saved = count_savings(model, whole, expert_set, plan.task, plan.candidate_ids, self.without)
        self.reference |= reference_outputs(model, whole, expert_set, plan.candidate_ids, cases)
        self.reference |= {f"{c}/in/{n}": cases[c][n] for c in cases for n in whole.input_names}
        pack.write_projections(model, self.folder, whole)
        input_names = whole.input_names
        parts: dict[Part, MergedModel] = {"whole": whole}
        if plan.split and reads_clip(model, expert_set):
            parts = {part: merge(part, plan.retrieval).eval() for part in ("query", "answer")}
        del whole
        portable: Graphs = {}
        for part, merged in parts.items():
            self.on_stage("trace", expert_set if part == "whole" else f"{expert_set}, {part}")
            portable[part] = trace(merged, _example(model), self.opset, plan.max_seq)
            self.on_stage("check", expert_set)
            check_graph(portable[part], merged, self.opset)
            pack.hide_taps(portable[part], merged)
        self.specs[expert_set] = pack.expert_set_spec(portable, parts, input_names)
        self._write_graphs(expert_set, "onnx", "fp32", portable, saved)
        self._answer_in_fp32(expert_set, gates)
        ranges: dict[Part, Ranges] = {}
        if any(precision in RECIPES for _, precision in wanted):
            ranges = self._measure(expert_set, portable, gates)
        if ("openvino", "int8") in wanted:
            round_products(portable["whole"], ranges["whole"], self.rounding)
        for target, precision in wanted:
            if target == "openvino" or (target, precision) == ("onnx", "fp32"):
                continue
            for recipe in RECIPES.get(precision, (None,)) if target == "cpu" else (None,):
                self.on_stage("derive", f"{expert_set}, {recipe.name if recipe else f'{target}-{precision}'}")
                graphs: Graphs = {}
                done: list[Optimisation] = []
                for part, merged in parts.items():
                    graphs[part], steps = derive(
                        portable[part], merged, target, precision, recipe, ranges.get(part), self.rounding
                    )
                    done += steps
                measured = None
                if precision != "fp32":
                    measured = self._try(expert_set, graphs, precision, gates)
                if measured is None or agreement.passes(measured):
                    break
            if self._leaves_out(f"{target}-{precision}", expert_set, measured, gates):
                continue
            self._write_graphs(expert_set, target, precision, graphs, [*saved, *add_up(done)], measured)

    def _write_graphs(
        self,
        expert_set: ExpertSet,
        target: Target,
        precision: Precision,
        graphs: Graphs,
        optimisations: list[Optimisation],
        measured: Agreement | None = None,
    ) -> None:
        """Writes a variant's graphs beside the others; the weights of all are in one file."""
        path, weights = weights_file(target, precision), self.weights
        if path not in weights:
            weights[path] = pack.SharedWeights(self.folder / path)
        files: dict[Part, str] = {}
        size = 0
        for part, graph in graphs.items():
            size += weights[path].take(graph)
            files[part] = variant_file(expert_set, self.plan.expert_sets[0], target, precision, part)
            pack.write_graph(graph.clone(), self.folder / files[part])
            size += (self.folder / files[part]).stat().st_size
        file = files.get("answer") or files["whole"]
        self._add(
            expert_set, target, precision, file, (path,), size, optimisations, measured, files.get("query")
        )

    def _answer_in_fp32(self, expert_set: ExpertSet, gates: Gates) -> None:
        """Asks the portable graph what lossy ones will be asked."""
        if gates.calibration is None:
            return
        self.on_stage("compare", f"{expert_set}, fp32")
        encoder = self.model.make_text_encoder(self.plan.max_seq)
        spec, task = self.specs[expert_set], self.plan.task
        texts = gates.calibration.compared_on
        probe = agreement.make_probe(encoder, spec, task, texts, gates.questions)
        session = self._open_portable(expert_set)
        self.answers[expert_set] = probe, agreement.collect(agreement.as_runner(session), probe, "fp32")

    def _open_portable(self, expert_set: ExpertSet) -> OnnxSession:
        variant = self._portable(expert_set)
        files: dict[Part, Path] = {"whole": self.folder / variant.file}
        if variant.query_file is not None:
            files = {"query": self.folder / variant.query_file, "answer": self.folder / variant.file}
        return self._open(expert_set, files)

    def _open(self, expert_set: ExpertSet, files: Mapping[Part, Path]) -> OnnxSession:
        """Opens a graph, or two as one, while the bundle is being made."""
        sessions = {part: create_session(file) for part, file in files.items()}
        if "whole" in sessions:
            return sessions["whole"]
        spec, retriever = self.specs[expert_set], None
        if spec.searches_outside:
            bank = pack.bank_spec(self.model, self.specs)
            assert bank is not None  # a set searches it
            retriever = Retriever(bank, BankRows(self.folder / FEATURES_NAME), None)
        return SplitSession(sessions["query"], sessions["answer"], spec, expert_set, retriever)

    def _try(
        self,
        expert_set: ExpertSet,
        graphs: Graphs,
        precision: Precision,
        gates: Gates,
    ) -> Agreement:
        """How graphs that are not written yet agree with fp32."""
        self.on_stage("compare", f"{expert_set}, {precision}")
        with TemporaryDirectory(dir=self.folder) as folder:
            files: dict[Part, Path] = {}
            for part, graph in graphs.items():
                files[part] = Path(folder) / f"{part}.onnx"
                ir.save(graph, files[part], external_data=f"{part}.onnx_data")
            return self._compare(expert_set, self._open(expert_set, files), precision, gates)

    def _compare(
        self, expert_set: ExpertSet, session: OnnxSession, precision: Precision, gates: Gates
    ) -> Agreement:
        probe, reference = self.answers[expert_set]
        return agreement.compare(
            reference,
            agreement.collect(agreement.as_runner(session), probe, precision),
            probe,
            precision,
            min_agreement=gates.min_agreement,
            max_points_lost=gates.max_points_lost,
            judged_on=gates.judged_on(str(read_machine())),
        )

    def _leaves_out(self, name: str, expert_set: ExpertSet, measured: Agreement | None, gates: Gates) -> bool:
        """Whether a variant is below its gate and is to be left out; then a warning says so."""
        if measured is None or not gates.skip_failed:
            return False
        try:
            agreement.check(measured, f"{name}, experts {expert_set}")
        except ParityError as error:
            self.left_out.append(f"left out: {error}")
            warnings.warn(self.left_out[-1], LeftOutWarning, stacklevel=2)
            return True
        return False

    def _check_remaining(self, wanted: Sequence[tuple[Target, Precision]]) -> None:
        """Refuses a bundle that would have nothing that was asked for of an expert set."""
        for expert_set in self.plan.expert_sets:
            written = {(v.target, v.precision) for v in self.variants if v.expert_set == expert_set}
            if written.isdisjoint(wanted):
                raise ParityError(
                    "every variant that was asked for is below its gate, so there is no bundle",
                    where=f"experts {expert_set}",
                    got=", ".join("-".join(pair) for pair in wanted),
                    mend="ask for fp32 too, or lower the gate with --min-agreement or --max-points-lost",
                )

    def _record_lossy(self, manifest: Manifest) -> None:
        """Keeps what every lossy variant says, and how far that is off, for whoever runs it elsewhere."""
        bundle = Bundle(self.folder, manifest)
        recorded: dict[str, Array] = {}
        for variant in [v for v in self.variants if v.agreement is not None]:
            spec = self.specs[variant.expert_set]
            recorded |= record(open_variant(bundle, variant), variant, spec, self.reference)
        self.reference |= recorded | noise(recorded, self.reference)

    def _calibration(self, expert_set: ExpertSet, gates: Gates) -> list[dict[str, Array]]:
        """Inputs to calibrate with; none where nothing lossy was asked for."""
        if gates.calibration is None:
            return []
        encoder = self.model.make_text_encoder(self.plan.max_seq)
        names = [tensor.name for tensor in self.specs[expert_set].inputs]
        return calibration_feeds(encoder, gates.calibration.made_with, names)

    def _measure(self, expert_set: ExpertSet, portable: Graphs, gates: Gates) -> dict[Part, Ranges]:
        """What goes into the products of each graph of a set."""
        self.on_stage("calibrate", expert_set)
        feeds = self._calibration(expert_set, gates)
        found: dict[Part, Ranges] = {}
        for part, graph in portable.items():
            if part == "answer":  # it reads what the query graph says
                session = self._open_portable(expert_set)
                assert isinstance(session, SplitSession)  # it has an answer graph
                feeds = [session.answer_feed(feed) for feed in feeds]
            found[part] = measure_products(graph, feeds, self.rounding)
        return found

    def _portable(self, expert_set: ExpertSet) -> Variant:
        return next(v for v in self.variants if (v.expert_set, v.name) == (expert_set, "onnx-fp32"))

    def _write_ir(self, expert_set: ExpertSet, precision: Precision, gates: Gates) -> None:
        from xadapter_export.bundle.openvino_session import create_openvino_session
        from xadapter_export.exporters.openvino_ir import convert_to_ir

        default = self.plan.expert_sets[0]
        path = variant_file(expert_set, default, "openvino", precision)
        weights = str(Path(path).with_suffix(".bin").as_posix())
        (self.folder / path).parent.mkdir(exist_ok=True)
        feeds = self._calibration(expert_set, gates)
        portable = self._portable(expert_set)
        done = list(portable.optimisations)
        measured = None
        for recipe in OPENVINO_RECIPES.get(precision, (f"openvino-{precision}",)):
            name = recipe.name if isinstance(recipe, Recipe) else recipe
            self.on_stage("derive", f"{expert_set}, {name}")
            source, file = self.folder / portable.file, self.folder / path
            convert_to_ir(
                source,
                file,
                precision,
                feeds,
                weights_only=name == "int8_weights_only",
                blocks=recipe if isinstance(recipe, Recipe) else None,
                rounding=self.rounding,
            )
            size = sum((self.folder / name).stat().st_size for name in (path, weights))
            if precision == "fp32":
                break
            self.on_stage("compare", f"{expert_set}, openvino-{precision}")
            measured = self._compare(expert_set, create_openvino_session(file), precision, gates)
            step = Optimisation(
                name=name, lossless=False, unit="bytes", before=portable.size_bytes, after=size
            )
            done = [*portable.optimisations, step]
            if agreement.passes(measured):
                break
        if self._leaves_out(f"openvino-{precision}", expert_set, measured, gates):
            for left in (path, weights):
                (self.folder / left).unlink()
            if not any((self.folder / path).parent.iterdir()):
                (self.folder / path).parent.rmdir()
            return
        self._add(expert_set, "openvino", precision, path, (weights,), size, done, measured)

    def _add(
        self,
        expert_set: ExpertSet,
        target: Target,
        precision: Precision,
        file: str,
        weight_files: tuple[str, ...],
        size_bytes: int,
        optimisations: list[Optimisation],
        measured: Agreement | None,
        query_file: str | None = None,
    ) -> None:
        variant = Variant(
            expert_set=expert_set,
            precision=precision,
            target=target,
            file=file,
            query_file=query_file,
            weight_files=weight_files,
            size_bytes=size_bytes,
            optimisations=tuple(optimisations),
            parity=None,
            agreement=measured,
        )
        self.variants.append(variant)
        self.variants.sort(key=lambda v: (self.plan.expert_sets.index(v.expert_set), v.name != "onnx-fp32"))


def _not_deployed(request: Request, manifest: Manifest) -> list[str]:
    """A line for each deployment that is not there because the graph it is made from was left out."""
    there = {(v.expert_set, v.target, v.precision) for v in manifest.variants}
    return [
        f"left out: {'-'.join(name)}, experts {expert_set}, with {'-'.join(request.source(name))}, "
        "which it is made from"
        for name in request.deployments
        for expert_set in manifest.expert_sets
        if (expert_set, *request.source(name)) not in there
    ]


def _remove_unnamed(folder: Path, variants: Sequence[Variant], kept: Sequence[Variant]) -> None:
    """Removes the files that no kept variant names: those of a portable graph that was not asked for."""
    named = {path for variant in kept for path in variant.all_files}
    for path in {path for variant in variants for path in variant.all_files} - named:
        (folder / path).unlink()
    if not any((folder / "onnx").iterdir()):
        (folder / "onnx").rmdir()


def _write_manifest(folder: Path, manifest: Manifest, name: str) -> Manifest:
    """Writes the manifest and, before it lists the files, the model card."""
    (folder / "README.md").write_text(model_card(manifest, name, choices_of(manifest)), encoding="utf-8")
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
        example["memory_t"] = torch.zeros(2, 5, model.clip.config.width)
        example["memory_t_mask"] = torch.ones(2, 5, dtype=torch.int64)
    if reads_bank(model.config.experts):
        example["memory_v"] = torch.zeros(2, model.config.retrieval.k, model.bank_features.shape[1])
    return example
