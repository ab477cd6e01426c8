"""Why a text is answered as it is: the same as PyTorch says, from every variant."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.tiny_checkpoint import TEXTS
from xadapter_export import XAdapterSession
from xadapter_export.errors import ConfigError, InputTextError, UnsupportedError
from xadapter_export.exporters.pipeline import ExportResult
from xadapter_export.model.x_adapter_model import Memory, XAdapterModel
from xadapter_export.runtime.answers import RetrievedPicture
from xadapter_export.runtime.explain import ExplainedExpert, Explanation

BANANA, TWO_MASKS, _ = TEXTS


@pytest.fixture(scope="module")
def session(explained_export: ExportResult) -> XAdapterSession:
    return XAdapterSession.load(explained_export.folder, experts="vt", variant="cpu-fp32", num_threads=1)


@pytest.fixture(scope="module")
def why(session: XAdapterSession) -> Explanation:
    return session.explain(TWO_MASKS, top_k=3)


def test_there_is_an_entry_for_each_mask_with_the_usual_answers(
    session: XAdapterSession, why: Explanation
) -> None:
    assert (why.text, why.experts, why.variant) == (TWO_MASKS, "vt", "cpu-fp32")
    assert [answer.mask for answer in why.answers] == [0, 1]
    usual = session.fill_mask(TWO_MASKS, top_k=3)
    for got, wanted in zip([a for answer in why.answers for a in answer.answers], usual, strict=True):
        assert (got.token, got.mask, got.sequence) == (wanted.token, wanted.mask, wanted.sequence)
        assert got.score == pytest.approx(wanted.score, abs=1e-5)


def test_shares_add_up_to_one(why: Explanation) -> None:
    for answer in why.answers:
        assert [expert.expert for expert in answer.experts] == ["v", "t"]
        for expert in answer.experts:
            assert expert.layers == (1, 2)
            assert min(expert.lengths) > 0
            assert expert.null_share == 0
            whole = sum(item.share for item in expert.items) + expert.bias_share
            assert whole == pytest.approx(1, abs=1e-4)
            for item in expert.items:
                weighted = sum(s * n for s, n in zip(item.by_layer, expert.lengths, strict=True))
                assert item.share == pytest.approx(weighted / sum(expert.lengths))


def test_pictures_and_tokens_have_their_names(session: XAdapterSession, why: Explanation) -> None:
    pictures, tokens = (expert.items for expert in why.answers[0].experts)
    seen = [RetrievedPicture(i.row or 0, i.id or "", i.name, i.cosine or 0.0) for i in pictures]
    assert seen == session.retrieve(TWO_MASKS)
    assert all((item.row, item.id, item.cosine) == (None, None, None) for item in tokens)
    assert len(tokens) == session.text_encoder().encode(TWO_MASKS)["clip_input_ids"].shape[1]
    assert [item.name for item in tokens][-1] == "<end_of_text>"


def probabilities(model: XAdapterModel, memory: Memory) -> torch.Tensor:
    """``(P, V)``: PyTorch's own answer to the text."""
    with torch.no_grad():
        logits: torch.Tensor = model(**model.encode([TWO_MASKS]), memory=memory).logits
    return logits[0].softmax(-1)


def test_leaving_one_out_is_what_pytorch_says_without_it(tiny_model: XAdapterModel, why: Explanation) -> None:
    memory = tiny_model.memory(tiny_model.encode([TWO_MASKS])["clip_input_ids"])
    assert memory.v is not None and memory.t_mask is not None  # noqa: PT018
    best = [answer.answers[0].token_id for answer in why.answers]
    for number in range(memory.v.shape[1]):  # the picture is taken out
        kept = [item for item in range(memory.v.shape[1]) if item != number]
        check(why, "v", number, probabilities(tiny_model, replace(memory, v=memory.v[:, kept])), best)
    for number in range(memory.t_mask.shape[1]):  # the token is hidden as padding is
        mask = memory.t_mask.clone()
        mask[:, number] = False
        check(why, "t", number, probabilities(tiny_model, replace(memory, t_mask=mask)), best)


def check(why: Explanation, name: str, item: int, wanted: torch.Tensor, best: list[int]) -> None:
    for place, answer in enumerate(why.answers):
        [expert] = [expert for expert in answer.experts if expert.expert == name]
        without = expert.items[item].without
        assert without.score == pytest.approx(float(wanted[place, best[place]]), abs=1e-4)
        assert without.answer is not None
        assert without.answer.score == pytest.approx(float(wanted[place].max()), abs=1e-4)
        assert without.changes == (without.answer.token_id != best[place])


def test_without_an_expert_is_the_set_without_it(session: XAdapterSession, why: Explanation) -> None:
    for name, others in (("v", "t"), ("t", "v")):
        wanted = session.with_experts(others).fill_mask(TWO_MASKS, top_k=1)
        for answer, best in zip(why.answers, wanted, strict=True):
            [expert] = [expert for expert in answer.experts if expert.expert == name]
            assert expert.without.answer is not None
            assert expert.without.answer.token_id == best.token_id
            assert expert.without.answer.score == pytest.approx(best.score, abs=1e-4)


def numbers(expert: ExplainedExpert) -> list[float]:
    return [n for item in expert.items for n in (item.share, *item.by_layer, item.without.score)]


def test_small_batches_and_the_portable_graph_say_the_same(
    explained_export: ExportResult, why: Explanation
) -> None:
    small = XAdapterSession.load(
        explained_export.folder, experts="vt", variant="onnx-fp32", batch_size=2, num_threads=1
    )
    for got, wanted in zip(small.explain(TWO_MASKS).answers, why.answers, strict=True):
        for one, other in zip(got.experts, wanted.experts, strict=True):
            assert numbers(one) == pytest.approx(numbers(other), abs=1e-4)


def test_int8_explains_itself(explained_export: ExportResult) -> None:
    small = XAdapterSession.load(explained_export.folder, experts="vt", variant="cpu-int8", num_threads=1)
    assert [check.passed for check in small.checks] in ([], [True])  # it is checked once in a process
    [answer] = small.explain(BANANA).answers
    assert answer.answers[0].score == pytest.approx(small.fill_mask(BANANA)[0].score, abs=1e-5)
    for expert in answer.experts:
        whole = sum(item.share for item in expert.items) + expert.bias_share
        assert whole == pytest.approx(1, abs=1e-4)


def test_candidates_and_one_set_at_a_time(session: XAdapterSession) -> None:
    [answer] = session.explain(BANANA, candidates=["red", "green"], experts="v").answers
    assert {a.token for a in answer.answers} == {"red", "green"}
    [expert] = answer.experts
    for item in expert.items:
        assert item.without.answer is not None
        assert item.without.answer.token in {"red", "green"}
        assert item.without.score == pytest.approx(
            1 - item.without.answer.score if item.without.changes else item.without.answer.score
        )


def test_a_text_is_answered_as_without_explanations(
    session: XAdapterSession, tiny_export: ExportResult
) -> None:
    plain = XAdapterSession.load(tiny_export.folder, experts="vt", variant="cpu-fp32", num_threads=1)
    got, wanted = (each.fill_mask(TEXTS) for each in (session, plain))
    assert [[a.token for a in answers] for answers in got] == [
        [a.token for a in answers] for answers in wanted
    ]
    assert got[0][0].logit == pytest.approx(wanted[0][0].logit, abs=1e-4)


def test_what_cannot_be_explained(session: XAdapterSession, tiny: Path) -> None:
    hint = "export it again with xad-export --with-explanations"
    with pytest.raises(UnsupportedError, match=rf"exported without explanations: experts v; {hint}"):
        XAdapterSession.load(tiny, num_threads=1).explain("a banana is [MASK]", experts="v")
    with pytest.raises(UnsupportedError, match="an expert set without experts has nothing to explain"):
        session.explain(BANANA, experts="none")
    with pytest.raises(UnsupportedError, match="the bundle's task does not use second texts"):
        session.explain(BANANA, "red")
    with pytest.raises(ConfigError, match="top_k must be at least 1"):
        session.explain(BANANA, top_k=0)
    with pytest.raises(InputTextError, match="the text has no mask to fill"):
        session.explain("a banana")
