"""Kinds of X-adapter layer: how an expert reads its memory.

A kind is a ``LayerKind``, which needs no PyTorch, and its ``model.x_adapter.XAdapterLayer``, which is the
equation: trained, in the graph, and folded with a static bank. To add one, list it here, or name it in a
package of your own as an entry point of the group ``xadapter_export.layers``. Nothing else knows a kind by
its name.
"""

from typing import Annotated, Final

from pydantic import AfterValidator

from xadapter_export.layers.kind import LayerKind
from xadapter_export.layers.null_rows import NullRowsKind
from xadapter_export.registry import Registry

_TORCH: Final = "xadapter_export.model.x_adapter"

TOKEN_QUERY: Final = LayerKind("token-query", "each token asks for itself", f"{_TORCH}:TokenQueryLayer")
SENTENCE_QUERY: Final = LayerKind(
    "sentence-query",
    "one query per sentence, with a learned key for each row of a static bank",
    f"{_TORCH}:SentenceQueryLayer",
    learns_rows=True,
)
NULL_ROWS: Final = NullRowsKind(
    "null-rows", "each token asks for itself, and may look away", f"{_TORCH}:NullRowsLayer"
)
LAYERS: Final[Registry[LayerKind]] = Registry(
    "xadapter_export.layers", "layer kind", TOKEN_QUERY, SENTENCE_QUERY, NULL_ROWS
)


def _known(name: str) -> str:
    """Refuse a kind that is in no table; pydantic makes one line of the error."""
    return LAYERS[name].name


LayerName = Annotated[str, AfterValidator(_known)]

__all__ = ["LAYERS", "NULL_ROWS", "SENTENCE_QUERY", "TOKEN_QUERY", "LayerKind", "LayerName", "NullRowsKind"]
