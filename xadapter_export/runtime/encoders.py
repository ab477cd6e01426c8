"""The text encoders of a bundle, made from its tokenizers and the rules in its manifest."""

from pathlib import Path

from tokenizers import Tokenizer

from xadapter_export.bundle.folder import CLIP_TOKENIZER_NAME, TOKENIZER_NAME, Bundle
from xadapter_export.errors import BundleError, XAdapterError, panics_as
from xadapter_export.runtime.text import TextEncoder, TowerTokens


def load_encoders(bundle: Bundle) -> tuple[TextEncoder, TextEncoder]:
    """Return an encoder without CLIP and one with it, the same one where the bundle has no CLIP.

    Raises:
        BundleError: If a tokenizer is missing, cannot be read, or does not belong to the manifest.
    """
    plm, clip = bundle.manifest.plm, bundle.manifest.clip
    tokens = None if clip is None else TowerTokens(_load_tokenizer(bundle.file(CLIP_TOKENIZER_NAME)), clip)
    encoder = TextEncoder(
        _load_tokenizer(bundle.file(TOKENIZER_NAME)),
        tokens,
        max_seq=plm.max_seq,
        mask_token=plm.mask_token,
        pad_token_id=plm.pad_token_id,
        has_token_type_ids=plm.has_token_type_ids,
    )
    if encoder.mask_token_id != plm.mask_token_id:
        raise BundleError(
            "the tokenizer and the manifest disagree about the mask token",
            where=bundle.folder,
            expected=plm.mask_token_id,
            got=encoder.mask_token_id,
        )
    return encoder if clip is None else encoder.without_clip(), encoder


def _load_tokenizer(path: Path) -> Tokenizer:
    try:
        with panics_as(BundleError, "the tokenizer cannot be read", where=path):
            return Tokenizer.from_file(str(path))
    except XAdapterError:
        raise
    except Exception as error:  # the tokenizers package raises nothing narrower
        raise BundleError("the tokenizer cannot be read", where=path, got=error) from error
