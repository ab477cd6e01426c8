"""CLIP's text tower, written for export: it reads the weights of any open_clip transformer text tower.

open_clip's own blocks go through ``nn.MultiheadAttention``, which traces into hundreds of nodes; this tower
has the same weights, gives the same features, and runs at the text's true length: attention is causal, so
what follows end-of-text cannot change what stands before it.

Dimensions: B batch, S CLIP tokens, W text width, D CLIP embedding size.
"""

from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from pydantic import ConfigDict, ValidationError
from pydantic.dataclasses import dataclass
from safetensors import SafetensorError
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch import Tensor, nn

from xadapter_export.bundle.small_files import describe, read_object
from xadapter_export.errors import CheckpointError, UnsupportedError, panics_as
from xadapter_export.model.builtin import BUILTIN, builtin_folder
from xadapter_export.model.clip_tokenizer import OPEN_CLIP_VOCAB_SIZE, clip_tokenizer
from xadapter_export.model.identity import weights_sha256

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
_PACKED = ("query", "key", "value")  # order in which open_clip packs them
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

    @property
    def mlp_width(self) -> int:
        """Width inside a block; open_clip cuts off a fraction, where rounding would be one more."""
        return int(self.width * self.mlp_ratio)

    @property
    def feature_dim(self) -> int:
        """D, width of the pooled text feature."""
        return self.width if self.proj_type == "none" else self.embed_dim


class _Attention(nn.Module):
    def __init__(self, config: ClipTextConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.query = nn.Linear(config.width, config.width)
        self.key = nn.Linear(config.width, config.width)
        self.value = nn.Linear(config.width, config.width)
        self.out_proj = nn.Linear(config.width, config.width)

    def forward(self, x: Tensor, causal_mask: Tensor) -> Tensor:
        projected = (self.query(x), self.key(x), self.value(x))  # each (B, S, W)
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in projected)
        context = F.scaled_dot_product_attention(q, k, v, attn_mask=causal_mask)  # (B, heads, S, W/heads)
        return self.out_proj(context.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]  # nn.Module call


class _QuickGelu(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


class _LayerScale(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.empty(width))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class _Block(nn.Module):
    def __init__(self, config: ClipTextConfig) -> None:
        super().__init__()
        width, inner = config.width, config.mlp_width
        scaled = config.ls_init_value is not None
        self.ln_1 = nn.LayerNorm(width, eps=config.norm_eps)
        self.attn = _Attention(config)
        self.ls_1 = _LayerScale(width) if scaled else nn.Identity()
        self.ln_2 = nn.LayerNorm(width, eps=config.norm_eps)
        self.mlp = nn.ModuleDict(
            {
                "c_fc": nn.Linear(width, inner),
                "gelu": _QuickGelu() if config.quick_gelu else nn.GELU(approximate=config.gelu_approximate),
                "c_proj": nn.Linear(inner, width),
            }
        )
        self.ls_2 = _LayerScale(width) if scaled else nn.Identity()

    def forward(self, x: Tensor, causal_mask: Tensor) -> Tensor:
        x = x + self.ls_1(self.attn(self.ln_1(x), causal_mask))
        inner = self.mlp["gelu"](self.mlp["c_fc"](self.ln_2(x)))
        return x + self.ls_2(self.mlp["c_proj"](inner))  # type: ignore[no-any-return]  # nn.Module call


class ClipTextTower(nn.Module):
    """Frozen CLIP text tower.

    Attributes:
        config: Its shape.
        tokenizer: Its tokenizer.
        source: Folder, ``model:tag`` or hub id it came from; else what it is called in messages.
        is_at_source: Whether ``load_clip(source)`` finds it again; a checkpoint stores it otherwise.

    Source:
        ``TextTransformer`` of open_clip 3.3; equal features up to rounding. Ours takes the
        text at its true length instead of padded to the context length.
    """

    def __init__(self, config: ClipTextConfig, tokenizer: Tokenizer, source: str) -> None:
        super().__init__()
        self.config = config
        self.tokenizer = tokenizer
        self.source = source
        self.is_at_source = True
        self.token_embedding = nn.Embedding(config.vocab_size, config.width)
        self.positional_embedding = nn.Parameter(torch.empty(config.context_length, config.width))
        self.transformer = nn.ModuleDict(
            {"resblocks": nn.ModuleList(_Block(config) for _ in range(config.layers))}
        )
        self.ln_final = nn.LayerNorm(config.width, eps=config.norm_eps)
        self.text_projection: nn.Parameter | nn.Linear | None = None
        if config.proj_type == "linear" and config.proj_bias:
            self.text_projection = nn.Linear(config.width, config.embed_dim)
        elif config.proj_type == "linear":
            self.text_projection = nn.Parameter(torch.empty(config.width, config.embed_dim))
        self.eval().requires_grad_(False)

    @property
    def settings(self) -> dict[str, object]:
        """Settings that belong to the identity of the tower: what its weights do not say."""
        names = ("heads", "pool_type", "eos_id", "quick_gelu", "gelu_approximate", "norm_eps")
        return {name: getattr(self.config, name) for name in names}

    @property
    def sha256(self) -> str:
        """Hash of the weights in memory, the settings and the tokenizer."""
        return weights_sha256(self.open_clip_state(), self.settings, self.tokenizer)

    @property
    def end_token_id(self) -> int:
        """Id of the end-of-text token."""
        return self.config.eos_id if self.config.pool_type == "eos" else self.config.vocab_size - 1

    def open_clip_state(self) -> dict[str, Tensor]:
        """The weights under open_clip's names, query, key and value packed into one ``in_proj``."""
        state: dict[str, Tensor] = {}
        for name, tensor in self.state_dict().items():
            block, found, kind = name.partition(".attn.query.")
            if found:
                parts = [self.get_parameter(f"{block}.attn.{part}.{kind}") for part in _PACKED]
                state[f"{block}.attn.in_proj_{kind}"] = torch.cat([part.detach() for part in parts])
            elif ".attn.key." not in name and ".attn.value." not in name:
                state[name] = tensor
        return state

    def load_open_clip_state(self, state: dict[str, Tensor]) -> None:
        """Takes weights under open_clip's names; the inverse of ``open_clip_state``."""
        own: dict[str, Tensor] = {}
        for name, tensor in state.items():
            block, found, kind = name.partition(".attn.in_proj_")
            if found:
                own |= {
                    f"{block}.attn.{part}.{kind}": x for part, x in zip(_PACKED, tensor.chunk(3), strict=True)
                }
            else:
                own[name] = tensor
        self.load_state_dict(own)

    def train(self, mode: bool = True) -> "ClipTextTower":
        """Stays in evaluation mode, whatever ``mode`` asks: a frozen tower has no dropout."""
        del mode
        return super().train(False)

    def end_position(self, clip_input_ids: Tensor) -> Tensor:
        """Index of end-of-text: ``(B, S) int64`` to ``(B,) int64``."""
        if self.config.pool_type == "eos":
            return (clip_input_ids == self.config.eos_id).to(torch.int64).argmax(dim=-1)
        return clip_input_ids.argmax(dim=-1)

    def token_mask(self, clip_input_ids: Tensor) -> Tensor:
        """Real tokens, end-of-text included: ``(B, S) int64`` to ``(B, S) bool``."""
        positions = torch.arange(clip_input_ids.shape[1], device=clip_input_ids.device)
        return positions[None, :] <= self.end_position(clip_input_ids)[:, None]

    def embed(self, clip_input_ids: Tensor) -> tuple[Tensor, Tensor]:
        """What the first block reads, and the mask of all blocks.

        Args:
            clip_input_ids: ``(B, S) int64``; S is at most the context length.

        Returns:
            ``(B, S, W) float32``, and ``(S, S) float32`` to be added to the scores of attention: 0 at a token
            and those before it, minus infinity after it.
        """
        length = clip_input_ids.shape[1]
        positions = torch.arange(length, device=clip_input_ids.device)
        later = positions[None, :] > positions[:, None]  # (S, S)
        x = self.token_embedding(clip_input_ids) + self.positional_embedding[:length]
        return x, x.new_zeros(()).masked_fill(later, float("-inf"))

    def token_states(self, clip_input_ids: Tensor) -> Tensor:
        """Token states after the final norm: ``(B, S) int64`` to ``(B, S, W) float32``.

        S is at most the context length.
        """
        x, causal_mask = self.embed(clip_input_ids)
        for block in cast(nn.ModuleList, self.transformer["resblocks"]):
            x = block(x, causal_mask)
        return self.ln_final(x)  # type: ignore[no-any-return]  # nn.Module call

    def pool(self, token_states: Tensor, clip_input_ids: Tensor) -> Tensor:
        """Text feature, what open_clip's ``encode_text`` returns: ``(B, S, W)`` to ``(B, D) float32``."""
        end = self.end_position(clip_input_ids)[:, None, None].expand(-1, 1, token_states.shape[-1])
        return self.project(token_states.gather(1, end).squeeze(1))

    def project(self, end_states: Tensor) -> Tensor:
        """Text feature from the state of end-of-text: ``(B, W) float32`` to ``(B, D) float32``."""
        if isinstance(self.text_projection, nn.Linear):
            return self.text_projection(end_states)  # type: ignore[no-any-return]  # nn.Module call
        return end_states if self.text_projection is None else end_states @ self.text_projection


def load_clip(source: str | Path | nn.Module) -> ClipTextTower:
    """Loads the text tower of a CLIP.

    Args:
        source: A folder with ``open_clip_config.json`` and ``open_clip_model.safetensors``; ``model:tag`` as
            open_clip lists them (``ViT-B-32:laion2b_s34b_b79k``); a hub id; ``builtin``; or an open_clip
            model with open_clip's own vocabulary, of which the weights are copied.

    Raises:
        CheckpointError: If it is not found, is a pickle, or its weights do not fit its configuration.
        UnsupportedError: If the text tower is of another kind.
    """
    if isinstance(source, nn.Module):
        return _from_open_clip_model(source)
    name = str(source)
    folder = builtin_folder() / "clip" if name == BUILTIN else Path(source)
    if not folder.is_dir():
        folder = download_clip(name)
    config_path, weights_path = folder / CONFIG_NAME, folder / WEIGHTS_NAME
    if not config_path.is_file():
        raise CheckpointError(
            f"CLIP {name}: expected {CONFIG_NAME} in the folder, found none. "
            "Save it in open_clip's hub layout"
        )
    if not weights_path.is_file():
        raise CheckpointError(
            f"CLIP {name}: expected {WEIGHTS_NAME}, found none (a pickle is refused). "
            "Save the weights as safetensors"
        )
    try:
        settings = read_object(config_path, "the configuration of CLIP", CheckpointError)
        model_cfg = settings.get("model_cfg", settings)  # open_clip's own model files have no wrapper
        weights = load_file(weights_path)
    except (OSError, ValueError, AttributeError, MemoryError, SafetensorError) as error:
        raise CheckpointError(
            f"CLIP {name}: {config_path.name} or {weights_path.name} cannot be read ({error})"
        ) from error
    config = ClipTextConfig.from_open_clip(model_cfg, name)
    return _build(config, weights, _tokenizer_for(config, folder / TOKENIZER_NAME, name), name)


def _build(
    config: ClipTextConfig, weights: dict[str, Tensor], tokenizer: Tokenizer, source: str
) -> ClipTextTower:
    tower = ClipTextTower(config, tokenizer, source)
    prefix = "text." if "text.token_embedding.weight" in weights else ""
    state: dict[str, Tensor] = {}
    for name, parameter in tower.open_clip_state().items():
        tensor = weights.get(prefix + name)
        if tensor is None or tensor.shape != parameter.shape:
            found = "none" if tensor is None else str(tuple(tensor.shape))
            raise CheckpointError(
                f"CLIP {source}: weight {prefix + name} expected {tuple(parameter.shape)}, found {found}"
            )
        state[name] = tensor.to(torch.float32)
    tower.load_open_clip_state(state)
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


def _from_open_clip_model(model: nn.Module) -> ClipTextTower:
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

    from xadapter_export.torchvision_cure import cure_torchvision

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
