"""Experts: one table has their names, order and what they read; a third kind is a line in it."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from tests import ROOT
from tests.branches import found_in
from xadapter_export.errors import UnsupportedError
from xadapter_export.experts import (
    EXPERT_SETS,
    KINDS,
    experts_of,
    known_expert,
    known_experts,
    known_set,
    reads_bank,
    reads_text,
    set_of,
    title_of,
)

ROOM = ROOT / "xadapter_export" / "experts.py"
ALLOWED = {
    "xadapter_export/training/batches.py": "t is an argument of TrainingModel.forward",
    "xadapter_export/model/clip_text.py": "none is open_clip's word for no projection and no approximation",
    "xadapter_export/targets.py": "none is the word for a target that keeps no taps",
}


def is_an_expert(node: ast.expr) -> bool:
    """Whether an expression is the name of an expert or of a set, or one of the table."""
    if isinstance(node, ast.Attribute):  # V.name, but no transposed array
        return node.attr == "name" and is_an_expert(node.value)
    return (isinstance(node, ast.Constant) and node.value in EXPERT_SETS) or (
        isinstance(node, ast.Name) and node.id in {"V", "T"}
    )


def library() -> list[tuple[str, str]]:
    files = sorted((ROOT / "xadapter_export").rglob("*.py"))
    names = {path: path.relative_to(ROOT).as_posix() for path in files if path != ROOM}
    return [(name, path.read_text(encoding="utf-8")) for path, name in names.items()]


def test_no_code_outside_their_table_branches_on_an_expert() -> None:
    found = {name: list(found_in(source, is_an_expert)) for name, source in library()}
    looked_up = {name: lines for name, lines in found.items() if lines}
    for name in ALLOWED:
        assert looked_up.pop(name), f"{name} is in ALLOWED and needs not be"
    # A static bank is folded for, or distilled to, the layers of one expert: the table says which.
    assert set(looked_up) <= {
        "xadapter_export/exporters/portable/merge.py",
        "xadapter_export/training/objective.py",
    }
    for name, source in library():
        if name in looked_up:
            lines = source.splitlines()
            assert all("[V.name]" in lines[line - 1] for line in looked_up[name]), (name, looked_up[name])


def test_the_library_writes_no_expert_outside_their_table() -> None:
    names = set(EXPERT_SETS) - {"none"}
    written = []
    for name, source in library():
        nodes = list(ast.walk(ast.parse(source)))
        pieces = {id(piece) for node in nodes if isinstance(node, ast.JoinedStr) for piece in node.values}
        found = [node for node in nodes if isinstance(node, ast.Constant) and node.value in names]
        written += [
            f"{name}:{node.lineno}" for node in found if name not in ALLOWED and id(node) not in pieces
        ]
    assert not written, "\n".join(written)


@pytest.mark.parametrize(
    "line",
    [
        '"v" in expert_set',
        'experts == "none"',
        'expert in ("v", "t")',
        "expert == V.name",
        "kind is T",
        'adapters["t"]',
        '{"vt": "V + T"}',
    ],
)
def test_such_a_branch_is_found(line: str) -> None:
    assert list(found_in(line, is_an_expert))


def test_sets_are_any_experts_together() -> None:
    assert EXPERT_SETS == ("none", "v", "t", "vt")
    for name in EXPERT_SETS:
        assert set_of(reversed(experts_of(name))) == name
    assert [title_of(name) for name in EXPERT_SETS] == ["frozen PLM", "V-expert", "T-expert", "V + T"]
    assert [reads_bank(name) for name in EXPERT_SETS] == [False, True, False, True]
    assert [reads_text(experts_of(name)) for name in EXPERT_SETS] == [False, False, True, True]
    assert tuple(KINDS) == ("v", "t")


def test_what_is_no_set_is_one_clear_error() -> None:
    with pytest.raises(
        UnsupportedError, match=r"no such expert set \(expected one of none, v, t, vt, got w\)"
    ):
        known_set("w")
    with pytest.raises(
        UnsupportedError, match=r"no such set of experts \(expected one of v, t, vt, got none\)"
    ):
        known_experts("none")
    with pytest.raises(UnsupportedError, match=r"no such expert \(expected one of v, t, got vt\)"):
        known_expert("vt")


@pytest.mark.slow
def test_a_third_kind_is_a_line_in_the_table(tmp_path: Path) -> None:
    code = f"""
from pathlib import Path
from xadapter_export import experts
experts.KINDS["w"] = experts.ExpertKind("w", "W-expert", "text")
experts.EXPERT_SETS = experts.all_sets()
import torch
from tests.tiny_checkpoint import make_model
from xadapter_export import XAdapterModel, XAdapterSession, export
folder = Path({str(tmp_path)!r})
model = make_model(folder, experts="vtw")
model.save_pretrained(folder / "checkpoint", self_contained=True)
model = XAdapterModel.from_pretrained(folder / "checkpoint")
result = export(model, folder / "bundle", ("vtw", "tw", "w", "none"))
assert result.parity.passed
taps = [tap.expert for tap in result.manifest.expert_sets["tw"].taps]
assert taps == ["t", "w", "t", "w"], taps
assert result.manifest.expert_sets["w"].component_parameters["adapter_w"] > 0
session = XAdapterSession.load(result.folder)
text = "a banana is [MASK]."
with torch.no_grad():
    for name in ("tw", "w"):
        said = model(**model.encode([text]), experts=name).logits[0, 0]
        got = session.fill_mask(text, experts=name)[0]
        assert got.token_id == int(said.argmax())
        assert abs(got.logit - float(said.max())) < 1e-4
"""
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
