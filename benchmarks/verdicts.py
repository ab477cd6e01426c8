"""The targets of the benchmark: each beside the figure that was measured, PASS or MISS.

Where a target names no way of feeding, both are compared and the stricter decides. Ours, in a precision on a
target, is one variant for all cells, never the best of each.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from benchmarks.contestants import find
from benchmarks.feeds import Cell, Feeding
from benchmarks.footprint import KEPT, Footprint
from benchmarks.intervals import Ratio, geometric_mean, ratio, spread
from benchmarks.machine import UNKNOWN, Cpu, Pick
from benchmarks.prepare import Cost

Sense = Literal["at least", "at most"]
_DISTURBED = 1.05  # times a limit: what is faster says that the limit was measured wrong
MOST_OF_AUTO = 1.05  # times the fastest variant
SIZE_LIMIT_MB = 112.0  # of the static V-bundle of BERT-base in int8


@dataclass(frozen=True)
class Row:
    """One line of a cell: a contestant, as it is fed."""

    contestant: str
    feeding: Feeding

    def __str__(self) -> str:
        return self.contestant if self.contestant.startswith("ours") else f"{self.contestant}, {self.feeding}"


@dataclass(frozen=True)
class Measured:
    """Times of a row in a cell.

    Attributes:
        times_ms: One for each round; round i is the same moment for all rows of a cell.
        gflop: Operations of a run, 1e9.
        weight_bytes: Bytes of weights that a run must read at least once.
        limit_ms: Time below which no run can be.
    """

    times_ms: tuple[float, ...]
    gflop: float
    weight_bytes: float = 0.0
    limit_ms: float = 0.0

    @property
    def median_ms(self) -> float:
        """Median of the rounds."""
        return spread(self.times_ms).median

    @property
    def share(self) -> float:
        """Share of the machine's limit: 1 is the limit."""
        return self.limit_ms / self.median_ms


@dataclass(frozen=True)
class Size:
    """Bytes of a variant of ours.

    Attributes:
        size_bytes: Graph and the weights that it refers to.
        parameters: Parameters that its graph needs.
        below_gate: What it loses, where a trained case is below the exporter's default gate; else empty.
    """

    case: str
    experts: str
    head: str
    variant: str
    size_bytes: int
    parameters: int
    below_gate: str = ""


@dataclass(frozen=True)
class Results:
    """Everything that was measured; what was not is empty."""

    cells: Mapping[Cell, Mapping[Row, Measured]] = field(default_factory=dict)
    sizes: Sequence[Size] = ()
    footprints: Mapping[str, Footprint] = field(default_factory=dict)
    file_mib: Mapping[str, float] = field(default_factory=dict)
    costs: Mapping[str, Cost] = field(default_factory=dict)
    disturbed: Mapping[Cell, float] = field(default_factory=dict)  # share of the CPU that others took
    picks: Mapping[Cell, Sequence[Pick]] = field(default_factory=dict)
    cpu: Cpu = UNKNOWN
    weights_mib: float = 0.0
    fp32_gflops: float = 0.0


@dataclass(frozen=True)
class Verdict:
    """One target.

    Attributes:
        text: What is asked, where, and against whom.
        sense: Whether the figure must be at least or at most the target.
        target: The target.
        figure: What was measured; None where nothing was.
        note: What else helps to read it.
        is_void: Whether the figure counts for nothing, because no user would get what has it.
    """

    text: str
    sense: Sense
    target: float
    figure: float | None
    note: str = ""
    is_void: bool = False

    @property
    def status(self) -> Literal["PASS", "MISS", "not measured"]:
        """Whether it is met."""
        if self.figure is None:
            return "not measured"
        met = self.figure >= self.target if self.sense == "at least" else self.figure <= self.target
        return "PASS" if met and not self.is_void else "MISS"

    def __str__(self) -> str:
        figure = "-" if self.figure is None else f"{self.figure:.3g}"
        note = f"; {self.note}" if self.note else ""
        return f"{self.status:12} {self.text}: {figure} ({self.sense} {self.target:g}{note})"


def judge(results: Results) -> list[Verdict]:
    """Hold what was measured against every target."""
    return [
        *_fp32(results),
        *_int8(results),
        *_openvino(results),
        *_avx2(results),
        *_auto(results),
        *_sizes(results),
        *_footprint(results),
    ]


# -------------------------------------------------------------------------------------------- speed


def chosen(results: Results, precision: str, target: str | None = None) -> str | None:
    """Return the one variant of ours that is judged: the fastest over all cells, in the geometric mean."""
    medians: dict[str, list[float]] = {}
    for rows in results.cells.values():
        for row, measured in rows.items():
            name = row.contestant.removeprefix("ours-")
            fits = name.endswith(f"-{precision}") and (target is None or name.startswith(f"{target}-"))
            if row.contestant.startswith("ours-") and fits:
                medians.setdefault(row.contestant, []).append(measured.median_ms)
    most = max(map(len, medians.values()), default=0)
    everywhere = {name: geometric_mean(found) for name, found in medians.items() if len(found) == most}
    return min(everywhere, key=everywhere.__getitem__) if everywhere else None


@dataclass(frozen=True)
class _Pair:
    """Ours beside a row that it is held against in one cell; times, and operations, of theirs to ours."""

    cell: Cell
    ratio: Ratio
    against: Row
    operations: float


def _worst(
    results: Results, mine: str | None, wanted: Callable[[Cell, Row], bool], *, by_high: bool = False
) -> _Pair | None:
    """The smallest ratio of theirs to ours; by the upper end of its interval if ``by_high``."""
    pairs = [
        _Pair(
            cell,
            ratio(measured.times_ms, rows[own].times_ms),
            row,
            measured.gflop / rows[own].gflop if rows[own].gflop else 0.0,
        )
        for cell, rows in results.cells.items()
        for own in rows
        if own.contestant == mine
        for row, measured in rows.items()
        if wanted(cell, row)
    ]

    def figure(pair: _Pair) -> float:
        return pair.ratio.high if by_high else pair.ratio.value

    return min(pairs, key=figure, default=None)


def _verdict(text: str, target: float, pair: _Pair | None, mine: str | None) -> Verdict:
    if pair is None:
        return Verdict(text, "at least", target, None)
    interval = f"{pair.ratio.low:.2f} to {pair.ratio.high:.2f}"
    note = (
        f"{mine} against {pair.against} at {pair.cell}, interval {interval}, operations {pair.operations:.2f}"
    )
    return Verdict(text, "at least", target, pair.ratio.value, note)


def _is(kind: str, precision: str | None = None) -> Callable[[Row], bool]:
    def fits(row: Row) -> bool:
        contestant = find(row.contestant)
        return contestant.kind == kind and precision in (None, contestant.precision)

    return fits


def _eager_at(shape: str) -> Callable[[Cell, Row], bool]:
    return lambda cell, row: row.contestant == "eager" and cell.shape == shape


def _fp32(results: Results) -> Iterable[Verdict]:
    mine = chosen(results, "fp32")
    others = (_is("exporter", "fp32"), _is("torch"))
    worst = _worst(results, mine, lambda _, row: any(fits(row) for fits in others), by_high=True)
    text = "fp32 never slower than another in fp32, upper end of the interval of theirs to ours"
    if worst is None:
        yield Verdict(text, "at least", 1.0, None)
    else:
        note = f"{mine} against {worst.against} at {worst.cell}, ratio {worst.ratio}"
        yield Verdict(text, "at least", 1.0, worst.ratio.high, note)
    for shape in ("1x12", "1x32"):
        pair = _worst(results, mine, _eager_at(shape))
        yield _verdict(f"fp32 times PyTorch eager at {shape}", 2.0, pair, mine)
    pair = _worst(results, mine, lambda cell, row: cell.head == "candidates" and _is("exporter", "fp32")(row))
    yield _verdict("fp32 times the best other exporter, 11 candidates", 1.3, pair, mine)
    shares = [
        measured.gflop / (measured.median_ms / 1e3) / results.fp32_gflops
        for cell, rows in results.cells.items()
        for row, measured in rows.items()
        if row.contestant == mine and cell.shape == "32x64"
    ]
    is_void = max(shares, default=0.0) > _DISTURBED
    note = "faster than the peak: the limits were disturbed" if is_void else mine or ""
    text = "fp32 share of the sgemm peak at 32x64"
    yield Verdict(text, "at least", 0.75, min(shares, default=None), note, is_void)


def _int8(results: Results) -> Iterable[Verdict]:
    mine = chosen(results, "int8", "cpu")

    def t(fits: Callable[[Row], bool], *shapes: str) -> Callable[[Cell, Row], bool]:
        return lambda cell, row: cell.experts == "t" and (not shapes or cell.shape in shapes) and fits(row)

    def usual(row: Row) -> bool:
        return row.contestant in ("ort-int8", "ort-fused-int8")

    for target, shapes in ((2.0, ("1x12", "1x32")), (1.5, ("8x32",))):
        text = f"int8 on onnxruntime, experts t, times the usual int8 at {' and '.join(shapes)}"
        yield _verdict(text, target, _worst(results, mine, t(usual, *shapes)), mine)
    pair = _worst(results, mine, t(lambda row: row.contestant == "eager"))
    yield _verdict("int8 on onnxruntime, experts t, times PyTorch eager everywhere", 3.0, pair, mine)
    pair = _worst(results, mine, t(_is("plm", "fp32")))
    yield _verdict("int8 on onnxruntime, experts t, times the plain fp32 PLM alone", 1.0, pair, mine)


def _openvino(results: Results) -> Iterable[Verdict]:
    mine = chosen(results, "int8", "openvino")

    def nncf(feeding: Feeding) -> Callable[[Cell, Row], bool]:
        return lambda cell, row: cell.experts == "t" and row == Row("openvino-int8", feeding)

    asked: tuple[tuple[float, Feeding, str], ...] = (
        (1.8, "user", "as its user feeds it"),
        (1.25, "equal", "at our lengths"),
    )
    for target, feeding, words in asked:
        pair = _worst(results, mine, nncf(feeding))
        text = f"int8 on OpenVINO, experts t, times OpenVINO and NNCF {words}"
        yield _verdict(text, target, pair, mine)
    at_1x12 = _eager_at("1x12")
    pair = _worst(results, mine, lambda cell, row: cell.experts == "t" and at_1x12(cell, row))
    yield _verdict("int8 on OpenVINO, experts t, times PyTorch eager at 1x12", 8.0, pair, mine)
    over = {
        cell: 1 / measured.share
        for cell, rows in results.cells.items()
        for row, measured in rows.items()
        if row.contestant == mine and cell.experts == "t"
    }
    text = "int8 on OpenVINO, experts t, times the larger of the two limits"
    where = max(over, key=over.__getitem__, default=None)
    note = "" if where is None else f"{mine} at {where}"
    is_void = min(over.values(), default=1.0) < 1 / _DISTURBED
    note += (
        "; a cell is faster than the limit: disturbed, or the weights stay in the caches" if is_void else ""
    )
    yield Verdict(text, "at most", 2.0, None if where is None else over[where], note, is_void)


def _avx2(results: Results) -> Iterable[Verdict]:
    """What is asked of a CPU that has AVX2 alone: experts t, the full vocabulary, every cell, our lengths."""
    if results.cpu.kind != "AVX2":
        return
    mine = "ours-cpu-int8"

    def here(cell: Cell, row: Row) -> bool:
        return cell.experts == "t" and cell.head == "full" and row.feeding == "equal"

    def usual(cell: Cell, row: Row) -> bool:
        return here(cell, row) and row.contestant in ("ort-int8", "ort-fused-int8")

    def other_fp32(cell: Cell, row: Row) -> bool:
        return here(cell, row) and (_is("exporter", "fp32")(row) or _is("torch", "fp32")(row))

    text = "AVX2: cpu-int8, experts t, full vocabulary, times"
    for target, wanted, words in (
        (1.5, usual, "the usual int8"),
        (1.8, other_fp32, "the best other in fp32"),
    ):
        yield _verdict(f"{text} {words} at our lengths", target, _worst(results, mine, wanted), mine)


@dataclass(frozen=True)
class Picked:
    """What ``auto`` takes in a cell beside the fastest variant that it could take.

    Attributes:
        ratio: Its time to that of the fastest; 1 where it is that one.
    """

    cell: Cell
    pick: Pick
    best: str
    ratio: Ratio


def picked(results: Results) -> list[Picked]:
    """Return what ``auto`` takes in each cell where all that it could take was timed."""
    found = []
    for cell, picks in results.picks.items():
        rows = results.cells[cell].items()  # others have names such as openvino-int8 too
        timed = {
            row.contestant.removeprefix("ours-"): each
            for row, each in rows
            if row.contestant.startswith("ours-")
        }
        for pick in picks:
            medians = {name: timed[name].median_ms for name in pick.among if name in timed}
            if pick.variant in medians:
                best = min(medians, key=medians.__getitem__)
                times = ratio(timed[pick.variant].times_ms, timed[best].times_ms)
                found.append(Picked(cell, pick, best, times))
    return found


def _auto(results: Results) -> Iterable[Verdict]:
    text = "auto, times what the fastest variant in the bundle takes"
    worst = max(picked(results), key=lambda each: each.ratio.value, default=None)
    if worst is None:
        yield Verdict(text, "at most", MOST_OF_AUTO, None)
    else:
        note = (
            f"{worst.pick.variant} for {worst.best} at {worst.cell}, {worst.pick.title}, ratio {worst.ratio}"
        )
        yield Verdict(text, "at most", MOST_OF_AUTO, worst.ratio.value, note)


# ------------------------------------------------------------------------------------ size and cost


def _sizes(results: Results) -> Iterable[Verdict]:
    def largest(text: str, target: float, found: dict[Size, float]) -> Verdict:
        where = max(found, key=found.__getitem__, default=None)
        if where is None:
            return Verdict(text, "at most", target, None)
        note = f"{where.case} {where.experts} {where.head} {where.variant}"
        below = sorted(
            {f"{size.variant} is below its gate: {size.below_gate}" for size in found if size.below_gate}
        )
        return Verdict(text, "at most", target, found[where], "; ".join([note, *below]), bool(below))

    full = [size for size in results.sizes if size.case != "bert-base-static"]
    fp32 = {(s.case, s.experts, s.head): s for s in full if s.variant == "onnx-fp32"}
    of = {
        precision: [s for s in full if s.variant.endswith(precision)]
        for precision in ("fp32", "int8", "int4")
    }

    def beside_fp32(size: Size) -> float:
        return size.size_bytes / fp32[size.case, size.experts, size.head].size_bytes

    yield largest("int8 beside fp32", 0.26, {s: beside_fp32(s) for s in of["int8"]})
    yield largest(
        "int8 beside one byte a parameter", 1.03, {s: s.size_bytes / s.parameters for s in of["int8"]}
    )
    yield largest("int4 beside fp32", 0.16, {s: beside_fp32(s) for s in of["int4"]})
    yield largest(
        "fp32 beside four bytes a parameter",
        1.01,
        {s: s.size_bytes / s.parameters / 4 for s in of["fp32"]},
    )
    static = {
        s: s.size_bytes / 1e6
        for s in results.sizes
        if s.case == "bert-base-static" and s.variant.endswith("int8")
    }
    yield largest("static V-bundle of BERT-base in int8, MB", SIZE_LIMIT_MB, static)


def _footprint(results: Results) -> Iterable[Verdict]:
    names = [
        name
        for name in results.footprints
        if name.startswith("ours-") and name.removesuffix(KEPT).endswith("int8")
    ]
    for name in names or [""]:
        found, files = results.footprints.get(name), results.file_mib.get(name)
        title = name or "int8"
        yield Verdict(f"{title}: seconds to load", "at most", 0.5, found.load_s if found else None)
        resident = found.one_mib / files if found and files else None
        yield Verdict(f"{title}: resident memory beside its files", "at most", 1.3, resident)
        both = found.two_mib / found.one_mib if found else None
        yield Verdict(f"{title}: two sessions beside one", "at most", 1.4, both)
    cost = results.costs.get("ours-portable")
    yield Verdict("export: seconds", "at most", 90.0, cost.seconds if cost else None)
    memory = cost.beyond_mib / results.weights_mib if cost and results.weights_mib else None
    yield Verdict("export: peak memory beside the fp32 weights", "at most", 2.5, memory)
