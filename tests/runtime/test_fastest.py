"""The variant that is the fastest here is measured, and what was measured is kept."""

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest

from tests.sessions.test_load_check import BANANA, VARIANTS, break_weight
from tests.tiny_bundle import write_bundle
from xadapter_export import XAdapterSession
from xadapter_export.errors import BundleError, ConfigError, ParityError
from xadapter_export.runtime import fastest, graphs
from xadapter_export.runtime.fastest import Timings, recall, remember, time_in_turn


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_bundle(tmp_path / "bundle", sets=("t", "v"), variants=VARIANTS)


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, ...]]:
    """Let cpu-fp32 be measured as the fastest; returns which variants were timed, call by call."""
    calls: list[tuple[str, ...]] = []

    def measure(runs: dict[str, Any], deadline: float) -> Timings:
        for run in runs.values():
            run()
        calls.append(tuple(runs))
        return Timings({name: 1.0 if name == "cpu-fp32" else 2.0 for name in runs})

    monkeypatch.setattr(graphs, "time_in_turn", measure)
    return calls


def load(folder: Path, **options: Any) -> XAdapterSession:
    return XAdapterSession.load(folder, variant="fastest", num_threads=1, **options)


def test_every_variant_is_timed_and_the_fastest_answers(folder: Path, timed: list[tuple[str, ...]]) -> None:
    session = load(folder, experts="v")
    assert set(timed[0]) == set(VARIANTS)
    assert session.answered_by == "cpu-fp32"
    assert session.variant_reason.startswith("measured: cpu-fp32 1.00 ms, ")
    assert session.fill_mask(BANANA)[0].token == "yellow"
    assert {check.variant for check in session.checks} == set(VARIANTS)
    assert session.with_experts("t").answered_by == "cpu-fp32"
    load(folder, experts="v")
    assert len(timed) == 2  # nothing was kept


def test_what_was_measured_is_kept_for_these_files_this_cpu_and_these_threads(
    folder: Path, tmp_path: Path, timed: list[tuple[str, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "new" / "cache"
    load(folder, cache_dir=cache)
    session = load(folder, cache_dir=str(cache))
    assert len(timed) == 1
    assert session.answered_by == "cpu-fp32"
    assert session.variant_reason.startswith("measured before: cpu-fp32 1.00 ms, ")
    assert os.listdir(cache) == ["fastest.json"]
    load(folder, cache_dir=cache, experts="t")
    XAdapterSession.load(folder, variant="fastest", num_threads=2, cache_dir=cache)
    other = write_bundle(tmp_path / "other", sets=("t", "v"), variants=VARIANTS[:2])
    load(other, cache_dir=cache)
    assert len(timed) == 4
    monkeypatch.setattr(fastest, "read_machine", lambda: "another CPU")
    load(folder, cache_dir=cache)
    assert len(timed) == 5
    assert len(json.loads((cache / "fastest.json").read_text("utf-8"))) == 5


@pytest.mark.parametrize(
    "broken", ["", "[1]", "{", "[" * 100_000, '{"KEY": 1}', '{"KEY": {}}', '{"KEY": {"cpu-fp32": "x"}}',
               '{"KEY": {"gone-fp32": 1.0}}', '{"KEY": {"cpu-fp32": -1.0}}'],
)  # fmt: skip
def test_what_is_broken_is_measured_again(tmp_path: Path, broken: str) -> None:
    remember(tmp_path, "KEY", Timings({"cpu-fp32": 1.5}))
    assert recall(tmp_path, "KEY", VARIANTS) == Timings({"cpu-fp32": 1.5})
    (tmp_path / "fastest.json").write_text(broken, encoding="utf-8")
    assert recall(tmp_path, "KEY", VARIANTS) is None
    remember(tmp_path, "KEY", Timings({"cpu-int8": 2.5}))
    assert recall(tmp_path, "KEY", VARIANTS) == Timings({"cpu-int8": 2.5})


def test_a_folder_that_cannot_be_written_is_one_line(folder: Path, timed: list[tuple[str, ...]]) -> None:
    with pytest.raises(ConfigError, match=r"^the timings cannot be saved: .*manifest\.json"):
        load(folder, cache_dir=folder / "manifest.json")


def test_only_so_many_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fastest, "_MOST_KEPT", 3)
    for key in "abcd":
        remember(tmp_path, key, Timings({"cpu-fp32": 1.0}))
    assert list(json.loads((tmp_path / "fastest.json").read_text("utf-8"))) == ["b", "c", "d"]


def test_what_is_wrong_here_is_left_out(folder: Path, timed: list[tuple[str, ...]]) -> None:
    break_weight(folder, "cpu-fp32", "v", "adapter_v")
    with pytest.warns(UserWarning, match=r"wrong outputs .*: cpu-fp32, experts v, .*; skipping it"):
        session = load(folder, experts="v")
    assert session.answered_by != "cpu-fp32"
    assert "cpu-fp32" not in timed[0]
    for name in ("onnx-fp32", "cpu-int8"):
        break_weight(folder, name, "v", "adapter_v")
    with (
        pytest.warns(UserWarning, match="skipping it"),
        pytest.raises(ParityError, match="every suitable v"),
    ):
        load(folder, experts="v")


def test_no_more_are_opened_when_time_is_up(
    folder: Path, timed: list[tuple[str, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(graphs, "OPENING_S", 0.0)
    session = load(folder)
    assert len(timed[0]) == 1
    assert "; not timed: " in session.variant_reason


def test_int4_and_what_does_not_suit_are_not_taken(tmp_path: Path) -> None:
    only = write_bundle(tmp_path / "b", sets=("t",), variants=("cpu-int4",))
    with pytest.raises(BundleError, match="has no suitable variant for this machine"):
        load(only)


def test_runs_are_timed_in_turn_and_the_clear_winner_ends_it(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    clock = [0.0]

    def pass_time(name: str, seconds: float) -> None:
        order.append(name)
        clock[0] += seconds

    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    runs = {"slow": lambda: pass_time("slow", 0.5), "quick": lambda: pass_time("quick", 0.25)}
    timings = time_in_turn(runs, 100.0)
    assert order[:4] == ["slow", "quick", "slow", "quick"]
    assert timings == Timings({"slow": 500.0, "quick": 250.0})
    assert (timings.fastest, str(timings)) == ("quick", "quick 250.00 ms, slow 500.00 ms")
    assert len(order) == 2 * fastest._MIN_ROUNDS
    order.clear()
    time_in_turn(runs | {"quick": lambda: pass_time("quick", 0.49)}, 100.0)  # too near to call early
    assert len(order) == 2 * fastest._MAX_ROUNDS
    order.clear()
    time_in_turn(runs, 0.0)  # too late, and each is run all the same
    assert order == ["slow", "quick"]


def test_a_real_measurement_says_what_it_measured(folder: Path) -> None:
    session = load(folder)
    assert all(name in session.variant_reason for name in VARIANTS)
    assert session.fill_mask(BANANA)[0].token == "yellow"
