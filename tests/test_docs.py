import re
from pathlib import Path

import pytest

from docs.cli_reference import render

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]


def test_the_command_reference_is_what_help_says() -> None:
    assert (ROOT / "docs" / "cli.md").read_text(encoding="utf-8") == render(), "run: make docs"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\((?!https?://)([^)#]+)", page.read_text(encoding="utf-8"))
    assert [link for link in links if not (page.parent / link).exists()] == []


def test_the_readme_shows_commands_that_exist() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    for block in re.findall(r"```console\n(.*?)```", text, re.DOTALL):
        for line in block.splitlines():
            program, *arguments = line.split()
            assert program in {"make", "pip", "xad-export", "xad-run", "xad-parity", "xad-inspect"}, line
            assert program != "make" or arguments[0] in targets, line


def test_the_readme_quotes_the_results_of_the_recipe() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    results = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
    table = results[results.index("### Colour") : results.index("### Language")]
    rows = [row for row in table.splitlines() if row.startswith("|") and "untrained" not in row]
    assert len(rows) == 11
    assert [row for row in rows if row not in readme] == []  # the untrained model's row is in the caveats
