"""Labeled texts: GLUE by name from a local copy or the hub, or any CSV, TSV, JSONL or parquet file."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from xadapter_export.errors import ConfigError, InputTextError, import_extra
from xadapter_export.evaluation.tables import class_names, read_table

HUB_GLUE = "nyu-mll/glue"
SUFFIXES = (".tsv", ".csv", ".jsonl", ".json", ".parquet", ".txt")


@dataclass(frozen=True)
class GlueTask:
    """One GLUE task.

    Attributes:
        text: Names that the column of the (first) text has, in the official files and on the hub.
        pair: Names of the second text's column; empty for tasks of one text.
        label: Names of the label's column.
        labels: Label names in the hub's order; empty for regression.
        headerless: Columns of official files that have no header line.
        splits: Stems of the official files where they are not train, dev and test.
        metrics: What GLUE reports, by the names of ``metrics.task_metrics``.

    Source:
        GLUE (Wang et al. 2019, arXiv 1804.07461): table 1, the official archives and the hub's copy of them.
    """

    text: tuple[str, ...]
    pair: tuple[str, ...] = ()
    label: tuple[str, ...] = ("label",)
    labels: tuple[str, ...] = ()
    headerless: tuple[str, ...] = ()
    splits: Mapping[str, tuple[str, ...]] | None = None
    metrics: tuple[str, ...] = ("accuracy",)


_ENTAILS = ("entailment", "not_entailment")
GLUE_TASKS: dict[str, GlueTask] = {
    "cola": GlueTask(
        ("sentence",),
        labels=("unacceptable", "acceptable"),
        headerless=("source", "label", "mark", "sentence"),
        metrics=("matthews",),
    ),
    "sst2": GlueTask(("sentence",), labels=("negative", "positive")),
    "mrpc": GlueTask(
        ("sentence1", "#1 String"),
        ("sentence2", "#2 String"),
        ("label", "Quality"),
        ("not_equivalent", "equivalent"),
        splits={"train": ("msr_paraphrase_train",), "test": ("msr_paraphrase_test",)},
        metrics=("accuracy", "f1"),
    ),
    "qqp": GlueTask(
        ("question1",),
        ("question2",),
        ("label", "is_duplicate"),
        ("not_duplicate", "duplicate"),
        metrics=("accuracy", "f1"),
    ),
    "stsb": GlueTask(("sentence1",), ("sentence2",), ("label", "score"), metrics=("pearson", "spearman")),
    "mnli": GlueTask(
        ("premise", "sentence1"),
        ("hypothesis", "sentence2"),
        ("label", "gold_label"),
        ("entailment", "neutral", "contradiction"),
        splits={
            "validation": ("validation_matched", "dev_matched"),
            "validation_mismatched": ("validation_mismatched", "dev_mismatched"),
        },
    ),
    "qnli": GlueTask(("question",), ("sentence",), labels=_ENTAILS),
    "rte": GlueTask(("sentence1",), ("sentence2",), labels=_ENTAILS),
    "wnli": GlueTask(("sentence1",), ("sentence2",), labels=("not_entailment", "entailment")),
}
_ALIASES = {"validation": ("validation", "dev", "valid"), "train": ("train",), "test": ("test",)}


@dataclass(frozen=True)
class Labeled:
    """Texts with their labels.

    Attributes:
        texts: n first texts.
        pairs: n second texts, or None.
        labels: n indices into ``label_names``, or n values for a regression.
        label_names: Names in the order of the logits; exactly one for a regression.
        where: File or data set they came from.
    """

    texts: tuple[str, ...]
    pairs: tuple[str, ...] | None
    labels: tuple[int, ...] | tuple[float, ...]
    label_names: tuple[str, ...]
    where: str

    def __len__(self) -> int:
        return len(self.texts)

    @property
    def is_regression(self) -> bool:
        """Whether the labels are values and not classes."""
        return len(self.label_names) == 1


def glue_task(name: str) -> GlueTask:
    """Find a GLUE task by name.

    Raises:
        ConfigError: If there is none; the message lists those that are known.
    """
    if name not in GLUE_TASKS:
        raise ConfigError("unknown GLUE task", got=name, expected=f"one of {', '.join(GLUE_TASKS)}")
    return GLUE_TASKS[name]


def read_labeled(
    data: str | Path | None,
    *,
    task: str | None = None,
    split: str = "validation",
    text_column: str | None = None,
    pair_column: str | None = None,
    label_column: str | None = None,
    labels: Sequence[str] | None = None,
    regression: bool = False,
) -> Labeled:
    """Read labeled texts.

    Args:
        data: A file; a folder with a file for each split; or None for GLUE from the hub.
        task: Name of a GLUE task, which says what the columns are called and what the labels are.
        split: Which file of a folder, or split of the hub's data set.
        text_column: Name of the text's column; where a file has no header, its number from 0.
        pair_column: Likewise for the second text.
        label_column: Likewise for the label.
        labels: Label names in the order of the logits; those that occur, sorted, if None. Data may number
            them from 0 instead, unless a name is a number itself.
        regression: Whether labels are values. GLUE's ``stsb`` is one by itself.

    Raises:
        ConfigError: If nothing says where the data is, a column is missing, or the task is unknown.
        InputTextError: If the file is empty, a text is empty, or a label is not one of ``labels``.
        MissingExtraError: If the hub or a parquet file is asked for without the ``train`` extra.
    """
    known = None if task is None else glue_task(task)
    if data is None:
        if task is None:
            raise ConfigError("no data was given", hint="give a file, a folder, or a GLUE task")
        rows, where = _read_hub(task, split)
    else:
        path = _find_file(Path(data), known, split)
        rows, where = _read_file(path, known, (text_column, pair_column, label_column)), str(path)
    if not rows:
        raise InputTextError("the file has no rows", where=where)
    columns = list(rows[0])
    text = _column(columns, text_column, known.text if known else ("sentence", "text", "0"), where, "text")
    pair = None
    if pair_column is not None or (known and known.pair):
        pair = _column(columns, pair_column, known.pair if known else (), where, "second text")
    fallback = ("label", "1" if pair is None else "2")
    label = _column(columns, label_column, known.label if known else fallback, where, "label")

    for number, row in enumerate(rows, 1):
        if missing := [name for name in (text, pair, label) if name is not None and name not in row]:
            raise InputTextError("a row lacks a column", where=f"{where}, row {number}", expected=missing[0])
    texts = _texts(rows, text, where)
    pairs = None if pair is None else _texts(rows, pair, where)
    raw = [row[label] for row in rows]
    if regression or (known is not None and not known.labels):
        return Labeled(texts, pairs, _values(raw, where), (label,), where)
    names = tuple(labels or (known.labels if known else ()) or _distinct(raw))
    return Labeled(texts, pairs, _classes(raw, names, where), names, where)


def _find_file(data: Path, task: GlueTask | None, split: str) -> Path:
    if data.is_file():
        return data
    stems = [*((task.splits or {}).get(split, ()) if task else ()), *_ALIASES.get(split, (split,))]
    found = [data / f"{stem}{suffix}" for stem in stems for suffix in SUFFIXES]
    for path in found:
        if path.is_file():
            return path
    raise ConfigError(
        "no such data",
        where=data,
        expected=f"a file, or a folder with {', '.join(f'{stem}.tsv' for stem in stems)} "
        f"(or {', '.join(SUFFIXES[1:-1])})",
    )


def _read_file(path: Path, task: GlueTask | None, asked: Sequence[str | None]) -> list[dict[str, Any]]:
    known = (*task.text, *task.pair, *task.label) if task else ("sentence", "text", "label")
    if task is not None and not task.headerless:  # a bare table: text, pair, label in this order
        bare = [task.text[0], *task.pair[:1], task.label[0]]
    else:
        bare = list(task.headerless) if task else []
    return read_table(path, header_names={*known, *filter(None, asked)}, headerless=bare)


def _read_hub(task: str, split: str) -> tuple[list[dict[str, Any]], str]:
    name = "validation_matched" if (task, split) == ("mnli", "validation") else split
    where = f"{HUB_GLUE}, {task}, {name}"
    try:
        table = import_extra("datasets", "train").load_dataset(HUB_GLUE, task, split=name)
    except ImportError:
        raise
    except Exception as error:  # the hub client raises many kinds; each means the data cannot be had
        raise ConfigError(
            "GLUE cannot be downloaded from the hub",
            where=where,
            got=str(error)[:200],
            hint="give a folder with its files",
        ) from error
    return class_names(table), where


def _column(columns: list[str], asked: str | None, known: Sequence[str], where: str, what: str) -> str:
    wanted = (asked,) if asked is not None else tuple(known)
    for name in wanted:
        if name in columns:
            return name
    raise ConfigError(
        f"the column with the {what} is missing",
        where=where,
        expected=" or ".join(wanted) or "its name",
        got=", ".join(columns[:12]),
    )


def _texts(rows: Sequence[Mapping[str, object]], column: str, where: str) -> tuple[str, ...]:
    return tuple(_text(row[column], where, number, column) for number, row in enumerate(rows, 1))


def _text(value: object, where: str, number: int, column: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise InputTextError("a text is empty", where=f"{where}, row {number}, column {column}")
    return value


def _distinct(raw: Sequence[object]) -> list[str]:
    names = sorted({str(value) for value in raw})
    return sorted(names, key=float) if all(name.lstrip("-").isdigit() for name in names) else names


def _classes(raw: Sequence[object], names: tuple[str, ...], where: str) -> tuple[int, ...]:
    if len(names) < 2:
        raise InputTextError("there is only one label", where=where, got=", ".join(names))
    index, expected = {name: number for number, name in enumerate(names)}, f"one of {', '.join(names)}"
    if not any(name.isdigit() for name in names):  # "1" of "1" to "5" is a name and no number
        index |= {str(number): number for number in range(len(names))}
        expected += f", or 0 to {len(names) - 1}"
    for number, value in enumerate(raw, 1):
        if str(value) not in index:
            raise InputTextError(
                "a label is out of range", where=f"{where}, row {number}", expected=expected, got=value
            )
    return tuple(index[str(value)] for value in raw)


def _values(raw: Sequence[object], where: str) -> tuple[float, ...]:
    values: list[float] = []
    for number, value in enumerate(raw, 1):
        try:
            values.append(float(str(value)))
        except ValueError as error:
            raise InputTextError(
                "a label is not a number", where=f"{where}, row {number}", got=repr(value)
            ) from error
    return tuple(values)
