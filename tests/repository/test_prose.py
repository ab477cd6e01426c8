"""Documentation and help texts read as plain English: proselint finds nothing, nor do our own word lists."""

import itertools
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from docs.cli_reference import COMMANDS
from tests import ROOT

PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md", "CODE_OF_CONDUCT.md")),
    *(ROOT / name for name in ("CHANGELOG.md", "export/web/README.md", "examples/node/README.md")),
    *sorted((ROOT / "docs").glob("*.md")),
]
# What makes a reader stumble, and what to write. Each is a regular expression of whole words.
STUMBLES = {
    r"beside": "next to, alongside, compared with",
    r"behind each other": "one after the other, concatenated",
    r"belongs? into": "belongs in",
    r"go(?:es)? on|went on": "resumes, continues",
    r"mend(?:s|ed|ing)?": "fix; hint",
    r"stands? (?:in(?! for)|at|before|behind|there|inside|alone)": "is, comes",
    r"those that|those which|that of": "name the noun",
    r"(?:is|are) asked": "is run on, is evaluated on",
    r"asks? a (?:bundle|session|model|checkpoint)": "runs",
    r"of yours|of theirs|of ours": "your, their, our",
    r"says? what|say what": "returns, gives",
    r"what is missing is named": "missing libraries are listed",
    r"number by number": "checks every output",
    r"in the place of": "instead of",
    r"let a \w+ be": "keep, allow",
    r"(?:is|are) named": "is listed, is called",
    r"the like": "and so on",
    r"more wins back": "gains back",
    r"a text that comes again": "a repeated text",
    r"colou?red like": "as colorful as",
}
BRITISH = r"\w*(?:colour|neighbour|behaviour|favour|licence|centre)\w*|\w+is(?:e|es|ed|ing|ation)\b"
# Words that end like British ones and are American too.
AMERICAN_ISE = """
    advise advises advised arise arises otherwise precise promise promises promised raise raises
    raised raising revise rise rises rising wise exercise exercises noise noised premise premises
    likewise pairwise elementwise compromise disguise surprise surprised surprising supervise
    supervised unsupervised comprise comprised comprises
"""
APART = "\n\n---\n\n"  # between what is no running text


def prose_of(markdown: str) -> str:
    """Sentences of a page: no code, tables' lines, comments or addresses; a blank line between paragraphs."""
    text = re.sub(r"^ *```.*?^ *```$", "\n", markdown, flags=re.DOTALL | re.MULTILINE)
    text = re.sub(r"<!--.*?-->", "", text, flags=re.DOTALL)
    text = re.sub(r"\]\([^)]*\)|!?\[", "", text)
    number = itertools.count()
    text = re.sub(r"`[^`\n]+`", lambda _: f"code{next(number)}", text)  # no word is there twice in a row
    text = re.sub(r"^(#.*)$", rf"\1{APART}", text, flags=re.MULTILINE)
    text = re.sub(r"^[ >]*(?:#+|[-*]|\d+\.) +", APART, text, flags=re.MULTILINE)
    text = re.sub(r"^\|[-:| ]+\|$", "", text, flags=re.MULTILINE)
    text = re.sub(r"^\|.*\|$", lambda row: row[0].replace("|", APART), text, flags=re.MULTILINE)
    return text.replace("**", "").replace("*", "")


def help_texts() -> Iterator[str]:
    waiting: list[click.Command] = list(COMMANDS.values())
    while waiting:
        command = waiting.pop()
        yield command.help or ""
        yield from (option.help or "" for option in command.params if isinstance(option, click.Option))
        if isinstance(command, click.Group) and command.name != "xad":
            waiting += command.commands.values()


def stumbles_in(text: str) -> list[str]:
    found = [
        f"{hit[0]!r}: {better}"
        for words, better in STUMBLES.items()
        for hit in re.finditer(rf"\b(?:{words})\b", text, re.IGNORECASE)
    ]
    british = (hit[0] for hit in re.finditer(rf"\b(?:{BRITISH})\b", text, re.IGNORECASE))
    return found + [
        f"{word!r}: American spelling" for word in british if word.lower() not in AMERICAN_ISE.split()
    ]


def proselint(text: str, folder: Path) -> list[str]:
    file = folder / "text.md"
    file.write_text(text, encoding="utf-8")
    command = [
        sys.executable,
        "-m",
        "proselint",
        "--config",
        str(ROOT / ".proselintrc.json"),
        "check",
        str(file),
    ]
    done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", check=False)
    assert not done.stderr, done.stderr
    return [line.partition("text.md:")[2] for line in done.stdout.splitlines() if line]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_a_page_has_no_stumbles(page: Path) -> None:
    assert stumbles_in(prose_of(page.read_text(encoding="utf-8"))) == []


def test_help_has_no_stumbles() -> None:
    texts = list(help_texts())
    assert len(texts) > 100
    assert stumbles_in("\n\n".join(texts)) == []


def test_proselint_finds_nothing(tmp_path: Path) -> None:
    pytest.importorskip("proselint", reason="proselint is not installed: make install")
    pages = {str(page): prose_of(page.read_text(encoding="utf-8")) for page in PAGES}
    pages["--help"] = "\n\n".join(help_texts())
    assert {page: found for page, text in pages.items() if (found := proselint(text, tmp_path))} == {}


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("Put it beside the bundle.", "beside"),
        ("A hint that mends it.", "mends"),
        ("The colour is normalised.", "colour"),
        ("A stopped build goes on.", "goes on"),
    ],
)
def test_a_stumble_is_found(text: str, word: str) -> None:
    assert any(word in found for found in stumbles_in(text))
    assert stumbles_in("The precise rise of a promise. Otherwise raise it alongside.") == []


def test_proselint_finds_a_mistake(tmp_path: Path) -> None:
    pytest.importorskip("proselint", reason="proselint is not installed: make install")
    assert proselint("This is very unique. The the end.", tmp_path) != []
