"""Every block of shell and Python in the documentation runs, page by page, each in a folder of its own.

A block below ``<!-- not run: REASON -->`` is left out. A block below a line that is only a file's name in
backquotes and a colon is written to that file. Training is cut to a few steps.
"""

import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from click.testing import CliRunner

from docs.cli_reference import COMMANDS
from tests import ROOT

if TYPE_CHECKING:
    from xadapter_export.exporters.pipeline import ExportResult

pytestmark = pytest.mark.slow  # minutes: `make test-slow`

PAGES = [
    *(
        ROOT / name
        for name in ("README.md", "CONTRIBUTING.md", "export/web/README.md", "examples/node/README.md")
    ),
    *sorted((ROOT / "docs").glob("*.md")),
]
RUN = {"console", "bash", "sh", "python"}
SHELL = {"mkdir", "openssl", "printf"}
_BLOCK = re.compile(
    r"(?:^ *<!-- not run: (?P<reason>.+?) -->\n|^ *`(?P<file>[\w.]+\.(?:py|toml))`:\n)?\n?"
    r"(?P<indent> *)```(?P<language>\w+)\n(?P<code>.*?)^ *```$",
    re.MULTILINE | re.DOTALL,
)


@dataclass(frozen=True)
class Block:
    """One block of a page: its language, its text, the file that it is, and why it is not run."""

    language: str
    code: str
    file: str | None
    reason: str | None


def blocks_of(page: Path) -> Iterator[Block]:
    for found in _BLOCK.finditer(page.read_text(encoding="utf-8")):
        code = textwrap.dedent(found["code"])
        if found["language"] in RUN or found["file"]:
            yield Block(found["language"], code, found["file"], found["reason"])


def shortened(code: str) -> str:
    """The same with two training steps; what a step computes does not depend on how many follow."""
    return re.sub(r"((?:max|distill)[-_]steps(?: = | ))\d+", r"\g<1>2", code)


def run_line(line: str) -> None:
    """Run one line of a shell block: ours in this process, which has loaded PyTorch once."""
    first, _, rest = line.partition(" | ")
    program, *arguments = shlex.split(first)
    if program in COMMANDS:
        done = CliRunner().invoke(COMMANDS[program], arguments, catch_exceptions=False)
        assert done.exit_code == 0, f"{line}\n{done.output}"
    elif program == "cd":
        os.chdir(arguments[0])
    elif program == "python":
        runpy.run_path(arguments[0], run_name="__main__")
    elif program in SHELL and rest:
        text = subprocess.run(first, shell=True, capture_output=True, text=True, check=True).stdout
        program, *arguments = shlex.split(rest)
        done = CliRunner().invoke(COMMANDS[program], arguments, input=text, catch_exceptions=False)
        assert done.exit_code == 0, f"{line}\n{done.output}"
    else:
        assert program in SHELL, f"{program!r} cannot be run by this test: mark its block as not run"
        subprocess.run(line, shell=True, check=True)


def run_blocks(page: Path) -> int:
    names: dict[str, object] = {"__name__": "__main__"}
    ran = 0
    for block in blocks_of(page):
        if block.reason:
            continue
        code = shortened(block.code)
        if block.file:
            Path(block.file).write_text(code, encoding="utf-8")
        elif block.language == "python":
            exec(compile(code, f"{page.name}, block {ran}", "exec"), names)
        else:
            for line in code.replace("\\\n", " ").splitlines():
                if line.strip():
                    run_line(line.strip())
        ran += 1
    return ran


@pytest.fixture
def folder(tmp_path: Path, builtin_export: "ExportResult", monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with what pages take for granted: a checkpoint, a bank, a bundle and the recipes."""
    from xadapter_export.model.builtin import builtin_folder

    shutil.copytree(builtin_folder(), tmp_path / "my-checkpoint")
    shutil.copytree(builtin_export.folder, tmp_path / "bundle")
    (tmp_path / "export").mkdir()
    for recipe in (ROOT / "export").glob("*.toml"):
        shutil.copyfile(recipe, tmp_path / "export" / recipe.name)
    (tmp_path / "text.txt").write_text("The banana is yellow.\nThe sky is blue.\n", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    run_line("xad-bank dtype builtin --to fp16 -o my-bank")
    return tmp_path


@pytest.mark.filterwarnings("default")  # a reader would see a warning and read on
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_the_blocks_of_a_page_run(page: Path, folder: Path) -> None:
    blocks = list(blocks_of(page))
    if not any(block.reason is None for block in blocks):
        pytest.skip("no block of this page is run: " + "; ".join({block.reason or "" for block in blocks}))
    if any("-o bundle\n" in block.code or "-o bundle " in block.code for block in blocks):
        shutil.rmtree(folder / "bundle")  # the page makes its own
    assert run_blocks(page) == len([block for block in blocks if block.reason is None])


def test_the_notebook_runs_top_to_bottom(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    notebook = json.loads((ROOT / "examples" / "tour.ipynb").read_text(encoding="utf-8"))
    names: dict[str, object] = {"__name__": "notebook"}
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            assert not cell["outputs"], "kept without outputs, so that its changes can be read"
            exec(compile("".join(cell["source"]), cell["id"], "exec"), names)
    lines = capsys.readouterr().out.splitlines()
    assert "V-expert: green" in next(line for line in lines if line.startswith("a frog"))
    assert lines[-2:] == ["red", "True"]


def test_a_block_that_fails_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    page = tmp_path / "page.md"
    page.write_text("# A page\n\n<!-- not run: no GPU -->\n```python\n1 / 0\n```\n\n```python\nx = 1\n```\n")
    assert run_blocks(page) == 1
    page.write_text("# A page\n\n- a list\n\n  ```console\n  xad-run nowhere 'a [MASK]'\n  ```\n")
    with pytest.raises(AssertionError, match="nowhere"):
        run_blocks(page)


def test_a_block_that_is_a_file_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    page = tmp_path / "page.md"
    page.write_text("`one.py`:\n\n```python\nprint(1)\nMAX = 1\n```\n\n```console\npython one.py\n```\n")
    assert run_blocks(page) == 2
    assert Path("one.py").read_text() == "print(1)\nMAX = 1\n"
