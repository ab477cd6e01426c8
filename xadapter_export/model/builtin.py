"""The checkpoint that is shipped with the package."""

from pathlib import Path

BUILTIN = "builtin"


def builtin_folder() -> Path:
    """Folder of the built-in checkpoint."""
    return Path(__file__).parents[1] / "builtin"
