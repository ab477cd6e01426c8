"""Does a graph give, on this processor, what it gave when the bundle was made? One case answers in a few ms.

An fp32 variant is compared with PyTorch's outputs, by the rule of ``parity.compare``. A lossy one is compared
with its own, which the exporter recorded: on every processor they come again nearly to float rounding, but
one rounding of an activation that falls the other way moves all that follows a little.

How far that may go is known from the variant itself. Each number that it gives is off from fp32 by the sum of
its roundings; two answers whose roundings have nothing in common are the square root of 2 as far apart as
each is from fp32. So the root mean square of what a variant differs from its record may be ``_FACTOR`` times
that of what the record differs from PyTorch. The answer that comes first must be the same, or nearly tie.

Keys, besides those of ``parity.reference``: ``{case}/{set}/{variant}/out/{output}``, and ``KEY#noise``, the
root mean square of its difference from PyTorch. After a swap of the bank, ``reference_swapped.npz`` holds
under the same keys what graphs with the V-expert give with the new bank, fp32 ones too.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Final, cast

import numpy as np
from numpy.typing import NDArray

from xadapter_export.bundle.bank_rows import BankRows
from xadapter_export.bundle.folder import REFERENCE_NAME, SWAPPED_NAME, Bundle
from xadapter_export.bundle.manifest import ExpertSetSpec, Variant
from xadapter_export.errors import BundleError, ParityError
from xadapter_export.experts import reads_bank
from xadapter_export.parity.compare import TIE, TOLERANCES, Place, compare, compare_retrieved
from xadapter_export.parity.proven_bank import ProvenBank, read_proven_bank
from xadapter_export.parity.reference import (
    SCORES,
    Archive,
    cases_of,
    feed_of,
    look_up,
    reference_feeds,
    retrieved_rows,
    take_columns,
)
from xadapter_export.sessions.session import Array, OnnxSession
from xadapter_export.sessions.split_session import SplitSession

TYPICAL: Final = "single_typical"
_FACTOR: Final = 1.5  # a little above the square root of 2
_TIE_FACTOR: Final = (
    6.0  # the difference of two numbers, each off by normal errors, as good as never exceeds it
)
_FEW: Final = 64  # of fewer numbers the root mean square says little: those of all cases are taken together


@dataclass(frozen=True)
class Check:
    """One case that a graph was asked on this processor.

    Attributes:
        expert_set: Its expert set.
        variant: Its name.
        case: Name of the case.
        output: The output that is nearest to its bound, or beyond it.
        difference: How far that is off: of an fp32 variant the smallest absolute tolerance that would do, of
            a lossy one the root mean square. None where nothing could be subtracted.
        bound: How far it may be off.
        passed: Whether every output is within its bound.
        problem: What else is wrong, or None.
        milliseconds: How long reading, running and comparing took.
    """

    expert_set: str
    variant: str
    case: str
    output: str | None
    difference: float | None
    bound: float | None
    passed: bool
    problem: str | None
    milliseconds: float

    @property
    def got(self) -> str:
        """What was found, in a few words."""
        if self.difference is None:
            return self.problem or "nothing"
        off = f"{self.difference:.1e} off in {self.output} of case {self.case}"
        return off if self.problem is None else f"{self.problem}, {off}" if self.difference else self.problem

    @property
    def expected(self) -> str | None:
        """What would have been right, in a few words; None where that is not a number."""
        return None if self.bound is None or self.difference is None else f"at most {self.bound:.1e} off"


def describe_checks(checks: Sequence[Check]) -> str:
    """Return in a few words what a variant gives here, by its worst case."""
    if not checks:
        return "not run with these providers"
    worst = max(checks, key=lambda c: (not c.passed, (c.difference or 0.0) / (c.bound or 1.0)))
    if not worst.passed:
        return f"FAILED: {worst.got}"
    allowed = "" if worst.bound is None else f", {worst.difference or 0.0:.1e} of {worst.bound:.1e}"
    return f"passed, {len(checks)} cases{allowed}"


@dataclass(frozen=True)
class _Finding:
    output: str
    difference: float | None
    bound: float | None
    problem: str | None

    @property
    def share(self) -> float:
        """How much of its bound the difference takes; infinite where something else is wrong."""
        if self.problem or self.difference is None or not self.bound:
            return float("inf") if self.problem else 0.0
        return self.difference / self.bound


def record(
    session: OnnxSession, variant: Variant, spec: ExpertSetSpec, reference: Mapping[str, Array]
) -> dict[str, Array]:
    """Run a graph on every case and return what it gives, by the keys above, whole arrays.

    Args:
        session: The graph.
        variant: Which variant it is.
        spec: The contract of its set.
        reference: Inputs of every case.
    """
    names = [tensor.name for tensor in spec.outputs]
    arrays: dict[str, Array] = {}
    for case, feed in reference_feeds(reference, spec).items():
        for name, array in zip(names, session.run(names, feed), strict=True):
            arrays[f"{case}/{variant.expert_set}/{variant.name}/out/{name}"] = array
    return arrays


def noise(recorded: Mapping[str, Array], reference: Mapping[str, Array]) -> dict[str, Array]:
    """Return how far each recorded output is from PyTorch's, ``KEY#noise`` a ``(1,) float32``.

    Args:
        recorded: As ``record`` returns it.
        reference: PyTorch's outputs, whole arrays.
    """
    off: dict[str, NDArray[np.float64]] = {}
    for key, array in recorded.items():
        case, expert_set, _, _, output = key.split("/")
        if array.dtype.kind == "f":
            ref = look_up(reference, f"{case}/{expert_set}/out/{output}")
            off[key] = np.square(array.astype(np.float64) - ref).ravel()
    found: dict[str, Array] = {}
    for key, squares in off.items():
        same = [s for other, s in off.items() if other.split("/")[1:] == key.split("/")[1:]]
        size = squares.mean() if squares.size >= _FEW else max(squares.mean(), np.concatenate(same).mean())
        found[f"{key}#noise"] = np.sqrt([size]).astype(np.float32)
    return found


@contextmanager
def opened_record(bundle: Bundle) -> Iterator["Record"]:
    """Open what a bundle carries to be compared with; arrays are read when they are looked at.

    Raises:
        BundleError: If a file of it is missing or cannot be read.
    """
    with ExitStack() as stack:
        archives = [Archive.open(bundle.file(name), stack) for name in files_of_record(bundle)]
        if not archives:
            raise BundleError("the bundle has no reference outputs", where=bundle.file(REFERENCE_NAME))
        yield Record(bundle, archives[0], archives[1] if len(archives) > 1 else {})


def files_of_record(bundle: Bundle) -> tuple[str, ...]:
    """Return the files that ``opened_record`` reads."""
    names = (REFERENCE_NAME, SWAPPED_NAME)
    return tuple(name for name in names if name in bundle.manifest.files)


class Record:
    """What a bundle carries to be compared with.

    Args:
        bundle: The bundle.
        reference: ``reference.npz``, by key.
        with_new_bank: ``reference_swapped.npz``, by key; empty where the bank is the one of the proof.
    """

    def __init__(
        self, bundle: Bundle, reference: Mapping[str, Array], with_new_bank: Mapping[str, Array]
    ) -> None:
        self._bundle, self._reference, self._with_new_bank = bundle, reference, with_new_bank

    @property
    def cases(self) -> list[str]:
        """Names of the cases."""
        return cases_of(self._reference)

    @property
    def typical_case(self) -> str:
        """The case to ask where one has to do."""
        cases = self.cases
        if not cases:
            raise ParityError("the reference has no cases", where=self._bundle.folder / REFERENCE_NAME)
        return TYPICAL if TYPICAL in cases else cases[0]

    def feed(self, spec: ExpertSetSpec, case: str) -> dict[str, Array]:
        """Return the inputs of a case.

        Raises:
            ParityError: If one is missing.
        """
        return feed_of(self._reference, spec, case)

    def check(self, session: OnnxSession, variant: Variant, case: str) -> Check:
        """Ask one case and compare.

        Args:
            session: What runs the variant.
            variant: A variant of the bundle.
            case: Name of the case.
        """
        start = time.perf_counter()
        output: str | None = None
        difference = bound = None
        try:
            findings = list(self._compare(session, variant, case))
            worst = max(findings, key=lambda finding: finding.share)
            output, difference, bound, problem = worst.output, worst.difference, worst.bound, worst.problem
            passed = all(finding.share <= 1 for finding in findings)
        except ParityError as error:
            problem, passed = str(error), False
        milliseconds = 1e3 * (time.perf_counter() - start)
        return Check(
            variant.expert_set, variant.name, case, output, difference, bound, passed, problem, milliseconds
        )

    def _compare(self, session: OnnxSession, variant: Variant, case: str) -> Iterator[_Finding]:
        spec = self._bundle.manifest.expert_sets[variant.expert_set]
        bank = self._bank(spec)
        if isinstance(session, SplitSession):
            session = session.without_memory(None if bank is None else bank.retriever(self._bundle))
        refs, start = self._recorded(variant, spec, case)
        names = [tensor.name for tensor in spec.outputs]
        try:
            got = dict(zip(names, session.run(names, self.feed(spec, case)), strict=True))
        except ParityError:
            raise
        except Exception as error:  # the engines' own errors have no common base below Exception
            raise ParityError("the graph cannot compute the reference inputs", got=error) from error
        for name in names:
            place, ref = Place(variant.expert_set, variant.name, case, name), look_up(refs, start + name)
            if name == "retrieved":
                rows = got[name] if bank is None else bank.number(got[name])
                scores = got[SCORES], look_up(refs, start + SCORES)
                yield _find_rows(rows, ref, *scores, place, self._tie(variant, case))
                continue
            kept = take_columns(got[name], refs, start + name)
            if variant.precision in TOLERANCES:
                finding = _find_exact(kept, ref, place)
            else:
                finding = _find_rms(kept, ref, self._noise(variant, case, name), place)
            if name == "logits" and finding.problem is None:
                finding = _with_top(finding, got[name], refs, start + name)
            yield finding

    def _bank(self, spec: ExpertSetSpec) -> ProvenBank | None:
        """Return the rows to search where the app does that, whatever index it has."""
        bank = self._bundle.manifest.bank
        if not spec.searches_outside or bank is None or bank.features is None:
            return None
        if (proven := read_proven_bank(self._bundle)) is not None:
            return proven
        rows = retrieved_rows(self._reference)
        stored = BankRows(self._bundle.file(bank.features))
        return ProvenBank({"bank": cast(Array, stored.take(rows))}, rows)

    def _recorded(self, variant: Variant, spec: ExpertSetSpec, case: str) -> tuple[Mapping[str, Array], str]:
        """Return what to compare with, and what its keys start with."""
        own = f"{case}/{variant.expert_set}/{variant.name}/out/"
        bank = self._bundle.manifest.bank
        swapped = bank is not None and bank.swapped_from is not None and reads_bank(variant.expert_set)
        if swapped and not spec.searches_outside:
            return self._with_new_bank, own
        return (
            self._reference,
            f"{case}/{variant.expert_set}/out/" if variant.precision in TOLERANCES else own,
        )

    def _noise(self, variant: Variant, case: str, output: str) -> float:
        key = f"{case}/{variant.expert_set}/{variant.name}/out/{output}#noise"
        return float(look_up(self._reference, key)[0])

    def _tie(self, variant: Variant, case: str) -> float:
        if variant.precision in TOLERANCES:
            return TIE
        return max(TIE, _TIE_FACTOR * self._noise(variant, case, SCORES))


def _find_exact(got: Array, ref: Array, place: Place) -> _Finding:
    tolerance = TOLERANCES["fp32"]
    cell = compare(got, ref, tolerance, place)
    return _Finding(place.output, cell.smallest_atol, tolerance.atol, cell.problem)


def _find_rms(got: Array, ref: Array, noise: float, place: Place) -> _Finding:
    tolerance = TOLERANCES["fp32"]
    cell = compare(got, ref, tolerance, place)
    if cell.problem:
        return _Finding(place.output, None, None, cell.problem)
    difference = float(np.sqrt(np.square(got.astype(np.float64) - ref).mean()))
    floor = tolerance.atol + tolerance.rtol * float(np.abs(ref).max())
    allowed = _FACTOR * (1 + 1 / np.sqrt(ref.size)) * noise  # few numbers scatter more
    return _Finding(place.output, difference, max(float(allowed), floor), None)


def _find_rows(
    got: Array, ref: Array, got_scores: Array, ref_scores: Array, place: Place, tie: float
) -> _Finding:
    rows = cast("tuple[NDArray[np.int64], NDArray[np.int64]]", (got, ref))
    scores = cast("tuple[NDArray[np.float32], NDArray[np.float32]]", (got_scores, ref_scores))
    cell = compare_retrieved(*rows, *scores, place, tie=tie)
    problem = cell.problem or (None if cell.passed else "other pictures are retrieved")
    return _Finding(place.output, None, None, problem)


def _with_top(finding: _Finding, got: Array, refs: Mapping[str, Array], key: str) -> _Finding:
    """Return the finding, with a problem where a row's largest logit is neither the recorded one nor ties."""
    ref = refs[key]
    places = ref.argmax(-1)
    if f"{key}#columns" in refs:
        places = refs[f"{key}#columns"][places]
    there = np.take_along_axis(got, places[..., None], -1)[..., 0]
    gap, size = float((got.max(-1) - there).max()), float(np.abs(there).max())
    if (
        gap <= _TIE_FACTOR * (finding.bound or 0.0) + 2 * TOLERANCES["fp32"].rtol * size
    ):  # not where it is NaN
        return finding
    return _Finding(finding.output, finding.difference, finding.bound, "another answer comes first")
