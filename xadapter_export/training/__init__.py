"""Training of plug-ins between a frozen PLM and a frozen CLIP; needs the ``train`` extra."""

from typing import TYPE_CHECKING, Any

from xadapter_export.training.config import TrainConfig, make_config, read_config

if TYPE_CHECKING:
    from xadapter_export.training.control import train_control
    from xadapter_export.training.run import TrainingStopped, TrainResult, train

__all__ = [
    "TrainConfig",
    "TrainResult",
    "TrainingStopped",
    "make_config",
    "read_config",
    "train",
    "train_control",
]


def __getattr__(name: str) -> Any:
    """Import what needs PyTorch only when it is asked for."""
    from importlib import import_module

    if name == "train_control":
        return import_module("xadapter_export.training.control").train_control
    if name in ("train", "TrainResult", "TrainingStopped"):
        return getattr(import_module("xadapter_export.training.run"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
