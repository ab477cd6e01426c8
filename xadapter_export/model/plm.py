"""The narrow interface to a frozen PLM: embed, layers, MLM head; one table of families.

Dimensions: B batch, T PLM tokens, H hidden size, V vocabulary.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn

from xadapter_export.bundle.manifest import Task
from xadapter_export.errors import CheckpointError, UnsupportedError
from xadapter_export.model.builtin import BUILTIN, builtin_folder
from xadapter_export.model.identity import weights_sha256
from xadapter_export.tasks import TASKS
from xadapter_export.torchvision_cure import cure_torchvision

cure_torchvision()

from optimum.utils import NormalizedConfigManager  # noqa: E402  # torchvision must be cured first
from transformers import (  # noqa: E402  # torchvision must be cured first
    AutoConfig,
    AutoModel,
    AutoModelForMaskedLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.utils import logging as transformers_logging  # noqa: E402  # same

# What a configuration says that the weights' names and shapes do not, and the result depends on.
_SETTINGS = (
    "model_type",
    "num_attention_heads",
    "hidden_act",
    "activation",
    "layer_norm_eps",
    "pad_token_id",
)


@dataclass(frozen=True)
class LayerParts:
    """Paths from one layer to its parts, as BERT names them."""

    query: str = "attention.self.query"
    key: str = "attention.self.key"
    value: str = "attention.self.value"
    attention_out: str = "attention.output.dense"
    attention_norm: str = "attention.output.LayerNorm"
    up: str = "intermediate.dense"
    activation: str = "intermediate.intermediate_act_fn"
    down: str = "output.dense"
    norm: str = "output.LayerNorm"


_DISTILBERT_LAYER = LayerParts(
    query="attention.q_lin",
    key="attention.k_lin",
    value="attention.v_lin",
    attention_out="attention.out_lin",
    attention_norm="sa_layer_norm",
    up="ffn.lin1",
    activation="ffn.activation",
    down="ffn.lin2",
    norm="output_layer_norm",
)


@dataclass(frozen=True)
class PlmFamily:
    """How to reach the parts of one family of post-norm encoders in transformers.

    Attributes:
        name: Family name, as it stands in checkpoints and manifests.
        model_types: transformers' ``config.model_type`` values that belong to it.
        base: Attribute of a task model that holds the encoder.
        layers: Path from the encoder to its list of layers.
        mlm_transform: What the MLM head does before the decoder, ``(..., H) -> (..., E)``.
        decoder: Path from the task model to the linear decoder of the MLM head.
        layer_parts: Where the parts of a layer are.
        counts_positions_after_padding: RoBERTa's way: the first token has position ``pad_token_id + 1``.
    """

    name: str
    model_types: tuple[str, ...]
    base: str
    layers: str
    mlm_transform: Callable[[nn.Module, Tensor], Tensor]
    decoder: str
    layer_parts: LayerParts = LayerParts()
    counts_positions_after_padding: bool = False


def _roberta_transform(plm: nn.Module, hidden: Tensor) -> Tensor:
    head = plm.get_submodule("lm_head")
    return head.get_submodule("layer_norm")(nn.functional.gelu(head.get_submodule("dense")(hidden)))  # type: ignore[no-any-return]  # nn.Module call


def _distilbert_transform(plm: nn.Module, hidden: Tensor) -> Tensor:
    hidden = plm.get_submodule("activation")(plm.get_submodule("vocab_transform")(hidden))
    return plm.get_submodule("vocab_layer_norm")(hidden)  # type: ignore[no-any-return]  # nn.Module call


def _submodule_transform(path: str) -> Callable[[nn.Module, Tensor], Tensor]:
    return lambda plm, hidden: plm.get_submodule(path)(hidden)


FAMILIES = (
    PlmFamily(
        name="bert",
        model_types=("bert",),
        base="bert",
        layers="encoder.layer",
        mlm_transform=_submodule_transform("cls.predictions.transform"),
        decoder="cls.predictions.decoder",
    ),
    PlmFamily(
        name="roberta",
        model_types=("roberta", "xlm-roberta", "camembert"),
        base="roberta",
        layers="encoder.layer",
        mlm_transform=_roberta_transform,
        decoder="lm_head.decoder",
        counts_positions_after_padding=True,
    ),
    PlmFamily(
        name="electra",
        model_types=("electra",),
        base="electra",
        layers="encoder.layer",
        mlm_transform=_submodule_transform("generator_predictions"),
        decoder="generator_lm_head",
    ),
    PlmFamily(
        name="distilbert",
        model_types=("distilbert",),
        base="distilbert",
        layers="transformer.layer",
        mlm_transform=_distilbert_transform,
        decoder="vocab_projector",
        layer_parts=_DISTILBERT_LAYER,
    ),
)


def family_of(config: PretrainedConfig) -> PlmFamily:
    """Finds the family of a PLM.

    Raises:
        UnsupportedError: If no family takes its ``model_type``; the message lists those that are known.
    """
    for family in FAMILIES:
        if config.model_type in family.model_types:
            return family
    known = ", ".join(model_type for family in FAMILIES for model_type in family.model_types)
    raise UnsupportedError(
        f"PLM family {config.model_type!r} is not supported; known families: {known}. "
        "Use a PLM of one of these"
    )


class NoMlmHeadError(CheckpointError):
    """A PLM that is to fill masks has no MLM head."""


class FrozenPlm(nn.Module):
    """A frozen PLM seen through its family: what an X-adapter needs of it, and no more.

    Attributes:
        model: The transformers model: with its MLM head for fill-mask, else the bare encoder.
        source: Hub id or path it came from; else what it is called in messages.
        is_at_source: Whether ``load_plm(source)`` finds it again; a checkpoint stores it otherwise.
        max_seq: Longest input in tokens, special tokens included.
    """

    def __init__(
        self, model: PreTrainedModel, tokenizer: Tokenizer, special: dict[str, int], source: str
    ) -> None:
        super().__init__()
        self.family = family_of(model.config)
        self.model = cast(PreTrainedModel, model.requires_grad_(False).train(False))
        self.source = source
        self.is_at_source = True
        self.tokenizer = tokenizer
        self.special = special  # "mask" (absent where the PLM has none) and "pad" token ids
        self.encoder: nn.Module = getattr(model, self.family.base, model)
        layers = self.encoder.get_submodule(self.family.layers)
        assert isinstance(layers, nn.ModuleList)  # the family table says so
        self.layers = layers
        config = model.config
        normalized = NormalizedConfigManager.get_normalized_config_class(config.model_type)(config)
        self.hidden_size = int(normalized.hidden_size)
        self.vocab_size = int(normalized.vocab_size)
        self.num_heads = int(normalized.num_attention_heads)
        self.max_seq = int(config.max_position_embeddings)
        if self.family.counts_positions_after_padding:
            self.max_seq -= int(config.pad_token_id) + 1
        self.has_token_type_ids = int(getattr(config, "type_vocab_size", 0)) > 1

    @property
    def settings(self) -> dict[str, object]:
        """Settings that belong to the identity of the PLM."""
        return {name: getattr(self.model.config, name, None) for name in _SETTINGS}

    @property
    def sha256(self) -> str:
        """Hash of the weights in memory, the settings and the tokenizer."""
        return weights_sha256(self.model.state_dict(), self.settings, self.tokenizer)

    def train(self, mode: bool = True) -> "FrozenPlm":
        """Stays in evaluation mode, whatever ``mode`` asks: a frozen PLM has no dropout."""
        del mode
        return super().train(False)

    def embed(self, input_ids: Tensor, token_type_ids: Tensor | None = None) -> Tensor:
        """Embeds tokens.

        Args:
            input_ids: ``(B, T) int64``.
            token_type_ids: ``(B, T) int64``; zeros if None. Not used where the PLM has none.

        Returns:
            ``(B, T, H) float32``. What the first layer reads.
        """
        arguments = {"input_ids": input_ids}
        if self.family.name != "distilbert":
            arguments["token_type_ids"] = (
                torch.zeros_like(input_ids) if token_type_ids is None else token_type_ids
            )
        hidden = self.encoder.get_submodule("embeddings")(**arguments)
        if hasattr(self.encoder, "embeddings_project"):
            hidden = self.encoder.get_submodule("embeddings_project")(hidden)
        return hidden  # type: ignore[no-any-return]  # nn.Module call

    def layer(self, index: int, hidden: Tensor, additive_mask: Tensor) -> Tensor:
        """Runs one layer: ``(B, T, H) float32`` with the mask of ``additive_mask`` to the same shape."""
        return self.layers[index](hidden, additive_mask)  # type: ignore[no-any-return]  # nn.Module call

    def mlm_logits(self, hidden: Tensor) -> Tensor:
        """MLM head: ``(..., H) float32`` to ``(..., V) float32``."""
        decoder = self.model.get_submodule(self.family.decoder)
        return decoder(self.family.mlm_transform(self.model, hidden))  # type: ignore[no-any-return]  # nn.Module call


def additive_mask(attention_mask: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Makes the mask that attention adds to its scores, once for all layers.

    Args:
        attention_mask: ``(B, T)``, 1 or True at real tokens.
        dtype: Floating-point type of the result.

    Returns:
        ``(B, 1, 1, T)``, 0 at real tokens and the dtype's lowest value at padding.
    """
    return (1.0 - attention_mask[:, None, None, :].to(dtype)) * torch.finfo(dtype).min


def load_plm(
    source: str | Path | PreTrainedModel, task: Task, tokenizer_source: str | Path | None = None
) -> FrozenPlm:
    """Loads a PLM and its tokenizer from a folder or hub id, or copies a loaded transformers model.

    Args:
        source: Folder in ``save_pretrained`` layout, hub id, ``builtin``, or a model, which stays as it is
            (its tokenizer is read from ``tokenizer_source`` or ``model.name_or_path``).
        task: One that fills words needs a PLM with a trained MLM head.
        tokenizer_source: Folder or hub id of the tokenizer, if not that of the PLM.

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
        model, tokenizer_source = _load_model(source, task), tokenizer_source or source
    tokenizer, special = _load_tokenizer(tokenizer_source or name)
    if TASKS[task].reads_masks and "mask" not in special:
        raise CheckpointError(
            f"PLM {name}: its tokenizer has no mask token; {task} needs one. Use another task or PLM"
        )
    plm = FrozenPlm(model, tokenizer, special, name)
    plm.is_at_source = is_at_source
    return plm


def _copy_model(source: PreTrainedModel, task: Task, name: str) -> PreTrainedModel:
    """Returns what ``_load_model`` would make of a model's weights, in memory of its own."""
    base = family_of(source.config).base
    with _quiet_transformers(), torch.random.fork_rng(devices=()):  # what is drawn here is overwritten
        model = _auto(task).from_config(source.config, attn_implementation="sdpa", dtype=torch.float32)
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
                attn_implementation="sdpa",
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
