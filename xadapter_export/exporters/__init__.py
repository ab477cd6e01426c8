"""From a checkpoint to a bundle: load, merge, trace, check, pack, prove; one module each.

What it exports is imported on first use: options can be checked without PyTorch.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from xadapter_export.exporters.pipeline import ExportResult, export

__all__ = ["ExportResult", "export"]


def __getattr__(name: str) -> object:
    """Import a public name on its first use."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module("xadapter_export.exporters.pipeline"), name)
