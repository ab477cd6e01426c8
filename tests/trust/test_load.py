"""A part of ``make trust``: threads and processes get the answers of one thread, and what grows is seen."""

import random
from pathlib import Path

import pytest

from tests.trust.load import (
    Outcome,
    make_calls,
    make_expected,
    measure,
    measure_processes,
    open_all,
    write_bundles,
)

pytestmark = pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="memory is read from /proc")


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("load")
    write_bundles(folder, small=True)
    return folder


def test_threads_and_processes_answer_like_one_thread(bundles: Path) -> None:
    sessions = open_all(bundles)
    calls = make_calls(sessions, random.Random(0), count=4)
    assert {(call.bundle, call.experts) for call in calls} == {
        (name, experts) for name in sessions for experts in ("none", "v", "t", "vt")
    }
    expected = make_expected(sessions, calls)
    together = measure(sessions, expected, seconds=0, num_threads=8)
    apart = measure_processes(bundles, expected, seconds=0, num_processes=2)
    for outcome, count in ((together, 8), (apart, 2)):
        assert outcome.num_calls == count * len(expected)
        assert outcome.wrong == []
        assert outcome.percentile_ms(50) <= outcome.percentile_ms(99.9)


def test_another_answer_is_seen(bundles: Path) -> None:
    sessions = open_all(bundles)
    expected = make_expected(sessions, make_calls(sessions, random.Random(0), count=1))
    wrong = next(call for call in expected if call.texts != ("",))
    expected[wrong] = "something else"
    found = measure(sessions, expected, seconds=0, num_threads=2).wrong
    assert [line.partition(": ")[0] for line in found] == [str(wrong)] * 2


def test_memory_that_grows_is_seen() -> None:
    assert Outcome(growth_bytes=3 << 20, noise_bytes=1 << 20).grew
    assert not Outcome(growth_bytes=1 << 20).grew
    assert not Outcome(growth_bytes=3 << 20, noise_bytes=4 << 20).grew
