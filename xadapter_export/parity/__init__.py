"""Does a graph still say what PyTorch said? The rule, its tolerances, the proof of a bundle, the report."""

from xadapter_export.parity.compare import TOLERANCES, Cell, Tolerance, compare
from xadapter_export.parity.engines import prove_engines
from xadapter_export.parity.prove import prove_bundle
from xadapter_export.parity.report import ParityReport

__all__ = ["TOLERANCES", "Cell", "ParityReport", "Tolerance", "compare", "prove_bundle", "prove_engines"]
