"""One hash for a frozen part: its weights, the settings that change what they compute, and its tokenizer.

It does not depend on files, shards, stored dtype, or on the version of the library that wrote them.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor

# Text on which tokenizers with one vocabulary and other rules differ: case, accents, scripts, punctuation.
_PROBE = (
    "The QUICK brown fox's naïve café; it’s 3,141.59% – ﬁne!",
    "Ünïcödé e\u0301 ＡＢＣ 日本語 русский ελληνικά 😀 <b>&amp;\t\n a_b@c.d",
)


def weights_sha256(
    state: Mapping[str, Tensor],
    settings: Mapping[str, object] | None = None,
    tokenizer: Tokenizer | None = None,
) -> str:
    """Hashes named tensors as float32, in the order of their names, then settings and tokenizer.

    Args:
        state: Names and tensors of any shape, as ``state_dict()`` gives them. Integer tensors are hashed as
            they are.
        settings: What the tensors do not say and the result depends on, such as the number of heads.
        tokenizer: Hashed by its vocabulary and by what it makes of a probe text.

    Returns:
        64 hexadecimal digits.
    """
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu()
        if tensor.is_floating_point():
            tensor = tensor.to(torch.float32)
        digest.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)};".encode())
        digest.update(tensor.contiguous().numpy().data)
    if settings is not None:
        digest.update(json.dumps(dict(settings), sort_keys=True).encode())
    if tokenizer is not None:
        digest.update(
            json.dumps(sorted(tokenizer.get_vocab().items(), key=lambda item: (item[1], item[0]))).encode()
        )
        digest.update(
            json.dumps([encoding.ids for encoding in tokenizer.encode_batch(list(_PROBE))]).encode()
        )
    return digest.hexdigest()


def public_name(source: str) -> str:
    """A hub id as it is; of a path only the last part, so that nothing published tells of this machine."""
    path = Path(source)
    if path.exists():
        return path.resolve().name
    is_path = path.is_absolute() or "\\" in source or source.startswith((".", "~")) or source.count("/") > 1
    return source.replace("\\", "/").rstrip("/").rpartition("/")[2] if is_path else source
