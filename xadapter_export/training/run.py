"""A whole training run: parts, examples, frozen features, the phases of the plug-in, proof, checkpoint."""

import hashlib
import json
import math
import platform
import random
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError

from xadapter_export.bank import FeatureBank
from xadapter_export.bundle.folder import sha256_file
from xadapter_export.bundle.manifest import Expert, ExpertSet
from xadapter_export.bundle.pictures import Picture
from xadapter_export.bundle.staging import check_replaceable, write_whole
from xadapter_export.errors import (
    CheckpointError,
    ConfigError,
    HashMismatchError,
    OutputWriteError,
    XAdapterError,
    import_extra,
)
from xadapter_export.evaluation.labeled import Labeled, read_labeled
from xadapter_export.experts import NONE, V, experts_of, reads_bank, reads_text, set_of
from xadapter_export.layers import LAYERS, TOKEN_QUERY
from xadapter_export.model.builtin import BUILTIN, builtin_folder
from xadapter_export.model.checkpoint import RECORD_NAME
from xadapter_export.model.config import BankPart, FrozenPart, RetrievalConfig, XAdapterConfig
from xadapter_export.model.identity import public_name
from xadapter_export.model.plm import load_plm
from xadapter_export.model.plm_family import PlmFamily
from xadapter_export.model.text_tower import TextTower
from xadapter_export.model.towers import load_clip
from xadapter_export.model.x_adapter_model import XAdapterModel, check_bank_fits
from xadapter_export.tasks import TASKS
from xadapter_export.training.arguments import blaming_the_table, make_arguments, reporters_write_to
from xadapter_export.training.batches import Collator, EvaluationOrder, Source, TrainingOrder
from xadapter_export.training.config import TrainConfig
from xadapter_export.training.examples import (
    Examples,
    Masker,
    answered_texts,
    encode_labeled,
    encode_masked,
    read_texts,
)
from xadapter_export.training.frozen_features import FeatureCache, frozen_features
from xadapter_export.training.objective import TrainingModel
from xadapter_export.training.trainer import (
    WEIGHTS_NAME,
    DivergedError,
    Progress,
    XAdapterTrainer,
    load_state,
)

from transformers import EarlyStoppingCallback, set_seed  # isort: skip  # cured by model.plm
from transformers.integrations.integration_utils import TensorBoardCallback  # isort: skip
from transformers.trainer import TRAINER_STATE_NAME  # isort: skip
from transformers.trainer_callback import PrinterCallback  # isort: skip

TRAIN_NAME = "train.json"
_NUM_CALIBRATION = 1300  # texts that a checkpoint carries for its export: 300 to calibrate, 1000 to compare
RUN_NAME = "run.json"
CONTROL_ROWS = 16
_NOT_OF_THE_RUN = {"output", "run", "cache", "force", "log_every", "tensorboard", "self_contained"}
_NOT_METRICS = ("runtime", "samples_per_second", "steps_per_second", "metric")
_PACKAGES = ("xadapter-export", "torch", "transformers", "accelerate", "datasets", "numpy", "tokenizers")

_Parts = tuple[FrozenPart, FrozenPart | None, BankPart | None]
OnStage = Callable[[str, str], None]
OnStep = Callable[[int, int, str], None]


class TrainingStopped(XAdapterError, KeyboardInterrupt):  # noqa: N818  # no error: somebody asked
    """A run was stopped by Ctrl-C or SIGTERM; its state is kept and the same command goes on with it.

    Attributes:
        exit_code: What a shell reports for a program that this signal ended: 130 or 143.
    """

    exit_code = 130


@dataclass(frozen=True)
class TrainResult:
    """What a run made.

    Attributes:
        folder: The checkpoint.
        model: The trained model, on the CPU, in evaluation mode.
        steps: Optimizer steps in all.
        cache: Folder of the frozen features, which another run can use.
        curve: ``{"step": ..., "loss": ...}`` and evaluations, in the order in which they came.
        record: What ``train.json`` holds.
    """

    folder: Path
    model: XAdapterModel
    steps: int
    cache: Path
    curve: list[dict[str, float]]
    record: dict[str, Any]


@dataclass(frozen=True)
class _Phase:
    """Some steps: which sets are switched on in turn, which experts learn, and for how many sets' steps."""

    expert_sets: tuple[ExpertSet, ...]
    trained: ExpertSet
    turns: int
    only_distill: bool = False


def train(
    config: TrainConfig,
    *,
    plm: PlmFamily | None = None,
    frozen_sha256: Mapping[str, str] = MappingProxyType({}),
    on_stage: OnStage = lambda *_: None,
    on_step: OnStep = lambda *_: None,
) -> TrainResult:
    """Train a plug-in and write its checkpoint.

    A run that was stopped goes on when it is started again with the same settings. Under ``torchrun`` every
    process calls this; the first one writes.

    Args:
        config: All settings.
        plm: The frozen PLM, where it is already loaded; else ``config.plm`` is.
        frozen_sha256: Hashes that ``plm``, ``clip`` and ``bank`` must have, by these names.
        on_stage: Called as each stage begins, with its name and what it works on.
        on_step: Called after each optimizer step with the step, the steps of the phase, and a note.

    Raises:
        ConfigError: If settings make no sense together, or the run folder holds another run.
        CheckpointError: If PLM, CLIP or bank cannot be loaded, or a frozen weight changed in training.
        HashMismatchError: If one of them has another hash than it must have.
        InputTextError: If a text is empty, a mask has no answer, or a label is out of range.
        OutputExistsError: If there is a checkpoint already and ``force`` is not set.
        OutputWriteError: If the disk is full or the place cannot be written.
        DivergedError: If the loss is not a number any more.
        TrainingStopped: If Ctrl-C or SIGTERM came; what was learned is kept in the run folder.
    """
    check_replaceable(config.output.resolve(), RECORD_NAME, force=config.force)
    versions = {name: version(name) for name in _PACKAGES}
    start = time.monotonic()
    set_seed(config.seed)
    arguments = make_arguments(config, config.run_folder / "state", steps=1, watched=False)  # joins processes
    is_first = arguments.process_index == 0

    on_stage("load", ", ".join(filter(None, (config.plm, config.clip, config.bank))))
    rows = _read_rows(config)
    model, teacher = _make_model(config, rows, plm, frozen_sha256)
    before = model.frozen_parts()
    if is_first:
        _claim(config.run_folder, _fingerprint(config, before, arguments.world_size))
    with arguments.main_process_first(local=False):
        sources, watched = _make_sources(config, model, teacher, rows, before, on_stage)

    curve, steps = _Learner(config, model, sources, watched, on_step).run(_phases(config), on_stage)
    on_stage("prove", "frozen weights unchanged")
    model.to("cpu").eval()
    after = model.frozen_parts()
    _check_trained(config, model, before, after)
    if config.plugin.retrieval == "static" and not reads_text(config.plugin.experts):
        model.clip = None  # taught, and no longer needed
        model.text_encoder = model.make_text_encoder(model.plm.max_seq)
    model.calibration = _calibration(rows, config.seed)
    record = _record(config, before, after, model, curve, steps, time.monotonic() - start, versions)
    if is_first:
        on_stage("save", str(config.output))
        _save(config, model, record)
    return TrainResult(config.output, model, steps, config.cache_folder, curve, record)


def _check_trained(config: TrainConfig, model: XAdapterModel, before: _Parts, after: _Parts) -> None:
    """Check that what is frozen did not change, and that what was trained is finite.

    Raises:
        CheckpointError: If a frozen part changed.
        DivergedError: If a number is not finite.
    """
    for name, one, other in zip(("PLM", "CLIP", "bank"), before, after, strict=True):
        if (one and one.sha256) != (other and other.sha256):
            raise CheckpointError(
                f"the frozen {name} changed in training; nothing was written", where=config.plm
            )
    for name, tensor in model.trained_state().items():
        if not torch.isfinite(tensor).all():
            raise DivergedError(
                "the training diverged",
                where=name,
                got="values that are not finite",
                hint="lower learning_rate",
            )


def _save(config: TrainConfig, model: XAdapterModel, record: dict[str, Any]) -> None:
    """Write the checkpoint, and remove what a stopped run would have resumed from."""
    model.save_pretrained(
        config.output,
        self_contained=config.self_contained,
        training={"steps": record["steps"], "seed": config.seed, "control": config.control},
        more_files={TRAIN_NAME: json.dumps(record, indent=1, ensure_ascii=False) + "\n"},
    )
    for folder in config.run_folder.glob("state-*"):
        shutil.rmtree(folder)
    (config.run_folder / RUN_NAME).unlink(missing_ok=True)


# ------------------------------------------------------------------------------------------ parts


def _make_model(
    config: TrainConfig, rows: "_Rows", plm: PlmFamily | None, frozen_sha256: Mapping[str, str]
) -> tuple[XAdapterModel, TextTower | None]:
    """Return the model with a fresh plug-in, and the CLIP that a static memory is distilled from."""
    plm = plm or load_plm(config.plm, config.task)
    count = len(plm.layers)
    layers = config.plugin.layers or tuple(range(max(0, count - 2), count))
    clip = None if config.clip is None else load_clip(config.clip)
    bank = None
    if config.bank is not None and reads_bank(config.plugin.experts):
        bank = FeatureBank.load(builtin_folder() if config.bank == BUILTIN else config.bank)
    for what, part in (("PLM", plm), ("CLIP", clip), ("bank", bank)):
        name = what.lower()
        if part is not None and part.sha256 != (expected := frozen_sha256.get(name, part.sha256)):
            raise HashMismatchError(
                f"the {what} is not the original",
                where=getattr(config, name),
                expected=f"SHA-256 {expected[:12]}",
                got=part.sha256[:12],
                hint="get the original",
            )
    plugin = config.plugin
    experts, width, retrieval = plugin.experts, plugin.adapter_width, plugin.retrieval
    layer, null_rows = plugin.layer, plugin.num_null_rows
    if config.control:
        bank = _random_bank(_memory_width(clip, bank), config.seed)
        width *= len(experts_of(experts))
        experts, retrieval, clip = V.name, "static", None
        if LAYERS[layer].learns_rows:
            layer, null_rows = TOKEN_QUERY.name, 0
    model = XAdapterModel(
        XAdapterConfig.model_validate(
            {
                "experts": experts,
                "layers": layers,
                "adapter_width": width,
                "num_heads": plugin.num_heads,
                "layer": layer,
                "null_rows": null_rows,
                "retrieval": RetrievalConfig(mode=retrieval, k=plugin.k),
                "task": config.task,
                "labels": rows.labels,
            }
        ),
        plm,
        clip,
        bank,
    )
    if config.data.max_seq is not None:
        if config.data.max_seq > plm.max_seq:
            raise ConfigError(
                "max_seq is longer than the PLM's longest input",
                expected=f"at most {plm.max_seq}",
                got=config.data.max_seq,
            )
        model.text_encoder = model.make_text_encoder(config.data.max_seq)
    teacher = clip if config.distill.weight and not config.control else None
    if teacher is not None and bank is not None:
        check_bank_fits(bank, teacher)
    return model, teacher


def _memory_width(clip: TextTower | None, bank: FeatureBank | None) -> int:
    if bank is not None:
        return int(bank.features.shape[1])
    assert clip is not None  # the config requires it for a T-expert
    return clip.width


def _random_bank(dim: int, seed: int) -> FeatureBank:
    features = np.random.default_rng(seed).standard_normal((CONTROL_ROWS, dim)).astype(np.float32)
    features /= np.linalg.norm(features, axis=1, keepdims=True)
    return FeatureBank(
        features, tuple(Picture(id=f"random-{i:02}", caption="no picture") for i in range(CONTROL_ROWS))
    )


# ------------------------------------------------------------------------------------------ data


def _calibration(rows: "_Rows", seed: int) -> str:
    """Some of the texts as JSON lines: what the exporter makes and judges lossy variants with."""
    if rows.labeled is not None:
        pairs = rows.labeled.pairs or [None] * len(rows.labeled.texts)
        lines = [
            {"sentence": text} if pair is None else {"sentence1": text, "sentence2": pair}
            for text, pair in zip(rows.labeled.texts, pairs, strict=True)
        ]
    else:
        texts = [text for group in rows.texts for text in group]
        lines = [{"sentence": text["text"] if isinstance(text, dict) else text} for text in texts]
    drawn = random.Random(seed).sample(lines, min(len(lines), _NUM_CALIBRATION))  # noqa: S311  # nothing is secret
    return "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in drawn)


@dataclass(frozen=True)
class _Rows:
    """What the files hold: labeled texts, or lists of texts."""

    labeled: Labeled | None
    watched: Labeled | None
    texts: tuple[list[Any], ...]
    watched_texts: list[Any] | None

    @property
    def labels(self) -> tuple[str, ...]:
        return () if self.labeled is None else self.labeled.label_names


def _read_rows(config: TrainConfig) -> _Rows:
    if not TASKS[config.task].labels_texts:
        texts = tuple(read_texts(source, config.data.text_column) for source in config.data.train_files)
        watched = (
            None
            if config.data.eval_file is None
            else read_texts(config.data.eval_file, config.data.text_column)
        )
        return _Rows(None, None, texts, watched)
    columns = {
        "task": config.data.glue,
        "text_column": config.data.text_column,
        "pair_column": config.data.pair_column,
        "label_column": config.data.label_column,
        "labels": config.data.labels,
        "regression": config.data.regression,
    }
    if len(config.data.train_files) > 1:
        raise ConfigError(
            "training with labels needs exactly one training file", got=len(config.data.train_files)
        )
    data = config.data.train_files[0] if config.data.train_files else config.data.glue_data
    labeled = read_labeled(data, split="train", **columns)  # type: ignore[arg-type]  # by their names
    names = {**columns, "labels": None if labeled.is_regression else labeled.label_names}
    held_out = None
    if config.data.eval_file is not None or config.data.glue is not None:
        held_out = read_labeled(config.data.eval_file or config.data.glue_data, split="validation", **names)  # type: ignore[arg-type]  # same
    return _Rows(labeled, held_out, (), None)


def _make_sources(
    config: TrainConfig,
    model: XAdapterModel,
    teacher: TextTower | None,
    rows: _Rows,
    parts: _Parts,
    on_stage: OnStage,
) -> tuple[list[Source], Source | None]:
    encoder = model.text_encoder

    def labeled(entry: Labeled) -> Examples:
        return encode_labeled(encoder, entry.texts, entry.pairs, entry.labels, regression=entry.is_regression)

    def masked(texts: list[Any], where: str, seed: int) -> Examples:
        answered = [row for row in texts if isinstance(row, dict)]
        plain = [row for row in texts if isinstance(row, str)]
        masker = Masker(
            encoder,
            share=config.data.mask_share,
            ways=config.data.maskings,
            favored=config.data.favor_words,
            favored_share=config.data.favor_share,
            seed=seed,
        )
        found = answered_texts(answered, encoder, where) + (masker.mask(plain) if plain else [])
        return encode_masked(encoder, found)

    hashes = {name: part.sha256 for name, part in zip(("plm", "clip", "bank"), parts, strict=True) if part}
    if teacher is not None:
        hashes["teacher"] = teacher.sha256

    cache = FeatureCache(config.cache_folder, hashes, on_stage)

    def source(examples: Examples, title: str, weight: int = 1) -> Source:
        features = frozen_features(
            model,
            examples,
            cache,
            pool=min(config.plugin.pool, _num_rows(model)),
            with_hidden=config.cache_hidden,
            teacher=teacher,
            title=title,
        )
        return Source(examples, features, weight)

    model.to("cuda" if torch.cuda.is_available() else "cpu")
    if rows.labeled is not None:
        watched = None if rows.watched is None else source(labeled(rows.watched), "held-out texts")
        return [source(labeled(rows.labeled), "training texts")], watched
    weights = config.data.train_weights or (1,) * len(rows.texts)
    sources = [
        source(masked(texts, name, config.seed), f"texts of {Path(name).name}", weight)
        for texts, name, weight in zip(rows.texts, config.data.train_files, weights, strict=True)
    ]
    watched = None
    if rows.watched_texts is not None:
        watched = source(
            masked(rows.watched_texts, str(config.data.eval_file), config.seed + 1), "held-out texts"
        )
    return sources, watched


def _num_rows(model: XAdapterModel) -> int:
    return 1 if model.bank is None else len(model.bank.features)


# ------------------------------------------------------------------------------------------ phases


def _phases(config: TrainConfig) -> tuple[_Phase, ...]:
    experts = config.plugin.experts
    if config.head_only:
        return (_Phase((NONE,), NONE, 1),)
    alone = experts_of(experts)
    phases: tuple[_Phase, ...] = (_Phase((experts,), experts, 1),)
    if len(alone) > 1 and config.plugin.order == "alternating":
        phases = (_Phase((*alone, experts), experts, len(alone) + 1),)
    elif len(alone) > 1 and config.plugin.order == "sequential":  # each on top of those before
        phases = tuple(_Phase((set_of(alone[: n + 1]),), alone[n], 1) for n in range(len(alone)))
    if config.control:  # one adapter, for as many steps in all
        return (_Phase((V.name,), V.name, sum(phase.turns for phase in phases)),)
    if config.distill.steps:
        return _Phase((V.name,), V.name, 1, only_distill=True), *phases
    return phases


class _Learner:
    """Runs the phases of a run, each with a trainer of its own.

    Args:
        config: All settings.
        model: The model with a fresh plug-in.
        sources: What it learns from.
        watched: Held-out examples.
        on_step: Called after each step.
    """

    def __init__(
        self,
        config: TrainConfig,
        model: XAdapterModel,
        sources: list[Source],
        watched: Source | None,
        on_step: OnStep,
    ) -> None:
        self.config, self.sources, self.watched, self.on_step = config, sources, watched, on_step
        self.model = TrainingModel(
            model, distill_weight=config.distill.weight, distill_temperature=config.distill.temperature
        )

    def run(self, phases: Sequence[_Phase], on_stage: OnStage) -> tuple[list[dict[str, float]], int]:
        """Run the phases, and return the curve and how many steps they took.

        Raises:
            As ``run_phase``.
        """
        curve: list[dict[str, float]] = []
        steps = 0
        for number, phase in enumerate(phases, 1):
            several = f" (phase {number})" if len(phases) > 1 else ""
            on_stage("train", f"experts {', '.join(phase.expert_sets)}{several}")
            history, done = self.run_phase(phase, number)
            curve += [{**entry, "phase": number} for entry in history]
            steps += done
        return curve, steps

    def run_phase(self, phase: _Phase, number: int) -> tuple[list[dict[str, float]], int]:
        """Run a phase, or what is left of it, and return its history and how many steps it took.

        Raises:
            TrainingStopped: If Ctrl-C or SIGTERM came.
            OutputWriteError: If the run folder cannot be written.
        """
        plugin = self.model.model
        for name, parameter in plugin.adapters.named_parameters():
            parameter.requires_grad_(_expert_of(name) in experts_of(phase.trained))
        folder = self.config.run_folder / f"state-{number}"
        finished = folder / "finished.json"
        kept = _read(finished)
        if kept is not None:  # by an earlier start of this run
            load_state(plugin, folder)
            return kept["history"], kept["steps"]

        with Progress(self.on_step) as progress, reporters_write_to(self.config.run_folder):
            trainer = self._make_trainer(phase, folder, progress)
            steps, last = trainer.args.max_steps, _last_state(folder)
            with _blaming(self.config.run_folder):
                trainer.train(resume_from_checkpoint=None if last is None else str(last))
            stopped = TrainingStopped(
                f"stopped after step {trainer.state.global_step} of {steps}",
                where=self.config.run_folder,
                hint="run the same command again to resume",
            )
            stopped.exit_code = progress.exit_code
            if progress.stopped and trainer.state.global_step < steps:
                raise stopped
        history = [
            {key: float(value) for key, value in entry.items() if isinstance(value, int | float)}
            for entry in trainer.state.log_history
        ]
        if trainer.args.should_save:
            with _blaming(folder):
                trainer.save_model(str(folder))
                write_whole(finished, json.dumps({"history": history, "steps": trainer.state.global_step}))
        if progress.stopped:  # in the very last step; what is left is quick, but not what was asked for
            raise stopped
        return history, trainer.state.global_step

    def _make_trainer(self, phase: _Phase, folder: Path, progress: Progress) -> XAdapterTrainer:
        config = self.config
        watched = None if phase.only_distill else self.watched
        arguments = make_arguments(config, folder, steps=1, watched=False)
        per_step = config.batch_size * config.accumulation * arguments.world_size
        num_examples = sum(len(source.examples) for source in self.sources)
        one_set = config.max_steps or math.ceil(config.epochs * num_examples / per_step)
        steps = config.distill.steps if phase.only_distill else one_set * phase.turns
        arguments = make_arguments(
            config,
            folder,
            steps=steps,
            watched=watched is not None,
            distills=phase.only_distill,
            sets=len(phase.expert_sets),
        )
        with blaming_the_table(config.trainer):
            trainer = XAdapterTrainer(
                expert_sets=phase.expert_sets,
                only_distill=phase.only_distill,
                model=self.model,
                args=arguments,
                data_collator=Collator(self.model.model.plm.special["pad"]),
                train_dataset=TrainingOrder(self.sources, steps * per_step, config.plugin.k, config.seed),
                eval_dataset=None if watched is None else EvaluationOrder(watched, config.plugin.k),
                compute_metrics=_metrics(config) if watched and watched.examples.labels is not None else None,
                callbacks=[
                    progress,
                    *([EarlyStoppingCallback(config.patience)] if config.patience and watched else []),
                    *([_tensorboard(config.run_folder / "tensorboard")] if config.tensorboard else []),
                ],
            )
        trainer.remove_callback(PrinterCallback)
        return trainer


@contextmanager
def _blaming(folder: Path) -> Iterator[None]:
    """Make of what open, safetensors and torch raise where a disk is full one error about the folder."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        if isinstance(error, XAdapterError):
            raise
        raise OutputWriteError(
            "the run folder cannot be written",
            where=folder,
            got=getattr(error, "strerror", None) or error,
            hint="free some space, or choose another with --run; then run the same command again to resume",
        ) from error


def _read(path: Path) -> Any:
    """Read JSON; None where there is none, or what an old version or an accident left."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None


def _last_state(folder: Path) -> Path | None:
    """Return the latest state that was written to its end: the record of the run is its last file."""
    states = sorted(
        folder.glob("checkpoint-*"), key=lambda path: int(path.name.partition("-")[2]), reverse=True
    )
    whole = (state for state in states if _read(state / TRAINER_STATE_NAME) is not None)
    return next((state for state in whole if (state / WEIGHTS_NAME).is_file()), None)


def _tensorboard(folder: Path) -> TensorBoardCallback:
    import_extra("tensorboard", "train")
    from torch.utils.tensorboard import SummaryWriter

    return TensorBoardCallback(SummaryWriter(log_dir=str(folder)))  # type: ignore[no-untyped-call]  # torch


def _expert_of(name: str) -> Expert:
    return name.split(".")[1]  # "<layer>.<expert>.<matrix>"


def _metrics(config: TrainConfig) -> Callable[[Any], dict[str, float]]:
    from xadapter_export.evaluation.metrics import task_metrics

    def compute(prediction: Any) -> dict[str, float]:
        logits = prediction.predictions
        metrics = task_metrics(config.data.glue, logits, prediction.label_ids)
        return {"metric": next(iter(metrics.values())), **metrics}

    return compute


# ------------------------------------------------------------------------------------------ records


def _fingerprint(
    config: TrainConfig, parts: tuple[FrozenPart | BankPart | None, ...], num_processes: int
) -> str:
    settings = settings_of_run(config.model_dump(mode="json"))
    digest = hashlib.sha256(
        json.dumps([settings, file_hashes(config), num_processes], sort_keys=True).encode()
    )
    for part in parts:
        digest.update(part.sha256.encode() if part else b"-")
    return digest.hexdigest()


def settings_of_run(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings that decide what is learned: not where things are, nor what is shown."""
    return {name: value for name, value in settings.items() if name not in _NOT_OF_THE_RUN}


def file_hashes(config: TrainConfig) -> dict[str, str]:
    """Return the SHA-256 of every file of the data that is there, by the path that names it."""
    named = [*config.data.train_files, config.data.eval_file, config.data.glue_data]
    paths = [Path(name) for name in named if name is not None and not name.startswith("hub:")]
    files = [path for path in paths if path.is_file()]
    files += sorted(file for path in paths if path.is_dir() for file in path.iterdir() if file.is_file())
    return {str(path): sha256_file(path) for path in files}


def _claim(folder: Path, fingerprint: str) -> None:
    """Make the run folder this run's.

    Raises:
        ConfigError: If another run was begun there and not finished.
    """
    path = folder / RUN_NAME
    kept = _read(path)
    if kept is not None and kept["fingerprint"] != fingerprint and any(folder.glob("state-*")):
        raise ConfigError(
            "the run folder holds an unfinished run with other settings, data or models",
            where=folder,
            hint="resume with the old settings, remove the folder, or choose another with --run",
        )
    with _blaming(folder):
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(path, json.dumps({"fingerprint": fingerprint}))


def _record(
    config: TrainConfig,
    before: _Parts,
    after: _Parts,
    model: XAdapterModel,
    curve: list[dict[str, float]],
    steps: int,
    elapsed_s: float,
    versions: dict[str, str],
) -> dict[str, Any]:
    names = ("plm", "clip", "bank")
    settings, files = recorded_settings(config)
    return {
        "format_version": 1,
        "config": settings,
        "files": files,
        "frozen_sha256_before": {n: p.sha256 for n, p in zip(names, before, strict=True) if p},
        "frozen_sha256_after": {n: p.sha256 for n, p in zip(names, after, strict=True) if p},
        "trained_parameters": sum(tensor.numel() for tensor in model.trained_state().values()),
        "steps": steps,
        "elapsed_s": round(elapsed_s, 1),
        "curve": curve,
        "versions": versions,
        "machine": {
            "system": platform.system(),
            "processor": platform.machine(),
            "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
            "threads": torch.get_num_threads(),
        },
    }


def held_out(record: Mapping[str, Any]) -> dict[str, float]:
    """Return what the kept state scored on held-out data, by metric; nothing where none was watched."""
    scored = [entry for entry in record["curve"] if "eval_loss" in entry]
    if not scored:
        return {}
    kept = scored[-1]
    if record["config"]["patience"]:  # then the best was kept
        kept = min(scored, key=lambda e: -e["eval_metric"] if "eval_metric" in e else e["eval_loss"])
    found = {name.removeprefix("eval_"): value for name, value in kept.items() if name.startswith("eval_")}
    return {name: value for name, value in found.items() if name not in _NOT_METRICS}


def recorded_settings(config: TrainConfig) -> tuple[dict[str, Any], dict[str, str]]:
    """Return all settings, and the hashes of the files, as ``train.json`` has them."""
    settings, files = config.model_dump(mode="json"), file_hashes(config)
    if config.self_contained:  # made to be given away, so it tells nothing of this machine
        data = settings["data"]
        for name in ("output", "run", "cache", "plm", "clip", "bank"):
            settings[name] = settings[name] and public_name(settings[name])
        for name in ("eval_file", "glue_data"):
            data[name] = data[name] and public_name(data[name])
        data["train_files"] = [public_name(name) for name in data["train_files"]]
        files = {Path(name).name: found for name, found in files.items()}
    return settings, files
