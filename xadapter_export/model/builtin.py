"""The checkpoint that is shipped with the package."""

from pathlib import Path

import xadapter_export

BUILTIN = "builtin"


def builtin_folder() -> Path:
    """Folder of the built-in checkpoint."""
    return Path(xadapter_export.__file__).parent / "builtin"
