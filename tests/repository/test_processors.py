"""The built-in checkpoint on two emulated processors: x86 without VNNI, and an Arm one."""

import json
import subprocess
from pathlib import Path

import numpy as np
import pytest

from benchmarks.processors import __main__ as program
from benchmarks.processors import debian, haswell, report
from benchmarks.processors.compare import Finding, Ran, compare, wrong
from benchmarks.processors.debian import UnavailableError, call
from benchmarks.processors.emulated import PROCESSORS, Machine, build, native
from benchmarks.processors.run import NATIVE, run_all
from xadapter_export import export
from xadapter_export.bundle.folder import read_bundle
from xadapter_export.bundle.manifest import Manifest
from xadapter_export.model.builtin import builtin_folder

SMALL = ("haswell", "neoverse-n1")
NUM_TEXTS = 30


@pytest.fixture(scope="module")
def machines() -> dict[str, Machine]:
    """Return the emulated processors; downloads are kept in ``build/processors``."""
    try:
        return {PROCESSORS[name].name: build(PROCESSORS[name]) for name in SMALL}
    except UnavailableError as error:
        pytest.skip(f"no emulated processor: {error}")


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("processors") / "bundle"
    return export("builtin", folder, "vt", precisions=("fp32", "int8"), min_agreement=0.9).folder


@pytest.fixture(scope="module")
def ran(
    machines: dict[str, Machine], bundle: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Ran]:
    lines = (builtin_folder() / "heldout.jsonl").read_text(encoding="utf-8").splitlines()
    texts = [json.loads(line)["sentences"][0] for line in lines][:NUM_TEXTS]
    cases = {"builtin": {"bundle": str(bundle), "texts": texts, "sets": ["vt"], "proven": ["vt"]}}
    job = {"routes": ["plain", "session"], "cases": cases}
    found, left_out = run_all({NATIVE: native(), **machines}, job, tmp_path_factory.mktemp("answers"))
    assert not left_out
    return found


def test_fp32_is_proven_on_each_processor(ran: dict[str, Ran]) -> None:
    for found in ran.values():
        assert found.parity["builtin"]["passed"]
        assert found.parity["builtin"]["cells"] > 20
    assert [found.machine["architecture"] for found in ran.values()] == ["x86_64", "x86_64", "aarch64"]


def test_every_variant_answers_there_as_here(ran: dict[str, Ran], bundle: Path) -> None:
    manifest = read_bundle(bundle).manifest
    for name in list(ran)[1:]:
        findings = list(compare(name, ran[name], ran[NATIVE], {"builtin": manifest}))
        assert {(f.variant, f.route) for f in findings} >= {
            (variant, route) for variant in ("cpu-int8", "onnx-fp32") for route in ("session", "plain")
        }
        assert not [(f.variant, f.route, f.reason) for f in findings if f.reason]
        for finding in findings:
            assert finding.same_as_native > 1 - 2 / NUM_TEXTS, finding  # a tie may fall the other way


def test_a_processor_is_what_it_is_called(machines: dict[str, Machine]) -> None:
    code = "from pathlib import Path; print(Path('/proc/cpuinfo').read_text())"
    seen = {
        name: subprocess.run(
            [*m.command, "-c", code], env=m.whole_environment(), check=True, capture_output=True, text=True
        ).stdout.split()
        for name, m in machines.items()
    }
    assert "avx2" in seen["Haswell"]
    assert "avx512_vnni" not in seen["Haswell"]
    assert "asimddp" in seen["Neoverse-N1"]


# ------------------------------------------------------------------------- without an emulator


def answers(rows: list[list[float]]) -> Ran:
    """One variant that says ``rows``, beside fp32 that always says the second of three."""
    arrays = {
        "builtin/vt/onnx-fp32/plain": np.array([[0.0, 1.0, 0.0]] * len(rows), np.float32),
        "builtin/vt/cpu-int8/plain": np.array(rows, np.float32),
    }
    row = {"case": "builtin", "experts": "vt", "variant": "cpu-int8", "route": "plain", "reason": ""}
    return Ran({}, {"builtin": {"passed": True, "cells": 2, "max_abs": 1e-6}}, [row], arrays)


def test_answers_that_differ_from_here_are_wrong(bundle: Path) -> None:
    manifests: dict[str, Manifest] = {"builtin": read_bundle(bundle).manifest}
    right, other = [[0.0, 2.0, 0.0]] * 4, [[0.0, 2.0, 0.0]] * 3 + [[2.0, 0.0, 0.0]]
    (same,) = compare("A", answers(right), answers(right), manifests)
    (found,) = compare("A", answers(other), answers(right), manifests)
    assert (same.kept, same.same_as_native, same.max_difference, same.is_right) == (1, 1, 0, True)
    assert (found.kept, found.kept_natively, found.same_as_native, found.max_difference) == (0.75, 1, 0.75, 2)
    assert wrong([same, found]) == [found]
    (nan,) = compare("A", answers([[float("nan")] * 3] * 4), answers(right), manifests)
    assert (nan.kept, nan.is_right) == (0, False)
    cells = report.kept_grid([found], ["A"]).rows[0]
    assert cells[-1] == "**75.0**"
    assert report.native_grid([found], ["A"]).rows == (("builtin, cpu-int8", "75.0 (2)"),)


def test_a_refused_variant_is_named_and_answers_nothing() -> None:
    refused = Finding("A", "builtin", "vt", "cpu-int8", "session", 0.99, reason="refused; cpu-fp32 answered")
    assert not refused.is_right
    assert wrong([refused]) == []
    assert report.kept_grid([refused], ["A"]).rows[0][-1] == "refused"


def test_what_cannot_be_had_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UnavailableError, match="a program is not installed: no-such-program"):
        call(["no-such-program"])
    with pytest.raises(UnavailableError, match=r"a program failed: sh -c \(got no mirror\)"):
        call(["sh", "-c", "echo no mirror >&2; exit 3"])
    monkeypatch.setattr(debian, "call", lambda command: "")
    with pytest.raises(UnavailableError, match="apt has no mirror of Debian here"):
        debian.unpack(tmp_path / "qemu", ["qemu-user"], "trixie", "amd64")
    assert not (tmp_path / "qemu").exists()


def test_a_program_that_fails_is_one_line(tmp_path: Path) -> None:
    found, left_out = run_all({"this": native()}, {"cases": {"a": {}}}, tmp_path)
    assert not found
    assert "a processor failed: this (got exit 1: KeyError: 'bundle')" in left_out["this"]


def test_what_is_off_is_asked_more_texts(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    off = Finding("A", "builtin", "vt", "cpu-int8", "plain", 0.99, kept=0.96, kept_natively=0.98)
    right = Finding("A", "builtin", "vt", "onnx-fp32", "plain", None, kept=1.0, kept_natively=1.0)
    monkeypatch.setattr(program, "NUM_MORE_TEXTS", 7)
    machines = {NATIVE: native(), "A": native()}
    same, asked = sorted(
        program.ask_again([right, off], machines, {"builtin": bundle}, tmp_path),
        key=lambda finding: finding.is_of_more_texts,
    )
    assert same is right
    assert (asked.is_of_more_texts, asked.is_right, asked.same_as_native) == (True, True, 1.0)
    with np.load(tmp_path / "answers" / "again" / "A-plain" / "A" / "answers.npz") as answers:
        assert {name: len(array) for name, array in answers.items()} == {
            "builtin/vt/onnx-fp32/plain": 5,  # the others are this machine's
            "builtin/vt/cpu-int8/plain": 7,
        }
    assert "(natively 100.0)" in report.kept_grid([asked], ["A"]).rows[0][-1]


def test_a_table_of_tests(tmp_path: Path) -> None:
    junit = tmp_path / "tests.xml"
    junit.write_text(
        '<testsuites><testsuite><testcase classname="tests.test_a" name="test_x[1]" time="2.0"/>'
        '<testcase classname="tests.test_a" name="test_x[2]" time="1.0"><failure/></testcase>'
        '<testcase classname="tests.test_a" name="test_y" time="0"><skipped/></testcase>'
        "</testsuite></testsuites>",
        encoding="utf-8",
    )
    assert haswell.tests_grid(junit).rows == (
        ("test_a, test_x", "1", "1", "0", "3"),
        ("test_a, test_y", "0", "0", "1", "0"),
    )
