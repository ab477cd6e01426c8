"""What is scored, asked and read: metrics, objects, prompts, and the rows of a table."""

import json
from pathlib import Path

import numpy as np
import pytest

from tests.tiny_bundle import write_bundle
from xadapter_export.errors import (
    BundleError,
    ConfigError,
    InputTextError,
    ShapeError,
    UnsupportedError,
)
from xadapter_export.evaluation.glue import evaluate_glue, match_labels
from xadapter_export.evaluation.labeled import Labeled
from xadapter_export.evaluation.metrics import (
    correlation,
    jensen_shannon_divergence,
    task_metrics,
)
from xadapter_export.evaluation.objects import (
    ColoredObject,
    read_colors,
    read_distributions,
    read_names,
    select_objects,
)
from xadapter_export.evaluation.opening import open_scorer
from xadapter_export.evaluation.prompts import CODA, NORLUND, VALM, ask, read_prompts
from xadapter_export.evaluation.readings import derangement, main_reading, plan_readings
from xadapter_export.evaluation.results import Metric, percentage
from xadapter_export.evaluation.scorer import Scorer
from xadapter_export.evaluation.tables import read_sentences

BANANA = ColoredObject("banana", "a", "bananas", "yellow", {"yellow": 1.0})


@pytest.fixture(scope="module")
def scorer(tiny: Path) -> Scorer:
    return open_scorer(tiny)


def logits_that_say(
    said: list[int], num_labels: int = 2
) -> np.ndarray[tuple[int, ...], np.dtype[np.float64]]:
    return np.eye(num_labels)[said]


def test_metrics_of_every_task_are_those_of_glue() -> None:
    truth, said = [0, 1, 1, 1, 0, 1], [0, 1, 0, 1, 1, 1]
    logits = logits_that_say(said)
    # 3 hits, 1 miss, 1 false alarm, 1 correct rejection
    assert task_metrics("mrpc", logits, truth) == pytest.approx({"accuracy": 4 / 6, "f1": 6 / 8})
    assert task_metrics("qqp", logits, truth) == task_metrics(None, logits, truth)
    matthews = (3 * 1 - 1 * 1) / np.sqrt(4 * 4 * 2 * 2)
    assert task_metrics("cola", logits, truth) == pytest.approx({"matthews": matthews})
    for task in ("sst2", "qnli", "rte", "wnli"):
        assert task_metrics(task, logits, truth) == pytest.approx({"accuracy": 4 / 6})
    three = logits_that_say([0, 1, 2, 2], 3)
    assert task_metrics("mnli", three, [0, 1, 2, 0]) == task_metrics(None, three, [0, 1, 2, 0])
    assert task_metrics("mnli", three, [0, 1, 2, 0]) == {"accuracy": 0.75}
    values = np.array([[1.0], [2.0], [3.0], [10.0]])
    found = task_metrics("stsb", values, [1.0, 2.0, 3.0, 4.0])
    assert found["spearman"] == pytest.approx(1)
    assert found["pearson"] == pytest.approx(np.corrcoef(values[:, 0], [1, 2, 3, 4])[0, 1])
    assert task_metrics(None, values, [1.0, 2.0, 3.0, 4.0]) == found


def test_predictions_that_are_all_equal_have_numbers_too() -> None:
    assert task_metrics("stsb", np.ones((3, 1)), [1.0, 2.0, 3.0]) == {"pearson": 0.0, "spearman": 0.0}
    assert task_metrics("mrpc", logits_that_say([0, 0]), [0, 1]) == {"accuracy": 0.5, "f1": 0.0}
    assert task_metrics("cola", logits_that_say([0, 0]), [0, 1]) == {"matthews": 0.0}


@pytest.mark.parametrize(
    ("task", "shape", "labels", "message"),
    [
        ("sst3", (2, 2), [0, 1], "unknown GLUE task .*cola, sst2, mrpc"),
        ("sst2", (2, 2), [0, 1, 1], "logits and labels have shapes that do not match"),
        ("sst2", (0, 2), [], "logits and labels have shapes that do not match"),
        ("sst2", (2, 2), [0, 2], "a label is out of range .*expected 0 to 1, got 2"),
        ("sst2", (2, 2), [0, 0.5], "a label is out of range"),
        ("sst2", (2, 1), [0, 1], "another kind of task"),
        ("stsb", (2, 2), [0, 1], "another kind of task"),
        ("stsb", (2, 1), [0, np.nan], "must be finite"),
    ],
)
def test_metrics_refuse_what_does_not_fit(
    task: str, shape: tuple[int, int], labels: list[int], message: str
) -> None:
    with pytest.raises((ConfigError, ShapeError), match=message):
        task_metrics(task, np.ones(shape), labels)
    broken = np.full((2, 2), np.nan)
    with pytest.raises(ShapeError, match="must be finite"):
        task_metrics("sst2", broken, [0, 1])


def test_divergence_and_correlations() -> None:
    p, q = np.array([0.5, 0.5, 0.0]), np.array([0.0, 0.0, 1.0])
    assert jensen_shannon_divergence(p, p) == pytest.approx(0)
    assert jensen_shannon_divergence(p, q) == pytest.approx(1)
    half = np.array([1.0, 0.0, 0.0])
    middle = (p + half) / 2
    entropy = [-sum(x * np.log2(x) for x in d if x) for d in (middle, p, half)]
    assert jensen_shannon_divergence(p, half) == pytest.approx(entropy[0] - (entropy[1] + entropy[2]) / 2)
    assert correlation("kendalltau", np.array([1.0, 2, 3]), np.array([1.0, 3, 2])) == pytest.approx(1 / 3)
    assert correlation("spearmanr", np.array([1.0, 1, 1]), np.array([1.0, 3, 2])) is None


def test_memory_colors_color_terms_and_coda_are_known_by_their_columns(tmp_path: Path) -> None:
    memory = tmp_path / "memory.jsonl"
    memory.write_text(
        '{"descriptor": "a", "item": "sunflower", "label": "yellow", "picture": "x"}\n'
        '{"descriptor": "", "item": "grass", "label": "green", "picture": "x"}\n'
    )
    found = read_colors(memory)
    assert (found.benchmark, found.colors) == ("memory_colors", ("green", "yellow"))
    assert [(o.descriptor, o.name, o.color) for o in found.objects] == [
        ("a", "sunflower", "yellow"),
        ("", "grass", "green"),
    ]
    terms = tmp_path / "terms.csv"
    terms.write_text("\ufeffobject,color\nash,grey\n", encoding="utf-8")
    assert read_colors(terms).benchmark == "color_terms"
    assert read_colors(terms).objects[0].name == "ash"
    coda = tmp_path / "coda.csv"
    coda.write_text(
        "# a comment\nobject,plural,annotators,red,green\n"
        "apple,apples,5,0.755,0.25\nmoss,moss,5,0,1\n,jeans,6,1,0\n"
    )
    dataset = read_distributions(coda)
    assert (dataset.benchmark, dataset.colors) == ("coda", ("green", "red"))
    apple, moss, jeans = dataset.objects
    assert (apple.descriptor, apple.plural, apple.color) == ("an", "apples", "red")
    assert (moss.descriptor, moss.color) == ("", "green")
    assert (jeans.descriptor, jeans.name, jeans.plural) == ("", "jeans", "jeans")
    assert sum(apple.shares.values()) == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "the data is empty"),
        ("object,color\n", "the data is empty"),
        ("object,shade\nash,grey\n", "a column is missing: .*expected label or color or colour"),
        ("thing,color\nash,grey\n", "a column is missing: .*expected item or object or name"),
        ("object,color\nash\n", "a row and the header have different numbers of cells: .*row 1"),
        ("object,color\nash,\n", "a cell is empty: .*row 1, color"),
        ('{"item": "ash"\n', "not JSON lines"),
        ('{"item": "ash", "label": "grey"}\n[]\n', "not a JSON object: .*line 2"),
        ('{"item": 3, "label": "grey"}\n', "a cell is empty: .*row 1, item"),
    ],
)
def test_colors_that_cannot_be_read(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "data.csv"
    path.write_text(text)
    with pytest.raises(InputTextError, match=message):
        read_colors(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("object,plural,annotators,red\napple,apples,5,1\n", "expected a column for each color"),
        ("object,red,green\napple,1,0\n", "a column is missing: .*expected plural"),
        ("object,plural,red,green\napple,,1,0\n", "a cell is empty: .*row 1, plural"),
        ("object,plural,red,green\napple,apples,0.5,0.4\n", "do not add up to 1: .*row 1 .*0.9000"),
        ("object,plural,red,green\napple,apples,1.5,-0.5\n", "a share is out of range"),
        ("object,plural,red,green\napple,apples,nan,1\n", "a share is out of range"),
        ("object,plural,red,green\napple,apples,much,1\n", "a share is not a number"),
    ],
)
def test_distributions_that_cannot_be_read(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "coda.csv"
    path.write_text(text)
    with pytest.raises(InputTextError, match=message):
        read_distributions(path)


def test_data_that_is_not_there_or_not_text(tmp_path: Path) -> None:
    with pytest.raises(InputTextError, match="the file cannot be read"):
        read_colors(tmp_path / "missing.jsonl")
    (tmp_path / "latin.csv").write_bytes(b"object,color\ngr\xfcn,grey\n")
    with pytest.raises(InputTextError, match="the file cannot be read"):
        read_colors(tmp_path / "latin.csv")


def test_objects_are_chosen_by_name_in_singular_or_plural(tmp_path: Path) -> None:
    path = tmp_path / "data.csv"
    names = ["cherry", "jeans", "Fox", "peach", "glass", "grass", "iris"]
    path.write_text("object,color\n" + "".join(f"{name},red\n" for name in names) + "ash,grey\n")
    data = read_colors(path)

    def chosen(*only: list[str], leave_out: tuple[str, ...] = ()) -> list[str]:
        return [o.name for o in select_objects(data, only=only, leave_out=leave_out).objects]

    assert chosen(["cherries", "jean", "foxes", "peaches", "glasses"]) == names[:5]
    assert chosen(names, ["fox", "ash"]) == ["Fox"]
    assert chosen(leave_out=("irises", "cherries", "glass")) == [
        "jeans",
        "Fox",
        "peach",
        "grass",
        "iris",
        "ash",
    ]
    assert select_objects(data, only=[["fox"]]).colors == ("grey", "red")  # those of the whole file
    with pytest.raises(ConfigError, match="no objects are left"):
        chosen(["nothing"])


def test_names_come_from_a_list_a_text_or_data(tmp_path: Path) -> None:
    assert read_names("frog, red fox") == ("frog", "red fox")
    (tmp_path / "names.txt").write_text("# seen\nfrog\n\nred fox\n")
    (tmp_path / "held.jsonl").write_text('{"name": "frog"}\n{"name": "red fox"}\n')
    (tmp_path / "terms.csv").write_text("object,color\nfrog,green\nred fox,red\n")
    for name in ("names.txt", "held.jsonl", "terms.csv"):
        assert read_names(str(tmp_path / name)) == ("frog", "red fox")
    with pytest.raises(ConfigError, match=r"no such file: missing\.txt"):
        read_names("missing.txt")
    with pytest.raises(ConfigError, match="no object was named"):
        read_names(" , ")


def test_prompts_of_both_protocols_become_questions(scorer: Scorer) -> None:
    assert (len(VALM), len(NORLUND)) == (9, 13)
    grass = ColoredObject("grass", "", "grass", "green", {"green": 1.0})
    asked = [ask(prompt, BANANA, scorer) for prompt in (*VALM, *NORLUND, *CODA)]
    assert all(q.text.count("[MASK]") == q.memory_text.count("[MASK]") == 1 for q in asked)
    assert asked[0].text == "Q: What is the color of a banana? A: It is [MASK]."
    assert asked[8].text == "a banana usually has the color of [MASK]."
    assert ask(VALM[2], BANANA, scorer, ends_with_stop=False).text.endswith("a banana? [MASK]")
    separated = ask(NORLUND[1], BANANA, scorer)
    assert separated.text == "Q: What is the color of a banana? [SEP] A: It is [MASK]."
    assert separated.memory_text == "Q: What is the color of a banana? A: It is [MASK]."
    ids = scorer.encoder.tokenizer.encode(separated.text).ids
    assert ids.count(3) == 2  # the PLM's own separator, inside and at the end
    bare = [ask(prompt, grass, scorer) for prompt in (*VALM, *NORLUND, *CODA)]
    assert not any(
        "  " in q.text or q.text.startswith(" ") or "[" in q.text.replace("[MASK]", "").replace("[SEP]", "")
        for q in bare
    )
    assert bare[8].text == "grass usually has the color of [MASK]."
    assert ask(CODA[0], BANANA, scorer).text == "Most bananas are [MASK]."


def test_prompts_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text("# ours\nThe [ITEM] is [MASK].\n\nLook: [DESCRIPTOR] [ITEM], so\n")
    assert read_prompts(str(path)) == ("The [ITEM] is [MASK].", "Look: [DESCRIPTOR] [ITEM], so")
    assert read_prompts("valm") == VALM
    for text, message in (
        ("# nothing\n", "the file has no prompt"),
        ("It is [MASK].\n", "does not name the object: It is"),
        ("[ITEM] [MASK] [MASK]\n", "more than one mask"),
    ):
        path.write_text(text)
        with pytest.raises(InputTextError, match=message):
            read_prompts(str(path))
    with pytest.raises(ConfigError, match=r"the prompts cannot be read: nowhere .*valm, norlund"):
        read_prompts("nowhere")


@pytest.mark.parametrize("count", [2, 3, 10, 1000])
def test_a_derangement_moves_everything_and_is_the_same_each_time(count: int) -> None:
    order = derangement(count, 7)
    assert sorted(order) == list(range(count))
    assert all(place != source for place, source in enumerate(order))
    assert order == derangement(count, 7)
    if count > 3:
        assert order != derangement(count, 8)


def test_one_text_has_no_other_memory() -> None:
    with pytest.raises(ConfigError, match="needs at least two texts"):
        derangement(1)


def test_rows_and_their_controls(scorer: Scorer, tmp_path: Path) -> None:
    names = [reading.name for reading in plan_readings(scorer, "fill-mask")]
    assert names == ["frozen PLM", "V-expert", "T-expert", "V + T"]
    readings = plan_readings(scorer, "fill-mask", ["v"], shuffled=True, controls={"other": scorer})
    assert [(r.name, r.experts, r.is_shuffled) for r in readings] == [
        ("frozen PLM", "none", False),
        ("V-expert", "v", False),
        ("V-expert, shuffled memory", "v", True),
        ("other", "vt", False),
    ]
    assert main_reading(readings).name == "V-expert"
    assert main_reading(readings[:1]).name == "frozen PLM"
    with pytest.raises(UnsupportedError, match="expected text-classification, got fill-mask"):
        plan_readings(scorer, "text-classification")
    only_t = open_scorer(write_bundle(tmp_path / "t", sets=("t",)))
    assert [r.name for r in plan_readings(only_t, "fill-mask", shuffled=True)] == [
        "T-expert",
        "T-expert, shuffled memory",
    ]
    with pytest.raises(BundleError, match=r"does not have this expert set: v .*one of t"):
        plan_readings(only_t, "fill-mask", ["v"])


def test_numbers_are_written_as_a_table_shows_them() -> None:
    assert percentage("accuracy").write(0.5678) == "56.8"
    assert Metric("tau").write(-0.1234) == "-0.123"
    assert Metric("tau").write(None) == "-"


def test_texts_are_read_line_by_line(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text("one\n\n two \nthree\n")
    assert read_sentences(path) == ["one", "two", "three"]
    path.write_text("\n")
    with pytest.raises(InputTextError, match="the file has no text"):
        read_sentences(path)


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Scorer:
    folder = tmp_path_factory.mktemp("classifier") / "bundle"
    return open_scorer(write_bundle(folder, task="text-classification"))


def test_labels_are_matched_by_name_and_else_by_number(classifier: Scorer) -> None:
    def labeled(names: tuple[str, ...], *labels: int) -> Labeled:
        return Labeled(("lime",) * len(labels), None, labels, names, "data")

    assert match_labels(labeled(("sour", "sweet"), 0, 1, 1), classifier).labels == (1, 0, 0)
    assert match_labels(labeled(("sweet", "sour"), 0, 1, 1), classifier).labels == (0, 1, 1)
    assert match_labels(labeled(("0", "1"), 0, 1), classifier).labels == (0, 1)
    for names in (("red", "green"), ("0", "1", "2"), ("score",)):
        with pytest.raises(ConfigError, match="the model and the data have different labels"):
            match_labels(labeled(names, 0), classifier)


def test_glue_counts_what_is_right(classifier: Scorer) -> None:
    texts = ("the lime is green", "a cherry", "very very yellow banana", "fruit")
    readings = plan_readings(classifier, "text-classification", shuffled=True)
    logits = classifier.label_logits(texts, None, "vt")
    said = [int(i) for i in logits.argmax(1)]
    right = Labeled(texts, None, tuple(said), ("sweet", "sour"), "folder/dev.tsv")
    wrong = Labeled(texts, None, tuple(1 - i for i in said), ("sweet", "sour"), "folder/other.tsv")
    found = evaluate_glue(readings, {"validation": right, "other": wrong}, task="sst2")
    assert found.row("V + T").values == {"accuracy": 1.0, "accuracy_other": 0.0}
    assert found.row("majority").values["accuracy"] == pytest.approx(max(np.bincount(said)) / 4)
    assert [row.name for row in found.rows][:2] == ["majority", "experts off"]
    assert found.data == "sst2, dev.tsv"
    assert json.loads(json.dumps(found.to_json()))["counts"] == {"texts": 4, "other texts": 4}
    assert "| V + T | 100.0 | 0.0 |" in found.to_markdown()
