from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, get_type_hints

import numpy as np
import pytest
from numpy.typing import NDArray
from tokenizers import Tokenizer, models, pre_tokenizers

from tests.tiny_bundle import WORDS, H, plm_tokenizer, rehash, write_bundle
from xadapter_export import XAdapterSession
from xadapter_export.errors import (
    BundleError,
    ConfigError,
    HashMismatchError,
    InputTextError,
    ProviderError,
    ShapeError,
    UnsupportedError,
)
from xadapter_export.experts import EXPERT_SETS
from xadapter_export.runtime.candidates import find_candidates
from xadapter_export.runtime.how_to_open import HowToOpen, SessionOptions
from xadapter_export.runtime.text import TruncationWarning
from xadapter_export.tasks.spec import best

BANANA, CHERRY = "the color of a banana is [MASK].", "a cherry is [MASK]"


@pytest.fixture(scope="module")
def session(tiny: Path) -> XAdapterSession:
    return XAdapterSession.load(tiny, experts="v", num_threads=1)


def test_it_answers_from_the_pictures(session: XAdapterSession) -> None:
    answer = session.fill_mask(BANANA, top_k=3)[0]
    assert answer.token == "yellow"
    assert answer.token_id == WORDS.index("yellow")
    assert answer.sequence == "the color of a banana is yellow."
    assert answer.mask == 0
    assert 0.5 < answer.score < 0.6


def test_scores_are_probabilities_over_the_vocabulary_best_first(session: XAdapterSession) -> None:
    answers = session.fill_mask(BANANA, top_k=1000)
    assert len(answers) == H
    assert sum(answer.score for answer in answers) == pytest.approx(1)
    assert answers == sorted(answers, key=lambda answer: -answer.logit)


def test_equal_logits_keep_the_order_of_the_vocabulary() -> None:
    logits = np.array([1, 3, 2, 3, 0, 2, 2], np.float32)
    assert [place for place, _ in best(logits, 4)] == [1, 3, 2, 5]
    assert [place for place, _ in best(logits, 99)] == [1, 3, 2, 5, 6, 0, 4]


@pytest.mark.parametrize("kind", ["graph", "tokenizer"])
def test_a_changed_file_is_named_even_where_it_cannot_be_read_any_more(kind: str, tmp_path: Path) -> None:
    folder = write_bundle(tmp_path / "b", sets=("t", "v"))
    other = bytearray((folder / "onnx/model_t.onnx").read_bytes())
    other[-1] ^= 1
    (folder / "onnx/model_t.onnx").write_bytes(other)  # a session of v does not open it, and does not hash it
    graph = XAdapterSession.load(folder, experts="v").variant.file
    path = folder / (graph if kind == "graph" else "tokenizer.json")
    path.write_bytes(b"?" + path.read_bytes()[1:])
    with pytest.raises(HashMismatchError, match=rf"has changed: .*{path.name}"):
        XAdapterSession.load(folder, experts="v")
    with pytest.raises(BundleError, match="cannot"):
        XAdapterSession.load(folder, experts="v", verify=False)


def test_a_list_gives_a_list_in_its_order_whatever_the_batches(tiny: Path, session: XAdapterSession) -> None:
    texts = [BANANA, CHERRY, "[MASK] lime", BANANA, CHERRY]
    small = XAdapterSession.load(tiny, experts="v", batch_size=2, verify=False)
    tokens = [answers[0].token for answers in small.fill_mask(texts, candidates=["red", "yellow", "green"])]
    assert tokens == ["yellow", "red", "green", "yellow", "red"]
    for alone, batched in zip(map(session.fill_mask, texts), small.fill_mask(texts), strict=True):
        assert [a.token for a in alone] == [b.token for b in batched]
        assert [a.logit for a in alone] == pytest.approx([b.logit for b in batched], abs=1e-5)


def test_several_masks_in_one_text(session: XAdapterSession) -> None:
    answers = session.fill_mask(["[MASK] banana is [MASK] .", BANANA], top_k=1)
    assert [(a.mask, a.token, a.sequence) for a in answers[0]] == [
        (0, "yellow", "yellow banana is [MASK] ."),
        (1, "yellow", "[MASK] banana is yellow ."),
    ]
    assert len(answers[1]) == 1


def test_candidates_restrict_the_answers_and_share_the_probability(session: XAdapterSession) -> None:
    answers = session.fill_mask(BANANA, candidates=["green", "Yellow"])
    assert [answer.token for answer in answers] == ["Yellow", "green"]
    assert sum(answer.score for answer in answers) == pytest.approx(1)
    everything = {answer.token_id: answer.logit for answer in session.fill_mask(BANANA, top_k=1000)}
    assert all(answer.logit == everything[answer.token_id] for answer in answers)


def test_a_bundle_exported_for_candidates(tmp_path: Path) -> None:
    session = XAdapterSession.load(write_bundle(tmp_path / "b", candidates=("green", "yellow", "red")))
    assert session.fill_mask(BANANA)[0].token == "yellow"
    answers = session.fill_mask(BANANA, candidates=["red", "yellow"])
    assert [(answer.token, answer.token_id) for answer in answers] == [("yellow", 14), ("red", 15)]
    with pytest.raises(
        ConfigError, match=r"exported for other candidates: fruit \(expected some of green, yellow, red"
    ):
        session.fill_mask(BANANA, candidates=["red", "fruit"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["yellow", "bananas"], r"not one token of the language model: 'bananas' \(got banana \+ ##s\)"),
        (["mauve"], r"not one token .*'mauve' \(got \[UNK\]\)"),
        ([" ", ""], "no candidate was given"),
        ("red", r"the candidates must be a list \(expected a list of words, got 'red'\); write \['red'\]"),
        ([], "no candidate was given"),
        (["red", "RED"], "two candidates are the same token: 'red', 'RED'"),
    ],
)
def test_bad_candidates(session: XAdapterSession, words: list[str] | str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        session.fill_mask(BANANA, candidates=words)


def test_candidates_that_are_no_text(session: XAdapterSession) -> None:
    with pytest.raises(InputTextError, match=r"candidate 2 of 2 is not a string \(got int\)"):
        session.fill_mask(BANANA, candidates=["red", 1])  # type: ignore[list-item]  # the mistake in question
    with pytest.raises(InputTextError, match="candidate 1 of 1 is not valid Unicode"):
        session.fill_mask(BANANA, candidates=["\udce9"])


def test_byte_level_candidates_are_looked_up_inside_a_sentence() -> None:
    tokenizer = Tokenizer(
        models.BPE(
            {"r": 0, "e": 1, "\u0120": 2, "\u0120r": 3, "\u0120re": 4}, [("\u0120", "r"), ("\u0120r", "e")]
        )
    )
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    assert find_candidates(tokenizer, ["re"])[0].token_id == 4
    assert len(find_candidates(tokenizer, ["", "re", " "])) == 1  # an empty word would be the space alone
    with pytest.raises(ConfigError, match="no candidate was given"):
        find_candidates(tokenizer, [""])


def test_candidates_do_not_mind_the_tokenizers_own_padding() -> None:
    tokenizer = plm_tokenizer()
    tokenizer.enable_padding(length=50)
    assert find_candidates(tokenizer, ["red"])[0].token_id == WORDS.index("red")


def test_experts_are_switched_without_loading_twice(session: XAdapterSession) -> None:
    plain = session.with_experts("none")
    assert (session.experts, plain.experts) == ("v", "none")
    assert plain.fill_mask(BANANA)[0].token != "yellow"
    assert plain.fill_mask(BANANA) == session.fill_mask(BANANA, experts="none")
    assert session.fill_mask(BANANA, experts="t")[0].token == "fruit"
    assert plain._graphs is session._graphs


def test_a_set_that_is_not_there(tmp_path: Path) -> None:
    folder = write_bundle(tmp_path / "b", sets=("none", "t"))
    with pytest.raises(BundleError, match=r"this expert set: v \(expected one of none, t\)"):
        XAdapterSession.load(folder, experts="v")
    session = XAdapterSession.load(folder)
    assert session.experts == "t"
    with pytest.raises(BundleError, match="does not have this expert set: vt"):
        session.with_experts("vt")
    with pytest.raises(BundleError, match="does not have this expert set: vt"):
        session.fill_mask(BANANA, experts="vt")


def test_it_names_the_pictures_it_looked_at(session: XAdapterSession) -> None:
    pictures = session.retrieve("a cherry")
    assert asdict(pictures[0]) == {
        "row": 1,
        "id": "1f352",
        "caption": "cherry",
        "score": pytest.approx(0.499, abs=1e-3),
    }
    assert [row[0].caption for row in session.retrieve(["a lime", BANANA])] == ["lime", "banana"]
    assert session.retrieves("vt")
    assert not session.retrieves("t")
    with pytest.raises(UnsupportedError, match="uses no images: t; choose v or vt"):
        session.retrieve("a cherry", experts="t")


def test_no_pictures_in_the_bundle_at_all(tmp_path: Path) -> None:
    session = XAdapterSession.load(write_bundle(tmp_path / "b", sets=("t",)))
    assert session.pictures == ()
    with pytest.raises(UnsupportedError, match="export the checkpoint with --experts v or vt"):
        session.retrieve("a cherry")


def test_classify(tmp_path: Path) -> None:
    session = XAdapterSession.load(write_bundle(tmp_path / "b", task="text-classification"), batch_size=1)
    answers = session.classify("a lime")
    assert {answer.label for answer in answers} == {"sweet", "sour"}
    assert sum(answer.score for answer in answers) == pytest.approx(1)
    assert answers[0].score > answers[1].score
    pairs = session.classify(["a lime", "a lime"], ["a cherry", "a banana"])
    assert pairs[0] != pairs[1]
    with pytest.raises(
        InputTextError, match=r"the numbers of texts and second texts differ \(expected 2, got 1\)"
    ):
        session.classify(["a", "a"], ["a"])
    with pytest.raises(
        UnsupportedError, match=r"another task \(expected fill-mask, got text-classification\)"
    ):
        session.fill_mask(BANANA)


def test_embed(tmp_path: Path) -> None:
    session = XAdapterSession.load(write_bundle(tmp_path / "b", task="feature-extraction"), batch_size=2)
    vectors = session.embed(["a lime", "a cherry is red", "a lime"])
    assert vectors.shape == (3, H)
    assert vectors.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-6)
    np.testing.assert_allclose(vectors[0], vectors[2], atol=1e-6)
    assert session.embed("a lime").shape == (1, H)


def test_threads_get_the_answers_that_one_gets(tiny: Path) -> None:
    session = XAdapterSession.load(tiny, verify=False, num_threads=1)
    jobs = [(text, experts) for text in (BANANA, CHERRY) for experts in EXPERT_SETS] * 8
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(lambda job: session.fill_mask(job[0], experts=job[1]), jobs))
    assert together == [session.fill_mask(text, experts=experts) for text, experts in jobs]


def test_run_takes_and_gives_arrays(session: XAdapterSession) -> None:
    inputs = session._clip_encoder.encode([BANANA, CHERRY])
    outputs = session.run(inputs)
    assert {name: array.shape for name, array in outputs.items()} == {
        "logits": (2, 1, H),
        "retrieved": (2, 2),
        "retrieved_scores": (2, 2),
    }
    assert list(session.run(inputs, outputs=["retrieved"])) == ["retrieved"]
    assert list(session.run(inputs, experts="none")) == ["logits"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"input_ids": None}, r"an input is missing: input_ids \(got attention_mask"),
        ({"input_ids": np.zeros((1, 5), np.int32)}, r"input_ids .*int64.*got \(1, 5\) int32"),
        ({"input_ids": np.zeros(5, np.int64)}, r"expected \(batch, seq <= 15\) int64.*got \(5,\) int64"),
        ({"input_ids": np.zeros((1, 16), np.int64)}, r"seq <= 15.*got \(1, 16\)"),
        ({"input_ids": np.zeros((1, 0), np.int64)}, r"got \(1, 0\)"),
        ({"clip_input_ids": np.zeros((2, 3), np.int64)}, r"clip_input_ids .*'batch': 1.*got \(2, 3\)"),
        ({"clip_input_ids": np.zeros((1, 15), np.int64)}, r"clip_seq <= 14.*got \(1, 15\)"),
    ],
)
def test_arrays_that_do_not_fit(
    session: XAdapterSession, changes: dict[str, NDArray[Any] | None], message: str
) -> None:
    inputs = session._clip_encoder.encode(BANANA) | changes
    with pytest.raises(ShapeError, match=message):
        session.run({name: array for name, array in inputs.items() if array is not None})


def test_a_graph_that_cannot_compute_is_one_clear_error(session: XAdapterSession) -> None:
    inputs = session._clip_encoder.encode(BANANA)
    inputs["input_ids"] = inputs["input_ids"] + 1000
    with pytest.raises(BundleError, match=r"^onnxruntime cannot run the graph: .*model_v\.onnx .*1002.*$"):
        session.run(inputs)
    with pytest.raises(BundleError, match=r"cannot run the graph: .*model_v\.onnx .*no_such_output"):
        session.run(session._clip_encoder.encode(BANANA), outputs=["no_such_output"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a banana is yellow", r"no mask to fill: 'a banana is yellow'; write \[MASK\]"),
        ("", "text 1 of 1 is empty"),
        ([], "no text was given"),
        ("[MASK] " + "very " * 20 + "[MASK]", "too far apart"),
    ],
)
def test_bad_texts(session: XAdapterSession, text: Any, message: str) -> None:
    with pytest.raises(InputTextError, match=message):
        session.fill_mask(text)


def test_an_over_long_text_is_cut_with_a_warning_and_keeps_its_mask(session: XAdapterSession) -> None:
    with pytest.warns(TruncationWarning, match="were truncated"):
        answers = session.fill_mask("very " * 20 + BANANA, experts="none")
    assert answers[0].sequence.endswith(
        "very the color of a banana is [MASK].".replace("[MASK]", answers[0].token)
    )


def test_a_set_without_clip_does_not_mind_what_clip_cannot_read(session: XAdapterSession) -> None:
    text = "very very very very very very very very very very banana [MASK] ."
    assert session.fill_mask(text, experts="none")


@pytest.mark.parametrize("top_k", [0, -1])
def test_top_k_below_one(session: XAdapterSession, top_k: int) -> None:
    with pytest.raises(ConfigError, match="top_k must be at least 1"):
        session.fill_mask(BANANA, top_k=top_k)


def test_batch_size_and_providers_are_checked_when_loading(tiny: Path) -> None:
    with pytest.raises(ConfigError, match="batch_size must be at least 1"):
        XAdapterSession.load(tiny, batch_size=0)
    with pytest.raises(ProviderError, match="CUDAExecutionProvider is not in this onnxruntime"):
        XAdapterSession.load(tiny, providers=["CUDAExecutionProvider"])


def test_what_load_takes_by_keyword_is_what_how_to_open_says(tiny: Path) -> None:
    typed = get_type_hints(SessionOptions)
    assert typed == {field.name: get_type_hints(HowToOpen)[field.name] for field in fields(HowToOpen)}
    with pytest.raises(TypeError, match="num_thread'"):
        XAdapterSession.load(tiny, num_thread=1)  # type: ignore[call-arg]  # a type checker sees it too


def test_a_tokenizer_that_is_broken_or_of_another_model(broken: Path) -> None:
    (broken / "tokenizer.json").write_text("{}")
    rehash(broken)
    with pytest.raises(BundleError, match=r"the tokenizer cannot be read: .*tokenizer\.json"):
        XAdapterSession.load(broken)
    other = plm_tokenizer()
    other.model = models.WordPiece({"[UNK]": 0, "[MASK]": 1, "[CLS]": 2, "[SEP]": 3}, unk_token="[UNK]")
    other.save(str(broken / "tokenizer.json"))
    rehash(broken)
    with pytest.raises(BundleError, match=r"disagree about the mask token: .*\(expected 4, got 1\)"):
        XAdapterSession.load(broken)
