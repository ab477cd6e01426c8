"""Lets ``open_clip`` and ``transformers`` be imported beside a torch that torchvision was not built for.

A torchvision wheel built for CUDA fails to import beside a CPU-only torch, because its compiled operators
are not registered: ``operator torchvision::nms does not exist``. This package uses neither of the two
operators, so declaring their schemas (names and types, no code) is enough for the import to succeed.
"""

import importlib
import sys

import torch

_MISSING_SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
_declared: list[torch.library.Library] = []  # a Library withdraws its schemas when it is collected


def cure_torchvision() -> bool:
    """Make ``import torchvision`` work, touching nothing where it already does or is not installed.

    Call it before the first import of ``transformers`` or ``open_clip``, any number of times.

    Returns:
        True if the cure was applied by this call.

    Raises:
        RuntimeError: If torchvision still cannot be imported, for another reason than the missing operators.
    """
    if "torchvision" in sys.modules:
        return False
    try:
        importlib.import_module("torchvision")
    except ModuleNotFoundError as error:
        if error.name != "torchvision":
            raise
        return False
    except RuntimeError as error:
        if "torchvision::" not in str(error):
            raise
    else:
        return False
    for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
        del sys.modules[name]  # what the failed import left half-initialized
    library = torch.library.Library("torchvision", "DEF")  # type: ignore[no-untyped-call]  # torch
    for schema in _MISSING_SCHEMAS:
        library.define(schema)  # type: ignore[no-untyped-call]  # torch
    _declared.append(library)
    importlib.import_module("torchvision")
    return True
