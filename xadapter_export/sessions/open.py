"""The one door to the graphs of a bundle: each is opened by the opener that its target names."""

import hashlib
from dataclasses import replace
from pathlib import Path

from xadapter_export.bundle.folder import Bundle
from xadapter_export.bundle.graph_check import beside
from xadapter_export.bundle.manifest import Variant
from xadapter_export.errors import UnsupportedError
from xadapter_export.registry import load_named
from xadapter_export.sessions.retrieval import Retriever, open_retriever
from xadapter_export.sessions.session import AS_IT_IS, OnnxSession, Opening
from xadapter_export.sessions.split_session import open_split
from xadapter_export.targets import TARGETS


def open_variant(
    bundle: Bundle, variant: Variant, how: Opening = AS_IT_IS, *, retriever: Retriever | None = None
) -> OnnxSession:
    """Open a variant of a bundle; of two graphs, both, as one.

    Args:
        bundle: The bundle.
        variant: One of its variants.
        how: How to open it. What is appended is for the answer graph, weights for whichever graph has them;
            of ``cache_dir``, each graph gets a folder that is named by the hash of its files.
        retriever: What searches the bank where no graph does; the bundle's own features if None.

    Raises:
        UnsupportedError: As ``open_graph``.
        MissingExtraError: If what runs the target is not installed.
        ProviderError: As ``open_onnx``.
        ConfigError: If ``cache_dir`` cannot be written.
        BundleError: If a file is missing, the graph could do harm (``bundle.graph_check``), or its library
            cannot load it.
    """
    if variant.query_file is not None:

        def open_one(graph: Variant) -> OnnxSession:
            is_answer = graph.file == variant.file
            return open_variant(bundle, graph, how if is_answer else replace(how, appended=b""))

        spec = bundle.manifest.expert_sets[variant.expert_set]
        if spec.searches_outside and retriever is None:
            retriever = open_retriever(bundle, None)
        return open_split(variant, spec, bundle.manifest.clip, open_one, retriever=retriever)
    if how.cache_dir is not None:
        hashes = " ".join(bundle.manifest.files[name].sha256 for name in variant.all_files)
        how = replace(how, cache_dir=how.cache_dir / hashlib.sha256(hashes.encode()).hexdigest()[:16])
    how = replace(how, weight_files=beside(variant.file, variant.weight_files))
    return open_graph(variant.target, bundle.file(variant.file), how)


def open_graph(target: str, file: Path, how: Opening = AS_IT_IS) -> OnnxSession:
    """Open one graph with the opener of its target.

    Args:
        target: Name of a target that a session runs.
        file: The graph; its weights are beside it.
        how: How to open it.

    Raises:
        UnsupportedError: If this installation does not know the target, or nothing here runs it.
        MissingExtraError: If what runs it is not installed.
        As the opener.
    """
    found = TARGETS[target]
    if found.opener is None or found.is_deployment:
        raise UnsupportedError("graphs for this target cannot be run here", where=target)
    session: OnnxSession = load_named(found.opener)(file, how)
    return session
