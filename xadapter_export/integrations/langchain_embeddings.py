"""A bundle as LangChain's embeddings."""

from pathlib import Path
from typing import Unpack

from langchain_core.embeddings import Embeddings

from xadapter_export.runtime.how_to_open import SessionOptions
from xadapter_export.runtime.session import XAdapterSession


class XAdapterEmbeddings(Embeddings):  # type: ignore[misc]  # LangChain may be missing
    """Embeddings of length 1 from a bundle for feature extraction.

    Args:
        bundle: Its folder, or its name on the Hub.
        options: As ``XAdapterSession.load``.

    Raises:
        As ``XAdapterSession.load``.
    """

    def __init__(self, bundle: Path | str, **options: Unpack[SessionOptions]) -> None:
        self.session = XAdapterSession.load(bundle, **options)

    def embed_documents(self, texts: list[str]) -> list[list[float]]:
        """Return an embedding for each text."""
        rows: list[list[float]] = self.session.embed(texts).tolist() if texts else []
        return rows

    def embed_query(self, text: str) -> list[float]:
        """Return the embedding of a text."""
        return self.embed_documents([text])[0]
