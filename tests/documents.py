"""The code blocks of a page of the documentation."""

import re

from tests import ROOT

DOCS = ROOT / "docs"


def code_blocks(page: str, language: str) -> list[str]:
    """Return the blocks of one language in ``docs/PAGE``, in order."""
    text = (DOCS / page).read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
