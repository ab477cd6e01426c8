"""``python -m benchmarks.latency``: a bundle against what a user would pick instead, in one run.

Every contestant runs in a process of its own, loaded once for all shapes, and has its turn in every round of
every cell, in an order that is drawn anew each round. Between turns its process is stopped (SIGSTOP), so no
thread pool spins into another's turn, and every engine keeps its own defaults but for the number of threads,
which is the same for all. A turn is an untimed run, where a run is short, and the median of a few timed ones.
Ratios compare the same rounds; their interval is a bootstrap over rounds. A cell ends when its intervals are
narrow, or its time is over. A round in which others took part of the CPU does not count and is run again; a
cell that has too few quiet ones is marked.

Every other exporter's graph is fed twice: as its user feeds it (CLIP ids padded to CLIP's context, logits at
every position) and at our lengths (CLIP at its true length). It computes the same for the full vocabulary and
for 11 candidates, so that its times stand in both tables. torch.compile is fed as its user feeds it only with
``--full``.
"""

import os
import shlex
import statistics
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import Final

import click
import numpy as np
from rich.table import Table

from benchmarks import footprint, limits, report
from benchmarks.contestants import THEIRS, Contestant, Place, find, ours
from benchmarks.feeds import CANDIDATES, SHAPES, Cell, Feeding, Head, heads_of, task_of
from benchmarks.machine import CpuTime, Pick, cpu, has_bf16, picks_of
from benchmarks.prepare import NEEDS, ROOT, Cost, Preparation, find_python, prepare, quiet_environment
from benchmarks.rounds import DISTURBED, Rounds, Turn
from benchmarks.verdicts import Measured, Results, Row, Size, Verdict, judge
from benchmarks.work import ModelShape, Work
from benchmarks.worker import Worker
from xadapter_export.bundle.folder import read_bundle
from xadapter_export.bundle.manifest import Deployment, ExpertSet, Manifest, Task, Variant
from xadapter_export.errors import XAdapterError
from xadapter_export.experts import EXPERT_SETS
from xadapter_export.sessions.cuda import find_missing
from xadapter_export.targets import CPU_PROVIDER, CUDA_PROVIDER

CASES: Final = ("bert-base", "minilm", "roberta-base", "builtin")
HEADS: Final[tuple[Head, ...]] = ("full", "candidates", "features")
OURS: Final = ("ours", "ours-openvino")  # bundles, as ``benchmarks.prepare`` makes them
OURS_GPU: Final = ("ours-gpu", "ours-engines")
COMPARED: Final = ("plain", "transformers", "ours-portable")  # whose seconds and memory are
_STATIC: Final = Preparation("ours", "bert-base-static", "v", "fill-mask")  # for its size
_UNTIMED = ("fp16", "int4")  # for size, or for GPUs; timed with --full
_FEW_ROUNDS, _LONG_CELL_S = 3, 120.0  # rounds that do where they take that long
_LONG_RUN_MS = 2000.0
_TURN_MS = 40.0  # of timed runs in a turn, where a run is shorter
_WARM_BELOW_MS = 500.0  # a longer run is not preceded by an untimed one
_MIB = 1 << 20


@dataclass(frozen=True)
class Settings:
    """What was asked for."""

    cases: tuple[str, ...]
    experts: tuple[ExpertSet, ...]
    shapes: tuple[tuple[int, int], ...]
    heads: tuple[Head, ...]
    contestants: tuple[str, ...]
    rounds: int
    seconds_per_cell: float
    threads: int
    cache: Path
    full: bool
    provider: str = CPU_PROVIDER


@dataclass
class Found:
    """What has been measured so far."""

    cells: dict[Cell, dict[Row, Measured]] = field(default_factory=dict)
    sizes: list[Size] = field(default_factory=list)
    footprints: dict[str, footprint.Footprint] = field(default_factory=dict)
    file_mib: dict[str, float] = field(default_factory=dict)
    costs: dict[str, Cost] = field(default_factory=dict)
    agreement: dict[str, float] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)
    disturbed: dict[Cell, float] = field(default_factory=dict)
    picks: dict[Cell, list[Pick]] = field(default_factory=dict)
    weights_mib: float = 0.0


@dataclass(frozen=True)
class Entry:
    """A contestant of a group: which process, how it is fed, and in which tables it stands."""

    contestant: Contestant
    place: Place
    feedings: tuple[Feeding, ...]
    heads: tuple[Head, ...]
    variant: Variant | None = None  # of ours, on a CPU


class Benchmark:
    """One run, case by case."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.environment = quiet_environment(settings.threads, settings.cache)
        self.found = Found()
        self._locks: dict[Preparation, threading.Lock] = defaultdict(threading.Lock)
        self._start = time.perf_counter()

    def run(self) -> tuple[Results, limits.Limits]:
        """Measure everything that was asked for, and the machine's limits before and after it."""
        self.say("limits of this machine")
        machine = self._measure_limits()
        self._prepare_everything()
        for case in self.settings.cases:
            for task, heads in self._tasks(case):
                self._run_task(case, task, heads)
            is_sized = case == "bert-base" and self._is_on_cpu and "ours" in self.settings.contestants
            if is_sized and self._prepare(_STATIC):
                self._note_sizes(_STATIC, "full")
        self.say("limits of this machine once more")
        machine = machine.best(self._measure_limits())
        found = self.found
        results = Results(
            cells={
                cell: {
                    row: replace(timed, limit_ms=_limit_ms(row, timed, machine))
                    for row, timed in rows.items()
                }
                for cell, rows in found.cells.items()
            },
            sizes=found.sizes,
            footprints=found.footprints,
            file_mib=found.file_mib,
            costs=found.costs,
            disturbed=found.disturbed,
            picks=found.picks,
            cpu=cpu(),
            weights_mib=found.weights_mib,
            fp32_gflops=machine.fp32_gflops,
        )
        return results, machine

    @property
    def _is_on_cpu(self) -> bool:
        return self.settings.provider == CPU_PROVIDER

    def _measure_limits(self) -> limits.Limits:
        is_gpu = self.settings.provider == CUDA_PROVIDER
        return limits.measure_in_child(self.settings.threads, self.environment, on_gpu=is_gpu)

    def _prepare_everything(self) -> None:
        """Make what will be timed, two at a time: an export computes on one core for most of its time.

        Seconds and memory of an export stand beside each other for ``COMPARED``, which are made one by one.
        """
        wanted = [
            preparation
            for case in self.settings.cases
            for task, heads in self._tasks(case)
            for experts in self.settings.experts
            for preparation in self._preparations(case, experts, task, heads)
        ]
        for preparation in wanted:
            if preparation.kind in COMPARED and preparation.experts == wanted[0].experts:
                self._prepare(preparation)
        with ThreadPoolExecutor(max_workers=2) as pool:
            list(pool.map(self._prepare, wanted))

    def _tasks(self, case: str) -> list[tuple[Task, tuple[Head, ...]]]:
        """What a case is asked, and the answers of each task."""
        heads = [head for head in self.settings.heads if head in heads_of(case)]
        tasks = dict.fromkeys(task_of(head) for head in heads)
        return [(task, tuple(head for head in heads if task_of(head) == task)) for task in tasks]

    def _theirs(self, experts: ExpertSet) -> Iterator[tuple[Contestant, ExpertSet]]:
        """The other contestants of a group, each with the expert set that it runs."""
        for contestant in THEIRS:
            is_wanted = contestant.name in self.settings.contestants
            is_double = (contestant.kind, experts) == ("plm", "none")
            is_double |= contestant.name == "openvino-bf16" and not has_bf16()  # is its fp32 there
            # On a GPU each shape takes it minutes of a machine that is paid for by the minute.
            is_slow = contestant.name == "compile" and not self._is_on_cpu and not self.settings.full
            if is_wanted and not is_double and not is_slow and contestant.runs_with(self.settings.provider):
                yield contestant, "none" if contestant.kind in ("plm", "encoder") else experts

    @property
    def _kinds_of_ours(self) -> tuple[str, ...]:
        """The bundles of ours that are timed."""
        if "ours" not in self.settings.contestants:
            return ()
        return OURS if self._is_on_cpu else OURS_GPU

    def _preparations(
        self, case: str, experts: ExpertSet, task: Task, heads: tuple[Head, ...]
    ) -> Iterator[Preparation]:
        """What the contestants of a group need."""
        for contestant, runs in self._theirs(experts):
            if contestant.preparation is not None:
                yield Preparation(contestant.preparation, case, runs, task)
        for head, kind in product(heads, self._kinds_of_ours):
            yield Preparation(kind, case, experts, task, head == "candidates")
        has_costs = self._kinds_of_ours and self._is_on_cpu
        if has_costs and case == self.settings.cases[0]:
            yield Preparation("ours-portable", case, experts, task)
        if has_costs and case == _STATIC.case.removesuffix("-static"):
            yield _STATIC

    def _run_task(self, case: str, task: Task, heads: tuple[Head, ...]) -> None:
        shape, feeds = self._feeds(case, task)
        with tempfile.TemporaryDirectory() as temporary:
            files = {key: Path(temporary) / f"{key[0]}x{key[1]}.npz" for key in feeds}
            for key, feed in feeds.items():
                np.savez(files[key], **feed)  # type: ignore[arg-type]  # numpy types any keyword as its flag allow_pickle
            for experts in self.settings.experts:
                entries = self._entries(case, experts, task, heads)
                group = _Group(case, experts, entries, shape, self)
                group.measure(files, Path(temporary))
            is_first = case == self.settings.cases[0] and task == task_of(self.settings.heads[0])
            if is_first and self._is_on_cpu:
                self._footprints(case, task, entries, next(iter(files.values())), shape)

    def _feeds(
        self, case: str, task: Task
    ) -> tuple[ModelShape, dict[tuple[int, int], Mapping[str, np.ndarray]]]:
        """Make the texts of every shape; the model is not kept."""
        from benchmarks.cases import make_feed, make_model

        model = make_model(case, task)
        fitting = [(batch, seq) for batch, seq in self.settings.shapes if seq <= model.plm.max_seq]
        return ModelShape.of(model), {(b, t): make_feed(model, b, t) for b, t in fitting}

    def _entries(self, case: str, experts: ExpertSet, task: Task, heads: tuple[Head, ...]) -> list[Entry]:
        """Prepare the contestants of a group; those that cannot be prepared are noted and left out."""
        threads, provider = self.settings.threads, self.settings.provider
        entries: list[Entry] = []
        for contestant, runs in self._theirs(experts):
            folder = None
            if contestant.preparation is not None:
                preparation = Preparation(contestant.preparation, case, runs, task)
                cost = self._prepare(preparation)
                if cost is None:
                    continue
                folder = preparation.folder(self.settings.cache)
                self.found.costs.setdefault(contestant.name, cost)
            feedings: tuple[Feeding, ...] = ("user", "equal")
            if contestant.kind != "torch" and runs == "none":
                feedings = ("user",)  # the two are the same
            if contestant.name == "compile" and not self.settings.full:
                feedings = ("equal",)
            if contestant.kind == "exporter" and contestant.name.startswith("litert"):
                feedings = ("equal",) if runs != "none" else ("user",)  # a signature has one length
            place = Place(case, runs, task, folder, threads, None, provider)
            entries.append(Entry(contestant, place, feedings, heads))
        for head, kind in product(heads, self._kinds_of_ours):
            preparation = Preparation(kind, case, experts, task, head == "candidates")
            cost = self._prepare(preparation)
            if cost is None:
                continue
            self.found.costs.setdefault(kind, cost)
            manifest = self._note_sizes(preparation, head)
            folder = preparation.folder(self.settings.cache)
            timed: Sequence[Variant | Deployment] = manifest.variants_of(experts)
            if kind == "ours-engines":
                timed = manifest.deployments
            for variant in timed:
                is_timed = variant.precision not in _UNTIMED or self.settings.full or not self._is_on_cpu
                if is_timed and ours(variant.name).runs_with(provider):
                    place = Place(case, experts, task, folder, threads, variant.name, provider)
                    known = variant if isinstance(variant, Variant) else None
                    entries.append(Entry(ours(variant.name), place, ("equal",), (head,), known))
        return entries

    def _prepare(self, preparation: Preparation) -> Cost | None:
        """Prepare it and what it is made from; None, with a note, where that fails."""
        needed = NEEDS.get(preparation.kind)
        parts = (preparation.case, preparation.experts, preparation.task)
        if needed is not None and self._prepare(Preparation(needed, *parts)) is None:
            return None
        with self._locks[preparation]:
            if preparation.name in self.found.missing:
                return None
            start = time.perf_counter()
            try:
                cost = prepare(preparation, self.settings.cache, self.environment)
            except XAdapterError as error:
                self.note(preparation.name, error)
                return None
        if time.perf_counter() - start > 1:
            self.say(f"prepared {preparation.name}: {cost.seconds:.0f} s, peak {cost.peak_mib:.0f} MiB")
        return cost

    def _note_sizes(self, preparation: Preparation, head: Head) -> Manifest:
        manifest = read_bundle(preparation.folder(self.settings.cache) / "bundle", verify=False).manifest
        counts = manifest.expert_sets[preparation.experts].component_parameters
        for variant in manifest.variants_of(preparation.experts):
            self.found.sizes.append(
                Size(
                    case=preparation.case,
                    experts=preparation.experts,
                    head=head,
                    variant=variant.name,
                    size_bytes=variant.size_bytes,
                    parameters=sum(counts.values()),
                    below_gate=_below_gate(variant) if preparation.case == "builtin" else "",
                )
            )
        return manifest

    def _footprints(
        self, case: str, task: Task, entries: Sequence[Entry], feed: Path, shape: ModelShape
    ) -> None:
        """Load, memory and export of the last expert set, whose graphs hold most."""
        for entry in entries:
            name = entry.contestant.name
            if entry.contestant.kind == "torch" or name in self.found.footprints:
                continue
            self.say(f"load and memory of {name}")
            places = {name: entry.place}
            if name.startswith("ours-openvino-"):
                cache_dir = self.settings.cache / "compiled"
                places |= {name + footprint.KEPT: replace(entry.place, cache_dir=cache_dir)}
            for title, place in places.items():
                size = entry.contestant.size_bytes(place)
                if size is not None:
                    self.found.file_mib[title] = size / _MIB
                try:
                    for _ in range(1 if place.cache_dir is None else 2):  # the first keeps it
                        python = find_python(entry.contestant.preparation, self.settings.cache)
                        self.found.footprints[title] = footprint.measure(
                            name, place, feed, shape.clip_context, self.environment, python
                        )
                except XAdapterError as error:
                    self.note(f"footprint of {title}", error)
        if "ours" in self.settings.contestants and entries:
            experts = entries[-1].place.experts
            preparation = Preparation("ours-portable", case, experts, task)
            if cost := self._prepare(preparation):
                self.found.costs["ours-portable"] = cost
                bundle = read_bundle(preparation.folder(self.settings.cache) / "bundle", verify=False)
                self.found.weights_mib = bundle.manifest.variant(experts).size_bytes / _MIB

    def say(self, text: str) -> None:
        """Print progress on stderr, after the seconds since the start."""
        click.echo(f"{time.perf_counter() - self._start:6.0f} s  {text}", err=True)

    def note(self, what: str, error: Exception) -> None:
        """Remember and print what could not be measured."""
        self.found.missing[what] = str(error)
        self.say(f"left out: {what}: {error}")


@dataclass
class _Group:
    """The contestants of one case, expert set and task, all loaded, shape by shape."""

    case: str
    experts: ExpertSet
    entries: Sequence[Entry]
    shape: ModelShape
    benchmark: Benchmark

    def measure(self, files: Mapping[tuple[int, int], Path], temporary: Path) -> None:
        with ExitStack() as stack:
            # Two load at a time: most of a load is on one core. A worker ends with the thread that started
            # it (see ``worker._end_with_parent``), so that the threads are kept as long as the workers.
            pool = stack.enter_context(ThreadPoolExecutor(max_workers=2))
            loads = [pool.submit(self._load, entry, list(files.values())) for entry in self.entries]
            loaded = {number: load.result() for number, load in enumerate(loads)}
            workers = {n: stack.enter_context(worker) for n, worker in loaded.items() if worker is not None}
            for is_first, (key, file) in zip([True] + [False] * len(files), files.items(), strict=False):
                if is_first:
                    self._compare(workers, file, temporary)
                self._measure_shape(key, file, workers)

    def _load(self, entry: Entry, files: Sequence[Path]) -> Worker | None:
        """Start a contestant, which compiles what it must; one that cannot start is noted and left out."""
        name = entry.contestant.name
        try:
            python = find_python(entry.contestant.preparation, self.benchmark.settings.cache)
            worker = Worker(name, entry.place, self.benchmark.environment, python)
            if name == "compile":  # each shape takes it half a minute on one core, while others load
                for file, feeding in product(files, entry.feedings):
                    worker.first(file, feeding, self.shape.clip_context)
        except XAdapterError as error:
            self.benchmark.note(f"{name} {self.case} {self.experts}", error)
            return None
        return worker

    def _compare(self, workers: Mapping[int, Worker], file: Path, temporary: Path) -> None:
        """Cosine of what each says at the masks to what PyTorch eager says: they do the same work."""
        answers: dict[int, np.ndarray] = {}
        for number, worker in workers.items():
            try:
                worker.first(file, "equal", self.shape.clip_context)
                worker.answer(temporary / "answer.npy")
            except XAdapterError:
                continue  # said when it is measured
            answers[number] = np.load(temporary / "answer.npy").astype(np.float64)
        named = {self.entries[number].contestant.name: number for number in answers}
        if "eager" not in named:
            return
        reference = answers[named["eager"]]
        for number, answer in answers.items():
            entry = self.entries[number]
            if entry.contestant.kind in ("plm", "encoder") or answer.shape != reference.shape:
                continue  # another model; or a head that is sliced
            cosine = np.sum(answer * reference) / np.linalg.norm(answer) / np.linalg.norm(reference)
            name = f"{self.case} {self.experts} {'/'.join(entry.heads)} {entry.contestant.name}"
            self.benchmark.found.agreement[name] = float(cosine)

    def _measure_shape(self, key: tuple[int, int], file: Path, workers: Mapping[int, Worker]) -> None:
        settings, start = self.benchmark.settings, time.perf_counter()
        rounds: Rounds = Rounds()
        with self._round(workers, rounds) as probes:
            probes.update(self._probe(key, file, workers))
        # Where runs are long, the turn that tells how long they are is a round like the others.
        is_long = sum(probes.values()) / 1e3 > _LONG_CELL_S / _FEW_ROUNDS
        enough = min(_FEW_ROUNDS, settings.rounds) if is_long else settings.rounds
        if not is_long:
            rounds, start = Rounds(), time.perf_counter()
        rng, turns = np.random.default_rng(0), list(probes)
        while turns and not rounds.are_done(
            enough, is_over=time.perf_counter() - start > settings.seconds_per_cell
        ):
            gone: set[int] = set()
            with self._round(workers, rounds) as found:
                for index in rng.permutation(len(turns)):
                    turn = turns[index]
                    try:
                        if turn[0] not in gone:
                            found[turn] = self._take_turn(turn, probes[turn], file, workers)
                    except XAdapterError as error:  # it ran out of memory, say: the others go on
                        name = self.entries[turn[0]].contestant.name
                        self.benchmark.note(f"{name} {self.case} {self.experts} {key}", error)
                        gone.add(turn[0])
            for number in gone:
                rounds.drop(number)
            turns = [turn for turn in turns if turn[0] not in gone]
        times, share = rounds.kept(enough)
        self._keep(key, file, times, share if share > DISTURBED else None)
        seconds = time.perf_counter() - start
        name = f"{self.case} {self.experts} {key[0]}x{key[1]}"
        disturbed = f", disturbed: others took {share:.0%} of the CPU" if share > DISTURBED else ""
        self.benchmark.say(
            f"{name}: {len(rounds.shares)} rounds of {len(turns)} in {seconds:.0f} s{disturbed}"
        )

    @contextmanager
    def _round(self, workers: Mapping[int, Worker], rounds: Rounds) -> Iterator[dict[Turn, float]]:
        """A round: gives what its times are put into, and adds it with what others took of the CPU."""
        processes = [os.getpid(), *(worker.process_id for worker in workers.values())]
        found: dict[Turn, float] = {}
        before = CpuTime.read(processes)
        yield found
        rounds.add(found, before.others_share(CpuTime.read(processes)))

    def _probe(self, key: tuple[int, int], file: Path, workers: Mapping[int, Worker]) -> dict[Turn, float]:
        """Run every turn for the first time, and return about how long it takes, in ms."""
        context = self.shape.clip_context
        probes: dict[Turn, float] = {}
        for number, worker in workers.items():
            entry = self.entries[number]
            for feeding in entry.feedings:
                try:
                    probe = 1e3 * worker.first(file, feeding, context)
                    if probe < _LONG_RUN_MS:  # a longer one is hardly longer for being the first
                        (probe,) = worker.turn(1, is_warmed=False)
                    probes[number, feeding] = probe
                except XAdapterError as error:
                    self.benchmark.note(f"{entry.contestant.name} {self.case} {self.experts} {key}", error)
                    break
        return probes

    def _take_turn(self, turn: Turn, probe: float, file: Path, workers: Mapping[int, Worker]) -> float:
        """Return the median ms of as many runs as a turn has."""
        number, feeding = turn
        workers[number].use(file, feeding, self.shape.clip_context)
        count = max(1, min(10, round(_TURN_MS / probe)))
        return statistics.median(workers[number].turn(count, is_warmed=probe < _WARM_BELOW_MS))

    def _keep(
        self,
        key: tuple[int, int],
        file: Path,
        times: Mapping[Turn, Sequence[float]],
        disturbed: float | None,
    ) -> None:
        with np.load(file) as feed:
            clip_seq = feed["clip_input_ids"].shape[1] if "clip_input_ids" in feed else 0
            masks = feed["mask_positions"].shape[1] if "mask_positions" in feed else 0
        for head in dict.fromkeys(head for entry in self.entries for head in entry.heads):
            cell = Cell(self.case, self.experts, *key, head)
            rows = self.benchmark.found.cells.setdefault(cell, {})
            if disturbed is not None:
                self.benchmark.found.disturbed[cell] = disturbed
            if self.benchmark.settings.provider == CPU_PROVIDER:
                variants = [entry.variant for entry in self.entries if entry.variant and head in entry.heads]
                self.benchmark.found.picks[cell] = list(picks_of(variants))
            for (number, feeding), found in times.items():
                entry = self.entries[number]
                if head not in entry.heads:
                    continue
                work = self._work(entry, head, key, feeding, clip_seq, masks)
                precision = entry.contestant.precision
                row = Row(entry.contestant.name, feeding)
                rows[row] = Measured(tuple(found), work.gflop, work.weight_bytes(precision))

    def _work(
        self, entry: Entry, head: Head, key: tuple[int, int], feeding: Feeding, clip_seq: int, masks: int
    ) -> Work:
        """Ours is held to the least that gives the answer, the others to what their graphs compute."""
        kind, (batch, seq) = entry.contestant.kind, key
        only_masks = kind == "ours" or (kind == "torch" and feeding == "equal")
        return self.shape.work(
            entry.place.experts,
            "features" if kind == "encoder" else head,
            batch=batch,
            seq=seq,
            clip_seq=(self.shape.clip_context or 0) if feeding == "user" else clip_seq,
            positions=masks if only_masks else seq,
            is_least=kind == "ours",
        )


def _limit_ms(row: Row, timed: Measured, machine: limits.Limits) -> float:
    return machine.least_ms(timed.gflop, timed.weight_bytes, find(row.contestant).precision)


def _below_gate(variant: Variant) -> str:
    """What a lossy variant loses beyond the default gate of its precision; empty where it is within."""
    from xadapter_export.exporters.judge.agreement import GATES, points_lost

    agreement = variant.agreement
    if agreement is None:
        return ""
    gate, points = GATES[variant.precision], points_lost(agreement) or 0.0
    same, least = agreement.same_top, gate.min_same_top
    if same is None:
        same, least = agreement.cosine, gate.min_cosine
    if same >= least and points <= gate.max_points_lost:
        return ""
    return f"{same:.1%} the same, {points:.1f} points lost"


# --------------------------------------------------------------------------------------- the command


class _Listed(click.ParamType[tuple[str, ...]]):
    """Names with commas between them."""

    name = "names"

    def __init__(self, allowed: Sequence[str]) -> None:
        self.allowed = tuple(allowed)

    def convert(
        self, value: object, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[str, ...]:
        if isinstance(value, tuple):
            return value
        names = tuple(dict.fromkeys(part.strip() for part in str(value).split(",")))
        if unknown := [name for name in names if name not in self.allowed]:
            self.fail(f"{unknown[0]!r} is none of {', '.join(self.allowed)}", param, ctx)
        return names


class _Shapes(click.ParamType[tuple[tuple[int, int], ...]]):
    """Shapes, texts x tokens, with commas between them."""

    name = "shapes"

    def convert(
        self, value: object, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[tuple[int, int], ...]:
        if isinstance(value, tuple):
            return value
        shapes = []
        for part in str(value).split(","):
            batch, _, seq = part.strip().partition("x")
            if not (batch.isdigit() and seq.isdigit() and int(batch) >= 1 and int(seq) >= 8):
                self.fail(f"{part!r} is not texts x tokens, such as 8x32, of 8 tokens or more", param, ctx)
            shapes.append((int(batch), int(seq)))
        return tuple(dict.fromkeys(shapes))


def _check_provider(provider: str) -> None:
    """Refuse a provider that cannot start here before graphs are prepared for it.

    Raises:
        ClickException: If it is not in this onnxruntime, or CUDA lacks something.
    """
    import onnxruntime as ort

    if provider not in ort.get_available_providers():
        raise click.ClickException(f"the execution provider {provider} is not in this onnxruntime")
    if provider == CUDA_PROVIDER and (missing := find_missing(ort)):
        raise click.ClickException(f"{provider} cannot start: missing are {', '.join(missing)}")


@click.command()
@click.option("--case", type=click.Choice(CASES), default="bert-base", show_default=True, help="Model.")
@click.option(
    "--experts",
    type=_Listed(EXPERT_SETS),
    default="t",
    show_default=True,
    help="Expert sets, commas between.",
)
@click.option(
    "--shapes",
    type=_Shapes(),
    default=",".join(f"{batch}x{seq}" for batch, seq in SHAPES),
    show_default=True,
    help="Texts x tokens, commas between.",
)
@click.option(
    "--heads",
    type=_Listed(HEADS),
    default="full,candidates",
    show_default=True,
    help=f"Answers: the full vocabulary, {len(CANDIDATES)} candidates, features.",
)
@click.option(
    "--contestants",
    type=_Listed(report.all_names()),
    default=",".join(report.usual_names()),
    help="[default: all but LiteRT, ExecuTorch and CTranslate2: make bench-field]",
)
@click.option("--rounds", type=click.IntRange(min=1), default=5, show_default=True, help="Rounds at least.")
@click.option(
    "--seconds-per-cell", type=float, default=15.0, show_default=True, help="More rounds until this is over."
)
@click.option("--threads", type=click.IntRange(min=1), default=2, show_default=True, help="For everyone.")
@click.option(
    "--provider",
    default=CPU_PROVIDER,
    show_default=True,
    help="Of onnxruntime. With CUDAExecutionProvider everyone runs on the GPU, in fp32 and fp16; PyTorch and "
    "TensorRT-RTX engines too.",
)
@click.option(
    "--output",
    type=click.Path(file_okay=False, path_type=Path),
    default=ROOT / "build" / "bench" / "results",
    help="Folder of latency.json, .md and .png. [default: build/bench/results]",
)
@click.option(
    "--cache",
    type=click.Path(file_okay=False, path_type=Path),
    default=ROOT / "build" / "bench",
    help="Where graphs are kept from run to run. [default: build/bench]",
)
@click.option("--full", is_flag=True, help="Every case, expert set, shape and answer.")
def main(case: str, output: Path, full: bool, **options: object) -> None:
    """Time a bundle against what a user would pick instead, and say which targets are met.

    The first run prepares the graphs of all contestants, which takes minutes; later runs find them.
    """
    settings = Settings(cases=(case,), full=full, **options)  # type: ignore[arg-type]  # click gives each option the type of its field
    _check_provider(settings.provider)
    if full:
        settings = Settings(
            **{**vars(settings), "cases": CASES, "experts": EXPERT_SETS, "shapes": SHAPES, "heads": HEADS}
        )
    output.mkdir(parents=True, exist_ok=True)
    settings.cache.mkdir(parents=True, exist_ok=True)
    benchmark = Benchmark(settings)
    results, machine = benchmark.run()
    verdicts = judge(results) if settings.provider == CPU_PROVIDER else []  # targets are for CPUs
    found = benchmark.found
    tables = _tables(results, machine)
    _print(tables, verdicts, found)
    (output / "latency.md").write_text(report.as_markdown(tables), encoding="utf-8")
    report.write_json(
        report.as_json(results, machine, verdicts, found.agreement, found.missing), output / "latency.json"
    )
    if results.cells:
        report.draw(results, output / "latency.png")
    click.echo(f"{output / 'latency.json'}, latency.md and latency.png")
    click.echo(shlex.join(["python", "-m", "benchmarks.latency", *sys.argv[1:]]))


def _tables(results: Results, machine: limits.Limits) -> list[Table]:
    return [
        *report.latency_tables(results),
        *([report.auto_table(results)] if results.picks else []),
        report.limits_table(machine, results),
        report.size_table(results),
        report.footprint_table(results),
    ]


def _print(tables: Sequence[Table], verdicts: Sequence[Verdict], found: Found) -> None:
    console = report.make_console()
    for table in tables:
        console.print(table)
        console.print()
    for name, reason in found.missing.items():
        console.print(f"left out: {name}: {reason}", soft_wrap=True)
    worst = min(found.agreement.items(), key=lambda item: item[1], default=None)
    if worst is not None:
        console.print(f"lowest cosine of an answer to PyTorch eager's: {worst[1]:.4f}, {worst[0]}")
    if verdicts:
        console.print("\ntargets")
    for verdict in verdicts:
        console.print(str(verdict), soft_wrap=True)


if __name__ == "__main__":
    main()
