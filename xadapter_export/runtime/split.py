"""What a session adds to graphs that are split: an index of its own, and a memory of the texts that came."""

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Final

from xadapter_export.bundle.folder import Bundle, verifying
from xadapter_export.bundle.manifest import Variant
from xadapter_export.errors import ConfigError
from xadapter_export.runtime.picture_index import open_index
from xadapter_export.sessions.retrieval import PictureIndex, Retriever, open_retriever
from xadapter_export.sessions.session import OnnxSession
from xadapter_export.sessions.split_session import MemoryCache, SplitSession, open_split

CACHE_SIZE: Final = 512  # texts


class SplitPairs:
    """Opens the split variants of a bundle for one session, whose index and cache they share.

    Args:
        bundle: The bundle.
        index: See ``HowToOpen``.
        cache_size: See ``HowToOpen``.
        verify: Whether to compare the features of the bank and the files of an index with their hashes.

    Raises:
        ConfigError: If there is an index and no set of the bundle searches outside its graph, or it is not
            one of the bundle's bank.
        BundleError: If the index cannot be read.
        MissingExtraError: If what searches it is not installed.
    """

    def __init__(
        self, bundle: Bundle, index: PictureIndex | Path | str | None, cache_size: int, *, verify: bool
    ) -> None:
        self._bundle, self._verify = bundle, verify
        self._cache = MemoryCache(cache_size) if cache_size else None
        self._retriever: Retriever | None = None
        sets = bundle.manifest.expert_sets.values()
        if index is not None and not any(spec.searches_outside for spec in sets):
            raise ConfigError(
                "no graph of this bundle uses an index",
                where=bundle.folder,
                hint="remove the index, or export the checkpoint with --retrieval external",
            )
        self._index = open_index(index, verify=verify) if isinstance(index, str | Path) else index
        if self._index is not None:
            self._open_retriever()

    def open(self, variant: Variant, open_graph: Callable[[Variant], OnnxSession]) -> SplitSession:
        """Open both graphs of a variant.

        Raises:
            As ``open_graph`` and ``open_retriever``.
        """
        manifest = self._bundle.manifest
        spec = manifest.expert_sets[variant.expert_set]
        retriever = self._open_retriever() if spec.searches_outside else None
        return open_split(variant, spec, manifest.clip, open_graph, retriever=retriever, cache=self._cache)

    def _open_retriever(self) -> Retriever:
        if self._retriever is None:
            bank = self._bundle.manifest.bank
            features = () if bank is None or bank.features is None else (bank.features,)
            reads_features = bool(features) and not getattr(self._index, "returns_features", False)
            with verifying(self._bundle, features) if self._verify and reads_features else nullcontext():
                self._retriever = open_retriever(self._bundle, self._index)
        return self._retriever
