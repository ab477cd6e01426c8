"""A bundle as LlamaIndex' embedding model."""

import asyncio
from pathlib import Path
from typing import Any, Unpack

from llama_index.core.embeddings import BaseEmbedding

from xadapter_export.runtime.how_to_open import SessionOptions
from xadapter_export.runtime.session import XAdapterSession


class XAdapterEmbedding(BaseEmbedding):  # type: ignore[misc]  # LlamaIndex may be missing
    """Embeddings of length 1 from a bundle for feature extraction.

    Args:
        bundle: Its folder, or its name on the Hub.
        options: As ``XAdapterSession.load``.

    Raises:
        As ``XAdapterSession.load``.
    """

    _session: XAdapterSession

    def __init__(self, bundle: Path | str, **options: Unpack[SessionOptions]) -> None:
        super().__init__(model_name=str(bundle))
        self._session = XAdapterSession.load(bundle, **options)

    def _get_text_embeddings(self, texts: list[str]) -> list[list[float]]:
        rows: list[list[float]] = self._session.embed(texts).tolist()
        return rows

    def _get_text_embedding(self, text: str) -> list[float]:
        return self._get_text_embeddings([text])[0]

    def _get_query_embedding(self, query: str) -> list[float]:
        return self._get_text_embedding(query)

    async def _aget_query_embedding(self, query: str) -> list[float]:
        return await asyncio.to_thread(self._get_query_embedding, query)

    def __getstate__(self) -> dict[str, Any]:
        raise TypeError("a session cannot be pickled; make the embedding anew in the other process")
