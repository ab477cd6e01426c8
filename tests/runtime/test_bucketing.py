from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.tiny_bundle import write_bundle
from xadapter_export import XAdapterSession
from xadapter_export.bundle.manifest import ExpertSet
from xadapter_export.runtime.batches import RUN_COST, plan_batches
from xadapter_export.runtime.text import Int64Array

BANK = ("banana", "cherry", "lime")
TEXTS = [f"{'very ' * (i % 7)}{BANK[i % 3]} is [MASK]" for i in range(40)]


def count_padding(batches: list[list[int]], lengths: list[int]) -> int:
    return sum(max(lengths[i] for i in batch) - lengths[j] for batch in batches for j in batch)


@given(st.lists(st.integers(1, 512), max_size=80), st.integers(1, 33))
def test_each_text_is_in_one_batch_of_similar_lengths(lengths: list[int], batch_size: int) -> None:
    batches = plan_batches(lengths, batch_size)
    assert sorted(number for batch in batches for number in batch) == list(range(len(lengths)))
    assert all(0 < len(batch) <= batch_size for batch in batches)
    assert all(count_padding([batch], lengths) <= RUN_COST for batch in batches)
    flat = [lengths[number] for batch in batches for number in batch]
    assert flat == sorted(flat)


def test_it_pads_less_than_batches_in_the_order_of_the_list() -> None:
    lengths = [4, 60, 5, 61, 6, 62, 4, 60]
    as_they_come = [list(range(start, start + 4)) for start in (0, 4)]
    assert count_padding(as_they_come, lengths) == 230
    assert plan_batches(lengths, 4) == [[0, 6, 2, 4], [1, 7, 3, 5]]
    assert count_padding(plan_batches(lengths, 4), lengths) == 10


def test_texts_of_one_length_fill_their_batches() -> None:
    assert [len(batch) for batch in plan_batches([7] * 70, 32)] == [32, 32, 6]
    assert plan_batches([9], 32) == [[0]]
    assert plan_batches([3, 3 + RUN_COST], 32) == [[0, 1]]
    assert plan_batches([3, 4 + RUN_COST], 32) == [[0], [1]]


def test_the_session_feeds_fewer_padded_tokens(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    session = XAdapterSession.load(tiny, experts="v", num_threads=1, batch_size=8)
    fed: list[int] = []
    run = session.run

    def count(inputs: dict[str, Int64Array], **settings: Any) -> object:
        fed.append(int((inputs["attention_mask"] == 0).sum()))
        return run(inputs, **settings)

    monkeypatch.setattr(session, "run", count)
    session.fill_mask(TEXTS)
    unsorted = [session._encoder.encode(TEXTS[i : i + 8])["attention_mask"] for i in range(0, len(TEXTS), 8)]
    assert len(fed) == len(unsorted) == 5
    assert sum(fed) < sum(int((mask == 0).sum()) for mask in unsorted) / 4


@pytest.mark.parametrize("experts", ["none", "v", "t", "vt"])
def test_answers_are_those_of_each_text_alone_and_in_the_order_of_the_list(
    tiny: Path, experts: ExpertSet
) -> None:
    session = XAdapterSession.load(tiny, experts=experts, num_threads=1, batch_size=4)
    for text, together in zip(TEXTS, session.fill_mask(TEXTS, top_k=3), strict=True):
        alone = session.fill_mask(text, top_k=3)
        assert [(a.token, a.sequence) for a in together] == [(a.token, a.sequence) for a in alone]
        assert [a.logit for a in together] == pytest.approx([a.logit for a in alone], abs=1e-5)


def test_pictures_labels_and_embeddings_come_back_in_order(tiny: Path, tmp_path: Path) -> None:
    pictures = XAdapterSession.load(tiny, experts="v", num_threads=1, batch_size=4).retrieve(TEXTS)
    assert [row[0].caption for row in pictures] == [BANK[i % 3] for i in range(len(TEXTS))]
    texts = [text.replace("[MASK]", "red") for text in TEXTS]
    folder = write_bundle(tmp_path / "c", task="text-classification", sets=("v",))
    session = XAdapterSession.load(folder, num_threads=1, batch_size=4)
    pairs = ["very " * (2 - i % 3) + "lime" for i in range(len(texts))]
    for text, pair, answers in zip(texts, pairs, session.classify(texts, pairs), strict=True):
        alone = session.classify(text, pair)
        assert [a.label for a in answers] == [a.label for a in alone]
        assert [a.logit for a in answers] == pytest.approx([a.logit for a in alone], abs=1e-5)
    folder = write_bundle(tmp_path / "e", task="feature-extraction", sets=("t",))
    session = XAdapterSession.load(folder, num_threads=1, batch_size=4)
    alone_rows = np.concatenate([session.embed(text) for text in texts])
    np.testing.assert_allclose(session.embed(texts), alone_rows, atol=1e-6)
