"""``python -m docs.site_pages``: gather the pages of the documentation site in build/site-pages.

These are docs/, and below ``repository/`` every file outside it that a page links to.
"""

import os
import re
import shutil
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
_LINK = re.compile(r"(?<=\]\()(?!\w+:|#|/)([^)\s#]+)")


def place_of(file: Path) -> Path:
    """Return where a file of the repository is in the site, relative to the site's root."""
    return file.relative_to(DOCS) if file.is_relative_to(DOCS) else "repository" / file.relative_to(ROOT)


def gather_pages(site: Path) -> None:
    """Write all pages and files.

    Args:
        site: Folder to write; what it held is removed.
    """
    shutil.rmtree(site, ignore_errors=True)
    waiting = [path for path in DOCS.rglob("*") if path.is_file() and path.suffix not in (".py", ".pyc")]
    seen = set(waiting)
    while waiting:
        file = waiting.pop()
        target = site / place_of(file)
        target.parent.mkdir(parents=True, exist_ok=True)
        if file.suffix != ".md":
            shutil.copyfile(file, target)
            continue
        text = file.read_text(encoding="utf-8")
        linked = {(file.parent / link).resolve() for link in _LINK.findall(text)}
        new = {path for path in linked if path.is_file()} - seen
        waiting += new
        seen |= new
        target.write_text(_LINK.sub(partial(_moved, file), text), encoding="utf-8")


def _moved(page: Path, link: re.Match[str]) -> str:
    target = (page.parent / link[1]).resolve()
    return Path(os.path.relpath(place_of(target), place_of(page).parent)).as_posix()


if __name__ == "__main__":
    gather_pages(ROOT / "build" / "site-pages")
