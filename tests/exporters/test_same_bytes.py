"""Two exports of one checkpoint under equal settings are the same bytes."""

from pathlib import Path

import pytest

from tests.tiny_checkpoint import make_model
from xadapter_export import export

pytestmark = pytest.mark.slow  # minutes: `make test-slow`


def test_two_exports_are_byte_identical(tmp_path: Path) -> None:
    model = make_model(tmp_path / "parts")
    folders = [tmp_path / name / "bundle" for name in ("one", "two")]
    for folder in folders:
        export(model, folder, ("vt",), variants=("onnx-fp32", "cpu-fp32"))
    files = [sorted(path.relative_to(folder) for path in folder.rglob("*")) for folder in folders]
    assert files[0] == files[1]
    assert len(files[0]) > 6
    for name in (name for name in files[0] if (folders[0] / name).is_file()):
        assert (folders[0] / name).read_bytes() == (folders[1] / name).read_bytes(), name
