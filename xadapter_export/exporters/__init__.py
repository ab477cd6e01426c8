"""From a checkpoint to a bundle: load, merge, trace, check, pack, prove; one module each."""

from xadapter_export.exporters.pipeline import ExportResult, export

__all__ = ["ExportResult", "export"]
