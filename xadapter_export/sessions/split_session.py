"""Two graphs run as one: what a text asks CLIP and the bank, and the answer that is given with it.

The query graph reads a text's CLIP tokens alone, so what it says of a text can be kept, with the pictures
that were found, for the next time the same text comes: then only the answer graph runs.

Dimensions: B batch, S CLIP tokens, W CLIP text width, K retrieved pictures, D CLIP embedding size.
"""

import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import cast

import numpy as np

from xadapter_export.bundle.manifest import ExpertSetSpec, TowerFacts, Variant
from xadapter_export.sessions.retrieval import Retriever
from xadapter_export.sessions.session import Array, OnnxSession, Value

Memory = Mapping[str, Array]  # of one text: the answer graph's inputs and what was retrieved, no batch axis

_CLIP_IDS, _QUERY = "clip_input_ids", "query"
_FOUND = ("memory_v", "retrieved", "retrieved_scores")


class MemoryCache:
    """What was found for the texts that came last; may be used from several threads.

    Args:
        size: How many texts are kept; the one that was not asked for longest goes first.
    """

    def __init__(self, size: int) -> None:
        self._size = size
        self._kept: OrderedDict[tuple[str, bytes], Memory] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._kept)

    def get(self, key: tuple[str, bytes]) -> Memory | None:
        """Return what is kept, or None."""
        with self._lock:
            if key in self._kept:
                self._kept.move_to_end(key)
            return self._kept.get(key)

    def put(self, key: tuple[str, bytes], memory: Memory) -> None:
        """Keep something."""
        with self._lock:
            self._kept[key] = memory
            self._kept.move_to_end(key)
            if len(self._kept) > self._size:
                self._kept.popitem(last=False)


class SplitSession:
    """The two graphs of a variant, with the interface of one.

    Args:
        query: The query graph.
        answer: The answer graph.
        spec: The contract of both.
        tower: How the query graph's text tower is fed.
        name: What tells this pair's memories from another's in the cache.
        retriever: The search of the bank, where a graph does not do it.
        cache: Where to keep what was found; None to keep nothing.
    """

    def __init__(
        self,
        query: OnnxSession,
        answer: OnnxSession,
        spec: ExpertSetSpec,
        tower: TowerFacts,
        name: str,
        retriever: Retriever | None = None,
        cache: MemoryCache | None = None,
    ) -> None:
        assert spec.split is not None  # a variant with a query graph is of a set that is split
        self._query, self._answer = query, answer
        self._name, self._retriever, self._cache = name, retriever, cache
        self._spec, self._tower = spec, tower
        self._query_outputs = [tensor.name for tensor in spec.split.query.outputs]
        self._answer_inputs = [tensor.name for tensor in spec.split.answer.inputs]

    def run(self, output_names: Sequence[str] | None, input_feed: Mapping[str, Array]) -> list[Array]:
        """Compute the named outputs; see ``OnnxSession.run``.

        Raises:
            XAdapterError: If the index does not answer as it must.
        """
        names = [t.name for t in self._spec.outputs] if output_names is None else list(output_names)
        memory = self._memory(input_feed[_CLIP_IDS])
        given = [name for name in names if name not in memory]
        if given:
            feed = self._answer_feed(input_feed, memory)
            memory |= dict(zip(given, self._answer.run(given, feed), strict=True))
        return [memory[name] for name in names]

    def answer_feed(self, input_feed: Mapping[str, Array]) -> dict[str, Array]:
        """Return what the answer graph reads for these inputs of the whole."""
        return self._answer_feed(input_feed, self._memory(input_feed[_CLIP_IDS]))

    def _answer_feed(self, input_feed: Mapping[str, Array], memory: Memory) -> dict[str, Array]:
        return {
            name: input_feed[name] if name in input_feed else memory[name] for name in self._answer_inputs
        }

    def without_memory(self, retriever: Retriever | None) -> "SplitSession":
        """Return the same graphs with no cache, and with another search of the bank where one is given."""
        search = self._retriever if retriever is None else retriever
        return SplitSession(self._query, self._answer, self._spec, self._tower, self._name, search)

    def get_providers(self) -> list[str]:
        """Return the active execution providers."""
        return self._answer.get_providers()

    def get_inputs(self) -> Sequence[Value]:
        """Return the inputs of the whole: the query graph's, and those of the answer graph that are given."""
        known = {tensor.name for tensor in self._spec.inputs}
        both = [*self._answer.get_inputs(), *self._query.get_inputs()]
        return [value for value in both if value.name in known]

    def get_outputs(self) -> Sequence[Value]:
        """Return the answer graph's outputs."""
        return self._answer.get_outputs()

    def _memory(self, clip_input_ids: Array) -> dict[str, Array]:
        """Return what the answer graph reads, and what was retrieved, of ``(B, S) int64`` texts."""
        texts = [self._true_length(row) for row in clip_input_ids]
        keys = [(self._name, text.tobytes()) for text in texts]
        found: dict[tuple[str, bytes], Memory] = {}
        missing: dict[tuple[str, bytes], Array] = {}
        for key, text in zip(keys, texts, strict=True):
            kept = None if self._cache is None else self._cache.get(key)
            if kept is None:
                missing[key] = text
            else:
                found[key] = kept
        if missing:
            for key, memory in zip(missing, self._ask(list(missing.values())), strict=True):
                found[key] = memory
                if self._cache is not None:
                    self._cache.put(key, memory)
        memories = [found[key] for key in keys]
        return {name: _stack([memory[name] for memory in memories]) for name in memories[0]}

    def _true_length(self, row: Array) -> Array:
        """Return a text of ``(S,) int64`` without its padding, where the tower may be run without."""
        ends = np.flatnonzero(row == self._tower.end_token_id)
        return row[: ends[0] + 1] if self._tower.exact_at_true_length and ends.size else row

    def _ask(self, texts: Sequence[Array]) -> list[Memory]:
        """Run the query graph on texts that differ, and search the bank with what it says."""
        ids = _stack(texts, self._tower.pad_token_id)
        outputs = self._query.run(self._query_outputs, {_CLIP_IDS: ids})
        arrays = dict(zip(self._query_outputs, outputs, strict=True))
        if _QUERY in arrays:
            assert self._retriever is not None  # whoever opened the pair has seen this output
            arrays |= dict(zip(_FOUND, self._retriever.find(arrays.pop(_QUERY)), strict=True))  # type: ignore[arg-type]  # float32, from the graph
        return [
            {
                # Copies: a view would keep the whole batch. A token's memory ends where its text does.
                name: np.array(array[b, : len(text)] if name.startswith("memory_t") else array[b])
                for name, array in arrays.items()
            }
            for b, text in enumerate(texts)
        ]


def open_split(
    variant: Variant,
    spec: ExpertSetSpec,
    tower: TowerFacts | None,
    open_graph: Callable[[Variant], OnnxSession],
    *,
    retriever: Retriever | None = None,
    cache: MemoryCache | None = None,
) -> SplitSession:
    """Open both graphs of a variant.

    Args:
        variant: A variant with a query graph.
        spec: The contract of its expert set.
        tower: See ``SplitSession``; a set that is split has one.
        open_graph: Opens a variant of one graph: the answer graph, then the query graph.
        retriever: See ``SplitSession``.
        cache: See ``SplitSession``.

    Raises:
        As ``open_graph``.
    """
    assert variant.query_file is not None and tower is not None  # noqa: PT018  # it is split
    answer = open_graph(variant.model_copy(update={"query_file": None}))
    query = open_graph(variant.model_copy(update={"query_file": None, "file": variant.query_file}))
    return SplitSession(query, answer, spec, tower, variant.query_file, retriever, cache)


def _stack(arrays: Sequence[Array], padding: int = 0) -> Array:
    """Put arrays that may differ in the length of their first axis into one, with padding after them."""
    longest = max(len(array) for array in arrays)
    stacked = np.full((len(arrays), longest, *arrays[0].shape[1:]), padding, arrays[0].dtype)
    for row, array in zip(stacked, arrays, strict=True):
        row[: len(array)] = array
    return cast(Array, stacked)
