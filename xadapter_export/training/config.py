"""Everything that a training run is told: a table of settings, each a key of a file and a flag."""

import difflib
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Final, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic.fields import FieldInfo

from xadapter_export.bundle.manifest import SomeExperts, Task
from xadapter_export.errors import ConfigError
from xadapter_export.evaluation.objects import ELEVEN
from xadapter_export.experts import EXPERT_SETS, V, reads_bank, reads_text
from xadapter_export.layers import LAYERS, NULL_ROWS, SENTENCE_QUERY, TOKEN_QUERY, LayerName
from xadapter_export.model.config import check_shape
from xadapter_export.tasks import FILL_MASK, TASKS, TEXT_CLASSIFICATION

Positive = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(ge=0.0, le=1.0)]


class _Table(BaseModel):
    """A table of settings."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class PluginSettings(_Table):
    """Table ``[plugin]``: what the plug-in is, and which of its experts learn when."""

    experts: SomeExperts = Field(
        V.name, description="Experts to train.", json_schema_extra={"enum": list(EXPERT_SETS[1:])}
    )
    layers: tuple[Annotated[int, Field(ge=0)], ...] | None = Field(
        None, description="PLM layer to add experts before, counted from 0. Default: the last two."
    )
    adapter_width: Positive = Field(64, description="Width of the attention inside the plug-in.")
    num_heads: Positive = Field(4, description="Attention heads of each expert.")
    layer: LayerName = Field(
        TOKEN_QUERY.name,
        description=f"Kind of X-adapter layer: {TOKEN_QUERY.name}, {NULL_ROWS.name} (the same with learned "
        f"rows alongside the memory, so that a token can look away), or {SENTENCE_QUERY.name} (static "
        "retrieval: one query per sentence, with a learned key for each prototype).",
    )
    null_rows: Positive | None = Field(
        None,
        description=f"Number of learned rows alongside each memory, for layer {NULL_ROWS.name}. "
        f"Default: {NULL_ROWS.null_rows}.",
    )
    retrieval: Literal["topk", "static"] = Field(
        "topk",
        description="topk: search the bank for each text. static: attend to every row of a small bank.",
    )
    k: Positive = Field(4, description="Number of images retrieved per text.")
    k_drawn_from: Positive | None = Field(
        None, description="In training, draw the k images at random from this many nearest. Default: twice k."
    )
    order: Literal["joint", "sequential", "alternating"] = Field(
        "alternating",
        description="How to train both experts. joint: always together. sequential: V first, then T on top "
        "of it. alternating: V, T and both in turn, so that each also works alone.",
    )

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        layers = self.layers or ()
        check_shape(
            self.layer, self.num_null_rows, self.retrieval, layers, self.adapter_width, self.num_heads
        )
        return self

    @property
    def num_null_rows(self) -> int:
        """How many null rows a layer has."""
        return self.null_rows or LAYERS[self.layer].null_rows

    @property
    def pool(self) -> int:
        """How many of the nearest pictures training draws from."""
        return max(self.k, self.k_drawn_from or 2 * self.k)


class DistillSettings(_Table):
    """Table ``[distill]``: a static memory learns to look where CLIP would search."""

    weight: Annotated[float, Field(ge=0.0)] = Field(
        0.0,
        description="Static retrieval: weight of the loss that teaches attention to imitate CLIP's search "
        "(needs clip).",
    )
    temperature: Annotated[float, Field(gt=0.0)] = Field(
        0.05, description="Temperature of the imitated search; cosines are divided by it."
    )
    steps: Annotated[int, Field(ge=0)] = Field(
        0, description="Number of distillation steps before training; cheap, because no PLM layer runs."
    )
    learning_rate: Annotated[float, Field(gt=0)] = Field(
        1e-2, description="Peak learning rate for the distillation steps."
    )


class DataSettings(_Table):
    """Table ``[data]``: what is learned from, and how texts become examples."""

    train_files: tuple[str, ...] = Field(
        (),
        description="Training data: .txt with one text per line; .jsonl with text, and optional answers for "
        "the masks already in it; .csv, .tsv or .parquet; or hub:NAME for a Hugging Face dataset.",
    )
    train_weights: tuple[Positive, ...] | None = Field(
        None, description="Number of texts to draw from each file per round. Default: one of each."
    )
    eval_file: str | None = Field(None, description="Held-out texts or rows to evaluate during training.")
    glue: str | None = Field(None, description="GLUE task; sets columns, labels and metric.")
    glue_data: str | None = Field(
        None, description="Folder with the GLUE task's files. Default: download from the hub."
    )
    text_column: str | None = Field(None, description="Column with the text.")
    pair_column: str | None = Field(None, description="Column with the second text.")
    label_column: str | None = Field(None, description="Column with the label.")
    labels: tuple[str, ...] | None = Field(None, description="Label names in the order of the logits.")
    regression: bool = Field(False, description="Train on numbers instead of classes.")
    mask_share: Share = Field(
        0.15, description="Fraction of the words in a text to mask; always at least one word."
    )
    maskings: Positive = Field(1, description="Number of maskings per text.")
    favor_words: tuple[str, ...] = Field(
        ELEVEN, description="Words to mask more often. Default: eleven color words."
    )
    favor_share: Share = Field(
        0.5, description="How often to mask only that word in a text that contains one."
    )
    max_seq: Positive | None = Field(None, description="Longest input in tokens. Default: the PLM's limit.")


class TrainConfig(_Table):
    """Settings of a training run. Relative paths are relative to the current folder."""

    # Parts
    output: Path = Field(description="Folder for the trained checkpoint.")
    plm: str = Field(description="Frozen PLM: a save_pretrained folder, a hub id or builtin.")
    clip: str | None = Field(
        None, description="Frozen CLIP: a folder in open_clip's layout, model:tag, a hub id or builtin."
    )
    bank: str | None = Field(None, description="Feature bank: a folder made by xad-bank, or builtin.")
    task: Task = Field(
        FILL_MASK.name,
        description=f"Task to train for: {FILL_MASK.name}, or {TEXT_CLASSIFICATION.name} (also regression).",
    )

    plugin: PluginSettings = Field(default_factory=lambda: PluginSettings.model_validate({}))
    distill: DistillSettings = Field(default_factory=lambda: DistillSettings.model_validate({}))
    data: DataSettings = Field(default_factory=lambda: DataSettings.model_validate({}))
    trainer: dict[str, Any] = Field(
        default_factory=dict,
        description="Further settings of transformers' TrainingArguments, under its own names.",
    )

    # Optimization
    epochs: Annotated[float, Field(gt=0, allow_inf_nan=False)] = Field(
        3.0, description="Passes over the data per expert set in --order; ignored with max_steps."
    )
    max_steps: Positive | None = Field(None, description="Optimizer steps per expert set in --order.")
    batch_size: Positive = Field(32, description="Texts per forward pass and process.")
    accumulation: Positive = Field(1, description="Forward passes per optimizer step.")
    learning_rate: Annotated[float, Field(gt=0, allow_inf_nan=False)] = Field(
        1e-3, description="Peak learning rate for AdamW."
    )
    weight_decay: Annotated[float, Field(ge=0)] = Field(
        0.01, description="Weight decay for matrices; norms and biases have none."
    )
    warmup_share: Share = Field(0.1, description="Fraction of steps used for warm-up.")
    schedule: Literal["cosine", "linear", "constant_with_warmup"] = Field(
        "cosine", description="How the learning rate decays."
    )
    max_grad_norm: Annotated[float, Field(gt=0)] = Field(
        1.0, description="Gradients are clipped to this norm."
    )
    precision: Literal["auto", "fp32", "bf16", "fp16"] = Field(
        "auto", description="Training precision. auto: bf16 on a GPU that supports it, else fp32."
    )
    seed: Annotated[int, Field(ge=0, lt=2**32)] = Field(
        7, description="Random seed for weights, masks and order."
    )

    # Watching and keeping
    eval_every: Positive | None = Field(
        None, description="Steps between evaluations. Default: ten evaluations in total."
    )
    patience: Positive | None = Field(
        None, description="Stop after this many evaluations without improvement, and keep the best state."
    )
    save_every: Positive | None = Field(
        None, description="Steps between saved states. Default: ten states in total."
    )
    log_every: Positive = Field(20, description="Steps between points of the loss curve.")
    tensorboard: bool = Field(False, description="Write TensorBoard logs to the run folder.")
    cache_hidden: bool = Field(
        True, description="Cache the activations of the frozen layers below the plug-in on disk."
    )
    cache: Path | None = Field(None, description="Folder for cached activations. Default: in the run folder.")
    run: Path | None = Field(None, description="Folder for states, logs and cache. Default: OUTPUT.run")
    self_contained: bool = Field(
        False, description="Also store the PLM and CLIP's text tower in the checkpoint."
    )
    force: bool = Field(False, description="Replace an existing checkpoint.")
    head_only: bool = Field(
        False, description="With labels: train only the head, without experts, as a baseline."
    )
    control: bool = Field(
        False, description="Train the control: the same plug-in with random rows instead of CLIP's features."
    )

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        data, plugin, task = self.data, self.plugin, TASKS[self.task]
        if data.glue is None and not data.train_files:
            raise ValueError("train_files: give training data, or name a GLUE task with glue")
        if not (task.fills_words or task.labels_texts):
            raise ValueError(f"task: {self.task} has nothing to train")
        if data.glue is not None and not task.labels_texts:
            raise ValueError(f"glue: needs task {TEXT_CLASSIFICATION.name}, {self.task} has no labels")
        if data.train_weights is not None and len(data.train_weights) != len(data.train_files):
            raise ValueError("train_weights: give one for each of train_files")
        if self.patience is not None and data.eval_file is None and data.glue is None:
            raise ValueError("patience needs an eval_file")
        needs_clip = reads_text(plugin.experts) or plugin.retrieval == "topk" or self.distill.weight > 0
        if needs_clip and self.clip is None:
            raise ValueError("clip: needed by the T-expert, by topk retrieval and by distillation")
        if reads_bank(plugin.experts) and self.bank is None:
            raise ValueError("bank: needed by the V-expert")
        if self.distill.steps and not (self.distill.weight and self.cache_hidden):
            raise ValueError("distill_steps needs a distill_weight above 0 and cache_hidden")
        if self.distill.weight > 0 and (plugin.retrieval != "static" or not reads_bank(plugin.experts)):
            raise ValueError("distill_weight is for a V-expert with static retrieval")
        if self.head_only and not task.has_labels:
            raise ValueError(f"head_only: {self.task} has no head to train")
        if not self.output.name:
            raise ValueError("output: give a folder, not a root")
        return self

    @property
    def run_folder(self) -> Path:
        """Where states, logs and cache are."""
        return self.run or self.output.with_name(f"{self.output.name}.run")

    @property
    def cache_folder(self) -> Path:
        """Where frozen features are."""
        return self.cache or self.run_folder / "cache"


TABLES: Final[Mapping[str, type[_Table]]] = {
    "plugin": PluginSettings,
    "distill": DistillSettings,
    "data": DataSettings,
}


def all_flags() -> dict[str, tuple[str | None, str, FieldInfo]]:
    """Return table, name and field of every setting by the name of its flag, in the order of the help.

    ``None`` stands for the top of the file. In ``[distill]`` names are short, and the flags say ``distill``.
    """
    found: dict[str, tuple[str | None, str, FieldInfo]] = {}
    for name, field in TrainConfig.model_fields.items():
        if name in TABLES:
            for inner, inner_field in TABLES[name].model_fields.items():
                flag = f"{name}_{inner}" if TABLES[name] is DistillSettings else inner
                found[flag] = (name, inner, inner_field)
        elif name != "trainer":
            found[name] = (None, name, field)
    return found


def lay_over(values: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings with changes laid over them, table by table."""
    merged = dict(values)
    for key, value in changes.items():
        below = merged.get(key)
        both = isinstance(value, Mapping) and isinstance(below, Mapping)
        merged[key] = lay_over(below, value) if both else value  # type: ignore[arg-type]  # both are tables
    return merged


def nest(flags: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings that are named like flags, ``adapter_width`` or ``distill_steps``, in their tables."""
    known = all_flags()
    nested: dict[str, Any] = {}
    for flag, value in flags.items():
        table, name, _ = known.get(flag, (None, flag, None))
        nested = lay_over(nested, {name: value} if table is None else {table: {name: value}})
    return nested


def read_file(path: Path) -> dict[str, Any]:
    """Read a TOML file of settings, whatever it holds.

    Raises:
        ConfigError: If it cannot be read.
    """
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError("the config cannot be read", where=path, got=error) from error


def has_arms(path: Path) -> bool:
    """Whether a file of settings is that of an ablation.

    Raises:
        ConfigError: As ``read_file``.
    """
    return not {"arm", "seeds"}.isdisjoint(read_file(path))


def read_config(path: Path | None, flags: Mapping[str, Any]) -> TrainConfig:
    """Read a TOML file and lay flags over it.

    Args:
        path: The file, or None.
        flags: Settings by the names of their flags; they win.

    Raises:
        ConfigError: If the file cannot be read, a key is not known (the message names the nearest one that
            is), or a value makes no sense.
    """
    values = {} if path is None else read_file(path)
    return make_config(lay_over(values, nest(flags)), where=str(path) if path else "the flags")


def make_config(values: Mapping[str, Any], where: str) -> TrainConfig:
    """Check settings, in the tables of the file.

    Raises:
        ConfigError: As ``read_config``.
    """
    _check_keys(values, None, where)
    for table in TABLES:
        if isinstance(values.get(table), Mapping):
            _check_keys(values[table], table, where)
    try:
        return TrainConfig.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        if first["type"] == "missing":
            flag = place.replace("_", "-")
            hint = f"give --{flag}, or {place} in the --config file"
            raise ConfigError(f"the setting {place} is missing", where=where, hint=hint) from error
        message = first["msg"].removeprefix("Value error, ")
        raise ConfigError(f"{place}: {message}" if place else message, where=where) from error


def _check_keys(values: Mapping[str, Any], table: str | None, where: str) -> None:
    """Refuse keys that a table does not have.

    Raises:
        ConfigError: If there is one; the hint has the nearest name, or the table that it belongs in.
    """
    known = (TrainConfig if table is None else TABLES[table]).model_fields
    flags = all_flags()
    for key in values:
        if key in known:
            continue
        here = [] if key in flags else difflib.get_close_matches(key, known, n=1)
        home, near = table, "".join(here)
        if not here:
            home, near, _ = flags[difflib.get_close_matches(key, flags, n=1, cutoff=0.0)[0]]
        inside = f" in [{home}]" if home is not None else " above the first table"
        hint = f"did you mean {near}{'' if home == table else inside}?"
        raise ConfigError(
            "unknown setting", where=f"{where}, {key if table is None else f'{table}.{key}'}", hint=hint
        )
