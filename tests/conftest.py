"""Fixtures: the tiny bundle, whole, and a copy of it to break."""

import shutil
from pathlib import Path

import pytest

from tests.tiny_bundle import write_bundle


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a fill-mask bundle with every expert set; not to be changed."""
    return write_bundle(tmp_path_factory.mktemp("tiny") / "bundle")


@pytest.fixture
def broken(tiny: Path, tmp_path: Path) -> Path:
    """Return a copy of the tiny bundle that a test may break."""
    return Path(shutil.copytree(tiny, tmp_path / "bundle"))
