import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import onnx
import pytest
import torch
from click.testing import CliRunner

from tests import ROOT
from tests.perturbed import prove_with_each_matrix_off
from xadapter_export import XAdapterSession, export
from xadapter_export.bundle.manifest import ExpertSet
from xadapter_export.cli.export import export as export_command
from xadapter_export.evaluation.objects import ELEVEN
from xadapter_export.experts import EXPERT_SETS
from xadapter_export.exporters.pipeline import ExportResult
from xadapter_export.model.builtin import builtin_folder
from xadapter_export.model.x_adapter_model import XAdapterModel

BIN = Path(sys.executable).parent


@pytest.fixture(scope="module")
def model() -> XAdapterModel:
    return XAdapterModel.from_pretrained("builtin")


@pytest.fixture(scope="module")
def result(builtin_export: ExportResult) -> ExportResult:
    return builtin_export


@pytest.fixture(scope="module")
def questions() -> list[tuple[str, str]]:
    """Sentence and the color that people say, for every held-out object and unseen template."""
    lines = (builtin_folder() / "heldout.jsonl").read_text(encoding="utf-8").splitlines()
    return [(text, entry["color"]) for entry in map(json.loads, lines) for text in entry["sentences"]]


def size_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def test_it_is_small_and_whole_and_has_its_notices(model: XAdapterModel) -> None:
    assert size_bytes(builtin_folder()) <= 12_000_000
    suffixes = {path.suffix for path in builtin_folder().rglob("*") if path.is_file()}
    assert suffixes <= {".json", ".jsonl", ".safetensors", ".md"}
    assert model.config.experts == "vt"
    notice = (builtin_folder() / "NOTICE.md").read_text(encoding="utf-8")
    assert all(name in notice for name in ("Noto", "Fluent", "CoDa", "Apache-2.0", "MIT"))


def test_every_expert_set_is_proven(result: ExportResult) -> None:
    assert result.parity.passed
    assert {cell.expert_set for cell in result.parity.cells} == set(EXPERT_SETS)


def test_any_adapter_matrix_that_is_5_percent_off_fails(result: ExportResult, tmp_path: Path) -> None:
    outcomes = prove_with_each_matrix_off(Path(shutil.copytree(result.folder, tmp_path / "bundle")))
    assert len(outcomes) == 2 * 2 * 4  # layers x experts x (query, key, value, out)
    assert not any(outcomes.values()), outcomes


def test_switching_an_expert_off_changes_the_answer_by_far_more_than_the_tolerance(
    result: ExportResult,
) -> None:
    session = XAdapterSession.load(result.folder)

    def logits(experts: ExpertSet) -> dict[str, float]:
        answers = session.fill_mask(
            "The color of a frog is [MASK].", candidates=ELEVEN, top_k=11, experts=experts
        )
        return {answer.token: answer.logit for answer in answers}

    pairs: list[tuple[ExpertSet, ExpertSet]] = [("vt", "v"), ("vt", "t"), ("v", "none"), ("t", "none")]
    for with_it, without in pairs:
        a, b = logits(with_it), logits(without)
        assert any(abs(a[color] - b[color]) > 100 * (1e-4 + 1e-4 * abs(b[color])) for color in ELEVEN)


def test_exported_graphs_give_the_answers_of_pytorch(
    model: XAdapterModel, result: ExportResult, questions: list[tuple[str, str]]
) -> None:
    session = XAdapterSession.load(result.folder)
    texts = [text for text, _ in questions]
    ids = [model.plm.tokenizer.token_to_id(color) for color in ELEVEN]
    inputs = model.encode(texts)
    share_right = {}
    for experts in EXPERT_SETS:
        with torch.no_grad():
            best = model(**inputs, experts=experts).logits[:, 0, ids].argmax(-1)
        expected = [ELEVEN[index] for index in best.tolist()]
        answers = session.fill_mask(texts, candidates=ELEVEN, top_k=1, experts=experts)
        said = [answer[0].token for answer in answers]
        assert said == expected
        num_right = sum(a == color for a, (_, color) in zip(said, questions, strict=True))
        share_right[experts] = num_right / len(said)
    published = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
    rows: dict[ExpertSet, str] = {"none": "frozen PLM", "v": "V-expert", "t": "T-expert", "vt": "V + T"}
    for experts, row in rows.items():
        assert f"| {row} | {100 * share_right[experts]:.1f} |" in published
    assert share_right["v"] > share_right["none"] + 0.25
    assert share_right["t"] > share_right["none"]


def test_it_answers_from_the_pictures_of_what_is_asked(result: ExportResult) -> None:
    session = XAdapterSession.load(result.folder, experts="v")
    for name, color in (("frog", "green"), ("strawberry", "red")):
        question = f"The color of a {name} is [MASK]."
        assert sum(picture.caption == name for picture in session.retrieve(question)) >= 3
        assert session.fill_mask(question)[0].token == color


def test_four_sets_cost_little_more_than_one(
    model: XAdapterModel, result: ExportResult, tmp_path: Path
) -> None:
    alone = export(model, tmp_path / "vt", "vt")
    assert size_bytes(result.folder) <= 1.02 * size_bytes(alone.folder)


@pytest.mark.parametrize(
    "text",
    [
        "Die Farbe der Äpfel ist [MASK].",
        "Το χρώμα [MASK].",
        "Цвет травы [MASK].",
        "naïve café [MASK]",
        "12 + 30 = [MASK]!?",
    ],
)
def test_both_tokenizers_read_any_letters(text: str, result: ExportResult, model: XAdapterModel) -> None:
    unknown = model.plm.tokenizer.token_to_id("[UNK]")
    inputs = model.encode([text])
    assert unknown not in inputs["input_ids"]
    assert XAdapterSession.load(result.folder).fill_mask(text)


def run(folder: Path, *command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(BIN / command[0]), *command[1:]],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "COLUMNS": "200"},
    )


def test_the_commands_in_an_empty_folder(tmp_path: Path) -> None:
    done = run(tmp_path, "xad-export", "--experts", "t", "--opset", "17")
    assert done.returncode == 0, done.stderr
    assert f"bundle: {tmp_path / 'bundle-t'}" in done.stdout
    graph = onnx.load(tmp_path / "bundle-t" / "onnx" / "model.onnx", load_external_data=False)
    assert [(entry.domain, entry.version) for entry in graph.opset_import] == [("", 17)]
    onnx.checker.check_model(tmp_path / "bundle-t" / "onnx" / "model.onnx", full_check=True)
    assert {path.name for path in tmp_path.iterdir()} == {"bundle-t"}

    again = run(tmp_path, "xad-export", "--experts", "t")
    assert again.returncode == 1
    assert "output path already exists" in again.stderr
    assert "Traceback" not in again.stderr
    old = run(tmp_path, "xad-export", "--experts", "t", "--opset", "16")
    assert old.returncode == 2
    assert (
        "opset 16 is not supported: expected 17 to 21, LayerNormalization is standard only since 17"
        in old.stderr
    )

    answer = run(tmp_path, "xad-run", "bundle-t", "The color of a strawberry is [MASK].", "--json")
    assert answer.returncode == 0, answer.stderr
    assert json.loads(answer.stdout)
    assert run(tmp_path, "xad-parity", "bundle-t").returncode == 0
    assert run(tmp_path, "xad-inspect", "bundle-t").returncode == 0


def test_sigterm_leaves_nothing(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [str(BIN / "xad-export"), "--experts", "t"], cwd=tmp_path, stderr=subprocess.PIPE, text=True
    )
    assert process.stderr is not None
    for line in process.stderr:
        if "trace" in line:  # by now the staged folder is there
            break
    assert list(tmp_path.iterdir())
    process.terminate()
    assert "stopped" in process.stderr.read()
    assert process.wait() == 143
    process.stderr.close()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("missing.txt", "cannot read the file missing.txt"),
        ("latin.txt", "latin.txt is not a UTF-8 text file"),
        (",".join(f"no{i}word" for i in range(60)), "a candidate is not one token of the language model"),
    ],
)
def test_candidates_that_cannot_be_read(
    value: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "latin.txt").write_bytes("gr\xfcn".encode("latin-1"))
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(export_command, ["--experts", "t", "--candidates", value])
    assert done.exit_code in {1, 2}
    assert message in done.stderr
    assert {path.name for path in tmp_path.iterdir()} == {"latin.txt"}
