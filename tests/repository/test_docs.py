import re
import shlex
import tomllib
from pathlib import Path
from pkgutil import resolve_name

import click
import pytest
import yaml

from docs.cli_reference import COMMANDS, render
from docs.house_map import FILE, draw, read_rooms
from docs.site_pages import gather_pages
from tests import ROOT
from xadapter_export.training.config import make_config

TRAINING = ROOT / "docs" / "training.md"
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
MODULES = {"xadapter_export.cli.train": "xad-train", "xadapter_export.cli.bank": "xad-bank"}
SHELL = {"git", "make", "pip", "source", "mkdir", "cd", "printf", "python"}


def test_the_map_is_drawn_from_the_code() -> None:
    rooms = read_rooms()
    assert {room.name for row in rooms for room in row if room.has_torch} >= {"cli", "exporters", "model"}
    assert FILE.read_text(encoding="utf-8") == draw(rooms), "run `make docs`"


def console_lines(page: Path) -> list[str]:
    blocks = re.findall(
        r"^ *```console\n(.*?)^ *```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE
    )
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    return [line.strip() for line in lines if line.strip()]


def command_of(line: str) -> tuple[click.Command, list[str]] | None:
    """Our command that a line runs, with its arguments; None for a program of the shell."""
    program, *arguments = shlex.split(line.partition("|")[0])
    if program == "torchrun":
        program, arguments = (
            MODULES[arguments[arguments.index("-m") + 1]],
            arguments[arguments.index("-m") + 2 :],
        )
    if program in SHELL:
        return None
    command = COMMANDS[program]
    if isinstance(command, click.Group):
        found = command.get_command(click.Context(command), arguments[0])
        assert found is not None, line
        return found, arguments[1:]
    return command, arguments


def unknown_options(command: click.Command, arguments: list[str]) -> list[str]:
    known = {name for option in command.params for name in (*option.opts, *option.secondary_opts)}
    given = [argument.partition("=")[0] for argument in arguments if re.match(r"--?[a-z]", argument)]
    return [option for option in given if option not in known]


def test_the_command_reference_is_what_help_says() -> None:
    assert (ROOT / "docs" / "cli.md").read_text(encoding="utf-8") == render(), "run: make docs"


def test_every_command_is_installed_and_the_package_by_its_own_name() -> None:
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["scripts"]
    for name, command in COMMANDS.items():
        assert resolve_name(scripts[name]) is command
    assert scripts["xadapter-export"] == scripts["xad"]  # uvx xadapter-export, pipx run xadapter-export


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\((?!https?://)([^)#]+)", page.read_text(encoding="utf-8"))
    assert [link for link in links if not (page.parent / link).exists()] == []


@pytest.mark.parametrize(
    ("page", "at_least"),
    [(ROOT / "README.md", 7), (ROOT / "docs" / "export.md", 4), (TRAINING, 24)],
    ids=["README", "export", "training"],
)
def test_console_blocks_show_programs_and_options_that_exist(page: Path, at_least: int) -> None:
    targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    checked = 0
    for line in console_lines(page):
        found = command_of(line)
        if found is not None:
            assert unknown_options(*found) == [], line
            checked += 1
        elif line.startswith("make "):
            assert line.split()[1] in targets, line
    assert checked >= at_least


def test_an_option_that_does_not_exist_is_found() -> None:
    found = command_of("xad-bank search builtin 'a --banana' --top-k 4 --hmtl x -k 3 -z")
    assert found is not None
    assert unknown_options(*found) == ["--hmtl", "-z"]


def test_the_training_guide_names_only_options_that_exist() -> None:
    commands: list[click.Command] = [*COMMANDS.values()]
    for group in [command for command in commands if isinstance(command, click.Group)]:
        names = group.list_commands(click.Context(group))
        commands += [found for name in names if (found := group.get_command(click.Context(group), name))]
    known = {
        name
        for command in commands
        for option in command.params
        for name in (*option.opts, *option.secondary_opts)
    }
    named = re.findall(r"`(--[a-z-]+)", TRAINING.read_text(encoding="utf-8"))
    assert len(named) > 10
    assert [option for option in named if option not in known] == []


def test_the_training_guide_shows_a_config_that_is_valid() -> None:
    (block,) = re.findall(r"```toml\n(.*?)```", TRAINING.read_text(encoding="utf-8"), re.DOTALL)
    config = make_config(tomllib.loads(block), "docs/training.md")
    assert config.data.train_files == ("answers.jsonl", "ordinary.txt")


def test_the_readme_quotes_the_results() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    results = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
    minilm = results[results.index("<!-- train.color begin -->") :]
    quoted = re.findall(r"\d+\.\d+ ± \d+\.\d+", readme)
    assert len(quoted) == 2
    assert [number for number in quoted if number not in minilm] == []
    shipped = {
        row.split("|")[1].strip(): row.split("|")[2].strip()
        for row in results[: results.index("### Language")].splitlines()
        if row.count("|") == 4
    }
    names = ("V-expert", "frozen PLM", "probe on the pictures' pixels")
    assert [name for name in names if f"{shipped[name]} %" not in readme] == []


def test_the_readme_quotes_the_benchmark() -> None:
    """Each time in the comparison is in the tables of ``make bench``."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    results = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
    speed = results[results.index("## Speed and size") : results.index("### With AVX2")]
    rows = readme[readme.index("| **this package**, onnxruntime") :].splitlines()[:6]
    times = [time for row in rows for cell in row.split("|")[2:4] for time in re.findall(r"[\d.]+", cell)]
    assert len(times) > 15
    assert [time for time in times if f" {time} (" not in speed] == []


def test_the_readme_is_short() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(re.sub(r"```.*?```", "", text, flags=re.DOTALL).split()) <= 700


def nav_pages(entries: list[object]) -> list[str]:
    found: list[str] = []
    for entry in entries:
        for value in entry.values() if isinstance(entry, dict) else [entry]:
            found += nav_pages(value) if isinstance(value, list) else [str(value)]
    return found


def test_the_site_leads_to_every_page(tmp_path: Path) -> None:
    gather_pages(tmp_path)
    nav = nav_pages(yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"])
    assert [page for page in nav if not (tmp_path / page).is_file()] == []
    assert {page.name for page in (ROOT / "docs").glob("*.md")} - set(nav) == set()


def test_links_of_the_site_lead_somewhere(tmp_path: Path) -> None:
    gather_pages(tmp_path)
    assert (tmp_path / "repository" / "CONTRIBUTING.md").is_file()
    for page in tmp_path.rglob("*.md"):
        links = re.findall(r"\]\((?!\w+:)([^)#\s]+)", page.read_text(encoding="utf-8"))
        assert [link for link in links if not (page.parent / link).exists()] == [], page
