"""The way from checkpoint to bundle: load, merge, trace, check, derive, pack, prove, compare."""

import gc
import itertools
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal, Unpack

import numpy as np
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
)
from xadapter_export.bundle.manifest import (
    Agreement,
    Deployment,
    ExpertSet,
    ExpertSetSpec,
    Manifest,
    Variant,
)
from xadapter_export.bundle.model_card import model_card
from xadapter_export.bundle.signature import BundleSigner
from xadapter_export.bundle.staging import StagedFolder, staged_folder
from xadapter_export.errors import ParityError, XAdapterError
from xadapter_export.experts import T, V, keep_name, reads_bank
from xadapter_export.exporters import pack
from xadapter_export.exporters.judge import agreement
from xadapter_export.exporters.judge.calibration import calibration_feeds
from xadapter_export.exporters.judge.judge import Judge, LeftOutWarning, read_gates
from xadapter_export.exporters.makers.axis_profile import check_cases, check_limits
from xadapter_export.exporters.makers.maker import (
    Deployer,
    DeployJob,
    GraphJob,
    GraphMaker,
    Graphs,
    MadeGraph,
    Material,
    check_options,
    load_maker,
)
from xadapter_export.exporters.onnx_files import hide_taps
from xadapter_export.exporters.passes.quantize import Ranges, Rounding, measure_products
from xadapter_export.exporters.plan import Plan, make_plan, reads_clip
from xadapter_export.exporters.portable.check import check_graph
from xadapter_export.exporters.portable.merge import MergedModel, Part
from xadapter_export.exporters.portable.reference import leave_some_out, reference_inputs, reference_outputs
from xadapter_export.exporters.portable.savings import count_savings
from xadapter_export.exporters.portable.trace import trace
from xadapter_export.exporters.request import ExportOptions, ExportRequest, WantedVariants, made_from
from xadapter_export.exporters.shelf import Shelf
from xadapter_export.model.builtin import BUILTIN
from xadapter_export.model.x_adapter_model import XAdapterModel
from xadapter_export.parity.prove import prove_bundle
from xadapter_export.parity.recorded import noise, record
from xadapter_export.parity.reference import sample_reference
from xadapter_export.parity.report import ParityReport
from xadapter_export.runtime.choose import choices_of
from xadapter_export.sessions.open import open_graph, open_variant
from xadapter_export.sessions.retrieval import Retriever
from xadapter_export.sessions.session import Array, OnnxSession
from xadapter_export.sessions.split_session import SplitSession
from xadapter_export.targets import PORTABLE, TARGETS, VariantName, all_variants
from xadapter_export.tasks import TASKS

Stage = Literal["load", "merge", "trace", "check", "calibrate", "derive", "prove", "compare", "deploy"]
OnStage = Callable[[Stage, str], None]
OnGraph = Callable[[int, int], None]


def _say_nothing(*_told: object) -> None:
    pass


@dataclass(frozen=True)
class ExportResult:
    """A finished bundle: where it is, what it says of itself, and the proof.

    ``left_out`` has a line for each variant that was below its gate, and so is not in the bundle.
    """

    folder: Path
    manifest: Manifest
    parity: ParityReport
    left_out: tuple[str, ...] = ()


def export(
    model: XAdapterModel | str | Path = BUILTIN,
    output: str | Path = "bundle",
    experts: ExpertSet | Sequence[ExpertSet] | None = None,
    *,
    on_stage: OnStage = _say_nothing,
    on_graph: OnGraph = _say_nothing,
    **options: Unpack[ExportOptions],
) -> ExportResult:
    """Makes a proven bundle.

    Args:
        model: A model, a checkpoint folder, a hub id, or ``"builtin"`` for the checkpoint that is shipped.
        output: Folder of the bundle.
        experts: Expert set or sets; the first is the bundle's default. None for all the checkpoint holds.
        on_stage: Called as each stage begins, with its name and what it works on.
        on_graph: Called as each graph is done, with how many are, and of how many.
        options: What to write, and how: ``precisions=("fp32", "int8")``, ``candidates=[...]``;
            ``ExportRequest`` lists them all, with their defaults.

    Raises:
        CheckpointError: If the checkpoint cannot be read, or does not hold an expert that was asked for.
        ConfigError: If options do not go together, or do not fit the checkpoint; or the key to sign with
            cannot be read.
        MissingExtraError: If the bundle is to be signed, and model-signing is not installed.
        UnsupportedError: If the opset, PLM or CLIP is not supported.
        OutputExistsError: If the folder is in the way.
        OutputWriteError: If it cannot be written.
        ParityError: If a graph does not say what PyTorch says, or a lossy one is below its gate; the bundle
            is kept beside as ``.rejected``. With ``skip_failed``, if of an expert set no variant is left.
        XAdapterError: If a deployment cannot be made; the bundle is kept there too.
    """
    request = ExportRequest(experts=experts, **options)
    signer = None if request.sign is None else BundleSigner(request.sign)
    check_options(request)
    with staged_folder(Path(output), force=request.force) as staged:
        source = type(model).__name__ if isinstance(model, XAdapterModel) else str(model)
        if not isinstance(model, XAdapterModel):
            on_stage("load", source)
            model = XAdapterModel.from_pretrained(model)
        plan = make_plan(model, request)
        cases = _make_cases(model, plan)
        _check_profile(request.profile, model, plan, cases)
        judge = Judge(read_gates(model, plan, request))
        builder = _Builder(model, source, request, plan, staged.path, on_stage, on_graph, judge)
        with _evaluating(model):
            manifest, report = builder.build(cases, staged.final.name)
        with _rejecting(staged):
            _raise_if_wrong(manifest, report)
            made = _deploy_all(staged.path, manifest, request, partial(on_stage, "deploy"))
        if made:
            manifest = manifest.model_copy(update={"deployments": made})
            manifest = _write_manifest(staged.path, manifest, staged.final.name)
        if signer is not None:
            signer.sign(Bundle(staged.path, manifest), staged.final.name)
    for line in (not_made := _not_deployed(request.wanted, manifest)):
        warnings.warn(line, LeftOutWarning, stacklevel=2)
    return ExportResult(staged.final, manifest, report, (*judge.left_out, *not_made))


def _make_cases(model: XAdapterModel, plan: Plan) -> dict[str, dict[str, Array]]:
    """Makes the inputs of every case of the proof."""
    encoder = model.make_text_encoder(plan.max_seq)
    cases = reference_inputs(encoder, with_masks=TASKS[plan.task].reads_masks)
    if plan.explains:
        leave_some_out(model, cases)
    return cases


def _check_profile(
    profile: Mapping[str, tuple[int, int]],
    model: XAdapterModel,
    plan: Plan,
    cases: Mapping[str, Mapping[str, Array]],
) -> None:
    """Refuses a profile that the models cannot read, or that holds no reference input.

    Raises:
        ConfigError: If it is one.
    """
    check_limits(profile, plan.longest)
    unread = set() if TASKS[plan.task].reads_masks else {"mask_positions"}
    if not any(reads_clip(model, expert_set) for expert_set in plan.expert_sets):
        unread.add("clip_input_ids")
    read = [{name: case[name] for name in case if name not in unread} for case in cases.values()]
    check_cases(profile, read)


@contextmanager
def _evaluating(model: XAdapterModel) -> Iterator[None]:
    """Put a model into evaluation mode for a block."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


@contextmanager
def _rejecting(staged: StagedFolder) -> Iterator[None]:
    """Keep what was written as ``.rejected`` if the block finds that it is wrong, and say so."""
    try:
        yield
    except OSError:  # one about the output, which keeps nothing
        raise
    except XAdapterError as error:
        rejected = staged.keep_as_rejected()
        raise error.with_hint(f"the bundle was rejected; its files are kept in {rejected}") from error


def _raise_if_wrong(manifest: Manifest, report: ParityReport) -> None:
    """Raise if a graph differs from PyTorch, or a lossy one is below its gate.

    Raises:
        ParityError: If one does.
    """
    report.raise_if_failed()
    for variant in manifest.variants:
        if variant.agreement is not None:
            agreement.check(variant.agreement, f"{variant.name}, experts {variant.expert_set}")


@dataclass
class _Builder:
    """Fills a staged folder."""

    model: XAdapterModel
    source: str
    request: ExportRequest
    plan: Plan
    folder: Path
    on_stage: OnStage
    on_graph: OnGraph
    judge: Judge
    specs: dict[ExpertSet, ExpertSetSpec] = field(default_factory=dict)
    variants: list[Variant] = field(default_factory=list)
    reference: dict[str, Array] = field(default_factory=dict)
    rounding: Rounding = field(default_factory=Rounding)

    def build(self, cases: dict[str, dict[str, Array]], name: str) -> tuple[Manifest, ParityReport]:
        """Writes and proves every variant of every expert set."""
        plan, folder, wanted = self.plan, self.folder, self.request.wanted.graphs
        if plan.retrieval == "external" and self.model.bank is not None:
            self.model.bank.save_features(folder / FEATURES_NAME)
        self._write_graphs(cases)
        self._check_remaining(wanted)

        components = {component for spec in self.specs.values() for component in spec.component_parameters}
        retrieves = any(output.name == "retrieved" for spec in self.specs.values() for output in spec.outputs)
        explains = any(spec.explains(V.name) for spec in self.specs.values())
        with_rows = retrieves or explains
        pack.write_companions(self.model, folder, with_clip="clip" in components, with_rows=with_rows)
        manifest = pack.make_manifest(
            self.model, self.source, plan, self.request.opset, self.specs, tuple(self.variants)
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
        kept = tuple(variant for variant in proven if all_variants()[variant.name] in wanted)
        manifest = manifest.model_copy(update={"variants": kept})
        _remove_unnamed(folder, self.variants, kept)
        _write_reference(folder, sample_reference(self.reference))
        (folder / PARITY_NAME).write_text(report.to_json(), encoding="utf-8")
        return _write_manifest(folder, manifest, name), report

    def _write_graphs(self, cases: dict[str, dict[str, Array]]) -> None:
        """Writes every variant of every expert set; what they were made from is gone afterwards."""
        plan, wanted = self.plan, self.request.wanted.graphs
        shelf, done = Shelf(self.folder, plan.expert_sets[0]), itertools.count(1)
        derived = [variant for variant in wanted if variant != all_variants()[PORTABLE]]
        total = len(plan.expert_sets) * (1 + len(derived))
        try:
            for expert_set in plan.expert_sets:
                material = self._write_portable(expert_set, cases, shelf)
                self.on_graph(next(done), total)
                for variant in derived:
                    self._write_variant(variant, material, shelf)
                    self.on_graph(next(done), total)
        finally:
            shelf.close()

    def _write_portable(
        self, expert_set: ExpertSet, cases: dict[str, dict[str, Array]], shelf: Shelf
    ) -> Material:
        """Writes the portable graph of a set, wanted or not, from which its other variants are made."""
        model, plan, without = self.model, self.plan, self.request.without
        self.on_stage("merge", expert_set)
        merge = partial(
            MergedModel, model, expert_set, plan.task, plan.candidate_ids, without, explains=plan.explains
        )
        whole = merge().eval()
        saved = count_savings(model, merge(explains=False).eval() if plan.explains else whole)
        self.reference |= reference_outputs(model, whole, expert_set, plan.candidate_ids, cases)
        self.reference |= {f"{c}/in/{n}": cases[c][n] for c in cases for n in whole.input_names}
        input_names = whole.input_names
        parts: dict[Part, MergedModel] = {"whole": whole}
        if plan.split and reads_clip(model, expert_set):
            parts = {part: merge(part=part, retrieval=plan.retrieval).eval() for part in ("query", "answer")}
        del whole
        graphs: Graphs = {}
        for part, merged in parts.items():
            self.on_stage("trace", expert_set if part == "whole" else f"{expert_set}, {part}")
            graphs[part] = trace(merged, _example(model), self.request.opset, plan.longest)
            self.on_stage("check", expert_set)
            check_graph(graphs[part], merged, self.request.opset)
            hide_taps(graphs[part], merged)
        self.specs[expert_set] = pack.expert_set_spec(graphs, parts, input_names)
        pack.write_projections(model, self.folder, parts.get("whole") or parts["answer"])
        variant = self._add(expert_set, all_variants()[PORTABLE], MadeGraph(saved, graphs), None, shelf)
        self._ask_fp32(expert_set, variant)
        return Material(
            expert_set,
            self.folder,
            variant,
            graphs,
            parts,
            self.rounding,
            plan.longest,
            calibrate=partial(self._calibration, expert_set),
            measure=partial(self._measure, variant, graphs),
        )

    def _write_variant(self, name: VariantName, material: Material, shelf: Shelf) -> None:
        """Writes a variant: the first try that passes its gate, or the last one."""
        expert_set = material.expert_set
        maker = load_maker(TARGETS[name.target])
        assert isinstance(maker, GraphMaker)  # deployments are made of what is proven
        with TemporaryDirectory(dir=self.folder) as folder:
            job = GraphJob(
                name.precision,
                material,
                shelf.stems(expert_set),
                Path(folder) / "try",
                lambda tried: self.on_stage("derive", f"{expert_set}, {tried}"),
            )
            made, measured = MadeGraph(), None
            for made in maker.tries(job):
                if name.precision == "fp32":
                    break
                self.on_stage("compare", f"{expert_set}, {name}")
                files = shelf.save(made, job)
                measured = self.judge.compare(self._open(expert_set, name.target, files), expert_set, name)
                if agreement.passes(measured):
                    break
            if not self.judge.leaves_out(measured, expert_set, name):
                steps = [*material.variant.optimizations, *made.steps]
                self._add(expert_set, name, replace(made, steps=steps), measured, shelf)

    def _ask_fp32(self, expert_set: ExpertSet, portable: Variant) -> None:
        """Asks the portable graph what lossy ones will be asked."""
        if self.judge.gates.calibration is None:
            return
        self.on_stage("compare", f"{expert_set}, fp32")
        encoder = self.model.make_text_encoder(self.plan.max_seq)
        session = self._open_written(portable)
        self.judge.ask_fp32(session, encoder, expert_set, self.specs[expert_set], self.plan.task)

    def _open_written(self, variant: Variant) -> OnnxSession:
        files: dict[Part, Path] = {"whole": self.folder / variant.file}
        if variant.query_file is not None:
            files = {"query": self.folder / variant.query_file, "answer": self.folder / variant.file}
        return self._open(variant.expert_set, variant.target, files)

    def _open(self, expert_set: ExpertSet, target: str, files: Mapping[Part, Path]) -> OnnxSession:
        """Opens a graph, or two as one, while the bundle is being made."""
        sessions = {part: open_graph(target, file) for part, file in files.items()}
        if "whole" in sessions:
            return sessions["whole"]
        spec, retriever = self.specs[expert_set], None
        if spec.searches_outside:
            bank = pack.bank_spec(self.model, self.specs)
            assert bank is not None  # a set searches it
            retriever = Retriever(bank, BankRows(self.folder / FEATURES_NAME), None)
        assert self.model.clip is not None  # a query graph runs it
        query, answer = sessions["query"], sessions["answer"]
        return SplitSession(query, answer, spec, self.model.clip, expert_set, retriever)

    def _check_remaining(self, wanted: Sequence[VariantName]) -> None:
        """Refuses a bundle that would have nothing that was asked for of an expert set."""
        for expert_set in self.plan.expert_sets:
            written = {v.name for v in self.variants if v.expert_set == expert_set}
            if written.isdisjoint(map(str, wanted)):
                raise ParityError(
                    "every variant failed its accuracy check, so there is no bundle",
                    where=f"experts {expert_set}",
                    got=", ".join(map(str, wanted)),
                    hint="add fp32, or change the limit with --min-agreement or --max-points-lost",
                )

    def _record_lossy(self, manifest: Manifest) -> None:
        """Keeps what every lossy variant says, and how far that is off, for whoever runs it elsewhere."""
        bundle = Bundle(self.folder, manifest)
        recorded: dict[str, Array] = {}
        for variant in [v for v in self.variants if v.agreement is not None]:
            spec = self.specs[variant.expert_set]
            recorded |= record(open_variant(bundle, variant), variant, spec, self.reference)
        self.reference |= recorded | noise(recorded, self.reference)

    def _calibration(self, expert_set: ExpertSet) -> list[dict[str, Array]]:
        """Inputs to calibrate with; none where nothing lossy was asked for."""
        calibration = self.judge.gates.calibration
        if calibration is None:
            return []
        encoder = self.model.make_text_encoder(self.plan.max_seq)
        return calibration_feeds(encoder, calibration.made_with, self.specs[expert_set].inputs)

    def _measure(self, portable: Variant, graphs: Graphs) -> dict[Part, Ranges]:
        """What goes into the products of each graph of a set."""
        self.on_stage("calibrate", portable.expert_set)
        feeds = self._calibration(portable.expert_set)
        found: dict[Part, Ranges] = {}
        for part, graph in graphs.items():
            if part == "answer":  # it reads what the query graph says
                session = self._open_written(portable)
                assert isinstance(session, SplitSession)  # it has an answer graph
                feeds = [session.answer_feed(feed) for feed in feeds]
            found[part] = measure_products(graph, feeds, self.rounding)
        return found

    def _add(
        self,
        expert_set: ExpertSet,
        name: VariantName,
        made: MadeGraph,
        measured: Agreement | None,
        shelf: Shelf,
    ) -> Variant:
        """Puts what was made in its place, and lists it."""
        placed = shelf.put(made, expert_set, name.target)
        variant = Variant(
            expert_set=expert_set,
            precision=name.precision,
            target=name.target,
            file=placed.file,
            query_file=placed.query_file,
            weight_files=placed.weight_files,
            size_bytes=placed.size_bytes,
            optimizations=tuple(made.steps),
            parity=None,
            agreement=measured,
        )
        self.variants.append(variant)
        self.variants.sort(key=lambda v: (self.plan.expert_sets.index(v.expert_set), v.name != PORTABLE))
        return variant


def _deploy_all(
    folder: Path, manifest: Manifest, request: ExportRequest, say: Callable[[str], None]
) -> tuple[Deployment, ...]:
    """Makes every deployment that was asked for, of every expert set whose graph is there."""
    made: list[Deployment] = []
    for name in request.wanted.deployments:
        deployer = load_maker(TARGETS[name.target])
        assert isinstance(deployer, Deployer)  # so says the table
        for variant in manifest.variants:
            if variant.name == str(made_from(name)):
                start = time.monotonic()
                job = DeployJob(folder, manifest, variant, request, say)
                wrote = deployer.deploy(job)
                deployment = Deployment(
                    target=name.target,
                    expert_set=variant.expert_set,
                    precision=name.precision,
                    source=variant.name,
                    files=wrote.files,
                    size_bytes=sum((folder / file).stat().st_size for file in wrote.files),
                    seconds=time.monotonic() - start,
                    facts=dict(wrote.facts),
                    refused=wrote.refused,
                    prove_with=wrote.prove_with,
                )
                made.append(deployment)
    return tuple(made)


def _not_deployed(wanted: WantedVariants, manifest: Manifest) -> list[str]:
    """A line for each deployment that is not there because the graph it is made from was left out."""
    there = {(variant.expert_set, variant.name) for variant in manifest.variants}
    return [
        f"left out: {name}, experts {expert_set}, because {made_from(name)}, its source, was left out"
        for name in wanted.deployments
        for expert_set in manifest.expert_sets
        if (expert_set, str(made_from(name))) not in there
    ]


def _remove_unnamed(folder: Path, variants: Sequence[Variant], kept: Sequence[Variant]) -> None:
    """Removes the files that no kept variant names: those of a portable graph that was not asked for."""
    named = {path for variant in kept for path in variant.all_files}
    for path in {path for variant in variants for path in variant.all_files} - named:
        (folder / path).unlink()
        if not any((folder / path).parent.iterdir()):
            (folder / path).parent.rmdir()


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
        example["memory_t"] = torch.zeros(2, 5, model.clip.width)
        for name in ("memory_t_mask", keep_name(T.name)):  # one tensor for both would be traced as one input
            example[name] = torch.ones(2, 5, dtype=torch.int64)
    if reads_bank(model.config.experts):
        example["memory_v"] = torch.zeros(2, model.config.retrieval.k, model.bank_features.shape[1])
        example[keep_name(V.name)] = torch.ones(2, model.num_bank_items, dtype=torch.int64)
    return example
