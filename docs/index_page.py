"""``python -m docs.index_page FOLDER REPOSITORY``: make a source tree's README fit for a package index.

An index shows the README alone, so its links become addresses of the repository at the release's tag, and
pyproject.toml gets ``[project.urls]``. A tree without REPOSITORY is left as it is.
"""

import re
import sys
import tomllib
from pathlib import Path

_LINK = re.compile(r"\]\((?!\w+:|#)(?P<target>[^)\s]+)\)")
_WHERE = " REPOSITORY is the address of this page."
_IMAGES = (".png", ".svg", ".webp")


def with_addresses(readme: str, repository: str, tag: str) -> str:
    """Return the README with each relative link, and each image, as an address, and with that to clone.

    Args:
        readme: Markdown.
        repository: Address of the repository, without a slash at its end.
        tag: Of the release, such as ``v0.1.0``.
    """

    def address(link: re.Match[str]) -> str:
        kind = "raw" if link["target"].endswith(_IMAGES) else "blob"
        return f"]({repository}/{kind}/{tag}/{link['target']})"

    readme = readme.replace(_WHERE, "").replace("git clone REPOSITORY", f"git clone {repository}")
    return _LINK.sub(address, readme)


def prepare(folder: Path, repository: str) -> None:
    """Rewrite ``README.md`` and ``pyproject.toml`` of a source tree."""
    readme, project = folder / "README.md", folder / "pyproject.toml"
    text = project.read_text(encoding="utf-8")
    tag = f"v{tomllib.loads(text)['project']['version']}"
    readme.write_text(
        with_addresses(readme.read_text(encoding="utf-8"), repository, tag), encoding="utf-8", newline="\n"
    )
    urls = f'Repository = "{repository}"\nIssues = "{repository}/issues"\n'
    urls += f'Changelog = "{repository}/blob/{tag}/CHANGELOG.md"\n'
    before, heading, after = text.partition("[project.optional-dependencies]")
    project.write_text(f"{before}[project.urls]\n{urls}\n{heading}{after}", encoding="utf-8", newline="\n")


if __name__ == "__main__":
    if len(sys.argv) > 2:
        prepare(Path(sys.argv[1]), sys.argv[2].rstrip("/"))
