"""The text side of a bank: which CLIP searches it, and what that CLIP makes of a query.

Dimensions: Q queries, S CLIP tokens, D CLIP embedding size.
"""

import warnings
from collections.abc import Sequence

import torch
from torch import nn

from xadapter_export.bank.reader import BankReader
from xadapter_export.bank.record import BankClip
from xadapter_export.bank.rows import Float32
from xadapter_export.errors import CheckpointError, ConfigError, HashMismatchError
from xadapter_export.model.builtin import BUILTIN, builtin_folder
from xadapter_export.model.checkpoint import read_record
from xadapter_export.model.text_tower import TextTower
from xadapter_export.model.towers import load_clip
from xadapter_export.runtime.text import TowerTokens, check_texts

_BATCH = 256


def load_bank_clip(bank: BankReader, given: str | None = None) -> TextTower:
    """Load the text tower that searches a bank.

    Args:
        bank: A bank, or the one in a checkpoint folder.
        given: The CLIP to use; None for the one that made the bank: the checkpoint's own, the built-in one,
            or where its recorded name leads.

    Raises:
        ConfigError: If nobody says which CLIP made the bank, and none is given.
        CheckpointError: If the CLIP cannot be found.
        HashMismatchError: If it is not the one that made the bank.
    """
    made_by = bank.clip or _builtin_clip_if_its_bank(bank)
    if given is None:
        given = _default_source(bank, made_by)
        try:
            tower = load_clip(given)
        except CheckpointError as error:
            raise CheckpointError(
                "the CLIP that made the bank cannot be loaded", where=made_by, got=error,
                hint="name it with --clip",
            ) from error  # fmt: skip
    else:
        tower = load_clip(given)
    found = tower.sha256
    if made_by is not None and found != made_by.sha256:
        raise HashMismatchError(
            "the bank was made with another CLIP",
            where=bank.folder,
            expected=made_by,
            got=f"{given} ({found[:12]})",
            hint="name the right one with --clip",
        )
    if made_by is None:
        warnings.warn(
            "the bank does not record which CLIP made it, so nothing checks that it is this one", stacklevel=2
        )
    return tower


def encode_texts(tower: TextTower, texts: Sequence[str]) -> Float32:
    """Return ``(Q, D) float32`` text features of length 1; a text that is too long is cut with a warning.

    Raises:
        InputTextError: If a text is empty.
    """
    tokens = TowerTokens(tower.tokenizer, tower)
    rows = tokens.encode(check_texts(texts))
    features = []
    with torch.inference_mode():
        for start in range(0, len(rows), _BATCH):
            ids = torch.from_numpy(tokens.pad(rows[start : start + _BATCH]))  # (Q, S)
            pooled = tower.pool(tower.token_states(ids), ids)
            features.append(nn.functional.normalize(pooled, dim=-1))
    array: Float32 = torch.cat(features).numpy()
    return array


def _builtin_clip_if_its_bank(bank: BankReader) -> BankClip | None:
    part = read_record(builtin_folder()).bank
    if part is None or (part.num_pictures, part.dim) != (bank.num_pictures, bank.dim):
        return None
    return BankReader(builtin_folder()).clip if part.sha256 == bank.sha256() else None


def _default_source(bank: BankReader, made_by: BankClip | None) -> str:
    if (bank.folder / "clip").is_dir():
        return str(bank.folder / "clip")
    if made_by is None:
        raise ConfigError(
            "the bank does not record which CLIP made it", where=bank.folder, hint="name it with --clip"
        )
    builtin = BankReader(builtin_folder()).clip
    return BUILTIN if builtin is not None and builtin.sha256 == made_by.sha256 else made_by.source
