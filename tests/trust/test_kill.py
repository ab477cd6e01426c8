"""A part of ``make trust``: a command that is killed leaves the whole old thing or the whole new one."""

import sys

import pytest

from tests.trust.kill import CASES, LOST, kill


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no locks by which leftovers are known")
def test_a_killed_command_leaves_the_old_or_the_new_thing() -> None:
    killed = list(kill(CASES["xad-bank merge"], (0.5, 0.75, 0.85, 0.9, 0.95)))
    assert len(killed) == 5
    assert [one for one in killed if one.found == LOST] == []
