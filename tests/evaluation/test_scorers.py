"""A model's numbers: against arithmetic done apart, and a checkpoint's beside those of its bundle."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tests import tiny_bundle
from tests.tiny_bundle import WORDS, reference, write_bundle
from tests.tiny_checkpoint import make_model
from xadapter_export import export
from xadapter_export.errors import (
    BundleError,
    CheckpointError,
    ConfigError,
    InputTextError,
    UnsupportedError,
)
from xadapter_export.evaluation.checkpoint_scorer import CheckpointScorer
from xadapter_export.evaluation.coda import evaluate_coda
from xadapter_export.evaluation.color import PUBLISHED, evaluate_color
from xadapter_export.evaluation.color_answers import look_up_pictures
from xadapter_export.evaluation.glue import evaluate_glue
from xadapter_export.evaluation.labeled import Labeled
from xadapter_export.evaluation.mlm import evaluate_mlm
from xadapter_export.evaluation.objects import ColoredObject, ObjectSet
from xadapter_export.evaluation.opening import open_scorer
from xadapter_export.evaluation.prompts import NORLUND, VALM
from xadapter_export.evaluation.readings import Reading, plan_readings
from xadapter_export.evaluation.scorer import Scorer
from xadapter_export.exporters.pipeline import ExportResult
from xadapter_export.model.builtin import builtin_folder
from xadapter_export.runtime.text import TruncationWarning

pytestmark = pytest.mark.long  # every test exports or trains

SHARES = {"banana": (0.1, 0.0, 0.9), "cherry": (0.1, 0.8, 0.1), "lime": (0.7, 0.1, 0.2)}
COLORS = ("green", "red", "yellow")
FRUIT = ObjectSet(
    "coda",
    tuple(
        ColoredObject(name, "a", name, COLORS[int(np.argmax(shares))], dict(zip(COLORS, shares, strict=True)))
        for name, shares in SHARES.items()
    ),
    COLORS,
    "fruit.csv",
)
SENTENCES = (
    ("the lime is green", "a cherry", "a cherry is red and a banana is yellow", "fruit"),
    ("very", "the color of a lime", "red", "a fruit"),
)
PROMPTS = ("[DESCRIPTOR] [ITEM] is [MASK].", "the color of [DESCRIPTOR] [ITEM] is")


@pytest.fixture(scope="module")
def scorer(tiny: Path) -> Scorer:
    return open_scorer(tiny)


def test_color_counts_answers_per_prompt_and_control(scorer: Scorer) -> None:
    told = []
    found = evaluate_color(
        plan_readings(scorer, "fill-mask", shuffled=True),
        FRUIT,
        PROMPTS,
        published=True,
        on_progress=lambda name, done, total: told.append((name, done, total)),
    )
    table = found.evaluation
    assert table.row("chance").values["accuracy"] == pytest.approx(1 / 3)
    assert table.row("majority (yellow)").values["accuracy"] == pytest.approx(1 / 3)
    own, other = table.row("V-expert"), table.row("V-expert, shuffled memory")
    assert own.values == {"accuracy": 1.0, "accuracy_sd": 0.0}
    assert other.values["accuracy"] == 0.0  # each is told of the pictures of another fruit
    assert own.details["answers"] == {
        n: [c, c] for n, c in zip(SHARES, ("yellow", "red", "green"), strict=True)
    }
    said = other.details["answers"]
    assert isinstance(said, dict)
    assert sorted(answers[0] for answers in said.values()) == sorted(COLORS)
    assert all(answers[0] == answers[1] for answers in said.values())  # the same other object in each prompt
    assert own.details["accuracy_per_prompt"] == dict.fromkeys(PROMPTS, 1.0)
    assert ("V-expert", 6, 6) in told
    assert not any(row.name.startswith("published") for row in table.rows)  # fruit.csv is no benchmark


def test_published_figures_stand_beside_their_benchmark(scorer: Scorer) -> None:
    readings = plan_readings(scorer, "fill-mask", ["none"])
    for benchmark, x_adapter in (("memory_colors", 0.641), ("color_terms", 0.600)):
        data = replace(FRUIT, benchmark=benchmark)
        table = evaluate_color(readings, data, PROMPTS, published=True).evaluation
        assert table.row("published: X-adapter on BERT (Yariv et al.)").values["accuracy"] == x_adapter
        assert len(table.rows) == 3 + len(PUBLISHED[benchmark])


def test_the_deviation_is_over_prompts(scorer: Scorer) -> None:
    # A prompt about another fruit retrieves its picture: right for one object of three.
    prompts = ("a [ITEM] is [MASK].", "lime lime lime lime lime and [ITEM] is [MASK].")
    table = evaluate_color(plan_readings(scorer, "fill-mask", ["v"]), FRUIT, prompts).evaluation
    shares = [1.0, 1 / 3]
    assert table.row("V-expert").values["accuracy"] == pytest.approx(np.mean(shares))
    assert table.row("V-expert").values["accuracy_sd"] == pytest.approx(np.std(shares, ddof=1))
    one = evaluate_color(plan_readings(scorer, "fill-mask", ["v"]), FRUIT, prompts[:1]).evaluation
    assert one.row("V-expert").values["accuracy_sd"] is None


def test_coda_compares_distributions(scorer: Scorer) -> None:
    found = evaluate_coda(plan_readings(scorer, "fill-mask", ["none", "v"]), FRUIT, PROMPTS[:1])
    table, answers = found.evaluation, found.answers[1]
    truth = np.array(list(SHARES.values()))
    predicted = np.exp(answers.logits[0].astype(np.float64))
    predicted /= predicted.sum(1, keepdims=True)
    middle = (truth + predicted) / 2

    def entropy(p: np.ndarray[tuple[int, ...], np.dtype[np.float64]]) -> float:
        return float(-(p[p > 0] * np.log2(p[p > 0])).sum())

    expected = np.mean(
        [entropy(m) - (entropy(p) + entropy(q)) / 2 for m, p, q in zip(middle, truth, predicted, strict=True)]
    )
    row = table.row("V-expert").values
    assert row["jensen_shannon"] == pytest.approx(expected, abs=1e-9)
    assert row["accuracy"] == 1.0
    ranks = [np.argsort(np.argsort(p)) for p in predicted]
    tau = []
    for p, rank in zip(truth, ranks, strict=True):
        pairs = [(i, j) for i in range(3) for j in range(i)]
        signs = [(np.sign(p[i] - p[j]), np.sign(rank[i] - rank[j])) for i, j in pairs]
        untied = sum(a != 0 for a, _ in signs)
        tau.append(sum(a * b for a, b in signs) / np.sqrt(untied * len(pairs)))
    assert row["kendall"] == pytest.approx(np.mean(tau))
    chance = table.row("chance").values
    assert chance["accuracy"] == pytest.approx(1 / 3)
    assert chance["spearman"] is None
    mean = table.row("mean distribution of these objects").values["jensen_shannon"]
    assert mean is not None
    assert chance["jensen_shannon"] is not None
    assert mean < chance["jensen_shannon"]


def test_colors_that_people_say_equally_often_are_all_right(scorer: Scorer) -> None:
    both = replace(FRUIT.objects[2], color="red", shares={"green": 0.5, "red": 0.5, "yellow": 0.0})
    data = replace(FRUIT, objects=(both,))
    table = evaluate_coda(plan_readings(scorer, "fill-mask", ["v"]), data, PROMPTS[:1]).evaluation
    assert table.row("V-expert").values["accuracy"] == 1.0  # it says green
    assert table.row("chance").values["accuracy"] == pytest.approx(2 / 3)


@pytest.mark.parametrize("experts", ["none", "vt"])
def test_pseudo_perplexity_is_that_of_numpy(scorer: Scorer, experts: str) -> None:
    texts = ["the lime is green.", "a cherry"]
    losses, hits = [], []
    for text in texts:
        ids = scorer.encoder.tokenizer.encode(text).ids
        for place in range(1, len(ids) - 1):
            words = [WORDS[i] for i in ids[1:-1]]
            read = " ".join(word for i, word in enumerate(words) if i != place - 1)
            masked = [4 if i == place else token for i, token in enumerate(ids)]
            inputs = {
                "input_ids": np.array([masked]),
                "attention_mask": np.ones((1, len(ids)), np.int64),
                "mask_positions": np.array([[place]]),
                "clip_input_ids": np.array([tiny_bundle.clip_tokenizer().encode(read).ids]),
            }
            logits = reference(inputs, experts, "fill-mask", None)["out/logits"][0, 0].astype(np.float64)
            losses.append(np.log(np.exp(logits).sum()) - logits[ids[place]])
            hits.append(logits.argmax() == ids[place])
    reading = next(r for r in plan_readings(scorer, "fill-mask") if r.experts == experts)
    found = evaluate_mlm([reading], texts, data_name="text.txt")
    assert found.counts == {"texts": 2, "tokens": 7}
    values = found.rows[0].values
    assert values["loss"] == pytest.approx(np.mean(losses), rel=1e-5)
    assert values["pseudo_perplexity"] == pytest.approx(np.exp(np.mean(losses)), rel=1e-5)
    assert values["top1"] == pytest.approx(np.mean(hits))
    per_text = found.rows[0].details["loss_per_text"]
    assert isinstance(per_text, list)
    assert per_text[1] == pytest.approx(np.mean(losses[5:]), rel=1e-5)


def test_batches_change_nothing(tiny: Path) -> None:
    texts = ["the lime is [MASK].", "[MASK]", "a cherry and a banana is [MASK]", "very [MASK] lime"]
    one, many = open_scorer(tiny, batch_size=1), open_scorer(tiny, batch_size=3)
    for experts in one.expert_sets:
        logits = [s.mask_logits(texts, COLORS, experts) for s in (one, many)]
        assert logits[0].shape == (4, 3)
        np.testing.assert_allclose(logits[0], logits[1], rtol=1e-5, atol=1e-5)
    found = many.retrieve(["a cherry is [MASK] and red .", "lime"], "v")
    assert [pictures[0].caption for pictures in found] == ["cherry", "lime"]


def test_the_memory_can_be_that_of_another_text(scorer: Scorer) -> None:
    texts = ["a cherry is [MASK]", "a lime is [MASK]"]
    own = scorer.mask_logits(texts, COLORS, "v")
    other = scorer.mask_logits(texts, COLORS, "v", memory_texts=texts[::-1])
    assert own.argmax(1).tolist() == [1, 0]
    assert other.argmax(1).tolist() == [0, 1]
    plain = scorer.mask_logits(texts, COLORS, "none")
    np.testing.assert_array_equal(scorer.mask_logits(texts, COLORS, "none", memory_texts=texts[::-1]), plain)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a cherry is red", r"exactly one mask: 'a cherry is red' \(expected one \[MASK\], got 0\)"),
        ("[MASK] [MASK]", "exactly one mask"),
        (" ", "text 1 of 1 is empty"),
    ],
)
def test_texts_without_exactly_one_mask(scorer: Scorer, text: str, message: str) -> None:
    with pytest.raises(InputTextError, match=message):
        scorer.mask_logits([text], COLORS, "none")


def test_what_a_model_cannot_be_asked(scorer: Scorer, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="not one token of the language model: 'mauve'"):
        scorer.mask_logits(["[MASK]"], ["red", "mauve"], "none")
    with pytest.raises(InputTextError, match="a text already has a mask"):
        scorer.token_scores(["it is [MASK]"], "none")
    with pytest.raises(UnsupportedError, match="uses no images: bundle, t"):
        scorer.retrieve(["lime"], "t")
    with pytest.raises(UnsupportedError, match="expected text-classification, got fill-mask"):
        scorer.label_logits(["lime"], None, "none")
    with pytest.raises(
        ConfigError, match=r"color is not among the candidates: fruit\.csv, banana .*got yellow"
    ):
        evaluate_color(plan_readings(scorer, "fill-mask"), FRUIT, PROMPTS, candidates=["red", "green"])
    sliced = open_scorer(write_bundle(tmp_path / "sliced", candidates=("yellow", "red")))
    assert sliced.mask_logits(["a cherry is [MASK]"], ["red", "yellow"], "v").argmax() == 0
    with pytest.raises(ConfigError, match="exported for other candidates: green"):
        sliced.mask_logits(["[MASK]"], COLORS, "none")
    with pytest.raises(UnsupportedError, match="predicts only its candidates"):
        sliced.token_scores(["lime"], "none")
    classifier = open_scorer(write_bundle(tmp_path / "classifier", task="text-classification"))
    with pytest.raises(UnsupportedError, match="expected fill-mask, got text-classification"):
        classifier.mask_logits(["[MASK]"], COLORS, "none")
    with pytest.raises(InputTextError, match="the numbers of texts and second texts differ"):
        classifier.label_logits(["lime"], ["a", "b"], "none")
    with pytest.raises(BundleError, match="does not have this expert set"):
        open_scorer(write_bundle(tmp_path / "t", sets=("t",))).check_experts("vt")


def test_texts_that_are_cut_are_said_once(tiny: Path) -> None:
    scorer = open_scorer(tiny, batch_size=1)
    long = "lime " * 20
    with pytest.warns(TruncationWarning, match="some texts were truncated") as caught:
        scorer.mask_logits([f"{long} is [MASK]"] * 3, COLORS, "vt")
    assert len(caught) == 1
    scorer.mask_logits([f"{long} is [MASK]"], COLORS, "vt")  # pytest would fail on a second warning
    with pytest.warns(TruncationWarning, match="1 of 2 texts are evaluated on their first 15 tokens only"):
        scores = scorer.token_scores([long, "lime"], "none")
    assert [len(score.is_best) for score in scores] == [13, 1]


def test_opening_says_what_is_wrong(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"xadapter\.json is missing"):
        open_scorer(tmp_path)
    with pytest.raises(CheckpointError, match="neither a folder nor a reachable hub id"):
        open_scorer(tmp_path / "nothing")


@pytest.fixture(scope="module")
def pair(builtin_export: ExportResult) -> tuple[Scorer, Scorer]:
    """The built-in checkpoint, and the bundle made from it."""
    return open_scorer("builtin"), open_scorer(builtin_export.folder)


def heldout(count: int) -> ObjectSet:
    lines = (builtin_folder() / "heldout.jsonl").read_text(encoding="utf-8").splitlines()[:count]
    objects = tuple(
        ColoredObject(e["name"], "a", f"{e['name']}s", e["color"], e["distribution"])
        for e in map(json.loads, lines)
    )
    return ObjectSet("coda", objects, tuple(sorted(objects[0].shares)), "heldout.jsonl")


def both(pair: tuple[Scorer, Scorer]) -> list[tuple[Reading, ...]]:
    readings = [plan_readings(scorer, "fill-mask", ["none", "v", "vt"], shuffled=True) for scorer in pair]
    assert [r.name for r in readings[0]] == [r.name for r in readings[1]]
    assert len(readings[0]) == 5
    return readings


def test_checkpoint_and_bundle_say_the_same_of_every_object(pair: tuple[Scorer, Scorer]) -> None:
    data, prompts = heldout(51), (VALM[4], NORLUND[1])
    ours, theirs = (evaluate_color(readings, data, prompts) for readings in both(pair))
    for a, b in zip(ours.answers, theirs.answers, strict=True):
        np.testing.assert_array_equal(a.said, b.said, err_msg=a.reading.name)
        np.testing.assert_allclose(a.logits, b.logits, rtol=1e-4, atol=1e-4)
    assert ours.evaluation.to_json()["rows"] == theirs.evaluation.to_json()["rows"]
    accuracy = {row.name: row.values["accuracy"] or 0.0 for row in ours.evaluation.rows}
    assert accuracy["V-expert"] > accuracy["V-expert, shuffled memory"] + 0.25
    pictures = [look_up_pictures(found.answers[3], prompts, ends_with_stop=True) for found in (ours, theirs)]
    assert [[p.row for p in some] for some in pictures[0]] == [[p.row for p in some] for some in pictures[1]]
    assert ours.answers[3].reading.name == "V + T"
    assert all(len(some) == 4 for some in pictures[0])
    nothing = look_up_pictures(ours.answers[0], prompts, ends_with_stop=True)
    assert nothing == ((),) * 51


def test_checkpoint_and_bundle_agree_in_coda_and_mlm(pair: tuple[Scorer, Scorer]) -> None:
    texts = [
        "The color of a frog is green.",
        "She has a cat.",
        "We went to the old market and bought a lamp.",
    ]
    tables = [
        (
            evaluate_coda(readings, heldout(12), PROMPTS[:1]).evaluation,
            evaluate_mlm(readings, texts, data_name="text.txt"),
        )
        for readings in both(pair)
    ]
    for ours, theirs in zip(*tables, strict=True):
        for a, b in zip(ours.rows, theirs.rows, strict=True):
            assert a.name == b.name
            for key, value in a.values.items():
                near = value if value is None else pytest.approx(value, rel=1e-5, abs=1e-4)
                assert b.values[key] == near, (a.name, key)
    losses = {row.name: row.values["loss"] for row in tables[0][1].rows}
    assert len(set(losses.values())) == 5  # every row is another model or another memory


def test_checkpoint_and_bundle_agree_on_labels(tmp_path: Path) -> None:
    model = make_model(tmp_path, task="text-classification", labels=("no", "yes"))
    export(model, tmp_path / "bundle", "vt")
    scorers = CheckpointScorer(model, "tiny"), open_scorer(tmp_path / "bundle")
    data = Labeled(*SENTENCES, (0, 1, 1, 0), ("no", "yes"), "data.tsv")
    tables = []
    for scorer in scorers:
        readings = plan_readings(scorer, "text-classification", ["vt"])
        tables.append(evaluate_glue(readings, {"validation": data}))
    logits = [scorer.label_logits(*SENTENCES, "vt") for scorer in scorers]
    np.testing.assert_allclose(logits[0], logits[1], rtol=1e-4, atol=1e-4)
    assert np.ptp(logits[0]) > 0.1
    assert tables[0].to_json()["rows"] == tables[1].to_json()["rows"]
    right = logits[0].argmax(1) == np.array(data.labels)
    assert tables[0].row("V + T").values["accuracy"] == right.mean()
    assert set(tables[0].metrics) == {"accuracy", "f1"}


def test_a_regression_is_scored_by_its_correlations(tmp_path: Path) -> None:
    scorer = CheckpointScorer(make_model(tmp_path, task="text-classification", labels=("score",)), "tiny")
    truth = (0.5, 1.5, 2.5, 0.0)
    data = Labeled(*SENTENCES, truth, ("score",), "data.tsv")
    table = evaluate_glue(plan_readings(scorer, "text-classification", ["vt"]), {"validation": data})
    values = scorer.label_logits(*SENTENCES, "vt")[:, 0]
    assert np.ptp(values) > 0.1
    assert [row.name for row in table.rows] == ["V + T"]  # a regression has no majority
    ranks = [np.argsort(np.argsort(numbers)) for numbers in (values, truth)]
    assert table.rows[0].values == {
        "pearson": pytest.approx(np.corrcoef(values, truth)[0, 1], abs=1e-6),
        "spearman": pytest.approx(np.corrcoef(ranks[0], ranks[1])[0, 1], abs=1e-6),
    }


def test_a_checkpoint_holds_its_experts_and_what_is_below(tmp_path: Path) -> None:
    scorer = CheckpointScorer(make_model(tmp_path, experts="t"), "tiny")
    assert scorer.expert_sets == ("none", "t")
    assert (scorer.default_experts, scorer.pictures) == ("t", ())
    with pytest.raises(CheckpointError, match="expert 'v' is not in this checkpoint"):
        plan_readings(scorer, "fill-mask", ["v"])
    static = CheckpointScorer(make_model(tmp_path, experts="v", retrieval={"mode": "static"}), "static")
    assert not static.retrieves("v")
    names = [reading.name for reading in plan_readings(static, "fill-mask", shuffled=True)]
    assert names == [
        "frozen PLM",
        "V-expert",
    ]  # every text has the same memory, so there is nothing to shuffle
