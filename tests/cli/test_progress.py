"""Progress: a bar with rate and time left on a terminal, lines elsewhere."""

import io
import sys
from typing import Any

import pytest

from xadapter_export.cli import progress
from xadapter_export.cli.progress import show_progress


class Clock:
    """Six seconds pass each time that someone looks."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        self.now += 6.0
        return self.now


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "time", Clock())


def count_to(total: int, step: int = 1, **settings: Any) -> None:
    line = "{done} of {total} images{note}"
    with show_progress(quiet=False, unit="image", line=line, **settings) as (say, count):
        say("first")
        for done in range(step, total // 2 + 1, step):
            count(done, total)
        say("second")
        for done in range(total // 2 + step, total + 1, step):
            count(done, total)


def test_lines_have_the_rate_and_the_time_left(capsys: pytest.CaptureFixture[str]) -> None:
    count_to(4, across_stages=True)
    lines = [line.partition(" s  ")[2] for line in capsys.readouterr().err.splitlines()]
    assert lines[:2] == ["first", "1 of 4 images"]  # one says nothing of the pace
    assert all(" s per image" in line for line in lines if line[:1] in "234")
    assert "left" in lines[2]
    assert "left" not in lines[-1]


def test_a_stage_starts_its_own_count(capsys: pytest.CaptureFixture[str]) -> None:
    count_to(4000, step=1000)
    lines = [line.partition(" s  ")[2] for line in capsys.readouterr().err.splitlines()]
    assert "images/s, " in lines[2]
    assert lines[4] == "3000 of 4000 images"


def test_what_is_over_soon_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    count_to(4, after_s=1e6)
    assert not capsys.readouterr().err
    count_to(4, after_s=40.0)
    lines = [line.partition(" s  ")[2] for line in capsys.readouterr().err.splitlines()]
    assert lines[0] != "first"
    assert lines[-1].startswith("4 of 4 images")


def test_a_terminal_shows_a_bar_with_the_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "160")
    count_to(4000, step=1000)
    assert "4000/4000" in terminal.getvalue()
    assert "images/s" in terminal.getvalue()


def test_quiet_is_quiet(capsys: pytest.CaptureFixture[str]) -> None:
    with show_progress(quiet=True, line="{done}") as (say, count):
        say("first")
        count(1, 2)
    assert capsys.readouterr().err == ""
