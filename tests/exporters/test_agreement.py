import copy
import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.stats import binomtest

from tests import ROOT
from tests.tiny_bundle import write_bundle
from tests.tiny_checkpoint import make_model
from xadapter_export.bundle.folder import read_bundle
from xadapter_export.bundle.manifest import Agreement, ExpertSet, ExpertSetSpec, Task, TensorSpec
from xadapter_export.errors import ConfigError, InputTextError, ParityError
from xadapter_export.evaluation.objects import ELEVEN
from xadapter_export.exporters.judge.agreement import (
    GATES,
    Answers,
    Probe,
    Questions,
    Runner,
    as_runner,
    check,
    collect,
    compare,
    make_probe,
    points_lost,
    read_questions,
    share_of_same_rows,
    wilson_interval,
)
from xadapter_export.exporters.judge.calibration import (
    SENTENCES_FILE,
    Calibration,
    CalibrationTexts,
    calibration_feeds,
    mask_word,
    read_calibration,
)
from xadapter_export.exporters.pipeline import ExportResult
from xadapter_export.model.x_adapter_model import XAdapterModel
from xadapter_export.runtime.candidates import find_candidates
from xadapter_export.runtime.encoders import load_encoders
from xadapter_export.sessions.onnx_session import open_onnx
from xadapter_export.sessions.session import Array, Opening
from xadapter_export.targets import Precision

MASKED = CalibrationTexts(("a banana is [MASK]", "the [MASK] of a lime is [MASK].", "[MASK] cherry") * 4)
PLAIN = CalibrationTexts(("a banana is yellow", "the color of a lime", "red cherry and lime") * 4)
MISSING = Path("missing.txt")


def measure(reference: Runner, candidate: Runner, probe: Probe, precision: Precision, name: str) -> Agreement:
    """Ask both graphs and compare."""
    said = collect(reference, probe, "fp32"), collect(candidate, probe, name)
    return compare(*said, probe, precision)


@pytest.fixture(scope="module")
def filler(tmp_path_factory: pytest.TempPathFactory) -> XAdapterModel:
    return make_model(tmp_path_factory.mktemp("filler"))


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> XAdapterModel:
    folder = tmp_path_factory.mktemp("classifier")
    return make_model(folder, task="text-classification", labels=("no", "yes"))


@pytest.fixture(scope="module")
def builtin() -> XAdapterModel:
    return XAdapterModel.from_pretrained("builtin")


@pytest.fixture(scope="module")
def bundles(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[Task, Path]:
    folder = tmp_path_factory.mktemp("bundles")
    found: dict[Task, Path] = {"fill-mask": tiny}
    for task in ("text-classification", "feature-extraction"):
        found[task] = write_bundle(folder / task, task=task)
    return found


def open_graph(
    folder: Path,
    texts: CalibrationTexts,
    questions: Questions | None = None,
    *,
    experts: ExpertSet = "vt",
) -> tuple[Runner, Probe]:
    """A graph of a bundle as a runner, and what to ask it."""
    bundle = read_bundle(folder)
    manifest = bundle.manifest
    spec = manifest.expert_sets[experts]
    encoder = load_encoders(bundle)[1]
    runner = as_runner(open_onnx(bundle.file(manifest.variant(experts).file), Opening(num_threads=1)))
    return runner, make_probe(encoder, spec, manifest.task, texts, questions)


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


# Texts


def test_our_sentences_are_short_and_long_and_all_different() -> None:
    sentences = SENTENCES_FILE.read_text(encoding="utf-8").splitlines()
    lengths = [len(sentence.split()) for sentence in sentences]
    assert len(set(sentences)) == len(sentences) >= 200
    assert min(lengths) == 5
    assert 45 <= max(lengths) <= 60
    assert sum(length >= 20 for length in lengths) >= 25
    assert all(sentence.isascii() and sentence[-1] == "." for sentence in sentences)


def test_texts_of_the_built_in_checkpoint_are_the_same_every_time(builtin: XAdapterModel) -> None:
    texts = read_calibration(builtin, None, "fill-mask")
    assert texts == read_calibration(builtin, None, "fill-mask")
    assert texts.source == "the checkpoint's own texts"
    for half, least, most in ((texts.made_with, 300, 300), (texts.compared_on, 700, 1000)):
        assert least <= len(set(half.texts)) == len(half) <= most
        assert {text.count("[MASK]") for text in half.texts} == {1}
        assert half.pairs is None
    held_out = read_questions(builtin, None, "fill-mask")
    assert held_out is not None
    assert not set(held_out.texts.texts) & {*texts.made_with.texts, *texts.compared_on.texts}


def test_our_texts_name_captions_of_the_bank(builtin: XAdapterModel) -> None:
    builtin = copy.copy(builtin)
    builtin.calibration = None
    texts = read_calibration(builtin, None, "fill-mask")
    assert texts.source == "everyday sentences"
    assert builtin.bank is not None
    captions = {picture.caption for picture in builtin.bank.pictures}
    for half in (texts.made_with, texts.compared_on):
        with_caption = [t for t in half.texts if any(f" {caption} " in t for caption in captions)]
        assert 0.2 < len(with_caption) / len(half) < 0.9


def test_our_texts_for_other_tasks_have_no_mask(classifier: XAdapterModel) -> None:
    found = read_calibration(classifier, None, "text-classification")
    texts = {*found.made_with.texts, *found.compared_on.texts}
    sentences = set(SENTENCES_FILE.read_text(encoding="utf-8").splitlines())
    assert sentences < texts
    others = texts - sentences
    assert len(others) == 30  # a text for each picture of the bank
    assert all(" picture " in text and "[MASK]" not in text and "{" not in text for text in others)


def same_but_for_masks(one: str, other: str) -> bool:
    words = zip_longest(one.casefold().split(), other.casefold().split(), fillvalue="")
    return all(a == b or "[mask]" in a + b for a, b in words)


def count_overlap(found: Calibration, sentences: Sequence[str]) -> int:
    """How many sentences have copies in both halves, as far as a copy tells which sentence it is of."""
    halves: list[set[str]] = []
    for half in (found.made_with, found.compared_on):
        of = [{s.casefold() for s in sentences if same_but_for_masks(text, s)} for text in half.texts]
        assert all(of), "a text that is of no sentence"
        halves.append({sentence for origins in of if len(origins) == 1 for sentence in origins})
    assert not set(found.made_with.texts) & set(found.compared_on.texts)
    return len(halves[0] & halves[1])


COPIES = "".join(f"{line}\n" for line in (
    "A ripe banana is yellow.", "a ripe  banana is Yellow.", "The sky is blue in summer.",
    "A [MASK] banana is yellow.", "A ripe banana is [MASK].", "The sky is [MASK] in summer.",
    "The [MASK] is green in spring.", "The grass is [MASK] in spring.", "A lime is sour.", "The sea is deep.",
    "The [MASK] is blue in summer.",
))  # fmt: skip


@pytest.mark.parametrize("kind", ["checkpoint", "ours"])
def test_no_sentence_is_in_both_halves(builtin: XAdapterModel, kind: str) -> None:
    model = copy.copy(builtin)
    lines = (model.calibration or "").splitlines()
    sentences = [json.loads(line)["sentence"] for line in lines]
    if kind == "ours":
        model.calibration = model.bank = None
        sentences = SENTENCES_FILE.read_text("utf-8").splitlines()
    found = read_calibration(model, None, "fill-mask")
    assert count_overlap(found, sentences) == 0
    copies = found.compared_on.texts  # of which some are of one sentence
    masked_first = (CalibrationTexts(copies[::2]), CalibrationTexts(copies[1::2]))
    assert count_overlap(Calibration(*masked_first, "so it was done before"), sentences) > 40


def test_copies_of_a_sentence_in_a_file_stay_together(builtin: XAdapterModel, tmp_path: Path) -> None:
    found = read_calibration(builtin, write(tmp_path / "copies.txt", COPIES), "fill-mask")
    sides = [
        {word for text in half.texts for word in ("banana", "sky", "grass", "lime", "sea") if word in text}
        for half in (found.made_with, found.compared_on)
    ]
    assert not sides[0] & sides[1]
    assert sides[0]
    assert sides[1]


def test_a_file_with_one_sentence_in_many_copies_is_refused(filler: XAdapterModel, tmp_path: Path) -> None:
    path = write(tmp_path / "one.txt", "a banana is yellow\nA  [MASK] is yellow\na banana is [MASK]\n" * 3)
    with pytest.raises(InputTextError, match=r"too few different sentences: .*: one\.txt .*2 or more, got 1"):
        read_calibration(filler, path, "fill-mask")


def test_few_texts_are_masked_again_elsewhere(filler: XAdapterModel, tmp_path: Path) -> None:
    path = write(tmp_path / "texts.txt", "one two three four five\n\nsix [MASK] seven\n")
    found = read_calibration(filler, path, "fill-mask")
    own, masked = sorted(
        (found.made_with.texts, found.compared_on.texts), key=lambda texts: "six" not in texts[0]
    )
    assert own == ("six [MASK] seven",)
    assert 2 <= len(set(masked)) == len(masked) <= 3  # up to three masks in the other


def test_many_texts_are_cut_to_what_is_asked_at_most(filler: XAdapterModel, tmp_path: Path) -> None:
    lines = "".join(f"text {number} is here\n" for number in range(2000))
    found = read_calibration(filler, write(tmp_path / "texts.txt", lines), "fill-mask")
    assert (len(found.made_with), len(found.compared_on)) == (300, 1000)
    assert not set(found.made_with.texts) & set(found.compared_on.texts)


def test_a_word_is_masked_whole() -> None:
    rng = random.Random(0)
    masked = {mask_word("Blue-ish skies, everywhere.", "<mask>", rng) for _ in range(60)}
    assert masked == {
        "<mask>-ish skies, everywhere.",
        "Blue-<mask> skies, everywhere.",
        "Blue-ish <mask>, everywhere.",
        "Blue-ish skies, <mask>.",
    }
    assert mask_word("a [MASK] b c", "<mask>", rng) == "a <mask> b c"
    wanted = frozenset({"red", "green"})
    assert {mask_word("The Red door is not green.", "[MASK]", rng, wanted) for _ in range(30)} == {
        "The [MASK] door is not green.",
        "The Red door is not [MASK].",
    }
    with pytest.raises(InputTextError, match="a text has no word to mask: '\\.\\.\\.'"):
        mask_word("...", "[MASK]", rng)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.txt", "\ufefffirst text\n\n  second text \n"),
        ("a.csv", 'label,text\n0,first text\n1,"second text"\n'),
        ("a.tsv", "sentence\tlabel\nfirst text\t0\nsecond text\t1\n"),
        ("a.tsv", "first text\t0\nsecond text\t1\n"),
        ("a.jsonl", '{"text": "first text"}\n{"text": "second text", "label": 1}\n'),
    ],
)
def test_texts_are_read_from_files(
    classifier: XAdapterModel, tmp_path: Path, name: str, content: str
) -> None:
    found = read_calibration(classifier, write(tmp_path / name, content), "text-classification")
    assert {found.made_with.texts, found.compared_on.texts} == {("first text",), ("second text",)}
    assert (found.made_with.pairs, found.compared_on.pairs, found.source) == (None, None, name)


def test_pairs_are_read_where_a_classifier_may_take_them(
    classifier: XAdapterModel, filler: XAdapterModel, tmp_path: Path
) -> None:
    lines = "".join(f"premise {i // 3}\thypothesis {i}\t0\n" for i in range(15))
    path = write(tmp_path / "dev.tsv", f"premise\thypothesis\tlabel\n{lines}")
    halves = read_calibration(classifier, path, "text-classification")
    found = halves.compared_on
    assert found.pairs is not None
    numbers = [
        (int(text.split()[1]), int(pair.split()[1]))
        for text, pair in zip(found.texts, found.pairs, strict=True)
    ]
    assert all(text == pair // 3 for text, pair in numbers)
    assert (len(halves.made_with), len(found)) == (6, 9)  # two premises and three, each with all that is his
    assert not set(halves.made_with.texts) & set(found.texts)
    assert read_calibration(filler, path, "fill-mask").compared_on.pairs is None
    encoder = classifier.make_text_encoder(32)
    feed = calibration_feeds(encoder, found, inputs_of("input_ids", "token_type_ids"))[0]
    assert feed["token_type_ids"].max() == 1


@pytest.mark.parametrize(
    ("name", "content", "error", "message"),
    [
        ("a.txt", "\n", InputTextError, "the file has no text: .*one sentence per line"),
        ("a.csv", "", InputTextError, "the file has no rows"),
        ("a.jsonl", '{"body": "x"}\n', ConfigError, "no column with text was found: .*a\\.jsonl .*got body"),
        ("a.tsv", "1\tx\t0\n", ConfigError, "expected a header with sentence or text"),
        ("a.csv", "text\nx\n ,\n", InputTextError, "wrong number of columns"),
        ("a.jsonl", '{"text": "x"}\n{"label": 1}\n', InputTextError, "row 2: text 1 of 1 is empty"),
        ("a.txt", "word\n!\n", InputTextError, "no word to mask: '!'"),
    ],
)
def test_files_that_will_not_do(
    filler: XAdapterModel, tmp_path: Path, name: str, content: str, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message) as caught:
        read_calibration(filler, write(tmp_path / name, content), "fill-mask")
    assert "\n" not in str(caught.value)


def test_a_file_that_is_not_there(filler: XAdapterModel) -> None:
    with pytest.raises(InputTextError, match="the file cannot be read: missing"):
        read_calibration(filler, MISSING, "fill-mask")


def test_feeds_hold_every_text_once_in_mixed_batches(filler: XAdapterModel) -> None:
    texts = CalibrationTexts(read_calibration(filler, None, "fill-mask").compared_on.texts[:40])
    names = ["input_ids", "attention_mask", "clip_input_ids", "mask_positions"]
    inputs = inputs_of(*names)
    feeds = calibration_feeds(
        filler.make_text_encoder(12), texts, inputs
    )  # most are cut: no warning is raised
    assert [len(feed["input_ids"]) for feed in feeds] == [1, 4, 8, 2, 1, 4, 8, 2, 1, 4, 5]
    assert all(list(feed) == names for feed in feeds)
    assert max(feed["input_ids"].shape[1] for feed in feeds) == 12
    whole = filler.make_text_encoder(40).encode(texts.texts[:1])
    np.testing.assert_array_equal(feeds[0]["clip_input_ids"], whole["clip_input_ids"])
    with pytest.raises(InputTextError, match="no mask to fill"):
        calibration_feeds(filler.text_encoder, PLAIN, inputs)


def inputs_of(*names: str) -> list[TensorSpec]:
    return [TensorSpec(name=name, dtype="int64", axes=("batch", "seq")) for name in names]


def test_feeds_keep_every_memory_item(filler: XAdapterModel) -> None:
    keep = TensorSpec(name="keep_v", dtype="int64", axes=("batch", 3))
    inputs = [*inputs_of("input_ids"), keep]
    for feed in calibration_feeds(filler.make_text_encoder(12), PLAIN, inputs):
        assert feed["keep_v"].tolist() == [[1, 1, 1]] * len(feed["input_ids"])


# Comparison


@pytest.mark.parametrize("task", ["fill-mask", "text-classification", "feature-extraction"])
def test_a_graph_agrees_with_itself(bundles: dict[Task, Path], task: Task) -> None:
    graph, probe = open_graph(bundles[task], MASKED if task == "fill-mask" else PLAIN)
    agreement = measure(graph, graph, probe, "int8", "itself")
    assert (agreement.num_texts, agreement.num_answers) == (12, 16 if task == "fill-mask" else 12)
    assert agreement.same_top == (None if task == "feature-extraction" else 1)
    assert agreement.cosine == 1
    assert (agreement.num_questions, agreement.accuracy, agreement.accuracy_fp32) == (0, None, None)
    assert (agreement.min_same_top, agreement.max_points_lost, agreement.gate_lowered) == (0.99, 1, False)
    check(agreement, "itself")


class Perturbed:
    """A graph whose answers to some texts, numbered as they are asked, have the other sign."""

    def __init__(self, runner: Runner, wrong: set[int]) -> None:
        self._runner, self._wrong, self._asked = runner, wrong, 0

    def __call__(self, feed: Mapping[str, Array], names: Sequence[str]) -> list[Array]:
        first, *rest = self._runner(feed, names)
        numbers = range(self._asked, self._asked + len(first))
        self._asked = numbers.stop
        signs = np.array([-1 if number in self._wrong else 1 for number in numbers], np.float32)
        changed: Any = first * signs.reshape(-1, *[1] * (first.ndim - 1))
        return [changed, *rest]


def test_texts_of_like_length_are_compared_together(tiny: Path) -> None:
    texts = CalibrationTexts(("a [MASK] " + "very " * 12, "[MASK]", "a cherry is [MASK]") * 4)
    _, probe = open_graph(tiny, texts)
    shapes = [feed["input_ids"].shape for feed in probe.feeds]
    assert [rows for rows, _ in shapes] == [1, 4, 7]
    assert (shapes[0][1], shapes[1][1]) == (3, 6)
    assert shapes[2][1] > 6
    pairs = CalibrationTexts(("long long long", "a", "b"), ("x", "a long one", "y"))
    assert pairs.by_length() == CalibrationTexts(("b", "a", "long long long"), ("y", "a long one", "x"))


@pytest.mark.parametrize(("same", "count"), [(297, 300), (990, 1000), (300, 300), (0, 10), (5, 10)])
def test_the_interval_is_wilsons(same: int, count: int) -> None:
    expected = binomtest(same, count).proportion_ci(method="wilson")
    assert wilson_interval(same / count, count) == pytest.approx((expected.low, expected.high))


@pytest.mark.parametrize("task", ["fill-mask", "text-classification", "feature-extraction"])
def test_what_differs_is_counted(bundles: dict[Task, Path], task: Task) -> None:
    graph, probe = open_graph(bundles[task], MASKED if task == "fill-mask" else PLAIN)
    agreement = measure(graph, Perturbed(graph, {1, 9}), probe, "int8", "perturbed")
    # The texts come from short to long: text 1 has one mask, text 9 two, which are two answers.
    share = 3 / 16 if task == "fill-mask" else 2 / 12
    assert agreement.cosine == pytest.approx(1 - 2 * share)
    assert agreement.same_top == (None if task == "feature-extraction" else 1 - share)
    interval = None if task == "feature-extraction" else wilson_interval(1 - share, agreement.num_answers)
    assert agreement.same_top_interval == interval
    got = (
        "got 0\\.66667 over 12" if task == "feature-extraction" else "got 8[13]\\...? %: [23] of 1[26] differ"
    )
    with pytest.raises(ParityError, match=f"failed its accuracy check: cpu-int8 .*{got}.*--min-agreement"):
        check(agreement, "cpu-int8")


def test_a_real_graph_that_was_changed_is_told_apart(tiny: Path) -> None:
    """Experts none instead of vt: the answer is a word of the sentence instead of a color."""
    (graph, probe), (other, _) = open_graph(tiny, MASKED), open_graph(tiny, MASKED, experts="none")

    def without_experts(feed: Mapping[str, Array], names: Sequence[str]) -> Sequence[Array]:
        kept = {name: feed[name] for name in ("input_ids", "mask_positions")}
        return [*other(kept, names[:1]), *graph(feed, names[1:])]

    reference, candidate = (collect(run, probe, "graph") for run in (graph, without_experts))
    agreement = compare(reference, candidate, probe, "int4")
    assert agreement.same_top == np.mean(reference.vectors.argmax(1) == candidate.vectors.argmax(1)) < 0.97
    assert share_of_same_rows(reference, candidate) == 1
    a, b = reference.vectors.astype(np.float64), candidate.vectors.astype(np.float64)
    cosines = [x @ y / np.sqrt(x @ x * (y @ y)) for x, y in zip(a, b, strict=True)]
    assert agreement.cosine == pytest.approx(np.mean(cosines))


def test_rows_retrieved_are_compared_in_any_order() -> None:
    def answers(rows: list[list[int]] | None) -> Answers:
        retrieved = None if rows is None else np.array(rows, np.int64)
        return Answers("x", np.ones((2, 3), np.float32), retrieved, None)

    reference = answers([[1, 2], [3, 4]])
    assert share_of_same_rows(reference, answers([[2, 1], [3, 9]])) == 0.75
    assert share_of_same_rows(answers(None), answers(None)) is None


def test_labeled_texts_are_compared_with_fp32_like_the_others(filler: XAdapterModel) -> None:
    inputs = tuple(
        TensorSpec(name=name, dtype="int64", axes=("batch", "seq"))
        for name in ("input_ids", "attention_mask")
    )
    spec = ExpertSetSpec(inputs=inputs, outputs=(), taps=(), component_parameters={})
    texts = CalibrationTexts(("lime", "a lime is green"))
    labeled = Questions(
        CalibrationTexts(("is it", "red cherry and lime and banana")), right=(0, 1), columns=None
    )
    probe = make_probe(filler.text_encoder, spec, "text-classification", texts, labeled)

    def logits(feed: Mapping[str, Array], names: Sequence[str]) -> list[Array]:
        lengths = feed["attention_mask"].sum(1).astype(np.float32)
        return [np.stack([lengths, np.full_like(lengths, 7.0)], 1)]

    def wrong_on_the_longest(feed: Mapping[str, Array], names: Sequence[str]) -> list[Array]:
        return [np.minimum(logits(feed, names)[0], 7.0 - np.array([0.1, 0.0], np.float32))]

    longest = max(int(feed["attention_mask"].sum(1).max()) for feed in probe.question_feeds)
    assert longest > max(int(feed["attention_mask"].sum(1).max()) for feed in probe.feeds)
    agreement = measure(logits, wrong_on_the_longest, probe, "int8", "cpu-int8")
    assert (agreement.num_texts, agreement.num_answers, agreement.num_questions) == (4, 4, 2)
    assert agreement.same_top == 0.75


def test_the_values_of_a_regression_are_correlated(filler: XAdapterModel) -> None:
    inputs = tuple(
        TensorSpec(name=name, dtype="int64", axes=("batch", "seq"))
        for name in ("input_ids", "attention_mask")
    )
    spec = ExpertSetSpec(inputs=inputs, outputs=(), taps=(), component_parameters={})
    texts = CalibrationTexts(("lime", "a lime is green", "red cherry and lime and banana", "is it") * 3)
    probe = make_probe(filler.text_encoder, spec, "text-classification", texts)

    def values(feed: Mapping[str, Array], names: Sequence[str]) -> list[Array]:
        return [feed["attention_mask"].sum(1, keepdims=True).astype(np.float32)]

    def rounded(feed: Mapping[str, Array], names: Sequence[str]) -> list[Array]:
        return [np.round(values(feed, names)[0] / 2).astype(np.float32)]

    agreement = measure(values, rounded, probe, "fp16", "onnx-fp16")
    lengths = np.concatenate([values(feed, ())[0][:, 0] for feed in probe.feeds])
    assert len(set(lengths)) == 4
    assert agreement.same_top is None
    assert agreement.cosine == pytest.approx(np.corrcoef(lengths, np.round(lengths / 2))[0, 1])
    assert agreement.min_same_top == GATES["fp16"].min_cosine == 0.9999
    with pytest.raises(
        ParityError, match=r"expected a mean cosine of at least 0\.9999, got 0\.\d{5} over 12"
    ):
        check(agreement, "onnx-fp16")


def test_answers_that_cannot_be_compared(tiny: Path, bundles: dict[Task, Path]) -> None:
    graph, probe = open_graph(tiny, MASKED)
    answers = collect(graph, probe, "cpu-int8")

    def broken(feed: Mapping[str, Array], names: Sequence[str]) -> Sequence[Array]:
        first, *rest = graph(feed, names)
        return [np.where(first > 0, np.float32(np.nan), first), *rest]

    with pytest.raises(ParityError, match="NaN or infinity: cpu-int8"):
        collect(broken, probe, "cpu-int8")
    for vectors in (answers.vectors[:, :1], answers.vectors[:1]):  # both would broadcast
        with pytest.raises(ParityError, match=r"wrong shape: cpu-int8 \(expected \(16, 21\), got"):
            compare(answers, replace(answers, vectors=vectors), probe, "int8")
    with pytest.raises(ParityError, match="no texts to compare a variant on: cpu-int8"):
        collect(graph, replace(probe, feeds=()), "cpu-int8")


# Gates


def make_agreement(**changes: Any) -> Agreement:
    whole = {
        "num_texts": 300,
        "num_answers": 300,
        "same_top": 0.99,
        "cosine": 0.9995,
        "num_questions": 300,
        "accuracy_fp32": 0.6,
        "accuracy": 0.59,
        "min_same_top": 0.99,
        "max_points_lost": 1.0,
        "gate_lowered": False,
    }
    return Agreement.model_validate(whole | changes)


def test_the_gates_are_those_that_were_agreed() -> None:
    found = {name: (gate.min_same_top, gate.min_cosine, gate.max_points_lost) for name, gate in GATES.items()}
    assert found == {"fp16": (0.999, 0.9999, 0.5), "int8": (0.99, 0.99, 1.0), "int4": (0.97, 0.97, 2.0)}


def test_exactly_at_the_gate_passes() -> None:
    agreement = make_agreement()
    assert 100 * (0.6 - 0.59) > 1  # as floats
    assert points_lost(agreement) == 1
    check(agreement, "cpu-int8")
    check(make_agreement(accuracy=0.8), "cpu-int8")
    assert points_lost(make_agreement(accuracy=None, accuracy_fp32=None, num_questions=0)) is None


def test_a_variant_below_both_gates_is_told_both() -> None:
    agreement = make_agreement(same_top=296 / 300, accuracy=0.58)
    with pytest.raises(ParityError) as caught:
        check(agreement, "cpu-int8, experts t")
    assert str(caught.value) == (
        "a variant failed its accuracy check: cpu-int8, experts t (expected the same top answer in at least "
        "99.00 % and at most 1 point of accuracy lost, got 98.67 %: 4 of 300 differ and 2.00: 60.00 % to "
        "58.00 % of "
        "300 questions); choose another precision, give typical texts with --calibration, or change the "
        "limit "
        "with --min-agreement and --max-points-lost"
    )
    with pytest.raises(ParityError, match=r"change the limit with --max-points-lost$"):
        check(make_agreement(accuracy=0.58), "cpu-int8")


def test_a_gate_that_was_lowered_is_recorded(tiny: Path) -> None:
    graph, probe = open_graph(tiny, MASKED)
    reference = collect(graph, probe, "fp32")
    candidate = collect(Perturbed(graph, {0}), probe, "cpu-int8")
    for min_agreement, max_points_lost, lowered in (
        (None, None, False),
        (0.99, 1.0, False),
        (0.995, 0.5, False),
        (0.9, None, True),
        (None, 5.0, True),
    ):
        agreement = compare(
            reference,
            candidate,
            probe,
            "int8",
            min_agreement=min_agreement,
            max_points_lost=max_points_lost,
        )
        assert agreement.gate_lowered is lowered
        assert agreement.min_same_top == (min_agreement or 0.99)
        assert agreement.max_points_lost == (max_points_lost or 1.0)
        if min_agreement == 0.9:
            check(agreement, "cpu-int8")  # 15 of 16
        else:
            with pytest.raises(ParityError, match="1 of 16 differ"):
                check(agreement, "cpu-int8")


# Questions


def test_accuracy_is_measured_before_and_after(tiny: Path) -> None:
    texts = CalibrationTexts(("a banana is [MASK]", "a cherry is [MASK]", "a lime is [MASK]"))
    # The words of the tiny PLM: 14 yellow, 15 red, 16 green. The last answer is wrong on purpose.
    questions = Questions(texts, right=(0, 1, 0), columns=(14, 15, 16))
    graph, probe = open_graph(tiny, MASKED, questions)
    agreement = measure(graph, Perturbed(graph, {12}), probe, "int4", "cpu-int4")
    assert (agreement.num_questions, agreement.same_top) == (3, 1)
    assert agreement.accuracy_fp32 == pytest.approx(2 / 3)
    assert agreement.accuracy == pytest.approx(1 / 3)
    assert points_lost(agreement) == pytest.approx(100 / 3)
    with pytest.raises(
        ParityError, match=r"at most 2 points .*got 33\.33: 66\.67 % to 33\.33 % of 3 questions"
    ):
        check(agreement, "cpu-int4")


def test_the_built_in_checkpoint_has_its_own_questions(builtin: XAdapterModel, filler: XAdapterModel) -> None:
    questions = read_questions(builtin, None, "fill-mask")
    assert questions is not None
    assert len(questions.texts) == len(questions.right) == 255
    token = builtin.plm.tokenizer.id_to_token
    assert [token(i) for i in questions.columns or ()] == list(ELEVEN)
    assert (questions.texts.texts[0], ELEVEN[questions.right[0]]) == (
        "The color of a deer is [MASK].",
        "brown",
    )
    assert read_questions(builtin, None, "feature-extraction") is None
    assert read_questions(filler, None, "fill-mask") is None


def test_columns_follow_the_candidates_of_a_sliced_head(builtin: XAdapterModel, tmp_path: Path) -> None:
    sliced = find_candidates(builtin.plm.tokenizer, ("banana", *reversed(ELEVEN)))
    questions = read_questions(builtin, None, "fill-mask", sliced)
    assert questions is not None
    assert questions.columns == tuple(range(11, 0, -1))
    assert read_questions(builtin, None, "fill-mask", sliced[:5]) is None
    row = {"color": "black", "sentences": ["A [MASK] cat."]}
    path = write(tmp_path / "own.jsonl", json.dumps(row))
    with pytest.raises(ConfigError, match=r"not among the candidates: .*own\.jsonl, black .*--candidates"):
        read_questions(builtin, path, "fill-mask", sliced[:5])


def test_color_questions_of_a_file(builtin: XAdapterModel, tmp_path: Path) -> None:
    rows = [
        {"item": "banana", "label": "yellow", "descriptor": "a"},
        {"item": "snow", "label": "white", "descriptor": ""},
    ]
    path = write(tmp_path / "memory_colors.jsonl", "\n".join(map(json.dumps, rows)))
    questions = read_questions(builtin, path, "fill-mask")
    assert questions is not None
    assert len(questions.texts) == 2 * 9  # VaLM's prompts
    assert questions.texts.texts[8:10] == (
        "The color of a banana is [MASK].",
        "The color of snow is [MASK].",
    )
    assert questions.right == (1, 0) * 9  # white, yellow
    terms = write(tmp_path / "terms.csv", "object,color\nbanana,yellow\nsnow,white\n")
    found = read_questions(builtin, terms, "fill-mask")
    assert found is not None
    assert (len(found.texts), found.columns) == (18, questions.columns)
    own = {"color": "red", "sentences": ["A [MASK] rose.", "Roses are [MASK]."], "distribution": {"white": 1}}
    found = read_questions(builtin, write(tmp_path / "own.jsonl", json.dumps(own)), "fill-mask")
    assert found is not None
    assert (found.right, len(found.columns or ())) == ((0, 0), 2)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"color": "red", "sentences": []}, "a row has no questions: .*row 1"),
        ({"color": None, "sentences": ["[MASK]"]}, "a row has no questions"),
        ({"color": "red", "sentences": ["a rose"]}, "exactly one mask: 'a rose' \\(got 0\\)"),
        ({"color": "red", "sentences": ["[MASK] [MASK]"]}, "exactly one mask"),
    ],
)
def test_questions_that_will_not_do(
    builtin: XAdapterModel, tmp_path: Path, row: dict[str, object], message: str
) -> None:
    with pytest.raises(InputTextError, match=message):
        read_questions(builtin, write(tmp_path / "own.jsonl", json.dumps(row)), "fill-mask")


def test_labeled_texts_are_questions_for_a_classifier(classifier: XAdapterModel, tmp_path: Path) -> None:
    names = write(tmp_path / "names.csv", "text,label\nlime,yes\ncherry,yes\n")
    numbers = write(
        tmp_path / "numbers.tsv", "#1 String\t#2 String\tQuality\nlime\tgreen\t1\ncherry\tred\t0\n"
    )
    assert read_questions(classifier, names, "text-classification") == Questions(
        CalibrationTexts(("lime", "cherry")), (1, 1), None, "names.csv"
    )
    assert read_questions(classifier, numbers, "text-classification") == Questions(
        CalibrationTexts(("lime", "cherry"), ("green", "red")), (1, 0), None, "numbers.tsv"
    )
    assert read_questions(classifier, None, "text-classification") is None
    other = write(tmp_path / "other.csv", "text,label\nlime,sweet\n")
    with pytest.raises(InputTextError, match=r"a label is out of range: .*expected one of no, yes"):
        read_questions(classifier, other, "text-classification")
    with pytest.raises(
        ConfigError, match=r"accuracy cannot be measured .*feature-extraction; remove --evaluate"
    ):
        read_questions(classifier, names, "feature-extraction")


def test_a_regression_has_no_share_of_right_answers(tmp_path: Path) -> None:
    model = make_model(tmp_path, task="text-classification", labels=("score",))
    path = write(tmp_path / "dev.csv", "sentence1,sentence2,score\na,b,2.5\n")
    with pytest.raises(ConfigError, match="cannot be measured for this task: a regression"):
        read_questions(model, path, "text-classification")


def test_a_classifier_is_scored_on_its_labels(bundles: dict[Task, Path]) -> None:
    texts = CalibrationTexts(PLAIN.texts[:3])
    graph, probe = open_graph(bundles["text-classification"], PLAIN)
    said = collect(graph, probe, "fp32").vectors[:3].argmax(1)
    questions = Questions(texts, tuple(int(label) for label in said), None)
    graph, probe = open_graph(bundles["text-classification"], PLAIN, questions)
    agreement = measure(graph, Perturbed(graph, {13}), probe, "int8", "cpu-int8")
    assert agreement.accuracy_fp32 == 1
    assert agreement.accuracy == pytest.approx(2 / 3)


@pytest.mark.slow
@pytest.mark.parametrize("experts", ["vt", "none"])
def test_the_built_in_bundle_is_as_right_as_was_published(
    builtin: XAdapterModel, builtin_export: ExportResult, experts: ExpertSet
) -> None:
    texts, questions = (
        CalibrationTexts(read_calibration(builtin, None, "fill-mask").compared_on.texts[:40]),
        read_questions(builtin, None, "fill-mask"),
    )
    graph, probe = open_graph(builtin_export.folder, texts, questions, experts=experts)
    answers = collect(graph, probe, "fp32")
    agreement = compare(answers, answers, probe, "int8")
    assert (agreement.num_texts, agreement.num_answers, agreement.num_questions) == (40, 40, 255)
    published = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
    row = {"vt": "V + T", "none": "frozen PLM"}[experts]
    assert f"| {row} | {100 * (agreement.accuracy or 0):.1f} |" in published
    assert (answers.retrieved is not None) == (experts == "vt")
