import subprocess
import sys
from pathlib import Path

import pytest

import xadapter_export
from xadapter_export.errors import MissingExtraError

HEAVY = ("torch", "transformers", "open_clip", "onnx", "onnxscript", "optimum", "sklearn", "datasets")


def python(code: str) -> str:
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_importing_the_package_pulls_nothing() -> None:
    pulled = python("import sys, xadapter_export; print(*sys.modules)").split()
    assert not set(pulled) & {*HEAVY, "numpy", "pydantic", "tokenizers", "onnxruntime", "click", "rich"}


def test_a_bundle_runs_and_is_proven_with_everything_heavy_blocked(tiny: Path) -> None:
    python(f"""
import sys
for name in {HEAVY}:
    sys.modules[name] = None
from xadapter_export import XAdapterSession, __version__
from xadapter_export.parity import prove_bundle
session = XAdapterSession.load({str(tiny)!r}, experts="v")
assert session.fill_mask("a cherry is [MASK]")[0].token == "red"
assert prove_bundle({str(tiny)!r}).passed
""")


def test_what_needs_an_extra_says_which() -> None:
    python(f"""
import sys
for name in {HEAVY}:
    sys.modules[name] = None
import xadapter_export
try:
    xadapter_export.XAdapterModel
except ImportError as error:
    assert str(error).endswith('pip install "xadapter-export[export]"'), error
else:
    raise SystemExit("no error")
""")
    assert issubclass(MissingExtraError, ImportError)


def test_public_names() -> None:
    assert set(xadapter_export.__all__) <= set(dir(xadapter_export))
    assert xadapter_export.XAdapterSession.__name__ == "XAdapterSession"
    assert isinstance(xadapter_export.__version__, str)
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        xadapter_export.nothing  # noqa: B018  # reading it is what raises
