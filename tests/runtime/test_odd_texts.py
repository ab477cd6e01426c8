"""Texts that people and attackers send: a defined answer or one clear line; the next text is not harmed."""

import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from xadapter_export import XAdapterSession
from xadapter_export.errors import InputTextError

PLAIN = "the color of a banana is [MASK]."
TEXTS = {
    "empty": "",
    "whitespace": " \t\n\u3000",
    "no mask": "a banana",
    "NUL": "a \0 banana is [MASK]",
    "lone surrogate": "a \ud800 [MASK]",
    "surrogate of a file name": "caf\udce9 [MASK]",
    "right to left": "\u202e\u05e9\u05dc\u05d5\u05dd [MASK] \u0645\u0631\u062d\u0628\u0627",
    "combining flood": "a" + "\u0301" * 10_000 + " [MASK]",
    "emoji": "\U0001f468\u200d\U0001f469\u200d\U0001f467 [MASK] \U0001f34c",
    "many scripts": "".join(chr(block * 0x80 + 0x25) for block in range(1, 100)) + " [MASK]",
    "unassigned": "\uffff\U0010ffff [MASK]",
    "500 masks": "[MASK] " * 500,
    "masks far apart": "[MASK]" + " very" * 500 + " [MASK]",
    "a megabyte": "very " * 200_000 + "[MASK]",
    "one long word": "x" * 1_000_000 + " [MASK]",
    "controls": "\x1b[2J\x07 [MASK]",
    "other mask": "<mask> [mask] [MASK ]",
}


@pytest.mark.parametrize("name", TEXTS)
def test_an_odd_text_is_answered_or_refused_in_one_line(tiny: Path, name: str) -> None:
    session = XAdapterSession.load(tiny)
    before = session.fill_mask(PLAIN)
    outcomes = []
    for _ in range(2):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # that it was cut
                answers = session.fill_mask(TEXTS[name], top_k=2)
            assert len(answers) == 2 * max(1, min(TEXTS[name].count("[MASK]"), 13))
            assert all(0 <= answer.score <= 1 for answer in answers)
            outcomes.append(str(answers))
        except InputTextError as error:
            outcomes.append(f"refused: {error}")
    assert outcomes[0] == outcomes[1]
    if outcomes[0].startswith("refused: "):
        assert outcomes[0].isprintable()
        assert len(outcomes[0]) < 1000
    assert session.fill_mask(PLAIN) == before


def test_one_odd_text_of_a_list_is_named_and_the_others_are_not_harmed(tiny: Path) -> None:
    session = XAdapterSession.load(tiny)
    with pytest.raises(InputTextError, match="text 2 of 3 is empty"):
        session.fill_mask([PLAIN, "", PLAIN])
    assert session.fill_mask([PLAIN, PLAIN])[0] == session.fill_mask(PLAIN)


FORK = """
import os, sys
from xadapter_export import XAdapterSession
from xadapter_export.errors import ConfigError
text = "the color of a banana is [MASK]."
session = XAdapterSession.load(sys.argv[1], num_threads=2)
before = session.fill_mask(text)
child = os.fork()
if not child:
    try:
        session.fill_mask(text)
    except ConfigError as error:
        assert "forked" in str(error), error
        os._exit(7 if XAdapterSession.load(sys.argv[1], num_threads=2).fill_mask(text) == before else 1)
    os._exit(2)
code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
assert session.fill_mask(text) == before
sys.exit(code)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="Windows does not fork")
def test_a_session_refuses_after_a_fork_and_a_new_one_is_right(tiny: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", FORK, str(tiny)], check=False, capture_output=True, timeout=300
    )
    assert done.returncode == 7, done.stderr.decode()
