"""What an attacker puts into a bundle, a bank or a text is refused or only shown; nothing of it is obeyed."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from tests.tiny_bundle import rehash, rewrite_manifest
from xadapter_export.cli.main import xad

BANANA = "the color of a banana is [MASK]."
CONTROLS = "\x1b[2J\x07\x9b31m\u202e"


def call(*arguments: object) -> Result:
    return CliRunner().invoke(xad, [str(argument) for argument in arguments])


def is_plain(text: str) -> bool:
    return not set(text) & set(CONTROLS.replace("[2J", "").replace("31m", ""))


@pytest.fixture
def painted(broken: Path) -> Path:
    """Return a bundle whose captions, vocabulary and names hold what a terminal obeys."""
    lines = [json.dumps({"id": f"{i}{CONTROLS}", "caption": f"picture {i}{CONTROLS}"}) for i in range(3)]
    (broken / "bank.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    tokenizer = json.loads((broken / "tokenizer.json").read_text(encoding="utf-8"))
    vocabulary = tokenizer["model"]["vocab"]
    tokenizer["model"]["vocab"] = {
        f"{word}{CONTROLS}" if word == "yellow" else word: i for word, i in vocabulary.items()
    }
    (broken / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    manifest = json.loads((broken / "manifest.json").read_text(encoding="utf-8"))
    for part in ("plm", "clip", "checkpoint"):
        manifest[part]["source"] += CONTROLS
    rewrite_manifest(broken, **manifest)
    rehash(broken)
    return broken


@pytest.mark.parametrize(
    "arguments", [("run",), ("run", "--compare"), ("run", "--json"), ("inspect",), ("inspect", "--json")]
)
def test_nothing_that_a_terminal_obeys_comes_out_of_a_bundle(
    painted: Path, arguments: tuple[str, ...]
) -> None:
    command, *options = arguments
    texts = [f"{BANANA}{CONTROLS}"] if command == "run" else []
    result = call(command, painted, *texts, *options)
    assert result.exit_code == 0, result.output
    assert is_plain(result.output)
    assert "x1b" in result.stdout or "u001b" in result.stdout


def test_an_error_obeys_no_terminal_and_stays_short(painted: Path) -> None:
    manifest = json.loads((painted / "manifest.json").read_text(encoding="utf-8"))
    rewrite_manifest(painted, task=f"{CONTROLS}{'x' * 10**5}", created_with=manifest["created_with"])
    result = call("inspect", painted)
    assert result.exit_code == 1
    assert is_plain(result.output)
    assert len(result.output) < 5000
    assert len(result.output.splitlines()) == 1
