"""Parts small enough to build in a second: real PLMs of every family, a real text tower, a bank."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer

from tests.tiny_bundle import plm_tokenizer
from xadapter_export.bank import FeatureBank
from xadapter_export.bundle.pictures import Picture
from xadapter_export.model.clip_text import ClipTextConfig, OpenClipTower
from xadapter_export.model.clip_tokenizer import build_clip_tokenizer
from xadapter_export.model.config import XAdapterConfig
from xadapter_export.model.plm import load_plm
from xadapter_export.model.x_adapter_model import XAdapterModel

from transformers import (  # isort: skip  # cured by model.plm
    BertConfig,
    BertForMaskedLM,
    CamembertConfig,
    CamembertForMaskedLM,
    DistilBertConfig,
    DistilBertForMaskedLM,
    ElectraConfig,
    ElectraForMaskedLM,
    PreTrainedModel,
    RobertaConfig,
    RobertaForMaskedLM,
    XLMRobertaConfig,
    XLMRobertaForMaskedLM,
)

VOCAB_SIZE = 40  # more than the tokenizer has, as with real models
N, D = 30, 24
_SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "pad_token_id": 0,
}
_DISTILBERT: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "dim": 32,
    "n_layers": 3,
    "n_heads": 4,
    "hidden_dim": 48,
    "pad_token_id": 0,
}
FAMILIES: dict[str, Callable[[], Any]] = {
    "bert": lambda: BertForMaskedLM(BertConfig(**_SHAPE, max_position_embeddings=40)),
    "roberta": lambda: RobertaForMaskedLM(
        RobertaConfig(**_SHAPE, max_position_embeddings=41, type_vocab_size=1)
    ),
    "xlm-roberta": lambda: XLMRobertaForMaskedLM(
        XLMRobertaConfig(**_SHAPE, max_position_embeddings=41, type_vocab_size=1)
    ),
    "camembert": lambda: CamembertForMaskedLM(
        CamembertConfig(**_SHAPE, max_position_embeddings=41, type_vocab_size=1)
    ),
    "electra": lambda: ElectraForMaskedLM(
        ElectraConfig(**_SHAPE, embedding_size=16, max_position_embeddings=40)
    ),
    "distilbert": lambda: DistilBertForMaskedLM(DistilBertConfig(**_DISTILBERT, max_position_embeddings=40)),
}


def make_plm(family: str, folder: Path) -> PreTrainedModel:
    """A PLM with weights large enough that every part shows in the logits; its tokenizer is in ``folder``."""
    torch.manual_seed(0)
    model: PreTrainedModel = FAMILIES[family]().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name.lower():
                parameter.normal_(std=0.2)
    model.name_or_path = str(folder)
    write_tokenizer(folder)
    return model


def write_tokenizer(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    plm_tokenizer().save(str(folder / "tokenizer.json"))
    settings = '{"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "[PAD]", "mask_token": "[MASK]"}'
    (folder / "tokenizer_config.json").write_text(settings)


def make_clip(**settings: Any) -> OpenClipTower:
    torch.manual_seed(1)
    tokenizer: Tokenizer = build_clip_tokenizer(
        [("b", "a"), ("ba", "n"), ("a", "n"), ("ban", "an"), ("banan", "a</w>")]
    )
    shape: dict[str, Any] = {
        "embed_dim": D,
        "context_length": 32,
        "width": 16,
        "heads": 2,
        "layers": 2,
        **settings,
    }
    tower = OpenClipTower(
        ClipTextConfig(vocab_size=tokenizer.get_vocab_size(), **shape), tokenizer, "tiny-clip"
    )
    with torch.no_grad():
        for name, parameter in tower.named_parameters():
            if "ln_" not in name:
                parameter.normal_(std=0.3)
    return tower


def make_bank(dim: int = D) -> FeatureBank:
    features = np.random.default_rng(2).standard_normal((N, dim)).astype(np.float32)
    features /= np.linalg.norm(features, axis=1, keepdims=True)
    return FeatureBank(features, tuple(Picture(id=f"{i}", caption=f"picture {i}") for i in range(N)))


def randomize_plugin(model: XAdapterModel) -> XAdapterModel:
    """Gives the plug-in weights as a trained one has: none is zero, none is its start."""
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in [*model.adapters.parameters(), *(model.head.parameters() if model.head else ())]:
            parameter.add_(
                torch.randn_like(parameter) * (parameter.shape[-1] ** -0.5 if parameter.ndim == 2 else 0.1)
            )
    return model


def make_model(
    folder: Path, family: str = "bert", *, context_length: int = 32, **settings: object
) -> XAdapterModel:
    config = XAdapterConfig.model_validate(
        {"experts": "vt", "layers": (1, 2), "adapter_width": 16, "num_heads": 2, **settings}
    )
    plm = make_plm(family, folder / "plm")
    if config.task != "fill-mask":
        plm = getattr(plm, plm.base_model_prefix)
        plm.name_or_path = str(folder / "plm")
    clip = make_clip(context_length=context_length)
    return randomize_plugin(XAdapterModel(config, load_plm(plm, config.task), clip, make_bank()))


def write_parts(folder: Path) -> tuple[Path, Path, Path]:
    """Writes PLM, CLIP and bank as folders, as a user has them."""
    plm, clip, bank = folder / "plm", folder / "clip", folder / "bank"
    make_plm("bert", plm).save_pretrained(plm)
    make_clip().save(clip)
    bank.mkdir()
    make_bank().save(bank)
    return plm, clip, bank


TEXTS = ["the color of a banana is [MASK].", "[MASK] and [MASK] fruit is very very green.", "[MASK]"]
