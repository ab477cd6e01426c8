"""Labeled texts: the layouts of every GLUE task, tables of one's own, and what is wrong with them."""

import json
from pathlib import Path
from typing import Any

import pytest

from xadapter_export.errors import ConfigError, InputTextError
from xadapter_export.evaluation.labeled import GLUE_TASKS, Labeled, glue_task, read_labeled

ENTAILS = ("entailment", "not_entailment")
# Task: name of the official dev file, its lines, texts, second texts, labels.
OFFICIAL: dict[str, tuple[str, str, tuple[str, ...], tuple[str, ...] | None, tuple[float, ...]]] = {
    "cola": (
        "dev.tsv",
        'gj04\t1\t\tThe sailors rode the breeze.\ngj04\t0\t*\tThe book "walked.\n',
        ("The sailors rode the breeze.", 'The book "walked.'),
        None,
        (1, 0),
    ),
    "sst2": (
        "dev.tsv",
        "sentence\tlabel\nit 's a charming film \t1\nunflinchingly bleak\t0\n",
        ("it 's a charming film ", "unflinchingly bleak"),
        None,
        (1, 0),
    ),
    "mrpc": (
        "msr_paraphrase_test.txt",
        "\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String\n"  # it begins with a byte order mark
        '1\t10\t11\tHe said "no\tHe said no\n0\t12\t13\tRain\tSun\n',
        ('He said "no', "Rain"),
        ("He said no", "Sun"),
        (1, 0),
    ),
    "qqp": (
        "dev.tsv",
        "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate\n"
        "1\t2\t3\tWhy?\tHow come?\t1\n4\t5\t6\tWho?\tWhen?\t0\n",
        ("Why?", "Who?"),
        ("How come?", "When?"),
        (1, 0),
    ),
    "stsb": (
        "dev.tsv",
        "index\tgenre\tfilename\tyear\told_index\tsource1\tsource2\tsentence1\tsentence2\tscore\n"
        "0\tmain\tnews\t2015\t0\tnone\tnone\tA man runs.\tA man is running.\t4.750\n"
        "1\tmain\tnews\t2015\t1\tnone\tnone\tA cat.\tA plane.\t0.000\n",
        ("A man runs.", "A cat."),
        ("A man is running.", "A plane."),
        (4.75, 0.0),
    ),
    "mnli": (
        "dev_matched.tsv",
        "index\tpromptID\tpairID\tgenre\tsentence1_binary_parse\tsentence2_binary_parse\tsentence1_parse\t"
        "sentence2_parse\tsentence1\tsentence2\tlabel1\tgold_label\n"
        "0\t1\t1e\tfiction\t(a)\t(b)\t(c)\t(d)\tIt rains.\tIt is wet.\tneutral\tentailment\n"
        "1\t2\t2c\tfiction\t(a)\t(b)\t(c)\t(d)\tIt rains.\tIt is dry.\tneutral\tcontradiction\n",
        ("It rains.", "It rains."),
        ("It is wet.", "It is dry."),
        (0, 2),
    ),
    "qnli": (
        "dev.tsv",
        "index\tquestion\tsentence\tlabel\n"
        "0\tWho won?\tAnna won.\tentailment\n1\tWhere?\tAt noon.\tnot_entailment\n",
        ("Who won?", "Where?"),
        ("Anna won.", "At noon."),
        (0, 1),
    ),
    "rte": (
        "dev.tsv",
        "index\tsentence1\tsentence2\tlabel\n"
        "0\tDana Reeve died.\tShe died.\tentailment\n1\tRain.\tSun.\tnot_entailment\n",
        ("Dana Reeve died.", "Rain."),
        ("She died.", "Sun."),
        (0, 1),
    ),
    "wnli": (
        "dev.tsv",
        "index\tsentence1\tsentence2\tlabel\n0\tThe drain is clogged with hair.\tThe hair is clean.\t0\n"
        "1\tJane knocked.\tJane did.\t1\n",
        ("The drain is clogged with hair.", "Jane knocked."),
        ("The hair is clean.", "Jane did."),
        (0, 1),
    ),
}


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def facts(data: Labeled) -> tuple[Any, ...]:
    return data.texts, data.pairs, data.labels, data.label_names


def test_every_task_of_glue_is_tried() -> None:
    assert set(OFFICIAL) == set(GLUE_TASKS)


@pytest.mark.parametrize("task", OFFICIAL)
def test_the_official_layout_of_each_task(task: str, tmp_path: Path) -> None:
    name, lines, texts, pairs, labels = OFFICIAL[task]
    write(tmp_path / name, lines)
    data = read_labeled(tmp_path, task=task, split="test" if "test" in name else "validation")
    assert (data.texts, data.pairs, data.labels) == (texts, pairs, labels)
    assert data.label_names == (glue_task(task).labels or ("score",))
    assert data.is_regression == (task == "stsb")
    assert len(data) == 2
    assert data.where == str(tmp_path / name)


def test_mnli_has_two_dev_sets(tmp_path: Path) -> None:
    _, lines, *_ = OFFICIAL["mnli"]
    write(tmp_path / "dev_matched.tsv", lines)
    write(tmp_path / "dev_mismatched.tsv", lines.replace("It is dry.", "The sun shines."))
    matched = read_labeled(tmp_path, task="mnli", split="validation")
    mismatched = read_labeled(tmp_path, task="mnli", split="validation_mismatched")
    assert matched.pairs == ("It is wet.", "It is dry.")
    assert mismatched.pairs == ("It is wet.", "The sun shines.")


def test_the_columns_of_the_hub_are_known_too(tmp_path: Path) -> None:
    rows = [
        {"premise": "It rains.", "hypothesis": "It is wet.", "label": 0, "idx": 0},
        {"premise": "It rains.", "hypothesis": "It is dry.", "label": 2, "idx": 1},
    ]
    write(tmp_path / "validation_matched.jsonl", "\n".join(map(json.dumps, rows)))
    assert facts(read_labeled(tmp_path, task="mnli")) == (
        ("It rains.", "It rains."),
        ("It is wet.", "It is dry."),
        (0, 2),
        ("entailment", "neutral", "contradiction"),
    )


@pytest.mark.parametrize("stem", ["validation", "dev", "valid"])
@pytest.mark.parametrize("suffix", [".tsv", ".csv", ".txt"])
def test_the_dev_set_has_several_names(stem: str, suffix: str, tmp_path: Path) -> None:
    comma = "," if suffix == ".csv" else "\t"
    write(tmp_path / f"{stem}{suffix}", f"sentence{comma}label\ngood{comma}1\nbad{comma}0\n")
    write(tmp_path / "train.tsv", "sentence\tlabel\nfine\t1\npoor\t0\nbad\t0\n")
    assert read_labeled(tmp_path, task="sst2").texts == ("good", "bad")
    assert read_labeled(tmp_path, task="sst2", split="train").labels == (1, 0, 0)


def test_every_kind_of_file_says_the_same(tmp_path: Path) -> None:
    import datasets

    rows = [
        {"sentence": 'a, "b"', "label": "positive"},
        {"sentence": "c", "label": "negative"},
        {"sentence": "d", "label": "positive"},
    ]
    lines = "\n".join(map(json.dumps, rows))
    files = [
        write(tmp_path / "rows.csv", 'sentence,label\n"a, ""b""",positive\nc,negative\nd,positive\n'),
        write(tmp_path / "rows.tsv", 'sentence\tlabel\na, "b"\tpositive\nc\tnegative\nd\tpositive\n'),
        write(tmp_path / "rows.txt", 'sentence\tlabel\na, "b"\tpositive\nc\tnegative\nd\tpositive\n'),
        write(tmp_path / "rows.jsonl", lines),
        write(tmp_path / "rows.json", lines + "\n\n"),
        tmp_path / "rows.parquet",
        tmp_path / "classes.parquet",
    ]
    table = datasets.Dataset.from_list(rows)
    table.to_parquet(str(files[-2]))
    classes = datasets.ClassLabel(names=["positive", "negative"])  # in another order than GLUE's
    table.cast_column("label", classes).to_parquet(str(files[-1]))
    for path in files:
        found = read_labeled(path, task="sst2")
        assert facts(found) == (('a, "b"', "c", "d"), None, (1, 0, 1), ("negative", "positive")), path.name


def test_labels_by_name_and_by_number_are_the_same(tmp_path: Path) -> None:
    by_name = write(
        tmp_path / "names.tsv", "sentence1\tsentence2\tlabel\na\tb\tnot_entailment\nc\td\tentailment\n"
    )
    by_number = write(tmp_path / "numbers.tsv", "sentence1\tsentence2\tlabel\na\tb\t1\nc\td\t0\n")
    assert facts(read_labeled(by_name, task="rte")) == facts(read_labeled(by_number, task="rte"))
    assert read_labeled(by_name, task="rte").label_names == ENTAILS


def test_tables_without_a_header(tmp_path: Path) -> None:
    single = write(tmp_path / "single.tsv", "good\t1\nbad\t0\n")
    assert read_labeled(single, task="sst2").texts == ("good", "bad")
    assert facts(read_labeled(single)) == (("good", "bad"), None, (1, 0), ("0", "1"))
    pairs = write(tmp_path / "pairs.tsv", "a\tb\tentailment\nc\td\tnot_entailment\n")
    assert facts(read_labeled(pairs, task="rte")) == (("a", "c"), ("b", "d"), (0, 1), ENTAILS)
    third = read_labeled(pairs, pair_column="1")
    assert facts(third) == (("a", "c"), ("b", "d"), (0, 1), ENTAILS)
    shifted = write(tmp_path / "shifted.csv", "7,no,good\n8,yes,bad\n")
    found = read_labeled(shifted, text_column="2", label_column="1")
    assert facts(found) == (("good", "bad"), None, (0, 1), ("no", "yes"))


def test_tables_of_ones_own(tmp_path: Path) -> None:
    path = write(
        tmp_path / "own.csv", "claim,source,verdict\nsky is blue,book,10\ngrass is red,web,9\nfog,web,9\n"
    )
    found = read_labeled(path, text_column="claim", pair_column="source", label_column="verdict")
    assert facts(found) == (
        ("sky is blue", "grass is red", "fog"),
        ("book", "web", "web"),
        (1, 0, 0),
        ("9", "10"),  # as numbers, not as letters
    )
    named = read_labeled(path, text_column="claim", label_column="verdict", labels=["10", "9", "8"])
    assert (named.labels, named.label_names) == ((0, 1, 1), ("10", "9", "8"))
    values = read_labeled(path, text_column="claim", label_column="verdict", regression=True)
    assert (values.labels, values.label_names, values.is_regression) == ((10.0, 9.0, 9.0), ("verdict",), True)


@pytest.mark.parametrize(
    ("lines", "options", "message"),
    [
        ("", {}, r"the file has no rows: .*rows\.tsv"),
        ("sentence\tlabel\n", {}, "the file has no rows"),
        ("sentence\tlabel\na\t0\n  \t1\n", {}, "a text is empty: .*row 2, column sentence"),
        ("sentence\tlabel\na\t0\nb\n", {}, r"wrong number of columns: .*(line|row) 3 \(expected 2, got 1\)"),
        (
            "sentence\tlabel\na\tmeh\n",
            {"task": "sst2"},
            "row 1 .expected one of negative, positive, or 0 to 1, got meh",
        ),
        ("sentence\tlabel\na\t2\n", {"task": "sst2"}, "a label is out of range: .*row 1"),
        ("sentence\tlabel\na\t-1\n", {"task": "sst2"}, "a label is out of range.*got -1"),
        ("sentence\tlabel\na\tx\nb\tx\n", {}, "there is only one label: .*got x"),
        ("sentence\tlabel\na\thigh\n", {"regression": True}, "a label is not a number: .*row 1 .got 'high'"),
    ],
)
def test_rows_that_cannot_be_read(lines: str, options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(InputTextError, match=message):
        read_labeled(write(tmp_path / "rows.tsv", lines), **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"task": "sst3"}, "unknown GLUE task .expected one of cola, sst2.*wnli, got sst3"),
        ({"text_column": "words"}, "the column with the text is missing: .*expected words"),
        (
            {"pair_column": "other"},
            "the column with the second text is missing: .*expected other, got sentence, label",
        ),
        ({"label_column": "mark"}, "the column with the label is missing: .*expected mark"),
        ({"task": "rte"}, "the column with the text is missing: .*expected sentence1, got sentence, label"),
    ],
)
def test_columns_that_are_not_there(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = write(tmp_path / "rows.tsv", "sentence\tlabel\na\t0\nb\t1\n")
    with pytest.raises(ConfigError, match=message):
        read_labeled(path, **options)


def test_data_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no data was given; give a file, a folder, or a GLUE task"):
        read_labeled(None)
    with pytest.raises(ConfigError, match=r"no such data: .*validation\.tsv, dev\.tsv"):
        read_labeled(tmp_path, task="sst2")
    with pytest.raises(ConfigError, match=r"msr_paraphrase_train\.tsv, train\.tsv"):
        read_labeled(tmp_path / "nowhere", task="mrpc", split="train")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("bytes.tsv", b"\xff\xfe\x00\x80"),
        ("broken.jsonl", b'{"sentence": "a", "label": 1\n'),
        ("list.jsonl", b"[1, 2]\n[3, 4]\n"),
        ("broken.parquet", b"PAR1 and then nothing"),
    ],
)
def test_files_that_are_not_what_they_say(name: str, content: bytes, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputTextError, match=name.replace(".", r"\.")):
        read_labeled(tmp_path / name)


def test_rows_without_a_column_are_told_by_their_number(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", '{"sentence": "a", "label": 1}\n{"sentence": "b"}\n')
    with pytest.raises(InputTextError, match=r"rows\.jsonl, row 2"):
        read_labeled(path)


def test_a_label_whose_name_is_a_number_is_not_counted(tmp_path: Path) -> None:
    """Stars from 1 to 5, numbered from 0 in the data: 0 and 1 would both be the first class."""
    path = write(tmp_path / "stars.tsv", "".join(f"text {n}\t{n}\n" for n in range(5)))
    stars = tuple("12345")
    with pytest.raises(InputTextError) as caught:
        read_labeled(path, labels=stars)
    assert (caught.value.where, caught.value.got) == (f"{path}, row 1", "0")
    assert caught.value.expected == "one of 1, 2, 3, 4, 5"
    path = write(tmp_path / "stars.tsv", "".join(f"text {n}\t{n}\n" for n in stars))
    assert read_labeled(path, labels=stars).labels == (0, 1, 2, 3, 4)
