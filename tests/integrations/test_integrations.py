"""Bundles inside other libraries; each test needs the real library, and is skipped where it is missing."""

import asyncio
import re
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from tests.documents import code_blocks
from tests.tiny_bundle import write_bundle
from xadapter_export import XAdapterSession
from xadapter_export.errors import UnsupportedError
from xadapter_export.torchvision_cure import cure_torchvision

cure_torchvision()  # sentence-transformers and transformers import torchvision

TEXTS = ["a banana is yellow .", "the cherry", "the color of a lime is very very green ."]
# Another batch may be computed in another order.
assert_alike = partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)


@pytest.fixture(scope="module")
def embeds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_bundle(tmp_path_factory.mktemp("embeds") / "bundle", task="feature-extraction")


@pytest.fixture(scope="module")
def classifies(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_bundle(tmp_path_factory.mktemp("classifies") / "bundle", task="text-classification")


class TestSentenceTransformers:
    @pytest.fixture(autouse=True)
    def _installed(self) -> None:
        pytest.importorskip("sentence_transformers", reason="sentence-transformers is not installed")

    def test_encodes_as_the_session(self, embeds: Path) -> None:
        from sentence_transformers import SentenceTransformer

        from xadapter_export.integrations.sentence_encoder import XAdapterEncoder

        model = SentenceTransformer(modules=[XAdapterEncoder(embeds, experts="vt")], device="cpu")
        wanted = XAdapterSession.load(embeds, experts="vt").embed(TEXTS)
        found = model.encode(TEXTS, batch_size=2)
        assert_alike(found, wanted)
        assert_alike(model.similarity(found, found), wanted @ wanted.T)
        assert_alike(model.encode("cherry", prompt="the "), wanted[1])
        assert model.get_embedding_dimension() == wanted.shape[1]
        assert model.max_seq_length == 15
        tokens = model.encode(TEXTS[1], output_value="token_embeddings")
        assert tokens.shape == (4, wanted.shape[1])  # two words between two special tokens

    def test_the_bundle_is_saved_with_the_model(self, embeds: Path, tmp_path: Path) -> None:
        from sentence_transformers import SentenceTransformer

        from xadapter_export.integrations.sentence_encoder import XAdapterEncoder

        model = SentenceTransformer(modules=[XAdapterEncoder(embeds)], device="cpu")
        model.save_pretrained(str(tmp_path / "model"))
        again = SentenceTransformer(str(tmp_path / "model"), device="cpu", trust_remote_code=True)
        np.testing.assert_array_equal(again.encode(TEXTS), model.encode(TEXTS))

    def test_a_bundle_for_another_task_is_refused(self, tiny: Path) -> None:
        from xadapter_export.integrations.sentence_encoder import XAdapterEncoder

        with pytest.raises(UnsupportedError, match=r"gives no embeddings.*feature-extraction, got fill-mask"):
            XAdapterEncoder(tiny)


class TestPipelines:
    @pytest.fixture(autouse=True)
    def _installed(self) -> None:
        pytest.importorskip("transformers", reason="transformers is not installed")

    @pytest.mark.parametrize("batch_size", [1, 3])
    @pytest.mark.parametrize("experts", ["none", "v", "vt"])
    def test_fill_mask(self, tiny: Path, experts: str, batch_size: int) -> None:
        from xadapter_export.integrations.pipelines import make_pipeline

        texts = [
            "the color of a banana is [MASK].",
            "[MASK]",
            "the color of a lime is [MASK] and a cherry is [MASK].",
        ]
        session = XAdapterSession.load(tiny, experts=experts)
        fill = make_pipeline(session, batch_size=batch_size)
        for answers, wanted in zip(fill(texts, top_k=4), session.fill_mask(texts, top_k=4), strict=True):
            masks = answers if isinstance(answers[0], list) else [answers]
            found = [answer for mask in masks for answer in mask]
            assert [answer["token"] for answer in found] == [answer.token_id for answer in wanted]
            assert [answer["token_str"] for answer in found] == [answer.token for answer in wanted]
            scores = [answer.score for answer in wanted]
            assert [answer["score"] for answer in found] == pytest.approx(scores, rel=1e-5)

    def test_fill_mask_among_words(self, tiny: Path) -> None:
        from xadapter_export.integrations.pipelines import make_pipeline

        session = XAdapterSession.load(tiny, experts="v")
        found = make_pipeline(session)("a cherry is [MASK]", targets=["green", "red"])
        assert [answer["token_str"] for answer in found] == ["red", "green"]

    def test_fill_mask_of_a_bundle_for_candidates(self, tmp_path: Path) -> None:
        from xadapter_export.integrations.pipelines import make_pipeline

        folder = write_bundle(tmp_path / "bundle", candidates=("red", "yellow", "green"))
        session = XAdapterSession.load(folder, experts="v")
        found = make_pipeline(session)("a cherry is [MASK]", top_k=3)
        wanted = session.fill_mask("a cherry is [MASK]", top_k=3)
        assert [answer["token_str"] for answer in found] == [answer.token for answer in wanted]
        scores = [answer.score for answer in wanted]
        assert [answer["score"] for answer in found] == pytest.approx(scores, rel=1e-5)

    def test_text_classification(self, classifies: Path) -> None:
        from xadapter_export.integrations.pipelines import make_pipeline

        session = XAdapterSession.load(classifies)
        classify = make_pipeline(session, batch_size=2)
        for answers, wanted in zip(classify(TEXTS, top_k=None), session.classify(TEXTS), strict=True):
            assert [answer["label"] for answer in answers] == [answer.label for answer in wanted]
            scores = [answer.score for answer in wanted]
            assert [answer["score"] for answer in answers] == pytest.approx(scores, rel=1e-5)
        pair = {"text": "a banana", "text_pair": "is yellow"}
        best = session.classify(pair["text"], pair["text_pair"])[0]
        assert classify(pair)["label"] == best.label
        assert classify(pair)["score"] == pytest.approx(best.score, rel=1e-5)

    def test_feature_extraction(self, embeds: Path) -> None:
        from xadapter_export.integrations.pipelines import make_pipeline

        session = XAdapterSession.load(embeds)
        for text, states in zip(TEXTS, make_pipeline(session)(TEXTS), strict=True):
            wanted = session.run(session.text_encoder().encode(text))["last_hidden_state"]
            assert_alike(states, wanted)


def test_langchain_embeds_as_the_session(embeds: Path) -> None:
    pytest.importorskip("langchain_core", reason="langchain-core is not installed")
    from langchain_core.embeddings import Embeddings
    from langchain_core.vectorstores import InMemoryVectorStore

    from xadapter_export.integrations.langchain_embeddings import XAdapterEmbeddings

    embeddings = XAdapterEmbeddings(embeds)
    assert isinstance(embeddings, Embeddings)
    wanted = XAdapterSession.load(embeds).embed(TEXTS)
    assert_alike(embeddings.embed_documents(TEXTS), wanted)
    assert_alike(embeddings.embed_query(TEXTS[1]), wanted[1])
    assert embeddings.embed_documents([]) == []
    store = InMemoryVectorStore.from_texts(TEXTS, embeddings)
    assert store.similarity_search("a banana is yellow", k=1)[0].page_content == TEXTS[0]


def test_llama_index_embeds_as_the_session(embeds: Path) -> None:
    pytest.importorskip("llama_index.core", reason="llama-index-core is not installed")
    from xadapter_export.integrations.llama_index_embeddings import XAdapterEmbedding

    embedding = XAdapterEmbedding(embeds, experts="v")
    wanted = XAdapterSession.load(embeds, experts="v").embed(TEXTS)
    assert_alike(embedding.get_text_embedding_batch(TEXTS), wanted)
    assert_alike(embedding.get_query_embedding(TEXTS[1]), wanted[1])
    assert_alike(asyncio.run(embedding.aget_query_embedding(TEXTS[1])), wanted[1])
    assert embedding.model_name == str(embeds)


@pytest.mark.parametrize("number", range(4))
def test_the_guide_runs_as_it_is_written(
    number: int, tiny: Path, embeds: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocks = code_blocks("integrations.md", "python")
    assert len(blocks) == 4
    for library in re.findall(r"^from (\w+)", blocks[number], re.MULTILINE):
        pytest.importorskip(library, reason=f"{library} is not installed")
    if "llama_index" in blocks[number]:
        pytest.importorskip("llama_index.core", reason="llama-index-core is not installed")
    shutil.copytree(tiny, tmp_path / "bundle")
    shutil.copytree(embeds, tmp_path / "embeddings")
    monkeypatch.chdir(tmp_path)
    exec(blocks[number], {})
