"""How the house is kept: a name is compared in its own room alone, and calls are short enough to read.

``python -m tests.repository.test_house`` prints the counts.
"""

import ast
import sys
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests import ROOT
from tests.branches import found_in
from xadapter_export.layers import LAYERS
from xadapter_export.model.plm import FAMILIES
from xadapter_export.model.towers import TEXT_TOWERS
from xadapter_export.targets import TARGETS, all_variants

PACKAGE = ROOT / "xadapter_export"


@dataclass(frozen=True)
class Seam:
    """Names that belong in some rooms alone.

    Attributes:
        names: The names.
        rooms: Files and folders where they may be compared.
        others: Files that compare a word which is such a name and means something else, and what it means.
    """

    names: Collection[str]
    rooms: Collection[str]
    others: Mapping[str, str] = field(default_factory=dict)


SEAMS = {
    "targets": Seam(
        {*TARGETS, *all_variants()},
        ("targets.py", "exporters/makers", "sessions"),  # the table, its makers and its openers
        dict.fromkeys(
            ("bank_builder/build.py", "bank_builder/encode.py", "bank_builder/image_tower.py"),
            "torch's kinds of device are cpu and cuda too",
        ),
    ),
    "PLM families": Seam(
        {name for family in FAMILIES for name in (family, *FAMILIES[family].model_types)},
        ("model/post_norm.py",),
    ),
    "text towers": Seam(set(TEXT_TOWERS), ("model/clip_text.py",)),
    "kinds of layers": Seam(set(LAYERS), ("layers", "model/x_adapter.py")),
}
LAYER_OBJECTS = {
    name
    for kind in map(LAYERS.__getitem__, LAYERS)
    for name in (kind.name.replace("-", "_").upper(), kind.torch_half.partition(":")[2])
}  # TOKEN_QUERY, TokenQueryLayer

CODE = ("xadapter_export", "material", "train", "export", "benchmarks", "tests", "docs", "examples")
MOST_PARAMETERS, MOST_LINES, MOST_LINES_OF_A_COMMAND = 8, 60, 39
MOST_EXCEPTIONS = 5
REASON = "# house: "  # on the line of the def; what follows says why the function may be over a limit


def comparisons(tree: ast.AST, names: Collection[str]) -> Iterator[int]:
    """Yield the line of everything in a module that goes by one of the names.

    That is what is compared with it, contained in a group of names, a key of a literal dictionary, a case of
    a match, a subscript, or the start or end of a string that is looked for.
    """
    for node in ast.walk(tree):
        match node:
            case ast.Compare():
                looked_at: list[ast.expr | None] = [node.left, *node.comparators]
            case ast.Dict():
                looked_at = list(node.keys)
            case ast.MatchValue():
                looked_at = [node.value]
            case ast.Subscript():
                looked_at = [node.slice]
            case ast.Call(func=ast.Attribute(attr="startswith" | "endswith" | "get" | "removeprefix")):
                looked_at = list(node.args)
            case _:
                continue
        if any(part is not None and _names(part) & set(names) for part in looked_at):
            yield getattr(node, "lineno", 0)


def _names(node: ast.expr) -> set[str]:
    """Return the strings in an expression, or in a group of them, without a dash at an end."""
    match node:
        case ast.Constant(value=str(text)):
            return {text.strip("-")}
        case ast.Tuple() | ast.List() | ast.Set():
            return {text for part in node.elts for text in _names(part)}
        case ast.Starred():
            return _names(node.value)
        case _:
            return set()


def found_in_library(seam: Seam) -> list[str]:
    """Return ``file:line`` of every comparison with a name outside the rooms, but for ``others``."""
    allowed = (*seam.rooms, *seam.others)
    return [
        f"{file.relative_to(PACKAGE).as_posix()}:{line}"
        for file in sorted(PACKAGE.rglob("*.py"))
        if not any(file.is_relative_to(PACKAGE / room) for room in allowed)
        for line in comparisons(ast.parse(file.read_text("utf-8")), seam.names)
    ]


@pytest.mark.parametrize("seam", SEAMS.values(), ids=SEAMS)
def test_a_name_is_compared_in_its_own_room_alone(seam: Seam) -> None:
    assert found_in_library(seam) == []


def names_a_layer(node: ast.expr) -> bool:
    """Whether an expression is one of our kinds of layer, or its module."""
    name = getattr(node, "id", getattr(node, "attr", None))
    return name in LAYER_OBJECTS or (isinstance(node, ast.Attribute) and names_a_layer(node.value))


def test_no_code_outside_its_room_branches_on_a_kind_of_layer() -> None:
    found = [
        f"{file.relative_to(PACKAGE).as_posix()}:{line}"
        for file in sorted(PACKAGE.rglob("*.py"))
        if not any(file.is_relative_to(PACKAGE / room) for room in SEAMS["kinds of layers"].rooms)
        for line in found_in(file.read_text("utf-8"), names_a_layer)
    ]
    assert found == []
    for line in ("isinstance(x, SentenceQueryLayer)", "kind is TOKEN_QUERY", "x == layers.TOKEN_QUERY.name"):
        assert list(found_in(line, names_a_layer)), line


@pytest.mark.parametrize("seam", SEAMS.values(), ids=SEAMS)
def test_the_rooms_and_the_exceptions_are_there(seam: Seam) -> None:
    for place in (*seam.rooms, *seam.others):
        assert (PACKAGE / place).exists()
    for place in seam.others:
        tree = ast.parse((PACKAGE / place).read_text("utf-8"))
        assert list(comparisons(tree, seam.names)), f"{place} needs no exception"


PROGRAMS = ("train", "export", "benchmarks")  # each may import the library, material and what is its own


def imported(source: str) -> Iterator[str]:
    """Yield the modules that a module imports, wherever in it, by their whole names."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{name.name}" for name in node.names)
        elif isinstance(node, ast.Import):
            yield from (name.name for name in node.names)


def wrong_import(file: Path, module: str) -> bool:
    """Whether a file imports another folder's code, or as a recipe a helper of another recipe."""
    (folder, name, *_), (first, *rest) = file.relative_to(ROOT).parts, module.split(".")
    if first in {*PROGRAMS, "tests", "docs"} - {folder}:
        return True
    is_recipe = first == folder == "train" and bool(rest) and (ROOT / folder / rest[0]).is_dir()
    return is_recipe and rest[0] != name


def test_no_recipe_imports_the_helpers_of_another() -> None:
    found = [
        f"{file.relative_to(ROOT).as_posix()}: {module}"
        for folder in (*PROGRAMS, "material")
        for file in sorted((ROOT / folder).rglob("*.py"))
        for module in imported(file.read_text("utf-8"))
        if wrong_import(file, module)
    ]
    assert found == []
    color = ROOT / "train" / "color" / "__main__.py"
    assert wrong_import(color, "train.demo.plugin.Split")
    assert wrong_import(color, "tests.tiny_bundle.write_bundle")
    assert not wrong_import(color, "train.color.laboratory.Arm")
    assert not wrong_import(color, "train.arms.run_arms")


def over_limits(source: str) -> Iterator[tuple[int, str, str]]:
    """Yield the line of every function that is over a limit, what is over it, and the reason beside it.

    Parameters are counted without self and cls. Of a click command, whose parameters are its options, only
    the body counts, without the docstring.
    """
    lines = source.splitlines()
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        assert node.end_lineno is not None
        if any(_makes_command(decorator) for decorator in node.decorator_list):
            body = node.body[1:] if ast.get_docstring(node) is not None else node.body
            length = node.end_lineno - body[0].lineno + 1 if body else 0
            found = {f"a command of {length} lines": length > MOST_LINES_OF_A_COMMAND}
        else:
            given = node.args
            named = [*given.posonlyargs, *given.args, *given.kwonlyargs, given.vararg, given.kwarg]
            count = len([part for part in named if part and part.arg not in ("self", "cls")])
            length = node.end_lineno - node.lineno + 1
            found = {f"{count} parameters": count > MOST_PARAMETERS, f"{length} lines": length > MOST_LINES}
        what = " and ".join(text for text, is_over in found.items() if is_over)
        if what:
            yield node.lineno, f"{node.name}: {what}", lines[node.lineno - 1].partition(REASON)[2].strip()


def _makes_command(decorator: ast.expr) -> bool:
    call = decorator.func if isinstance(decorator, ast.Call) else decorator
    return isinstance(call, ast.Attribute) and call.attr in ("command", "group")


def functions_over_limits() -> tuple[list[str], list[str]]:
    """Return every function of the project that is over a limit: those without a reason, and with one."""
    without: list[str] = []
    excused: list[str] = []
    for file in sorted(file for room in CODE for file in (ROOT / room).rglob("*.py")):
        for line, what, reason in over_limits(file.read_text("utf-8")):
            said = f"{file.relative_to(ROOT).as_posix()}:{line} {what}"
            (excused if reason else without).append(f"{said} ({reason})" if reason else said)
    return without, excused


def test_functions_are_short_and_take_few_parameters() -> None:
    without, excused = functions_over_limits()
    assert without == []
    assert 0 < len(excused) <= MOST_EXCEPTIONS


def test_what_is_over_a_limit_is_found() -> None:
    long = "def f({}):{}\n" + "    x = 1\n" * 60
    nine = ", ".join("abcdefghi")
    assert [what for _, what, _ in over_limits(long.format("", ""))] == ["f: 61 lines"]
    assert [what for _, what, _ in over_limits(f"def f({nine}): pass")] == ["f: 9 parameters"]
    assert [what for _, what, _ in over_limits("def f(a, *b, c, d, e, f, g, h, **i): pass")]
    assert not list(over_limits("class A:\n    def f(self, a, b, c, d, e, f, g, h): pass"))
    assert not list(over_limits("def f():\n" + "    x = 1\n" * 59))
    assert [why for _, _, why in over_limits(long.format(nine, "  # house: so it is"))] == ["so it is"]
    assert [why for _, _, why in over_limits(long.format(nine, "  # so it is"))] == [""]
    command = f'@click.command()\n@click.option("--a")\ndef f({nine}):\n    """Says."""\n'
    assert not list(over_limits(command + "    x = 1\n" * 39))
    assert [what for _, what, _ in over_limits(command + "    x = 1\n" * 40)] == ["f: a command of 40 lines"]


def test_what_goes_by_a_name_is_found() -> None:
    """The check itself: each way to go by a name counts, and other words do not."""
    counted = (
        'x == "openvino"',
        'x != "cpu-int8"',
        'x in ("onnx", "cpu")',
        '{"mobile": 1}',
        'x.startswith("tensorrt")',
        'x.startswith(("cpu-", "cuda-"))',
        'table["triton"]',
        'table.get("triton")',
        'match x:\n    case "cuda":\n        pass',
    )
    for line in counted:
        assert list(comparisons(ast.parse(line), SEAMS["targets"].names)), line
    for line in ('x == "fp32"', 'print("openvino")', 'x in ("cpus", "the cpu")', "x == y"):
        assert not list(comparisons(ast.parse(line), SEAMS["targets"].names)), line


if __name__ == "__main__":
    counts = {what: found_in_library(seam) for what, seam in SEAMS.items()}
    without, excused = functions_over_limits()
    for what, found in counts.items():
        print(f"names of {what} compared outside their rooms: {len(found)}", *found, sep="\n  ")  # noqa: T201
    print(f"functions over the limits: {len(without)}", *without, sep="\n  ")  # noqa: T201
    print(f"over them for a reason: {len(excused)}", *excused, sep="\n  ")  # noqa: T201
    sys.exit(1 if any(counts.values()) or without else 0)
