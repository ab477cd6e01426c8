"""The report of a proof: every cell, for machines, and what the manifest keeps of it."""

import json
from pathlib import Path
from typing import Self

from pydantic import BaseModel, ConfigDict, ValidationError

from xadapter_export.bundle.manifest import VariantParity
from xadapter_export.bundle.small_files import describe, read_object
from xadapter_export.errors import BundleError, ParityError
from xadapter_export.parity.compare import TOLERANCES, Cell, Tolerance
from xadapter_export.targets import PORTABLE


class ParityReport(BaseModel):
    """Every array that was compared, and with what.

    Attributes:
        rule: The rule that every float cell was held to.
        tolerances: ``atol`` and ``rtol`` of each precision; of a lossy engine, of each ``VARIANT/OUTPUT``.
        created_with: Versions of the packages that computed the compared side.
        providers: Execution providers that computed it.
        processor: The CPU of that machine.
        cells: Every comparison.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    rule: str = "|got - ref| <= atol + rtol * |ref|, in float64"
    tolerances: dict[str, Tolerance]
    created_with: dict[str, str]
    providers: tuple[str, ...]
    processor: str | None = None
    cells: tuple[Cell, ...]

    @property
    def passed(self) -> bool:
        """Whether every cell passed."""
        return all(cell.passed for cell in self.cells)

    @property
    def failures(self) -> tuple[Cell, ...]:
        """The cells that did not pass."""
        return tuple(cell for cell in self.cells if not cell.passed)

    @property
    def variants(self) -> tuple[str, ...]:
        """Names of the variants that were compared, in their order."""
        return tuple(dict.fromkeys(cell.variant for cell in self.cells))

    def cells_of(self, expert_set: str, variant: str) -> tuple[Cell, ...]:
        """Return the cells of one variant of an expert set."""
        return tuple(c for c in self.cells if (c.expert_set, c.variant) == (expert_set, variant))

    def raise_if_failed(self) -> None:
        """Raise if a cell failed, naming the worst.

        Raises:
            ParityError: If a cell did not pass.
        """
        if self.passed:
            return
        worst = max(self.failures, key=lambda cell: (cell.problem is not None, cell.smallest_atol or 0.0))
        tolerance = self.tolerances.get(f"{worst.variant}/{worst.output}") or _tolerance(worst.variant)
        raise ParityError(
            f"the graph's outputs differ from PyTorch's in {len(self.failures)} of {len(self.cells)} "
            "comparisons",
            where=f"worst: {worst.expert_set}/{worst.case}/{worst.output} of {worst.variant}",
            expected=f"an absolute tolerance of {tolerance.atol:.0e} to be enough",
            got=worst.problem or (f"{worst.smallest_atol:.1e}" if worst.smallest_atol else "another row"),
        )

    def variant_parity(self, expert_set: str, variant: str = PORTABLE) -> VariantParity:
        """Return what the manifest keeps for one variant, by its name; of the portable one by default.

        Raises:
            ParityError: If the report has no cell of that variant.
        """
        cells = self.cells_of(expert_set, variant)
        if not cells:
            raise ParityError("nothing was compared", where=f"{expert_set}, {variant}")
        tolerance = _tolerance(variant)
        return VariantParity(
            passed=all(cell.passed for cell in cells),
            max_abs=max(cell.max_abs or 0.0 for cell in cells),
            atol=tolerance.atol,
            rtol=tolerance.rtol,
            num_cells=len(cells),
        )

    def to_json(self) -> str:
        """Return the text of ``parity.json``: the report's fields and ``passed``."""
        return json.dumps({"passed": self.passed, **self.model_dump(mode="json")}, indent=1) + "\n"

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read ``parity.json``.

        Raises:
            BundleError: If it is not a report.
        """
        fields = read_object(path, "the parity report")
        fields.pop("passed", None)
        try:
            return cls.model_validate(fields)
        except ValidationError as error:
            raise BundleError("not a parity report", where=path, got=describe(error)) from error


def _tolerance(variant: str) -> Tolerance:
    return TOLERANCES[variant.rpartition("-")[2]]
