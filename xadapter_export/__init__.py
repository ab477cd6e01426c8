"""Train X-adapters, export them to ONNX with proof, and run the exported bundles without PyTorch.

The public names are imported when they are first used, so that importing this package costs nothing and an
app that runs a bundle needs no PyTorch.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from xadapter_export.errors import (
    BundleError,
    CheckpointError,
    ConfigError,
    HashMismatchError,
    InputTextError,
    MissingExtraError,
    OutputExistsError,
    OutputWriteError,
    ParityError,
    ProviderError,
    ShapeError,
    SignatureError,
    UnsupportedError,
    XAdapterError,
    import_extra,
)

if TYPE_CHECKING:
    from xadapter_export.bank import FeatureBank
    from xadapter_export.exporters.pipeline import ExportResult, export
    from xadapter_export.model.config import XAdapterConfig
    from xadapter_export.model.x_adapter_model import XAdapterModel
    from xadapter_export.runtime.answers import RetrievedPicture
    from xadapter_export.runtime.session import XAdapterSession
    from xadapter_export.tasks.fill_mask import FillMaskAnswer
    from xadapter_export.tasks.text_classification import LabelAnswer

    __version__: str

__all__ = [
    "BundleError",
    "CheckpointError",
    "ConfigError",
    "ExportResult",
    "FeatureBank",
    "FillMaskAnswer",
    "HashMismatchError",
    "InputTextError",
    "LabelAnswer",
    "MissingExtraError",
    "OutputExistsError",
    "OutputWriteError",
    "ParityError",
    "ProviderError",
    "RetrievedPicture",
    "ShapeError",
    "SignatureError",
    "UnsupportedError",
    "XAdapterConfig",
    "XAdapterError",
    "XAdapterModel",
    "XAdapterSession",
    "__version__",
    "export",
]

_BASE = {
    "FeatureBank": "xadapter_export.bank",
    "FillMaskAnswer": "xadapter_export.tasks.fill_mask",
    "LabelAnswer": "xadapter_export.tasks.text_classification",
    "RetrievedPicture": "xadapter_export.runtime.answers",
    "XAdapterConfig": "xadapter_export.model.config",
    "XAdapterSession": "xadapter_export.runtime.session",
}
_EXPORT_EXTRA = {
    "ExportResult": "xadapter_export.exporters.pipeline",
    "XAdapterModel": "xadapter_export.model.x_adapter_model",
    "export": "xadapter_export.exporters.pipeline",
}


def __getattr__(name: str) -> object:
    """Import a public name on its first use.

    Raises:
        MissingExtraError: If the name needs an extra that is not installed.
    """
    value: object
    if name == "__version__":
        metadata = import_module("importlib.metadata")  # slow to import, and seldom needed
        try:
            value = metadata.version("xadapter-export")
        except metadata.PackageNotFoundError:  # a source tree that was never installed
            value = "0+unknown"
    elif name in _BASE:
        value = getattr(import_module(_BASE[name]), name)
    elif name in _EXPORT_EXTRA:
        value = getattr(import_extra(_EXPORT_EXTRA[name], "export"), name)
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """Return the public names, imported or not."""
    return sorted(set(globals()) | set(__all__))
