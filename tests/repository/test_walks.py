"""The walks of docs/design.md: their files are there, each once, and commands enter them in that order."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests import ROOT

TEXT = (ROOT / "docs" / "design.md").read_text(encoding="utf-8").split("\n## 16. ")[1]
WALKS = {
    section.partition("`")[2].partition("`")[0]: re.findall(r"^\d+\. `(\S+\.py)`", section, re.MULTILINE)
    for section in TEXT.split("\n### ")[1:]
}


def files_entered(*command: str) -> list[str]:
    done = subprocess.run(
        [sys.executable, "-m", "tests.walk", *command], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return done.stderr.splitlines()


def test_the_walks_name_files_that_are_there_each_once() -> None:
    assert list(WALKS) == ["xad-run", "xad-export"]
    for program, files in WALKS.items():
        assert len(files) > 20, program
        assert len(set(files)) == len(files), program
        assert [file for file in files if not (ROOT / "xadapter_export" / file).is_file()] == []


def test_a_text_goes_the_way_from_xad_run_to_the_answer(tiny: Path) -> None:
    entered = files_entered("xad-run", str(tiny), "a cherry is [MASK]")
    assert [file for file in entered if file in WALKS["xad-run"]] == WALKS["xad-run"]


@pytest.mark.slow
def test_a_checkpoint_goes_the_way_from_xad_export_to_the_bundle(tmp_path: Path) -> None:
    entered = files_entered(
        "xad-export", "builtin", "--experts", "vt", "-o", str(tmp_path / "bundle"), "--quiet"
    )
    assert [file for file in entered if file in WALKS["xad-export"]] == WALKS["xad-export"]
