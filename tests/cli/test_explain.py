"""``xad run --explain`` on the terminal, as JSON and as a page."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from xadapter_export.bank.thumbnails import write_thumbnails
from xadapter_export.cli.run import run
from xadapter_export.exporters.pipeline import ExportResult

BANANA = "the color of a banana is [MASK]."


def call(folder: Path, *arguments: object) -> Result:
    line = [folder, BANANA, "--variant", "cpu-fp32", "--threads", 1, *arguments]
    result = CliRunner().invoke(run, [str(argument) for argument in line])
    assert result.exit_code == 0, result.output
    return result


def test_the_terminal_shows_shares_and_what_without(explained_export: ExportResult) -> None:
    lines = call(explained_export.folder, "--explain").stdout.splitlines()
    titles = [line.strip() for line in lines if line.strip() in ("V-expert", "T-expert")]
    assert titles == ["V-expert", "T-expert"]
    assert any(line.split()[:2] == ["share", "image"] for line in lines)
    assert any("CLIP token" in line for line in lines)
    [whole] = [line for line in lines if "without the V-expert" in line]
    assert whole.split()[-1].strip("()").endswith("%")
    shares = []
    for line in lines[lines.index("  V-expert") + 2 : lines.index("  T-expert") - 1]:
        if line.split()[0].endswith("%"):
            shares.append(float(line.split()[0].rstrip("%")))
    assert sum(shares) == pytest.approx(100, abs=0.5)
    assert "share" not in call(explained_export.folder).stdout


def test_two_masks_are_told_apart(explained_export: ExportResult) -> None:
    result = CliRunner().invoke(run, [str(explained_export.folder), "[MASK] and [MASK] .", "--explain"])
    assert "V-expert, mask 1" in result.stdout
    assert "T-expert, mask 2" in result.stdout


def test_json_has_everything(explained_export: ExportResult) -> None:
    printed = json.loads(call(explained_export.folder, "--explain", "--json").stdout)
    [why] = printed["explanations"]
    assert why["text"] == BANANA
    assert why["answers"][0]["answers"][0] == printed["replies"][0]["answers"][0]
    pictures, tokens = (expert["items"] for expert in why["answers"][0]["experts"])
    assert [item["row"] for item in pictures] == [p["row"] for p in printed["replies"][0]["pictures"]]
    assert set(tokens[0]) == {"name", "row", "id", "cosine", "share", "by_layer", "without"}
    assert "explanations" not in json.loads(call(explained_export.folder, "--json").stdout)


def test_a_page_with_thumbnails(explained_export: ExportResult, tmp_path: Path) -> None:
    page = tmp_path / "why.html"
    shown = call(explained_export.folder, "--explain-html", page)
    assert f"page: {page}" in shown.stdout
    text = page.read_text("utf-8")
    assert text.count("<figure>") == explained_export.manifest.bank.k  # type: ignore[union-attr]  # it has one
    assert "data:image/webp" not in text
    assert BANANA in text

    with write_thumbnails(tmp_path) as thumbnails:
        for row in range(30):
            thumbnails.add(row, b"webp")
    call(explained_export.folder, "--explain-html", page, "--pictures", tmp_path, "--force")
    assert page.read_text("utf-8").count("data:image/webp;base64,d2VicA==") == text.count("<figure>")
    assert "http" not in text
