"""Objects and the colors that people say they have, read from the files in which such data is published."""

import csv
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from xadapter_export.errors import ConfigError, InputTextError
from xadapter_export.evaluation.tables import parse_json_rows, read_lines

# The basic color terms of Memory Colors and CoDa.
ELEVEN: Final = (
    "black",
    "blue",
    "brown",
    "green",
    "grey",
    "orange",
    "pink",
    "purple",
    "red",
    "white",
    "yellow",
)
_NAME_COLUMNS = ("item", "object", "name")
_LABEL_COLUMNS = ("label", "color", "colour")
_SUM_TOLERANCE = 0.02  # published shares are rounded


@dataclass(frozen=True)
class ColoredObject:
    """An object and its color.

    Attributes:
        name: The object.
        descriptor: What goes before it in a sentence; may be empty.
        plural: Several of it.
        color: The color that most people say.
        shares: How often each color is said, adding up to 1; only ``color`` where no more is known.
    """

    name: str
    descriptor: str
    plural: str
    color: str
    shares: Mapping[str, float]


@dataclass(frozen=True)
class ObjectSet:
    """The objects of a file.

    Attributes:
        benchmark: ``memory_colors``, ``color_terms`` or ``coda``, by the file's columns.
        objects: The objects, in the file's order.
        colors: The colors that occur, in alphabetical order.
        where: The file.
    """

    benchmark: str
    objects: tuple[ColoredObject, ...]
    colors: tuple[str, ...]
    where: str


def read_colors(path: str | Path) -> ObjectSet:
    """Read objects with one color each.

    JSON lines with ``item``, ``label`` and ``descriptor`` as Memory Colors is published, or CSV with
    ``object`` and ``color`` as ColorTerms is; a CSV may have a ``descriptor`` too.

    Raises:
        InputTextError: If the file cannot be read, is empty, lacks a column, or a cell is empty.
    """
    path = Path(path)
    rows = _read_rows(path)
    name, label = _find_column(rows, _NAME_COLUMNS, path), _find_column(rows, _LABEL_COLUMNS, path)
    objects = []
    for number, row in enumerate(rows, start=1):
        item, color = _cell(row, name, path, number), _cell(row, label, path, number)
        descriptor = str(row.get("descriptor") or "").strip()
        objects.append(ColoredObject(item, descriptor, item, color, {color: 1.0}))
    benchmark = "memory_colors" if "descriptor" in rows[0] else "color_terms"
    return ObjectSet(benchmark, tuple(objects), tuple(sorted({o.color for o in objects})), str(path))


def read_distributions(path: str | Path) -> ObjectSet:
    """Read objects with the share of people who say each color, as CoDa is published.

    CSV with ``object``, ``plural``, perhaps ``annotators``, and a column for each color. Where there is no
    singular ("jeans"), the plural stands for it, without an article.

    Raises:
        InputTextError: If the file cannot be read, is empty, lacks a column, or the shares of a row are no
            distribution.
    """
    path = Path(path)
    rows = _read_rows(path)
    name, plural = _find_column(rows, _NAME_COLUMNS, path), _find_column(rows, ("plural",), path)
    colors = sorted(key for key in rows[0] if key not in {name, plural, "annotators"})
    if len(colors) < 2:
        raise InputTextError(
            "a column is missing", where=path, expected="a column for each color", got=", ".join(rows[0])
        )
    objects = []
    for number, row in enumerate(rows, start=1):
        shares = {color: _share(row[color], f"{path}, row {number}, {color}") for color in colors}
        total = sum(shares.values())
        if abs(total - 1) > _SUM_TOLERANCE:
            raise InputTextError(
                "the shares of a row do not add up to 1", where=f"{path}, row {number}", got=f"{total:.4f}"
            )
        shares = {color: share / total for color, share in shares.items()}
        several = _cell(row, plural, path, number)
        item = str(row[name]).strip() or several
        article = "" if item == several else "an" if item[0].lower() in "aeiou" else "a"
        objects.append(ColoredObject(item, article, several, max(colors, key=shares.__getitem__), shares))
    return ObjectSet("coda", tuple(objects), tuple(colors), str(path))


def read_names(value: str) -> tuple[str, ...]:
    """Return names of objects: from a file of data, a text file of one a line, or a list with commas.

    Raises:
        InputTextError: If a file cannot be read or names nothing.
        ConfigError: If no name was given.
    """
    path = Path(value)
    if path.suffix and not path.is_file():
        raise ConfigError("no such file", where=value, hint="give a file, or names separated by commas")
    if not path.is_file():
        names = [name.strip() for name in value.split(",")]
    elif path.suffix in {".jsonl", ".csv"}:
        rows = _read_rows(path)
        column = _find_column(rows, _NAME_COLUMNS, path)
        names = [_cell(row, column, path, number) for number, row in enumerate(rows, start=1)]
    else:
        names = [line.strip() for line in _read_lines(path)]
    names = [name for name in names if name]
    if not names:
        raise ConfigError("no object was named", where=value)
    return tuple(names)


def select_objects(
    data: ObjectSet,
    *,
    only: Sequence[Collection[str]] = (),
    leave_out: Collection[str] = (),
) -> ObjectSet:
    """Return the objects whose name is in every collection of ``only`` and not in ``leave_out``.

    Names are compared without case, and a plural is the same as its singular. The colors stay those of the
    whole file.

    Raises:
        ConfigError: If no object is left.
    """
    wanted = [_all_forms(names) for names in only]
    unwanted = _all_forms(leave_out)

    def names(thing: ColoredObject) -> set[str]:
        return _forms(thing.name) | _forms(thing.plural)

    kept = tuple(
        thing
        for thing in data.objects
        if all(names(thing) & forms for forms in wanted) and not names(thing) & unwanted
    )
    if not kept:
        raise ConfigError(
            "no objects are left to evaluate",
            where=data.where,
            got=f"{len(data.objects)} objects in the data, none of them selected",
            hint="check --objects, --in-bank and --not-in",
        )
    return ObjectSet(data.benchmark, kept, data.colors, data.where)


def _all_forms(names: Collection[str]) -> set[str]:
    return {form for name in names for form in _forms(name)}


def _forms(name: str) -> set[str]:
    """Return a name, and what it may be the regular plural of; two names match where these overlap."""
    name = " ".join(name.casefold().split())
    forms = {name}
    if name.endswith("ies"):
        forms.add(f"{name[:-3]}y")
    if name.endswith(("ches", "shes", "xes", "sses", "oes")):
        forms.add(name[:-2])
    if name.endswith("s") and not name.endswith("ss"):
        forms.add(name[:-1])
    return forms


def _read_lines(path: Path) -> list[str]:
    return [line for line in read_lines(path) if not line.startswith("#")]


def _read_rows(path: Path) -> list[dict[str, Any]]:
    """Return the rows of JSON lines or of a CSV with a header, lines that start with ``#`` left out."""
    lines = _read_lines(path)
    if lines and lines[0].lstrip().startswith("{"):
        rows = parse_json_rows("\n".join(lines), path)
    else:
        rows = list(csv.DictReader(lines))
        for number, row in enumerate(rows, start=1):
            if None in row or None in row.values():
                raise InputTextError(
                    "a row and the header have different numbers of cells", where=f"{path}, row {number}"
                )
    if not rows:
        raise InputTextError("the data is empty", where=path, hint="give a file with at least one object")
    return rows


def _find_column(rows: Sequence[Mapping[str, Any]], names: Sequence[str], path: Path) -> str:
    for name in names:
        if name in rows[0]:
            return name
    raise InputTextError(
        "a column is missing", where=path, expected=" or ".join(names), got=", ".join(map(str, rows[0]))
    )


def _cell(row: Mapping[str, Any], column: str, path: Path, number: int) -> str:
    value = row.get(column)
    if not isinstance(value, str) or not value.strip():
        raise InputTextError("a cell is empty", where=f"{path}, row {number}, {column}")
    return value.strip()


def _share(value: object, where: str) -> float:
    try:
        share = float(str(value))
    except ValueError as error:
        raise InputTextError("a share is not a number", where=where, got=repr(value)) from error
    if not math.isfinite(share) or not 0 <= share <= 1:
        raise InputTextError("a share is out of range", where=where, expected="0 to 1", got=share)
    return share
