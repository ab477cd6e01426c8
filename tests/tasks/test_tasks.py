"""Tasks: nothing outside their room knows one by its name, and others can be added from outside."""

import ast
from collections.abc import Mapping
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from tests import ROOT
from tests.branches import found_in
from tests.tiny_checkpoint import make_model, write_parts
from xadapter_export import XAdapterModel, XAdapterSession, export, registry
from xadapter_export.cli.run import run
from xadapter_export.errors import ConfigError, UnsupportedError
from xadapter_export.exporters.pipeline import ExportResult
from xadapter_export.model.pooling import mean_pool, unit_length
from xadapter_export.model.tasks import States, TaskHead, TextClassificationHead
from xadapter_export.tasks import TASKS
from xadapter_export.tasks.spec import Asked, Output, TaskSpec, best
from xadapter_export.tasks.text_classification import LabelAnswer, TextClassification
from xadapter_export.training import read_config, train

ROOM = ROOT / "xadapter_export" / "tasks"
SEARCHED = ("xadapter_export", "benchmarks", "examples", "export", "material", "train")
GROUP = "xadapter_export.tasks"
TEXTS = ["a banana is green.", "the color of a cherry"]

# ------------------------------------------------------------------------------------------ the house

OWN = tuple(TASKS)
SPECS = {type(TASKS[name]).__name__ for name in OWN} | {
    name.replace("-", "_").upper() for name in OWN
}  # FillMask, FILL_MASK


def names_a_task(node: ast.expr) -> bool:
    """Whether an expression is the name of a task, or its spec."""
    if isinstance(node, ast.Attribute):
        return node.attr in SPECS or names_a_task(node.value)
    return (isinstance(node, ast.Constant) and node.value in OWN) or (
        isinstance(node, ast.Name) and node.id in SPECS
    )


def test_no_code_outside_their_room_branches_on_a_task() -> None:
    files = [path for folder in SEARCHED for path in sorted((ROOT / folder).rglob("*.py"))]
    files = [path for path in files if ROOM not in path.parents]
    assert len(files) > 150
    found = [
        f"{path.relative_to(ROOT)}:{line}"
        for path in files
        for line in found_in(path.read_text(encoding="utf-8"), names_a_task)
    ]
    assert not found, "\n".join(found)


def test_the_library_writes_no_task_name_outside_their_room() -> None:
    written = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for path in sorted((ROOT / "xadapter_export").rglob("*.py"))
        if ROOM not in path.parents
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Constant) and node.value in OWN
    ]
    assert not written, "\n".join(written)


@pytest.mark.parametrize(
    "line",
    [
        'task == "fill-mask"',
        'task in ("text-classification", "feature-extraction")',
        "spec is FILL_MASK",
        "tasks.FILL_MASK.name != task",
        '{"fill-mask": 8}[task]',
        'limits["fill-mask"]',
        "isinstance(spec, FillMask)",
        "isinstance(spec, (TextClassification, int))",
        'match task:\n    case "fill-mask": pass',
    ],
)
def test_such_a_branch_is_found(line: str) -> None:
    assert list(found_in(line, names_a_task))


def test_naming_a_task_is_no_branch() -> None:
    source = 'export(model, task="fill-mask")\nrequire(FILL_MASK)\nname = FILL_MASK.name'
    assert not list(found_in(source, names_a_task))


# ------------------------------------------------------------------------------------------ from outside


class TokenClassification(TaskSpec):
    """A label for each token."""

    name = "token-classification"
    says = "a label for each token"
    reads = "all"
    head = "labels"
    outputs = (Output("logits", ("batch", "seq", "labels")),)
    compared = "logits"
    torch_half = "tests.tasks.test_tasks:TokenHead"

    def rows(self, values: NDArray[Any], feed: Mapping[str, NDArray[Any]]) -> NDArray[Any]:
        rows: NDArray[Any] = values[feed["attention_mask"] == 1]
        return rows

    def answers(self, values: NDArray[Any], asked: Asked) -> list[list[LabelAnswer]]:
        labels = asked.manifest.labels or ()
        firsts = [
            [(best(token, 1)[0], token) for token in row[mask == 1]]
            for row, mask in zip(values, asked.feed["attention_mask"], strict=True)
        ]
        return [
            [LabelAnswer(labels[i], score, float(token[i])) for (i, score), token in row] for row in firsts
        ]


class TokenHead(TaskHead):
    def make_head(self, hidden_size: int, num_labels: int) -> nn.Module:
        return nn.Linear(hidden_size, num_labels)

    def answer(self, states: States) -> tuple[Tensor, ...]:
        assert states.head is not None
        return (states.head(states.hidden),)


class MaxEmbedding(TaskSpec):
    """Embeddings of any checkpoint, pooled in another way."""

    name = "max-embedding"
    says = "embeddings, the largest of each number"
    reads = "all"
    head = None
    outputs = (Output("pooled", ("batch", "hidden")),)
    compared = "pooled"
    torch_half = "tests.tasks.test_tasks:MaxHead"


class MaxHead(TaskHead):
    def answer(self, states: States) -> tuple[Tensor, ...]:
        padding = (states.attention_mask == 0)[:, :, None]
        return (unit_length(states.hidden.masked_fill(padding, -1e4).amax(1)),)


class MeanClassification(TextClassification):
    """Labels from the mean of the tokens."""

    name = "mean-classification"
    reads = "all"
    torch_half = "tests.tasks.test_tasks:MeanHead"


class MeanHead(TextClassificationHead):
    def make_head(self, hidden_size: int, num_labels: int) -> nn.Module:
        return nn.Linear(hidden_size, num_labels)

    def answer(self, states: States) -> tuple[Tensor, ...]:
        assert states.head is not None
        return (states.head(mean_pool(states.hidden, states.attention_mask)),)


TOKEN_CLASSIFICATION = TokenClassification()
MAX_EMBEDDING = MaxEmbedding()
MEAN_CLASSIFICATION = MeanClassification()
NO_TASK = object()


@pytest.fixture(autouse=True)
def _installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Installs the tasks above, as a package with these entry points would."""
    names = {
        "token-classification": "TOKEN_CLASSIFICATION",
        "max-embedding": "MAX_EMBEDDING",
        "mean-classification": "MEAN_CLASSIFICATION",
        "another": "MAX_EMBEDDING",
        "broken": "NOTHING",
        "fill-mask": "NO_TASK",
    }
    points = [EntryPoint(name, f"tests.tasks.test_tasks:{value}", GROUP) for name, value in names.items()]
    monkeypatch.setattr(registry, "entry_points", lambda group: points if group == GROUP else [])
    monkeypatch.setattr(TASKS, "_loaded", dict(TASKS._loaded))


def test_the_table_lists_ours_first_and_loads_others_when_asked() -> None:
    assert tuple(TASKS)[:4] == (*OWN, "token-classification")
    assert "max-embedding" in TASKS
    assert "max-embedding" not in TASKS._loaded
    assert TASKS["max-embedding"] is MAX_EMBEDDING
    assert TASKS["fill-mask"] is not NO_TASK  # ours are never replaced


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("fly", r"there is no such task \(expected fill-mask, text-classification, .*, got fly\)"),
        ("broken", "a task cannot be loaded: xadapter_export.tasks: broken = tests.tasks.test_tasks:NOTHING"),
        ("another", r"an entry point gives another task: .*another = .* \(got max-embedding\)"),
    ],
)
def test_a_task_that_cannot_be_had_is_one_clear_error(name: str, message: str) -> None:
    with pytest.raises(UnsupportedError, match=message):
        TASKS[name]


def proven(result: ExportResult, output: str) -> XAdapterSession:
    """Return a session of a bundle whose proof compared this output."""
    assert result.parity.passed
    assert output in {cell.output for cell in result.parity.cells}
    return XAdapterSession.load(result.folder)


def test_a_label_for_each_token_from_checkpoint_to_answer(tmp_path: Path) -> None:
    model = make_model(tmp_path, task="token-classification", labels=("no", "yes", "maybe"))
    model.save_pretrained(tmp_path / "checkpoint", self_contained=True)
    texts = tmp_path / "texts.txt"
    texts.write_text("\n".join(f"{text} {n}" for n in range(3) for text in TEXTS), encoding="utf-8")
    again = XAdapterModel.from_pretrained(tmp_path / "checkpoint")
    variants = ("onnx-fp32", "onnx-fp16")
    result = export(again, tmp_path / "bundle", "vt", variants=variants, calibration=texts)
    session = proven(result, "logits")
    inputs = model.encode(TEXTS)
    with torch.no_grad():
        logits = model(**inputs).logits
    for row, mask, answers in zip(logits, inputs["attention_mask"], session.answer(TEXTS), strict=True):
        assert len(answers) == mask.sum()
        for token, answer in zip(row, answers, strict=False):
            assert answer.label == ("no", "yes", "maybe")[int(token.argmax())]
            assert answer.logit == pytest.approx(float(token.max()), abs=1e-4)
    agreement = result.manifest.variants[1].agreement
    assert agreement is not None
    assert agreement.num_answers > agreement.num_texts  # tokens, and no padding
    assert agreement.same_top == 1
    with pytest.raises(UnsupportedError, match=r"does not use second texts \(got token-classification\)"):
        session.answer(TEXTS, TEXTS)


def test_another_embedding_of_any_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = make_model(tmp_path)
    session = proven(export(model, tmp_path / "bundle", "vt", task="max-embedding"), "pooled")
    inputs = {name: torch.from_numpy(array) for name, array in model.text_encoder.encode(TEXTS).items()}
    with torch.no_grad():
        hidden = model(**inputs).last_hidden_state
    for text, row, mask in zip(session.answer(TEXTS), hidden, inputs["attention_mask"], strict=True):
        expected = row[mask == 1].amax(0)
        np.testing.assert_allclose(text, (expected / expected.norm()).numpy(), atol=1e-5)
    run([str(tmp_path / "bundle"), TEXTS[0]], standalone_mode=False)
    assert "32 numbers [" in capsys.readouterr().out
    with pytest.raises(
        UnsupportedError, match="trained for fill-mask and can be exported for that, or for a"
    ):
        export(model, tmp_path / "other", "vt", task="mean-classification")


def test_a_classifier_of_another_kind_is_trained_exported_and_asked(tmp_path: Path) -> None:
    plm, clip, bank = map(str, write_parts(tmp_path / "parts"))
    table = tmp_path / "train.tsv"
    table.write_text("".join(f"{text} {n}\t{n % 2}\n" for n in range(4) for text in TEXTS), encoding="utf-8")
    settings: dict[str, Any] = {
        "plm": plm,
        "clip": clip,
        "bank": bank,
        "train_files": [str(table)],
        "labels": ["no", "yes"],
    }
    settings |= {"layers": [1, 2], "adapter_width": 16, "num_heads": 2, "max_steps": 2, "experts": "vt"}
    settings |= {"output": str(tmp_path / "checkpoint"), "task": "mean-classification"}
    model = train(read_config(None, settings)).model
    assert any(name.startswith("head.") for name in model.trained_state())
    session = proven(export(tmp_path / "checkpoint", tmp_path / "bundle", "vt"), "logits")
    with torch.no_grad():
        logits = model(**model.encode(TEXTS)).logits
    for row, answers in zip(logits, session.answer(TEXTS), strict=True):
        assert {answer.label: answer.logit for answer in answers} == pytest.approx(
            dict(zip(("no", "yes"), row.tolist(), strict=True)), abs=1e-4
        )
    with pytest.raises(ConfigError, match="task: token-classification has nothing to train"):
        read_config(None, {**settings, "task": "token-classification"})
