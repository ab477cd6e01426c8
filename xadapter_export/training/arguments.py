"""The settings of transformers' Trainer: those of a run, and what ``[trainer]`` adds by their own names."""

import dataclasses
import difflib
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import torch

from xadapter_export.errors import ConfigError, XAdapterError
from xadapter_export.tasks import TASKS
from xadapter_export.torchvision_cure import cure_torchvision
from xadapter_export.training.config import TrainConfig

cure_torchvision()

from transformers import TrainingArguments  # noqa: E402  # torchvision must be cured first

# Settings that a run has under a name of its own.
_OURS: Final[Mapping[str, str]] = {
    "output_dir": "run",
    "per_device_train_batch_size": "batch_size",
    "gradient_accumulation_steps": "accumulation",
    "num_train_epochs": "epochs",
    "max_steps": "max_steps",
    "learning_rate": "learning_rate",
    "weight_decay": "weight_decay",
    "warmup_steps": "warmup_share",
    "max_grad_norm": "max_grad_norm",
    "bf16": "precision",
    "fp16": "precision",
    "seed": "seed",
    "data_seed": "seed",
    "logging_steps": "log_every",
    "eval_steps": "eval_every",
    "save_steps": "save_every",
}
# What a run promises rests on these: resuming, the order of draws, what is frozen, what is saved and where.
# Or they are for a loss or a model of transformers' own, and would change nothing. ``deepspeed`` and the
# ``_config`` ones may name files whose content decides what is imported.
_DECIDED: Final = frozenset(
    {
        *("eval_strategy", "save_strategy", "logging_strategy", "load_best_model_at_end", "save_only_model"),
        *("metric_for_best_model", "greater_is_better", "label_names", "prediction_loss_only"),
        *("remove_unused_columns", "train_sampling_strategy", "length_column_name", "auto_find_batch_size"),
        *("batch_eval_metrics", "include_for_metrics", "eval_do_concat_batches", "dataloader_drop_last"),
        *("ignore_data_skip", "resume_from_checkpoint", "restore_callback_states_from_checkpoint"),
        *("enable_jit_checkpoint", "use_cpu", "local_rank", "do_train", "do_eval", "do_predict"),
        *("gradient_checkpointing", "gradient_checkpointing_kwargs", "label_smoothing_factor", "use_cache"),
        *("activation_checkpointing", "activation_checkpointing_kwargs", "neftune_noise_alpha"),
        *("use_liger_kernel", "liger_kernel_config", "include_num_input_tokens_seen"),
        *("deepspeed", "fsdp", "fsdp_config", "accelerator_config", "parallelism_config"),
        *("disable_tqdm", "log_level", "log_level_replica", "logging_nan_inf_filter"),
    }
)
_FOLDERS: Final = ("WANDB_DIR", "TENSORBOARD_LOGGING_DIR")
_UPLOADS: Final = ("push_to_hub", "hub_", "trackio_")


def check_trainer_table(table: Mapping[str, Any]) -> None:
    """Refuse what ``[trainer]`` may not hold.

    Raises:
        ConfigError: If ``TrainingArguments`` has no such setting, a run has it under another name, or it is
            one that a run decides by itself; anything that uploads is among those.
    """
    known = [field.name for field in dataclasses.fields(TrainingArguments)]
    for name in table:
        where = f"[trainer], {name}"
        if name in _OURS:
            hint = f"use {_OURS[name]}"
            raise ConfigError("this setting of the trainer has another name here", where=where, hint=hint)
        if name in _DECIDED or name.startswith(_UPLOADS):
            raise ConfigError("xad-train decides this setting of the trainer", where=where, hint="remove it")
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.0)
            raise ConfigError("unknown setting of the trainer", where=where, hint=f"did you mean {near[0]}?")


@contextmanager
def reporters_write_to(folder: Path) -> Iterator[None]:
    """Let the reporters that ``[trainer]`` names write into a folder, unless the environment says where."""
    added = {name: str(folder.resolve()) for name in _FOLDERS if name not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            os.environ.pop(name, None)


@contextmanager
def blaming_the_table(table: Mapping[str, Any]) -> Iterator[None]:
    """Make of what transformers raises in a block an error about ``[trainer]``, if that holds anything.

    Raises:
        ConfigError: If it raises something.
    """
    try:
        yield
    except (TypeError, ValueError, ImportError, RuntimeError) as error:
        if not table or isinstance(error, XAdapterError):
            raise
        got = " ".join(str(error).split())
        raise ConfigError("transformers refuses the settings", where="[trainer]", got=got) from error


def make_arguments(
    config: TrainConfig, folder: Path, *, steps: int, watched: bool, distills: bool = False, sets: int = 1
) -> TrainingArguments:
    """Return the trainer's settings for some steps.

    Args:
        config: All settings.
        folder: Where states go.
        steps: How many optimizer steps.
        watched: Whether held-out examples are evaluated.
        distills: Whether the steps teach only the search of a static memory.
        sets: How many expert sets take turns.

    Raises:
        ConfigError: If the precision needs a GPU, or a setting of ``[trainer]`` is refused.
    """
    on_gpu = torch.cuda.is_available()
    if config.precision == "fp16" and not on_gpu:
        raise ConfigError("fp16 training needs a GPU", got="no GPU", hint="use precision bf16 or fp32")
    check_trainer_table(config.trainer)
    eval_every = config.eval_every or max(1, steps // 10)
    has_labels = TASKS[config.task].labels_texts
    metric = "eval_metric" if has_labels else "eval_loss"
    settings: dict[str, Any] = {
        "output_dir": str(folder),
        "max_steps": steps,
        **_optimization(config, steps, on_gpu=on_gpu, distills=distills),
        "use_cpu": not on_gpu,
        "ddp_backend": "gloo" if not on_gpu and int(os.environ.get("WORLD_SIZE", "1")) > 1 else None,
        "ddp_find_unused_parameters": distills or sets > 1,
        "ddp_timeout": 24 * 3600,  # the first process may cache for hours
        "eval_strategy": "steps" if watched else "no",
        "eval_steps": eval_every,
        "load_best_model_at_end": bool(config.patience) and watched,
        "metric_for_best_model": metric,
        "greater_is_better": metric == "eval_metric",
        "label_names": ["labels" if has_labels else "answers"],
        "prediction_loss_only": not has_labels,
        "save_strategy": "steps",
        "save_steps": eval_every if config.patience else config.save_every or max(1, steps // 10),
        "save_total_limit": 2,
        "restore_callback_states_from_checkpoint": True,
        "logging_steps": config.log_every,
        "logging_nan_inf_filter": False,
        "report_to": "none",
        "remove_unused_columns": False,
        "dataloader_pin_memory": on_gpu,
        "disable_tqdm": True,
        "log_level": "error",
    }
    with blaming_the_table(config.trainer):
        arguments = TrainingArguments(**{**settings, **config.trainer})
    if arguments.n_gpu > 1:  # one process trains on one GPU; torchrun gives each its own
        arguments._n_gpu = 1
    return arguments


def _optimization(config: TrainConfig, steps: int, *, on_gpu: bool, distills: bool) -> dict[str, Any]:
    use_bf16 = config.precision == "bf16" or (
        config.precision == "auto" and on_gpu and torch.cuda.is_bf16_supported()
    )
    return {
        "per_device_train_batch_size": config.batch_size,
        "per_device_eval_batch_size": max(config.batch_size, 64),
        "gradient_accumulation_steps": config.accumulation,
        "learning_rate": config.distill.learning_rate if distills else config.learning_rate,
        "weight_decay": config.weight_decay,
        "warmup_steps": round(config.warmup_share * steps),
        "lr_scheduler_type": config.schedule,
        "max_grad_norm": config.max_grad_norm,
        "bf16": use_bf16,
        "fp16": config.precision == "fp16",
        "seed": config.seed,
        "data_seed": config.seed,
    }
