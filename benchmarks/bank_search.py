"""``python -m benchmarks.bank_search``: the in-graph search of the bank, from 1,000 to 1,000,000 pictures.

Graphs that only search are rewritten and packed as an export does it, and take turns on the same queries,
with ``--faiss`` beside faiss.IndexFlatIP. The figures to read are the ratios, which are taken round by round.
``traced`` is the graph as it is traced, before the rewrite; at a million pictures it needs 6 GiB to load.

Resident memory is counted after a few queries. Each reads its rows from the memory-mapped file, and the
kernel maps what lies around them, so that it grows with the queries by pages that the system can drop at any
time; the anonymous part does not.

Dimensions: B batch, N bank size, D CLIP embedding size, K retrieved pictures, Q queries.
"""

import gc
import importlib
import multiprocessing
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import click
import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from onnx_ir.tape import Tape
from rich.table import Table

from benchmarks.machine import cpu
from xadapter_export.cli.command import make_console, print_json
from xadapter_export.errors import ConfigError, MissingExtraError
from xadapter_export.sessions.onnx_session import open_onnx
from xadapter_export.sessions.session import Opening

if TYPE_CHECKING:
    from xadapter_export.exporters.passes.bank_search import BankPrecision

Float32Array = NDArray[np.float32]
Int64Array = NDArray[np.int64]
Search = Callable[[Float32Array], Int64Array]  # (B, D) to the rows of the best (B, K)
Rows = Literal["random", "clustered"]

_D, _K = 512, 4
_MEMORY_QUERIES = 8
_PAUSE_S = 0.05  # before each turn, in which threads of the one before cease to spin
_CHUNK = 32768  # rows that are made, or compared, at a time
_CENTERS, _NOISE = 1000, 0.4  # of clustered rows, which share a mean direction too, as CLIP's features do
_SEARCHES = ("traced", "fp32", "int8")
_TIE = 1e-6  # a cosine this far below the K-th best is as good
_GATES = {"r2": 0.99, "recall": 0.995, "int8 to fp32": 3.0, "int8 to faiss": 0.8, "resident": 1.1}


@dataclass(frozen=True)
class Resident:
    """What a process holds of a session, in bytes beyond what it held before.

    Attributes:
        total: Anonymous and memory-mapped, after the queries.
        anonymous: The part that the system cannot drop.
        peak: Highest total, which is reached while loading.
    """

    total: int
    anonymous: int
    peak: int


def write_rows(path: Path, num_rows: int, kind: Rows) -> Float32Array:
    """Writes ``(N, D) float32`` rows of length 1, chunk by chunk, and returns them memory-mapped."""
    rng = np.random.default_rng(0)
    centers = _centers()
    with path.open("wb") as stream:
        for start in range(0, num_rows, _CHUNK):
            noise = unit(rng.standard_normal((min(_CHUNK, num_rows - start), _D), dtype=np.float32))
            if kind == "clustered":
                noise = unit(centers[rng.integers(_CENTERS, size=len(noise))] + _NOISE * noise)
            stream.write(noise.tobytes())
    return np.memmap(path, np.float32, "r").reshape(num_rows, _D)


def make_queries(count: int, kind: Rows) -> Float32Array:
    """Returns ``(Q, D) float32`` of length 1, as far from the centers as texts are from pictures."""
    rng = np.random.default_rng(1)
    queries = unit(rng.standard_normal((count, _D), dtype=np.float32))
    return unit(_centers()[rng.integers(_CENTERS, size=count)] + queries) if kind == "clustered" else queries


def _centers() -> Float32Array:
    rng = np.random.default_rng(2)
    mean = rng.standard_normal(_D, dtype=np.float32)
    mean[:2] *= 12  # a few numbers of CLIP's features are far larger than the others
    return unit(unit(mean) + unit(rng.standard_normal((_CENTERS, _D), dtype=np.float32)))


def unit(rows: Float32Array) -> Float32Array:
    """Returns rows at length 1."""
    scaled: Float32Array = rows / np.linalg.norm(rows, axis=-1, keepdims=True)
    return scaled


def search_graph(rows: Float32Array, k: int = _K) -> ir.Model:
    """Returns the part of a traced graph that searches ``rows (N, D)``: from ``query`` to ``pictures``."""

    def weight(name: str, array: NDArray[Any]) -> ir.Value:
        return ir.Value(name=name, const_value=ir.Tensor(array, name=name), shape=ir.Shape(array.shape))

    query = ir.Value(
        name="query", shape=ir.Shape(("batch", rows.shape[1])), type=ir.TensorType(ir.DataType.FLOAT)
    )
    bank, count, axis = weight("bank", rows), weight("k", np.array([k])), weight("axis", np.array([-1]))
    tape = Tape()
    transposed = tape.op("Transpose", [bank], {"perm": [1, 0]})
    product = tape.op("MatMul", [query, transposed])
    scores, places = tape.op_multi_out("TopK", [product, count], {"axis": -1}, num_outputs=2)
    index = tape.op("Unsqueeze", [places, axis])
    pictures = tape.op("GatherND", [bank, index])
    outputs = {"retrieved": places, "retrieved_scores": scores, "pictures": pictures}
    for name, value in outputs.items():
        value.name = name
        value.type = ir.TensorType(ir.DataType.INT64 if value is places else ir.DataType.FLOAT)
    graph = ir.Graph(
        [query],
        list(outputs.values()),
        nodes=tape.nodes,
        initializers=[bank, count, axis],
        opset_imports={"": 17},
        name="search",
    )
    return ir.Model(graph, ir_version=10)


def write_search(folder: Path, rows: Float32Array, precision: str) -> tuple[Path, int]:
    """Writes a graph that searches; returns its file, and the bytes of weights that it refers to."""
    from xadapter_export.exporters.onnx_files import SharedWeights, write_graph
    from xadapter_export.exporters.passes.bank_search import (
        search_bank,  # PyTorch, which the child does without
    )

    model = search_graph(rows)
    if precision != "traced":
        search_bank(model, cast("BankPrecision", precision))
    weights = SharedWeights(folder / f"{precision}.onnx_data")
    size_bytes = weights.take(model)
    weights.close()
    write_graph(model, folder / f"{precision}.onnx")
    return folder / f"{precision}.onnx", size_bytes


def open_search(graph: Path, threads: int) -> Search:
    """Loads a graph that searches."""
    session = open_onnx(graph, Opening(num_threads=threads))
    names = ["retrieved", "retrieved_scores", "pictures"]
    return lambda queries: cast(Int64Array, session.run(names, {"query": queries})[0])


def open_faiss(rows: Float32Array, threads: int) -> Search:
    """Loads the rows into faiss.

    Raises:
        MissingExtraError: If faiss is not installed.
    """
    try:
        faiss = importlib.import_module("faiss")
    except ImportError as error:
        raise MissingExtraError(
            "faiss cannot be imported", got=error, hint="pip install faiss-cpu, or leave out --faiss"
        ) from error
    faiss.omp_set_num_threads(threads)
    index = faiss.IndexFlatIP(rows.shape[1])
    for start in range(0, len(rows), _CHUNK):
        index.add(np.ascontiguousarray(rows[start : start + _CHUNK]))
    return lambda queries: cast(Int64Array, index.search(queries, _K)[1])


def lowest_best(rows: Float32Array, queries: Float32Array) -> Float32Array:
    """Returns the K-th best cosine ``(Q,) float32`` of each query."""
    best = np.full((len(queries), _K), -np.inf, np.float32)
    for start in range(0, len(rows), _CHUNK):
        scores = np.concatenate([best, queries @ rows[start : start + _CHUNK].T], axis=1)
        best = np.partition(scores, -_K, axis=1)[:, -_K:]
    return cast(Float32Array, best.min(axis=1))


def recall(search: Search, rows: Float32Array, queries: Float32Array, bounds: Float32Array) -> float:
    """Returns the share of retrieved rows that are among the K best, ties included."""
    found = np.concatenate([search(queries[i : i + 8]) for i in range(0, len(queries), 8)])  # (Q, K)
    cosines = np.einsum("qd,qkd->qk", queries, rows[found])
    distinct = sum(len(set(row)) for row in found.tolist()) / found.size
    return float((cosines >= bounds[:, None] - _TIE).mean()) * distinct


def take_turns(
    searches: dict[str, Search], queries: Float32Array, batch: int, rounds: int
) -> dict[str, list[float]]:
    """Returns seconds of every round; each round asks all of them the same, in alternating order."""
    times: dict[str, list[float]] = {name: [] for name in searches}
    for number in range(-1, rounds):  # the first warms up
        asked = queries[np.arange(number * batch, (number + 1) * batch) % len(queries)]
        for name in list(searches)[:: 1 if number % 2 else -1]:
            time.sleep(_PAUSE_S)
            searches[name](asked)  # untimed: after a pause the first milliseconds run at half the speed
            start = time.perf_counter()
            searches[name](asked)
            times[name].append(time.perf_counter() - start)
    return {name: seconds[1:] for name, seconds in times.items()}


def resident(graph: Path, queries: Float32Array, threads: int) -> Resident:
    """Measures, in a process of its own, what a session holds after the queries, one by one (Linux only)."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_resident, graph, queries, threads).result()


def _resident(graph: Path, queries: Float32Array, threads: int) -> Resident:
    importlib.import_module("onnxruntime")
    before = _status()
    search = open_search(graph, threads)
    for query in queries:
        search(query[None])
    after = _status()
    return Resident(
        after["VmRSS"] - before["VmRSS"],
        after["RssAnon"] - before["RssAnon"],
        after["VmHWM"] - before["VmRSS"],
    )


def _status() -> dict[str, int]:
    """Returns this process's memory in bytes, as the kernel counts it."""
    lines = Path("/proc/self/status").read_text().splitlines()
    pairs = (line.split(":") for line in lines if line.endswith(" kB"))
    return {name: 1024 * int(value.split()[0]) for name, value in pairs}


def r_squared(sizes: list[int], seconds: list[float]) -> float:
    """Returns how much of the spread of the times a straight line over the sizes explains."""
    return float(np.corrcoef(sizes, seconds)[0, 1] ** 2)


def measure(
    size: int, kind: Rows, precisions: list[str], *, with_memory: bool, **options: Any
) -> Iterator[dict[str, Any]]:
    """Yields a row of the table for each contestant, at one size of the bank."""
    threads, batch, rounds = options["threads"], options["batch_size"], options["rounds"]
    queries = make_queries(options["queries"], kind)
    with tempfile.TemporaryDirectory(dir=options["folder"]) as temporary:
        folder = Path(temporary)
        rows = write_rows(folder / "rows", size, kind)
        bounds = lowest_best(rows, queries)
        graphs = {precision: write_search(folder, rows, precision) for precision in precisions}
        asked = queries[:_MEMORY_QUERIES]
        memory = {name: graph for name, (graph, _) in graphs.items() if with_memory}
        held = {name: resident(graph, asked, threads) for name, graph in memory.items()}
        searches = {name: open_search(graph, threads) for name, (graph, _) in graphs.items()}
        if options["faiss"]:
            searches["faiss"] = open_faiss(rows, threads)
        times = take_turns(searches, queries, batch, rounds)
        for name, seconds in times.items():
            row: dict[str, Any] = {"rows": kind, "N": size, "search": name, "batch": batch}
            row |= {"ms": 1e3 * statistics.median(seconds)}
            row |= {"ms, lowest": 1e3 * min(seconds), "ms, highest": 1e3 * max(seconds)}
            for other in ("fp32", "faiss"):
                if other in times and name != other:
                    ratios = [b / a for a, b in zip(seconds, times[other], strict=True)]
                    row[f"speed to {other}"] = statistics.median(ratios)
            row["recall"] = recall(searches[name], rows, queries, bounds)
            if name in graphs:
                row["stored (MB)"] = graphs[name][1] / 1e6
            if name in held:
                row |= {
                    "resident (MB)": held[name].total / 1e6,
                    "anonymous (MB)": held[name].anonymous / 1e6,
                    "peak (MB)": held[name].peak / 1e6,
                    "resident to bank": held[name].total / graphs[name][1],
                }
            yield row
        del searches, rows
        gc.collect()  # the sessions let go of their files before the folder goes


def judge(found: list[dict[str, Any]]) -> list[tuple[str, float, str, float, bool]]:
    """Returns what must be shown: a name, what was measured, a relation, the gate, whether it holds."""
    results = []

    def gate(name: str, value: float, gate: str, *, at_most: bool = False) -> None:
        limit = _GATES[gate]
        results.append(
            (name, value, "<=" if at_most else ">=", limit, value <= limit if at_most else value >= limit)
        )

    largest = max(row["N"] for row in found)
    for name in dict.fromkeys(row["search"] for row in found if row["search"] not in ("faiss", "traced")):
        own = [row for row in found if row["search"] == name]
        for kind in dict.fromkeys(row["rows"] for row in own):
            line = [row for row in own if row["rows"] == kind]
            if len(line) > 2:
                fit = r_squared([row["N"] for row in line], [row["ms"] for row in line])
                gate(f"{name}, {kind} rows: R2 of time over N", fit, "r2")
        gate(f"{name}: lowest recall@{_K}", min(row["recall"] for row in own), "recall")
        at_largest = [row for row in own if row["N"] == largest]
        share = max(row["resident to bank"] for row in at_largest)
        gate(f"{name}: resident memory to bank, N = {largest:,}", share, "resident", at_most=True)
        for other in ("fp32", "faiss") if name == "int8" else ():
            ratios = [row[key] for row in at_largest if (key := f"speed to {other}") in row]
            if ratios:
                gate(f"int8: speed to {other}, N = {largest:,}", min(ratios), f"int8 to {other}")
    return results


def _split(_context: click.Context, _option: click.Parameter, text: str) -> list[str]:
    return text.split(",")


@click.command()
@click.option("--sizes", default="1000,10000,100000,1000000", show_default=True, callback=_split)
@click.option("--precisions", default="fp32,int8", show_default=True, callback=_split, help="traced too.")
@click.option("--rows", default="random,clustered", show_default=True, callback=_split, help="How they lie.")
@click.option("--faiss", is_flag=True, help="Compare with faiss.IndexFlatIP.")
@click.option("--batch-size", default=1, show_default=True, help="Queries asked together.")
@click.option("--rounds", default=15, show_default=True)
@click.option("--queries", default=100, show_default=True, help="For the recall.")
@click.option("--threads", default=2, show_default=True)
@click.option("--folder", type=click.Path(exists=True, file_okay=False), help="For files; 6 GB at the most.")
@click.option("--json", "as_json", is_flag=True)
def main(sizes: list[str], precisions: list[str], rows: list[str], as_json: bool, **options: Any) -> None:
    """Time the search of the bank, and compare what it finds with the exact answer."""
    for given, allowed in ((precisions, [*_SEARCHES]), (rows, ["random", "clustered"])):
        if not set(given) <= set(allowed):
            raise ConfigError("no such choice", expected=", ".join(allowed), got=", ".join(given))
    banks = sorted(int(size) for size in sizes)
    found = [
        row
        for kind in rows
        for size in banks
        for row in measure(size, cast(Rows, kind), precisions, with_memory=size == banks[-1], **options)
    ]
    gates = judge(found)
    if as_json:
        keys = ("name", "measured", "relation", "gate", "passed")
        print_json({"rows": found, "gates": [dict(zip(keys, gate, strict=True)) for gate in gates]})
        return
    columns = list(dict.fromkeys(key for row in found for key in row))
    table = Table(
        show_edge=False, title=f"{options['threads']} threads, {options['rounds']} rounds in turn, D = {_D}"
    )
    for column in columns:
        table.add_column(column, justify="right")
    for row in found:
        table.add_row(*(_show(row.get(column, "-")) for column in columns))
    console = make_console()
    console.print(f"on {cpu()}")
    console.print(table)
    for name, value, relation, limit, passed in gates:
        console.print(f"{'PASS' if passed else 'MISS'}  {name}: {value:.4g} ({relation} {limit:g})")
    console.print(shlex.join(["python", "-m", "benchmarks.bank_search", *sys.argv[1:]]))


def _show(value: str | int | float) -> str:
    if isinstance(value, float):
        return f"{value:.3f}" if value < 10 else f"{value:.1f}"
    return f"{value:,}" if isinstance(value, int) else value


if __name__ == "__main__":
    main()
