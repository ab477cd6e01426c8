"""The table of PLM families, and loading a frozen PLM as one of them.

To add a family, write a ``PlmFamily`` and list it here, or name it in a package of your own as an entry point
of the group ``xadapter_export.plm_families``. Nothing else knows a family by its name.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, cast

import torch
from tokenizers import Tokenizer

from xadapter_export.bundle.manifest import Task
from xadapter_export.errors import CheckpointError, UnsupportedError
from xadapter_export.model.builtin import BUILTIN, builtin_folder
from xadapter_export.model.plm_family import PlmFamily
from xadapter_export.model.post_norm import Bert, DistilBert, Electra, Roberta
from xadapter_export.registry import Registry
from xadapter_export.tasks import TASKS
from xadapter_export.torchvision_cure import cure_torchvision

cure_torchvision()

from transformers import (  # noqa: E402  # torchvision must be cured first
    AutoConfig,
    AutoModel,
    AutoModelForMaskedLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.utils import logging as transformers_logging  # noqa: E402  # same

FAMILIES: Final[Registry[type[PlmFamily]]] = Registry(
    "xadapter_export.plm_families", "PLM family", Bert, Roberta, Electra, DistilBert
)


def family_of(config: PretrainedConfig) -> type[PlmFamily]:
    """Finds the family of a PLM.

    Raises:
        UnsupportedError: If no family takes its ``model_type``; the message lists those that are known.
    """
    known: list[str] = []
    for name in FAMILIES:
        family = FAMILIES[name]
        if config.model_type in family.model_types:
            return family
        known += family.model_types
    raise UnsupportedError(
        f"PLM family {config.model_type!r} is not supported; known families: {', '.join(known)}. "
        "Use a PLM of one of these"
    )


class NoMlmHeadError(CheckpointError):
    """A PLM that is to fill masks has no MLM head."""


def load_plm(source: str | Path | PreTrainedModel, task: Task) -> PlmFamily:
    """Loads a PLM and its tokenizer from a folder or hub id, or copies a loaded transformers model.

    Args:
        source: Folder in ``save_pretrained`` layout, hub id, ``builtin``, or a model, which stays as it is
            (its tokenizer is read from ``model.name_or_path``).
        task: One that fills words needs a PLM with a trained MLM head.

    Raises:
        CheckpointError: If it cannot be found or read, holds a pickle instead of safetensors, or has no fast
            tokenizer.
        NoMlmHeadError: If it has no MLM head and the task needs one.
        UnsupportedError: If its family is not known.
    """
    is_at_source = True
    if isinstance(source, PreTrainedModel):
        name, is_at_source = str(source.name_or_path or type(source).__name__), bool(source.name_or_path)
        model = _copy_model(source, task, name)
    else:
        name = str(source)
        source = builtin_folder() / "plm" if name == BUILTIN else source
        model = _load_model(source, task)
    tokenizer, special = _load_tokenizer(name if isinstance(source, PreTrainedModel) else source)
    if TASKS[task].reads_masks and "mask" not in special:
        raise CheckpointError(
            f"PLM {name}: its tokenizer has no mask token; {task} needs one. Use another task or PLM"
        )
    plm = family_of(model.config)(model, tokenizer, special, name)
    plm.is_at_source = is_at_source
    return plm


def _copy_model(source: PreTrainedModel, task: Task, name: str) -> PreTrainedModel:
    """Returns what ``_load_model`` would make of a model's weights, in memory of its own."""
    family_of(source.config)  # or it is refused
    base = source.base_model_prefix
    with _quiet_transformers(), torch.random.fork_rng(devices=()):  # what is drawn here is overwritten
        attention = "sdpa" if source._supports_sdpa else "eager"
        model = _auto(task).from_config(source.config, attn_implementation=attention, dtype=torch.float32)
    model.name_or_path = source.name_or_path  # where its tokenizer is
    weights = source.state_dict()
    if not hasattr(model, base):
        weights = getattr(source, base, source).state_dict()
    elif not hasattr(source, base):
        weights = {f"{base}.{key}": tensor for key, tensor in weights.items()}
    return _complete(model, model.load_state_dict(weights, strict=False).missing_keys, task, name)


def _auto(task: Task) -> Any:
    return AutoModelForMaskedLM if TASKS[task].fills_words else AutoModel


def _complete(model: Any, missing: Sequence[str], task: Task, name: str) -> PreTrainedModel:
    """Returns a model without its pooler, which is no part of it: the first token's state is read as it is.

    Raises:
        CheckpointError: If it lacks a weight.
        NoMlmHeadError: If that is all of its MLM head.
    """
    lacking = sorted(key for key in missing if not key.startswith("pooler."))
    in_encoder = f"{model.base_model_prefix}."
    if lacking and TASKS[task].fills_words and not any(key.startswith(in_encoder) for key in lacking):
        raise NoMlmHeadError(
            f"PLM {name} has no MLM head, which {task} needs",
            got=f"{len(lacking)} missing weights, first {lacking[0]}",
            hint="use a PLM with an MLM head, or another task",
        )
    if lacking:
        raise CheckpointError(
            f"PLM {name}: the file is incomplete",
            got=f"{len(lacking)} missing weights, first {lacking[0]}",
            hint="download the whole file",
        )
    if getattr(model, "pooler", None) is not None:
        model.pooler = None
    return cast(PreTrainedModel, model)


def _load_model(source: str | Path, task: Task) -> PreTrainedModel:
    what = f"PLM {source}"
    if Path(source).is_dir() and not list(Path(source).glob("*.safetensors")):
        pickles = [
            p.name for p in Path(source).iterdir() if p.suffix in {".bin", ".pt", ".pth", ".ckpt", ".pkl"}
        ]
        found = f"found the pickle {pickles[0]}, which is refused" if pickles else "found none"
        raise CheckpointError(f"{what}: expected model.safetensors, {found}. Save it with save_pretrained")
    try:
        family_of(AutoConfig.from_pretrained(source, trust_remote_code=False))
        with _quiet_transformers():
            model, info = _auto(task).from_pretrained(
                source,
                trust_remote_code=False,
                use_safetensors=True,
                dtype=torch.float32,
                output_loading_info=True,
            )
    except UnsupportedError:
        raise
    except Exception as error:  # transformers raises many kinds for a bad folder; each is the user's input
        reason = " ".join(str(error).split())[:300]
        raise CheckpointError(
            f"{what} could not be loaded: {reason}. Expected a save_pretrained folder or a reachable hub id"
        ) from error
    return _complete(model, info["missing_keys"], task, str(source))


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """No progress bar, and no table of the pooler that is not used; what matters is raised."""
    enabled, verbosity = transformers_logging.is_progress_bar_enabled(), transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()  # type: ignore[no-untyped-call]  # transformers
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]  # transformers
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if enabled:
            transformers_logging.enable_progress_bar()  # type: ignore[no-untyped-call]  # transformers


def _load_tokenizer(source: str | Path) -> tuple[Tokenizer, dict[str, int]]:
    try:
        auto = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    except Exception as error:  # transformers raises many kinds for a bad folder; each is the user's input
        reason = " ".join(str(error).split())[:300]
        raise CheckpointError(
            f"tokenizer of PLM {source} could not be loaded: {reason}. "
            "Expected tokenizer.json next to the weights"
        ) from error
    backend = getattr(auto, "backend_tokenizer", None)
    if backend is None:
        raise CheckpointError(f"PLM {source} has no fast tokenizer (tokenizer.json), which a bundle needs")
    tokenizer = Tokenizer.from_str(backend.to_str())
    if tokenizer.get_vocab().keys() <= set(auto.all_special_tokens):  # what transformers makes of no file
        raise CheckpointError(f"PLM {source} has no tokenizer; expected tokenizer.json next to the weights")
    tokenizer.no_padding()
    tokenizer.no_truncation()
    special = {"pad": int(auto.pad_token_id if auto.pad_token_id is not None else 0)}
    if auto.mask_token_id is not None:
        special["mask"] = int(auto.mask_token_id)
    return tokenizer, special
