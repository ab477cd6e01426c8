"""``python -m docs.house_map``: draw docs/images/house.svg, the map of the library, from its own code.

Rows and the line below which there is no PyTorch come from the import contracts of ``pyproject.toml``, what a
room is for from the first sentence of its docstring, and what is in it from its files.
"""

import ast
import re
import textwrap
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any, Final

ROOT: Final = Path(__file__).resolve().parents[1]
FILE: Final = ROOT / "docs" / "images" / "house.svg"
_PACKAGE: Final = "xadapter_export"
_WIDTH, _GAP, _PADDING = 1120, 10, 12  # pixels
_TITLE, _TEXT, _NAMES = 20, 16, 14  # heights of lines
_TEXT_WIDTH, _NAME_WIDTH = 6.3, 6.1  # of a character, on average
_STYLE: Final = """
  text { font-family: system-ui, sans-serif; font-size: 12px; fill: #1f2328 }
  .title { font-size: 14px; font-weight: 600 }
  .names { font-family: ui-monospace, monospace; font-size: 10px; fill: #59636e }
  .room { fill: #f6f8fa; stroke: #d1d9e0 }
  .border { stroke: #bc4c00; stroke-dasharray: 6 4 }
  .above { fill: #bc4c00 }
  @media (prefers-color-scheme: dark) {
    text { fill: #f0f6fc } .names { fill: #9198a1 } .room { fill: #151b23; stroke: #3d444d }
    .border { stroke: #f0883e } .above { fill: #f0883e }
  }
"""


@dataclass(frozen=True)
class Room:
    """A folder or a module of the library.

    Attributes:
        name: Its name in the package.
        says: First sentence of its docstring.
        modules: Names of what is in it; of a folder in it, the folder's name and then its modules' names.
        has_torch: Whether PyTorch may be imported there.
    """

    name: str
    says: str
    modules: tuple[str, ...]
    has_torch: bool


def read_rooms() -> list[list[Room]]:
    """Return the rooms in rows: each row imports only from rows below it."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    contracts: list[dict[str, Any]] = project["tool"]["importlinter"]["contracts"]
    (layers,) = (contract["layers"] for contract in contracts if contract["type"] == "layers")
    (light,) = (
        contract["source_modules"]
        for contract in contracts
        if "torch" in contract.get("forbidden_modules", ())
    )
    return [[_read_room(name.strip(), light) for name in layer.split("|")] for layer in layers]


def draw(rows: list[list[Room]]) -> str:
    """Return the map as SVG."""
    parts: list[str] = []
    top = 0
    for index, row in enumerate(rows):
        if index and rows[index - 1][0].has_torch and not row[0].has_torch:
            parts += _border(top)
            top += 3 * _GAP
        width = (_WIDTH - _GAP * (len(row) - 1)) // len(row)
        drawn = [_draw_room(room, width) for room in row]
        height = max(lines[-1][1] for lines in drawn) + _PADDING
        for column, lines in enumerate(drawn):
            left = column * (width + _GAP)
            parts.append(
                f'<rect class="room" x="{left + 0.5}" y="{top + 0.5}" rx="6" '
                f'width="{width - 1}" height="{height}"/>'
            )
            parts += [
                f'<text class="{style}" x="{left + _PADDING}" y="{top + y}">{escape(text)}</text>'
                for style, y, text in lines
            ]
        top += height + _GAP
    size = f'width="{_WIDTH}" height="{top}" viewBox="0 0 {_WIDTH} {top}"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {size}>'
    title = "<title>The rooms of the library: each imports only from rows below it</title>"
    return "\n".join([head, title, f"<style>{_STYLE}</style>", *parts, "</svg>", ""])


def _read_room(name: str, light: list[str]) -> Room:
    short = name.removeprefix(f"{_PACKAGE}.")
    folder = ROOT / name.replace(".", "/")
    file = folder / "__init__.py" if folder.is_dir() else folder.with_suffix(".py")
    says = (ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or "").split("\n\n")[0]
    sentence = re.split(r"(?<=\.)\s", " ".join(says.split()).replace("``", ""))[0]
    return Room(short, sentence, tuple(_modules(folder)) if folder.is_dir() else (), name not in light)


def _modules(folder: Path) -> Iterator[str]:
    yield from sorted(file.stem for file in folder.glob("*.py") if not file.stem.startswith("__"))
    for inner in sorted(file.parent for file in folder.glob("*/__init__.py")):
        yield f"{inner.name}/ {' '.join(_modules(inner))}"


def _draw_room(room: Room, width: int) -> list[tuple[str, int, str]]:
    """Return the lines of a room: style, offset from the top, text."""
    inside = width - 2 * _PADDING
    y = _PADDING + _TITLE // 2
    lines = [("title", y, room.name)]
    for text in textwrap.wrap(room.says, int(inside / _TEXT_WIDTH)):
        y += _TEXT if len(lines) > 1 else _TITLE
        lines.append(("says", y, text))
    loose = " ".join(name for name in room.modules if "/" not in name)
    for group in (loose, *(name for name in room.modules if "/" in name)):
        for text in textwrap.wrap(group, int(inside / _NAME_WIDTH)):
            y += _NAMES if lines[-1][0] == "names" else _TEXT + 2
            lines.append(("names", y, text))
    return lines


def _border(top: int) -> list[str]:
    y = top + _GAP
    words = "above: PyTorch, transformers, open_clip, onnx; below: numpy and onnxruntime"
    return [
        f'<line class="border" x1="0" x2="{_WIDTH}" y1="{y + 6}" y2="{y + 6}"/>',
        f'<text class="above" x="{_PADDING}" y="{y}">{words}</text>',
    ]


if __name__ == "__main__":
    FILE.write_text(draw(read_rooms()), encoding="utf-8")
