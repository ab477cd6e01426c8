"""A part of ``make trust``: damaged folders are refused in one line or do no harm."""

import json
from pathlib import Path

import pytest

from tests.trust.damage import SUBJECTS, damage, run
from tests.trust.mutations import mutate
from xadapter_export.errors import CheckpointError

COUNTS = {"bundle": 130, "bank": 120, "index": 30, "checkpoint": 20}


@pytest.mark.parametrize("name", SUBJECTS)
def test_damage_is_refused_in_one_line_or_does_no_harm(name: str) -> None:
    if name == "index":
        pytest.importorskip("faiss")
    found = list(run(name, COUNTS[name], first=10_000))
    assert [one.seed for one in found] == list(range(10_000, 10_000 + COUNTS[name]))
    assert [one for one in found if not one.is_good] == []
    assert sum(one.outcome == "refused" for one in found) > COUNTS[name] / 3


def test_a_seed_does_the_same_damage_again(tmp_path: Path) -> None:
    done = []
    for name in ("one", "two"):
        SUBJECTS["bank"].make(tmp_path / name)
        what = [mutate(tmp_path / name, seed) for seed in range(3)]
        files = {path.name: path.read_bytes() for path in (tmp_path / name).iterdir() if path.is_file()}
        done.append((what, files))
    assert done[0] == done[1]
    SUBJECTS["bank"].make(tmp_path / "whole")
    whole = {path.name: path.read_bytes() for path in (tmp_path / "whole").iterdir()}
    assert done[0][1] != whole


def test_what_looks_for_harm_finds_it(tmp_path: Path) -> None:
    class Careless:
        def use(self, folder: Path) -> object:
            if not all((folder / name).is_file() for name in ("bank.json", "bank.safetensors")):
                raise CheckpointError("not there")
            json.loads((folder / "bank.json").read_text(encoding="utf-8"))
            return (folder / "bank.json").read_bytes(), (folder / "bank.safetensors").read_bytes()

    SUBJECTS["bank"].make(tmp_path / "whole")
    whole = Careless().use(tmp_path / "whole")
    work = tmp_path / "work"
    found = [damage(Careless(), tmp_path / "whole", work, seed, whole) for seed in range(0, 40, 2)]
    outcomes = {one.outcome for one in found}
    assert {"traceback", "other answers"} <= outcomes
    assert not any(one.is_good for one in found if one.outcome not in {"equal", "refused"})
