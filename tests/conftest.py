"""Fixtures: the tiny bundle, whole, and a copy of it to break; the bundle of the built-in checkpoint."""

import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Unpack

import pytest
from filelock import FileLock

from tests.tiny_bundle import write_bundle

if TYPE_CHECKING:
    from xadapter_export.exporters.pipeline import ExportResult
    from xadapter_export.exporters.request import ExportOptions
    from xadapter_export.model.x_adapter_model import XAdapterModel

_FIRST = ("test_web.py", "test_recipes.py", "test_swap.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the files that take longest, so that no worker is left alone with one of them."""
    items.sort(key=lambda item: item.path.name not in _FIRST)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a fill-mask bundle with every expert set; not to be changed."""
    return write_bundle(tmp_path_factory.mktemp("tiny") / "bundle")


@pytest.fixture
def broken(tiny: Path, tmp_path: Path) -> Path:
    """Return a copy of the tiny bundle that a test may break."""
    return Path(shutil.copytree(tiny, tmp_path / "bundle"))


@pytest.fixture(scope="session")
def builtin_export(tmp_path_factory: pytest.TempPathFactory) -> "ExportResult":
    """Return the built-in checkpoint, exported once for all workers with every expert set; not to change."""
    return _export_once(tmp_path_factory, "builtin-bundle", "builtin", targets=("onnx",))


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> "XAdapterModel":
    """Return the tiny BERT with its tower, its bank and a plug-in of both experts; not to change."""
    from tests.tiny_checkpoint import make_model

    return make_model(tmp_path_factory.mktemp("tiny-model"))


@pytest.fixture(scope="session")
def tiny_export(tiny_model: "XAdapterModel", tmp_path_factory: pytest.TempPathFactory) -> "ExportResult":
    """Return ``tiny_model``, exported once for all workers with every expert set; not to change."""
    return _export_once(tmp_path_factory, "tiny-export", tiny_model, targets=("onnx", "cpu"))


@pytest.fixture(scope="session")
def explained_export(tiny_model: "XAdapterModel", tmp_path_factory: pytest.TempPathFactory) -> "ExportResult":
    """Return ``tiny_model``, exported once for all workers with explanations, int8 too; not to change."""
    return _export_once(
        tmp_path_factory,
        "explained-export",
        tiny_model,
        targets=("onnx", "cpu"),
        precisions=("fp32", "int8"),
        with_explanations=True,
        min_agreement=0.0,
    )


def _export_once(
    tmp_path_factory: pytest.TempPathFactory,
    name: str,
    checkpoint: "str | XAdapterModel",
    **options: "Unpack[ExportOptions]",
) -> "ExportResult":
    """Export, or find what another worker exported: tracing takes seconds for each expert set."""
    from xadapter_export import export  # PyTorch, which most tests do without
    from xadapter_export.bundle.folder import read_bundle
    from xadapter_export.exporters.pipeline import ExportResult
    from xadapter_export.parity import ParityReport

    root = tmp_path_factory.getbasetemp()
    folder = (root.parent if "PYTEST_XDIST_WORKER" in os.environ else root) / name
    with FileLock(folder.with_suffix(".lock")):
        if not folder.exists():
            return export(checkpoint, folder, ("vt", "v", "t", "none"), **options)
    return ExportResult(folder, read_bundle(folder).manifest, ParityReport.read(folder / "parity.json"))
