"""Rows of a file of data: CSV, TSV, JSON lines or parquet, whatever wrote it."""

import csv
import json
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from xadapter_export.errors import InputTextError, import_extra

_LONGEST_FIELD = 10_000_000  # characters; Python's own limit is 131,072


def read_lines(path: Path) -> list[str]:
    """Return the lines of a text file that are not blank; a byte-order mark is no part of them.

    Raises:
        InputTextError: If the file cannot be read as UTF-8.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise InputTextError("the file cannot be read", where=path, got=error) from error
    return [line for line in text.split("\n") if line.strip()]  # other separators may stand inside a line


def read_sentences(path: Path) -> list[str]:
    """Return the lines of a text file that are not blank, without space around them.

    Raises:
        InputTextError: If the file cannot be read as UTF-8 or has no text.
    """
    texts = [line.strip() for line in read_lines(path)]
    if not texts:
        raise InputTextError("the file has no text", where=path, hint="write one sentence per line")
    return texts


def read_table(
    path: Path, *, header_names: Collection[str] = (), headerless: Sequence[str] = ()
) -> list[dict[str, Any]]:
    """Return the rows of a file by column.

    TSV has no quoting, as GLUE's files have none. A first row is a header where it holds one of
    ``header_names``; else the columns are called ``headerless``, if there are as many, or by their numbers
    from 0.

    Args:
        path: ``.csv``, ``.jsonl``, ``.json`` (JSON lines, or one list), ``.parquet``; anything else is TSV.
        header_names: Names of which a header has at least one.
        headerless: Names for a file without header.

    Raises:
        InputTextError: If the file cannot be read, or a row has another number of columns than the first.
    """
    if path.suffix == ".parquet":
        return _read_parquet(path)
    if path.suffix in (".jsonl", ".json"):
        return parse_json_rows("\n".join(read_lines(path)), path)
    is_csv = path.suffix == ".csv"
    settings: dict[str, Any] = {} if is_csv else {"delimiter": "\t", "quoting": csv.QUOTE_NONE}
    limit = csv.field_size_limit(_LONGEST_FIELD)
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows = [row for row in csv.reader(file, **settings) if row]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputTextError("the file cannot be read", where=path, got=error) from error
    finally:
        csv.field_size_limit(limit)
    if not rows:
        return []
    header, body = rows[0], rows[1:]
    if not set(header_names) & set(header):
        named = headerless and len(headerless) == len(header)
        header, body = list(headerless) if named else [str(i) for i in range(len(header))], rows
    for number, row in enumerate(body, 1 + len(rows) - len(body)):
        if len(row) != len(header):
            raise InputTextError(
                "a row has the wrong number of columns",
                where=f"{path}, row {number}",
                expected=len(header),
                got=len(row),
            )
    return [dict(zip(header, row, strict=True)) for row in body]


def class_names(rows: Any) -> list[dict[str, Any]]:
    """Rows of a ``datasets`` table, class labels by name instead of by number."""
    features = {name: feature for name, feature in rows.features.items() if hasattr(feature, "int2str")}
    return [
        {**row, **{n: f.int2str(row[n]) if row[n] >= 0 else "unlabeled" for n, f in features.items()}}
        for row in rows
    ]


def _read_parquet(path: Path) -> list[dict[str, Any]]:
    table = import_extra("datasets", "train").Dataset
    try:
        return class_names(table.from_parquet(str(path), keep_in_memory=True))
    except Exception as error:  # datasets and pyarrow raise many kinds for a broken file
        raise InputTextError("the file cannot be read", where=path, got=str(error)[:200]) from error


def parse_json_rows(text: str, where: object) -> list[dict[str, Any]]:
    """Return the rows that a text holds as JSON lines, or as one list.

    Raises:
        InputTextError: If it is no JSON, or a row is no object.
    """
    lines = [line for line in text.split("\n") if line.strip()]
    rows: list[Any] = []
    try:
        if lines and lines[0].lstrip().startswith("["):
            rows = json.loads("\n".join(lines))
        else:
            rows = [json.loads(line) for line in lines]
    except json.JSONDecodeError as error:
        line = f"{where}, line {len(rows) + 1}"
        raise InputTextError("the file is not JSON lines", where=line, got=error) from error
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            raise InputTextError(
                "a line is not a JSON object", where=f"{where}, line {number}", got=type(row).__name__
            )
    return rows
