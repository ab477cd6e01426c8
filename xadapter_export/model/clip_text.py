"""open_clip's text towers: its own modules, with the facts that an X-adapter and the exporter need of them.

They are built with open_clip's "custom" block, which has the weights of the usual one in plain products, and
run at the text's true length: attention is causal, so what follows end-of-text cannot change what stands
before it. Only the layers of a graph are ours.

Dimensions: B batch, S CLIP tokens, W text width, D CLIP embedding size.
"""

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from pydantic import ConfigDict, ValidationError
from pydantic.dataclasses import dataclass
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor, nn

from xadapter_export.bundle.small_files import describe, read_object
from xadapter_export.errors import CheckpointError, UnsupportedError, panics_as
from xadapter_export.model.builtin import BUILTIN, builtin_folder
from xadapter_export.model.clip_tokenizer import OPEN_CLIP_VOCAB_SIZE, clip_tokenizer
from xadapter_export.model.export_layers import PackedAttention, PackedLayer, additive_mask
from xadapter_export.model.pooling import take_positions
from xadapter_export.model.text_tower import TextTower
from xadapter_export.torchvision_cure import cure_torchvision

CONFIG_NAME = "open_clip_config.json"
WEIGHTS_NAME = "open_clip_model.safetensors"
TOKENIZER_NAME = "tokenizer.json"

# Settings of open_clip's text_cfg that make another kind of tower, with the value that this one has.
_FIXED_SETTINGS = {
    "hf_model_name": None,
    "hf_tokenizer_name": None,
    "embed_cls": False,
    "no_causal_mask": False,
    "final_ln_after_pool": False,
    "block_type": None,
    "qk_norm": False,
    "scaled_cosine_attn": False,
    "scale_heads": False,
    "scale_attn_inner": False,
    "scale_attn": False,
    "scale_fc": False,
}
_IGNORED_SETTINGS = {
    "pad_id",
    "output_tokens",
    "tokenizer_mode",
    "hf_model_pretrained",
    "hf_proj_type",
    "hf_pooler_type",
    "hf_model_config",
}
_SUPPORTED = "open_clip transformer text towers (ViT-B-32, ViT-B-16, ViT-L-14 and their like)"


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class ClipTextConfig:
    """Shape of a text tower, in open_clip's words (``text_cfg``).

    Attributes:
        pool_type: How end-of-text is found: ``argmax``, the highest id, or ``eos``, the first ``eos_id``.
    """

    embed_dim: int
    context_length: int = 77
    vocab_size: int = 49408
    width: int = 512
    heads: int = 8
    layers: int = 12
    mlp_ratio: float = 4.0
    ls_init_value: float | None = None
    pool_type: str = "argmax"
    eos_id: int = 2
    proj_type: str = "linear"
    proj_bias: bool = False
    quick_gelu: bool = False
    gelu_approximate: str = "none"
    norm_eps: float = 1e-5

    @classmethod
    def from_open_clip(cls, model_cfg: dict[str, object], source: str) -> "ClipTextConfig":
        """Reads open_clip's ``model_cfg``.

        Raises:
            UnsupportedError: If it describes a tower of another kind (HF text encoder, SigLIP, CoCa).
            CheckpointError: If it is no open_clip configuration.
        """
        settings = model_cfg.get("text_cfg") if isinstance(model_cfg, dict) else None
        if not isinstance(settings, dict) or not isinstance(model_cfg.get("embed_dim"), int):
            raise CheckpointError(
                f"CLIP {source}: model_cfg needs embed_dim and text_cfg, as open_clip writes them"
            )
        settings = dict(settings)

        def refuse(setting: str, value: object) -> UnsupportedError:
            return UnsupportedError(
                f"CLIP {source}: text tower with {setting}={value!r} is not supported; "
                f"use one of {_SUPPORTED}"
            )

        for name, only in _FIXED_SETTINGS.items():
            if (value := settings.pop(name, only)) != only:
                raise refuse(name, value)
        if settings.get("pool_type", "argmax") not in {"argmax", "eos"}:
            raise refuse("pool_type", settings["pool_type"])
        if settings.get("proj_type", "linear") not in {"linear", "none"}:
            raise refuse("proj_type", settings["proj_type"])
        if (tokenizer_kwargs := settings.pop("tokenizer_kwargs", None)) and tokenizer_kwargs.get(
            "clean", "lower"
        ) != "lower":
            raise refuse("tokenizer_kwargs", tokenizer_kwargs)
        act, norm = settings.pop("act_kwargs", None) or {}, settings.pop("norm_kwargs", None) or {}
        settings = {name: value for name, value in settings.items() if name not in _IGNORED_SETTINGS}
        try:
            config = cls(
                embed_dim=cast(int, model_cfg["embed_dim"]),
                quick_gelu=bool(model_cfg.get("quick_gelu", False)),
                gelu_approximate=act.get("approximate", "none"),
                norm_eps=norm.get("eps", 1e-5),
                **settings,
            )
        except ValidationError as error:
            raise UnsupportedError(
                f"CLIP {source}: text_cfg has an unknown setting: {describe(error)}"
            ) from error
        if config.heads < 1 or config.width % config.heads:
            raise CheckpointError(
                f"CLIP {source}: text width {config.width} is not a multiple of heads {config.heads}"
            )
        return config

    def to_open_clip(self) -> dict[str, object]:
        """The ``model_cfg`` that ``from_open_clip`` reads."""
        names = (
            *("context_length", "vocab_size", "width", "heads", "layers", "mlp_ratio", "ls_init_value"),
            *("pool_type", "eos_id", "proj_type", "proj_bias"),
        )
        text_cfg: dict[str, object] = {name: getattr(self, name) for name in names}
        text_cfg["norm_kwargs"] = {"eps": self.norm_eps}
        if not self.quick_gelu:  # which has no such argument
            text_cfg["act_kwargs"] = {"approximate": self.gelu_approximate}
        return {"embed_dim": self.embed_dim, "quick_gelu": self.quick_gelu, "text_cfg": text_cfg}

    @property
    def feature_dim(self) -> int:
        """D, width of the pooled text feature."""
        return self.width if self.proj_type == "none" else self.embed_dim


class ClipBlock(PackedLayer):
    """One block as it goes into the graph.

    Args:
        block: open_clip's block.
        packed: See ``PackedAttention``.
    """

    def __init__(self, block: Any, *, packed: bool) -> None:
        super().__init__()
        self.ln_1, self.ls_1, self.ln_2, self.mlp, self.ls_2 = (
            block.ln_1, block.ls_1, block.ln_2, block.mlp, block.ls_2,
        )  # fmt: skip
        of_three = zip(block.attn.in_proj_weight.chunk(3), block.attn.in_proj_bias.chunk(3), strict=True)
        projections = [_linear(weight, bias) for weight, bias in of_three]
        self.attention = PackedAttention(
            projections, block.attn.out_proj, block.attn.num_heads, packed=packed
        )

    def forward(
        self, hidden: Tensor, context: tuple[Tensor, Tensor], positions: Tensor | None = None
    ) -> Tensor:
        """``(B, S, W) float32`` to the same, or to ``(B, 1, W)`` at end-of-text."""
        causal_mask, token_mask = context
        normed = self.ln_1(hidden)
        if positions is None:
            added = self.attention(normed, causal_mask)
        else:
            hidden = take_positions(hidden, positions)
            added = self.attention(normed, token_mask, positions=positions)
        hidden = hidden + self.ls_1(added)
        return hidden + self.ls_2(self.mlp(self.ln_2(hidden)))  # type: ignore[no-any-return]  # nn.Module call


def _linear(weight: Tensor, bias: Tensor) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], device="meta")
    linear.weight, linear.bias = (nn.Parameter(x, requires_grad=False) for x in (weight, bias))
    return linear


class OpenClipTower(TextTower):
    """A transformer text tower of open_clip.

    Args:
        config: Its shape.
        tokenizer: Its tokenizer.
        source: Folder, ``model:tag`` or hub id it came from; else what it is called in messages.

    Attributes:
        config: Its shape.
        text: open_clip's module.

    Source:
        ``TextTransformer`` of open_clip 3.3, which runs it at the context length.
    """

    name = "open_clip"

    def __init__(self, config: ClipTextConfig, tokenizer: Tokenizer, source: str) -> None:
        super().__init__(tokenizer, source)
        self.config = config
        self.context_length = config.context_length
        self.width = config.width
        self.feature_dim = config.feature_dim
        self.end_token_id = config.eos_id if config.pool_type == "eos" else config.vocab_size - 1
        self.text: Any = _make_text_transformer(config)
        self.eval().requires_grad_(False)

    @classmethod
    def load(cls, source: str | Path | nn.Module) -> "OpenClipTower":
        """Loads the text tower of an open_clip model.

        Args:
            source: A folder with ``open_clip_config.json`` and ``open_clip_model.safetensors``; ``model:tag``
                as open_clip lists them (``ViT-B-32:laion2b_s34b_b79k``); a hub id; ``builtin``; or an
                open_clip model with open_clip's own vocabulary, of which the weights are copied.

        Raises:
            CheckpointError: If it is not found, is a pickle, or its weights do not fit its configuration.
            UnsupportedError: If the text tower is of another kind.
        """
        return _from_open_clip_model(source) if isinstance(source, nn.Module) else _from_source(source)

    def save(self, folder: Path, dtype: torch.dtype = torch.float32) -> None:
        """Writes open_clip's hub layout, without the image tower."""
        folder.mkdir(parents=True, exist_ok=True)
        weights = {f"text.{name}": tensor.to(dtype).contiguous() for name, tensor in self.weights.items()}
        save_file(weights, folder / WEIGHTS_NAME)
        config = {"model_cfg": self.config.to_open_clip()}
        (folder / CONFIG_NAME).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        self.tokenizer.save(str(folder / TOKENIZER_NAME), pretty=False)

    @property
    def settings(self) -> dict[str, object]:
        """See ``TextTower.settings``."""
        names = ("heads", "pool_type", "eos_id", "quick_gelu", "gelu_approximate", "norm_eps")
        return {name: getattr(self.config, name) for name in names}

    @property
    def weights(self) -> dict[str, Tensor]:
        """The weights under open_clip's names."""
        return dict(self.text.state_dict())

    @property
    def layers(self) -> Sequence[nn.Module]:
        """See ``TextTower.layers``."""
        return self.text.transformer.resblocks  # type: ignore[no-any-return]  # of open_clip

    def embed(self, clip_input_ids: Tensor) -> Tensor:
        """See ``TextTower.embed``."""
        length = clip_input_ids.shape[1]
        return self.text.token_embedding(clip_input_ids) + self.text.positional_embedding[:length]  # type: ignore[no-any-return]  # same

    def prepare(self, clip_input_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Makes what is added to the scores of attention.

        Returns:
            ``(S, S) float32``, 0 at a token and those before it, minus infinity after it; and the same for
            end-of-text alone, ``(B, 1, 1, S) float32``: 0 at real tokens.
        """
        positions = torch.arange(clip_input_ids.shape[1], device=clip_input_ids.device)
        later = positions[None, :] > positions[:, None]  # (S, S)
        causal = torch.zeros((), device=later.device).masked_fill(later, float("-inf"))
        return causal, additive_mask(self.token_mask(clip_input_ids))

    def layer(self, index: int, hidden: Tensor, context: tuple[Tensor, Tensor]) -> Tensor:
        """See ``TextTower.layer``."""
        return self.layers[index](hidden, attn_mask=context[0])  # type: ignore[no-any-return]  # nn.Module call

    def finish(self, hidden: Tensor) -> Tensor:
        """See ``TextTower.finish``."""
        return self.text.ln_final(hidden)  # type: ignore[no-any-return]  # nn.Module call

    def token_mask(self, clip_input_ids: Tensor) -> Tensor:
        """See ``TextTower.token_mask``."""
        positions = torch.arange(clip_input_ids.shape[1], device=clip_input_ids.device)
        return positions[None, :] <= self.end_position(clip_input_ids)[:, None]

    def end_position(self, clip_input_ids: Tensor) -> Tensor:
        """Index of end-of-text: ``(B, S) int64`` to ``(B,) int64``."""
        if self.config.pool_type == "eos":
            return (clip_input_ids == self.config.eos_id).to(torch.int64).argmax(dim=-1)
        return clip_input_ids.argmax(dim=-1)

    def project(self, pooled: Tensor) -> Tensor:
        """See ``TextTower.project``."""
        projection = self.text.text_projection
        if isinstance(projection, nn.Linear):
            return projection(pooled)  # type: ignore[no-any-return]  # nn.Module call
        return pooled if projection is None else pooled @ projection

    def export_layer(self, index: int, *, packed: bool = True) -> nn.Module:
        """See ``TextTower.export_layer``."""
        return ClipBlock(self.layers[index], packed=packed)


def _make_text_transformer(config: ClipTextConfig) -> nn.Module:
    cure_torchvision()
    from open_clip.transformer import LayerNorm, QuickGELU, TextTransformer

    text: nn.Module = TextTransformer(
        context_length=config.context_length,
        vocab_size=config.vocab_size,
        width=config.width,
        heads=config.heads,
        layers=config.layers,
        mlp_ratio=config.mlp_ratio,
        ls_init_value=config.ls_init_value,
        output_dim=config.embed_dim,
        eos_id=config.eos_id,
        pool_type=config.pool_type,
        proj_type=config.proj_type,
        proj_bias=config.proj_bias,
        act_layer=QuickGELU if config.quick_gelu else partial(nn.GELU, approximate=config.gelu_approximate),
        norm_layer=partial(LayerNorm, eps=config.norm_eps),
        block_type="custom",
    )
    return text


def find_clip(source: str | Path) -> Path:
    """Return the folder of a CLIP in open_clip's hub layout, fetched where it is no folder.

    Args:
        source: A folder, ``model:tag``, a hub id, or ``builtin``.

    Raises:
        CheckpointError: If it cannot be had, or a file is missing.
    """
    folder = builtin_folder() / "clip" if str(source) == BUILTIN else Path(source)
    folder = folder if folder.is_dir() else download_clip(str(source))
    if not (folder / CONFIG_NAME).is_file():
        is_transformers = (folder / "config.json").is_file()
        raise CheckpointError(
            "the CLIP is not in open_clip's hub layout",
            where=source,
            expected=CONFIG_NAME,
            got="a model of transformers" if is_transformers else "none",
            hint="name a model of open_clip, such as ViT-B-32:laion2b_s34b_b79k",
        )
    if not (folder / WEIGHTS_NAME).is_file():
        raise CheckpointError(
            f"CLIP {source}: expected {WEIGHTS_NAME}, found none (a pickle is refused). "
            "Save the weights as safetensors"
        )
    return folder


def read_clip_config(folder: Path) -> dict[str, Any]:
    """Read ``open_clip_config.json``; a bare model configuration, as open_clip's own are, is wrapped.

    Raises:
        CheckpointError: If it cannot be read.
    """
    settings = read_object(folder / CONFIG_NAME, "the configuration of CLIP", CheckpointError)
    return settings if "model_cfg" in settings else {"model_cfg": settings}


def _from_source(source: str | Path) -> OpenClipTower:
    name, folder = str(source), find_clip(source)
    model_cfg = read_clip_config(folder)["model_cfg"]
    try:
        weights = load_file(folder / WEIGHTS_NAME)
    except (OSError, MemoryError, SafetensorError) as error:
        raise CheckpointError(f"CLIP {name}: {WEIGHTS_NAME} cannot be read", got=error) from error
    config = ClipTextConfig.from_open_clip(model_cfg, name)
    return _build(config, weights, _tokenizer_for(config, folder / TOKENIZER_NAME, name), name)


def _build(
    config: ClipTextConfig, weights: dict[str, Tensor], tokenizer: Tokenizer, source: str
) -> OpenClipTower:
    tower = OpenClipTower(config, tokenizer, source)
    prefix = "text." if "text.token_embedding.weight" in weights else ""
    state: dict[str, Tensor] = {}
    for name, parameter in tower.weights.items():
        tensor = weights.get(prefix + name)
        if tensor is None or tensor.shape != parameter.shape:
            found = "none" if tensor is None else str(tuple(tensor.shape))
            raise CheckpointError(
                f"CLIP {source}: weight {prefix + name} expected {tuple(parameter.shape)}, found {found}"
            )
        state[name] = tensor.to(torch.float32)
    tower.text.load_state_dict(state)
    return tower


def _tokenizer_for(config: ClipTextConfig, path: Path | None, source: str) -> Tokenizer:
    if config.vocab_size == OPEN_CLIP_VOCAB_SIZE:
        return clip_tokenizer()
    if path is None:
        raise CheckpointError(
            "a CLIP that is given as a model has open_clip's vocabulary, as it carries no tokenizer",
            where=source,
            expected=f"{OPEN_CLIP_VOCAB_SIZE} tokens",
            got=config.vocab_size,
            hint=f"save it in open_clip's hub layout with its {TOKENIZER_NAME}, and give the folder",
        )
    if not path.is_file():
        raise CheckpointError(
            f"CLIP {source}: vocabulary of {config.vocab_size} is not open_clip's {OPEN_CLIP_VOCAB_SIZE}; "
            f"expected a {path.name}"
        )
    try:
        with panics_as(CheckpointError, f"CLIP {source}: {path.name} cannot be read"):
            tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises a bare Exception
        raise CheckpointError(f"CLIP {source}: {path.name} cannot be read ({error})") from error
    if tokenizer.get_vocab_size() > config.vocab_size:
        raise CheckpointError(
            f"CLIP {source}: {path.name} has {tokenizer.get_vocab_size()} tokens, "
            f"the tower {config.vocab_size}"
        )
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def _from_open_clip_model(model: nn.Module) -> OpenClipTower:
    """Reads the text tower of a model that open_clip built; the shape is read off its modules."""
    text: Any = getattr(model, "text", model)
    blocks = getattr(getattr(text, "transformer", None), "resblocks", None)
    if (
        blocks is None
        or getattr(text, "token_embedding", None) is None
        or getattr(text, "cls_emb", None) is not None
    ):
        raise UnsupportedError(
            f"CLIP {type(model).__name__}: not an open_clip transformer text tower; use one of {_SUPPORTED}"
        )
    if getattr(text, "attn_mask", None) is None or type(blocks[0]).__name__ != "ResidualAttentionBlock":
        raise UnsupportedError(
            f"CLIP {type(model).__name__}: text tower without causal attention; use one of {_SUPPORTED}"
        )
    projection = text.text_projection
    width = text.token_embedding.embedding_dim
    biased = isinstance(projection, nn.Linear)
    embed_dim = width if projection is None else projection.out_features if biased else projection.shape[1]
    act = blocks[0].mlp.gelu
    config = ClipTextConfig(
        embed_dim=embed_dim,
        context_length=text.positional_embedding.shape[0],
        vocab_size=text.token_embedding.num_embeddings,
        width=width,
        heads=blocks[0].attn.num_heads,
        layers=len(blocks),
        mlp_ratio=_ratio(blocks[0].mlp.c_fc.out_features, width),
        ls_init_value=None if isinstance(blocks[0].ls_1, nn.Identity) else 1.0,
        pool_type=str(getattr(text, "pool_type", None) or getattr(model, "text_pool_type", "argmax")),
        eos_id=int(getattr(text, "eos_id", getattr(model, "text_eos_id", 2))),
        proj_type="none" if projection is None else "linear",
        proj_bias=biased,
        quick_gelu=type(act).__name__ == "QuickGELU",
        gelu_approximate=getattr(act, "approximate", "none"),
        norm_eps=text.ln_final.eps,
    )
    if config.pool_type not in {"argmax", "eos"}:
        raise UnsupportedError(
            f"CLIP {type(model).__name__}: pool_type {config.pool_type!r}; use one of {_SUPPORTED}"
        )
    name = type(model).__name__
    tower = _build(config, dict(text.state_dict()), _tokenizer_for(config, None, name), name)
    tower.is_at_source = False
    return tower


def _ratio(inner: int, width: int) -> float:
    """Return the ratio that gives ``inner`` back when it is multiplied with ``width`` and cut off."""
    ratio = inner / width
    return ratio if int(width * ratio) == inner else (inner + 0.5) / width


def download_clip(name: str) -> Path:
    """Fetches configuration, safetensors and tokenizer of a hub id or of open_clip's ``model:tag``.

    Returns:
        The folder they are in.

    Raises:
        CheckpointError: If it cannot be had.
    """
    from huggingface_hub import snapshot_download

    repo = name.removeprefix("hf-hub:")
    if ":" in repo:
        cure_torchvision()
        import open_clip

        model_name, tag = repo.split(":", 1)
        pretrained = open_clip.pretrained.get_pretrained_cfg(model_name, tag)
        if not pretrained.get("hf_hub"):
            known = ", ".join(open_clip.pretrained.list_pretrained_tags_by_model(model_name)) or "none"
            raise CheckpointError(
                f"CLIP {name}: open_clip has no safetensors for this tag; tags of {model_name}: {known}"
            )
        repo = str(pretrained["hf_hub"]).rstrip("/")
    try:
        return Path(snapshot_download(repo, allow_patterns=[CONFIG_NAME, WEIGHTS_NAME, TOKENIZER_NAME]))
    except Exception as error:  # the hub client raises many kinds; each means the source cannot be had
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(
            f"CLIP {name} is neither a folder nor a reachable hub id ({reason}). "
            f"Expected a folder with {CONFIG_NAME}, or model:tag as open_clip names them"
        ) from error
