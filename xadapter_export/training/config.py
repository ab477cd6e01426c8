"""Everything that a training run is told: one flat list of settings, each a key of a file and a flag."""

import difflib
import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from xadapter_export.bundle.manifest import SomeExperts, Task
from xadapter_export.errors import ConfigError
from xadapter_export.experts import EXPERT_SETS, V, reads_bank, reads_text
from xadapter_export.tasks import FILL_MASK, TASKS, TEXT_CLASSIFICATION

COLOR_WORDS = (
    "black",
    "blue",
    "brown",
    "green",
    "grey",
    "orange",
    "pink",
    "purple",
    "red",
    "white",
    "yellow",
)
Positive = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(ge=0.0, le=1.0)]


class TrainConfig(BaseModel):
    """Settings of a training run. Relative paths are relative to the current folder."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    # Parts
    output: Path = Field(description="Folder for the trained checkpoint.")
    plm: str = Field(description="Frozen PLM: a save_pretrained folder, a hub id or builtin.")
    clip: str | None = Field(
        None, description="Frozen CLIP: a folder in open_clip's layout, model:tag, a hub id or builtin."
    )
    bank: str | None = Field(None, description="Feature bank: a folder made by xad-bank, or builtin.")

    # Plug-in
    experts: SomeExperts = Field(
        V.name, description="Experts to train.", json_schema_extra={"enum": list(EXPERT_SETS[1:])}
    )
    layers: tuple[Annotated[int, Field(ge=0)], ...] | None = Field(
        None, description="PLM layer to add experts before, counted from 0. Default: the last two."
    )
    adapter_width: Positive = Field(64, description="Width of the attention inside the plug-in.")
    num_heads: Positive = Field(4, description="Attention heads of each expert.")
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
    query: Literal["token", "sentence"] = Field(
        "token",
        description="Static retrieval: one query per token, or one per sentence with a learned key for each "
        "prototype.",
    )
    distill_weight: Annotated[float, Field(ge=0.0)] = Field(
        0.0,
        description="Static retrieval: weight of the loss that teaches attention to imitate CLIP's search "
        "(needs clip).",
    )
    distill_temperature: Annotated[float, Field(gt=0.0)] = Field(
        0.05, description="Temperature of the imitated search; cosines are divided by it."
    )

    distill_steps: Annotated[int, Field(ge=0)] = Field(
        0, description="Number of distillation steps before training; cheap, because no PLM layer runs."
    )
    distill_learning_rate: Annotated[float, Field(gt=0)] = Field(
        1e-2, description="Peak learning rate for the distillation steps."
    )

    # Data
    task: Task = Field(
        FILL_MASK.name,
        description=f"Task to train for: {FILL_MASK.name}, or {TEXT_CLASSIFICATION.name} (also regression).",
    )
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
        COLOR_WORDS, description="Words to mask more often. Default: eleven color words."
    )
    favor_share: Share = Field(
        0.5, description="How often to mask only that word in a text that contains one."
    )
    max_seq: Positive | None = Field(None, description="Longest input in tokens. Default: the PLM's limit.")

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
        if self.glue is None and not self.train_files:
            raise ValueError("train_files: give training data, or name a GLUE task with glue")
        task = TASKS[self.task]
        if not (task.fills_words or task.labels_texts):
            raise ValueError(f"task: {self.task} has nothing to train")
        if self.glue is not None and not task.labels_texts:
            raise ValueError(f"glue: needs task {TEXT_CLASSIFICATION.name}, {self.task} has no labels")
        if self.train_weights is not None and len(self.train_weights) != len(self.train_files):
            raise ValueError("train_weights: give one for each of train_files")
        if self.patience is not None and self.eval_file is None and self.glue is None:
            raise ValueError("patience needs an eval_file")
        needs_clip = reads_text(self.experts) or self.retrieval == "topk" or self.distill_weight > 0
        if needs_clip and self.clip is None:
            raise ValueError("clip: needed by the T-expert, by topk retrieval and by distillation")
        if reads_bank(self.experts) and self.bank is None:
            raise ValueError("bank: needed by the V-expert")
        if self.query == "sentence" and self.retrieval != "static":
            raise ValueError("query = sentence needs retrieval = static")
        if self.distill_steps and not (self.distill_weight and self.cache_hidden):
            raise ValueError("distill_steps needs a distill_weight above 0 and cache_hidden")
        if self.distill_weight > 0 and (self.retrieval != "static" or not reads_bank(self.experts)):
            raise ValueError("distill_weight is for a V-expert with static retrieval")
        if self.head_only and not task.has_labels:
            raise ValueError(f"head_only: {self.task} has no head to train")
        if not self.output.name:
            raise ValueError("output: give a folder, not a root")
        if self.layers is not None and list(self.layers) != sorted(set(self.layers)):
            raise ValueError("layers must be in ascending order, without repeats")
        if self.adapter_width % self.num_heads:
            raise ValueError("adapter_width must be a multiple of num_heads")
        return self

    @property
    def run_folder(self) -> Path:
        """Where states, logs and cache are."""
        return self.run or self.output.with_name(f"{self.output.name}.run")

    @property
    def cache_folder(self) -> Path:
        """Where frozen features are."""
        return self.cache or self.run_folder / "cache"

    @property
    def pool(self) -> int:
        """How many of the nearest pictures training draws from."""
        return max(self.k, self.k_drawn_from or 2 * self.k)


def read_config(path: Path | None, flags: dict[str, Any]) -> TrainConfig:
    """Read a TOML file and lay flags over it.

    Args:
        path: The file, or None.
        flags: Settings by name; they win.

    Raises:
        ConfigError: If the file cannot be read, a key is not known (the message names the nearest one that
            is), or a value makes no sense.
    """
    values: dict[str, Any] = {}
    if path is not None:
        try:
            values = tomllib.loads(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
            raise ConfigError("the config cannot be read", where=path, got=error) from error
    return make_config({**values, **flags}, where=str(path) if path else "the flags")


def make_config(values: dict[str, Any], where: str) -> TrainConfig:
    """Check settings.

    Raises:
        ConfigError: As ``read_config``.
    """
    for key in values:
        if key not in TrainConfig.model_fields:
            near = difflib.get_close_matches(key, TrainConfig.model_fields, n=1, cutoff=0.0)
            raise ConfigError("unknown setting", where=f"{where}, {key}", hint=f"did you mean {near[0]}?")
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
