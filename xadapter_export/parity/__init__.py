"""Does a graph still say what PyTorch said? The rule, its tolerances, the proof of a bundle, the report."""

from xadapter_export.parity.compare import TOLERANCES, Cell, Tolerance, compare
from xadapter_export.parity.engines import prove_engines
from xadapter_export.parity.prove import check_lossy, prove_bundle
from xadapter_export.parity.recorded import Check
from xadapter_export.parity.report import ParityReport

__all__ = [
    "TOLERANCES",
    "Cell",
    "Check",
    "ParityReport",
    "Tolerance",
    "check_lossy",
    "compare",
    "prove_bundle",
    "prove_engines",
]
