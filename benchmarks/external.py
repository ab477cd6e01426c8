"""Search outside the graph, end to end: a bank of many pictures, a bundle over it, each kind of index.

Every stage is a process of its own, whose peak of anonymous memory is sampled: what the system could drop,
as the pages of a mapped bank, is not counted.
"""

import json
import shutil
import statistics
import threading
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any, cast

import click

from benchmarks.bank_search import Rows, unit
from benchmarks.machine import cpu
from xadapter_export.runtime.picture_index import KINDS, IndexKind

_D = 512
_GIB, _MIB = 2**30, 2**20
_BLOCK = 8192  # rows written at a time
_SECONDS_BETWEEN_SAMPLES = 0.02
_OBJECTS = ("banana", "tomato", "frog", "koala", "river", "chair", "letter", "car", "house", "bird")
_SENTENCES = ("The color of a {} is [MASK].", "I saw a [MASK] {} in the garden.")
TEXTS = [sentence.format(thing) for sentence in _SENTENCES for thing in _OBJECTS]


def write_bank(folder: Path, num_pictures: int, kind: Rows) -> int:
    """Writes a bank of rows of width 512, and returns its bytes on disk."""
    import numpy as np

    from benchmarks.bank_search import _centers
    from xadapter_export.bank.writer import BankWriter
    from xadapter_export.bundle.pictures import Picture

    folder.mkdir()
    rng = np.random.default_rng(0)
    centers = _centers()
    with BankWriter(folder, dtype="fp32", dim=_D) as writer:
        for start in range(0, num_pictures, _BLOCK):
            count = min(_BLOCK, num_pictures - start)
            rows = unit(rng.standard_normal((count, _D), dtype=np.float32))
            if kind == "clustered":
                rows = unit(centers[rng.integers(len(centers), size=count)] + np.float32(0.7) * rows)
            numbers = range(start, start + count)
            writer.append(rows, [Picture(id=f"p{n}", caption=f"picture {n}") for n in numbers])
        writer.finish(clip=None)
    return sum(path.stat().st_size for path in folder.iterdir())


def export_bundle(bank: Path, output: Path) -> int:
    """Exports BERT-base with CLIP ViT-B/16 and the V-expert over the bank; returns the graphs' bytes."""
    from material.models import CASES, randomize_plugin
    from xadapter_export import FeatureBank, XAdapterModel, export

    case = CASES["bert-base"]()
    model = XAdapterModel(case.config, case.plm, case.clip, FeatureBank.load(bank))
    randomize_plugin(model)
    result = export(model, output, "v", retrieval="external")
    return sum(variant.size_bytes for variant in result.manifest.variants)


def make_index(bundle: Path, output: Path, kind: IndexKind) -> dict[str, Any]:
    """Makes an index of the bundle's bank."""
    from xadapter_export.bank.index import IndexOptions, build_index

    record = build_index(bundle, output, kind, IndexOptions(num_queries=200))
    return record.model_dump(mode="json", exclude={"files"}) | {"size_bytes": record.size_bytes}


def ask(bundle: Path, index: Path | None, threads: int) -> dict[str, Any]:
    """Asks every text alone, twice, and says how long that took, which rows were found, what was answered."""
    from xadapter_export import XAdapterSession

    start = time.perf_counter()
    session = XAdapterSession.load(bundle, index=index, num_threads=threads, verify=False)
    loaded = time.perf_counter() - start
    session.fill_mask("A warm-up [MASK].")

    def seconds(text: str) -> tuple[float, str]:
        start = time.perf_counter()
        token = session.fill_mask(text)[0].token
        return time.perf_counter() - start, token

    first, again = [seconds(text) for text in TEXTS], [seconds(text) for text in TEXTS]
    assert [token for _, token in first] == [token for _, token in again]
    return {
        "load_s": loaded,
        "first_ms": 1e3 * statistics.median(s for s, _ in first),
        "again_ms": 1e3 * statistics.median(s for s, _ in again),
        "tokens": [token for _, token in first],
        "rows": [[picture.row for picture in pictures] for pictures in session.retrieve(TEXTS)],
    }


def compare_builtin(folder: Path) -> list[str]:
    """Asks the built-in checkpoint its questions, each index beside the search in the graph."""
    from xadapter_export import XAdapterSession, export
    from xadapter_export.bank.index import IndexOptions, build_index
    from xadapter_export.model.builtin import builtin_folder

    export("builtin", folder / "in-graph", "v")
    export("builtin", folder / "bundle", "v", retrieval="external")
    questions = (builtin_folder() / "heldout.jsonl").read_text(encoding="utf-8").splitlines()
    texts = [text for line in questions for text in json.loads(line)["sentences"]]

    def answers(bundle: str, index: Path | None) -> tuple[list[str], list[set[int]]]:
        session = XAdapterSession.load(folder / bundle, index=index)
        tokens = [found[0].token for found in session.fill_mask(texts)]
        return tokens, [{picture.row for picture in found} for found in session.retrieve(texts)]

    right, right_rows = answers("in-graph", None)
    lines = [
        "| index | size KiB | recall@1 | @5 | @10 | same pictures | same answer |",
        "|---|" + "---:|" * 6,
    ]
    plans: dict[str, IndexOptions | None] = {"exact": None}
    plans |= dict.fromkeys(KINDS, IndexOptions())
    plans["lancedb, 60 lists"] = IndexOptions(num_lists=60, num_probes=16)
    for name, options in plans.items():
        place, cells = None, ["-"] * 4
        if options is not None:
            place = folder / name
            kind = cast(IndexKind, name.split(",")[0])
            record = build_index(folder / "bundle", place, kind, options)
            cells = [f"{record.size_bytes / 1024:.0f}", *(f"{r:.4f}" for r in record.recall.values())]
        tokens, rows = answers("bundle", place)
        same_rows = statistics.mean(len(a & b) / len(a) for a, b in zip(right_rows, rows, strict=True))
        same = statistics.mean(a == b for a, b in zip(right, tokens, strict=True))
        lines.append(f"| {name} | " + " | ".join([*cells, f"{same_rows:.4f}", f"{same:.4f}"]) + " |")
    return [f"{len(texts)} questions of the built-in checkpoint, beside the search in the graph:", "", *lines]


def _watched(work: Callable[..., Any], arguments: tuple[Any, ...]) -> tuple[Any, float, int]:
    """Runs in a process of its own: the result, seconds, and the most anonymous bytes at a time."""
    peak, done = 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(_SECONDS_BETWEEN_SAMPLES):
            status = Path("/proc/self/status").read_text(encoding="ascii")
            peak = max(peak, 1024 * int(status.split("RssAnon:")[1].split()[0]))

    watcher = threading.Thread(target=watch)
    watcher.start()
    start = time.perf_counter()
    try:
        result = work(*arguments)
    finally:
        done.set()
        watcher.join()
    return result, time.perf_counter() - start, peak


def run_alone(work: Callable[..., Any], *arguments: object) -> tuple[Any, float, int]:
    """Runs a stage in a new process; see ``_watched``."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(_watched, work, arguments).result()


def table(found: dict[str, Any]) -> list[str]:
    """Returns the lines of a table of what each stage took and found."""
    heads = "index, built in s, peak GiB, size MiB, recall@1, @5, @10, load s, first ms, again ms, peak GiB"
    lines = ["| " + " | ".join(heads.split(", ")) + " |", "|---|" + "---:|" * 10]
    for name in ("exact", *KINDS):
        cells = ["-", "-", "-", "1", "1", "1"]
        if made := found.get(f"index {name}"):
            cells = [
                f"{made['seconds']:.0f}",
                f"{made['peak_bytes'] / _GIB:.2f}",
                f"{made['result']['size_bytes'] / _MIB:.0f}",
                *(f"{r:.3f}" for r in made["result"]["recall"].values()),
            ]
        asked = found[f"ask {name}"]
        got = asked["result"]
        cells += [
            f"{got['load_s']:.2f}",
            f"{got['first_ms']:.1f}",
            f"{got['again_ms']:.1f}",
            f"{asked['peak_bytes'] / _GIB:.2f}",
        ]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return lines


@click.command()
@click.option("--pictures", default=1_000_000, show_default=True, type=click.IntRange(min=10_000))
@click.option(
    "--rows", "kind", type=click.Choice(["random", "clustered"]), default="clustered", show_default=True
)
@click.option("--threads", default=2, show_default=True, type=click.IntRange(min=1))
@click.option("--folder", type=click.Path(path_type=Path), default=Path("build/external"), show_default=True)
@click.option("--builtin", is_flag=True, help="Compare answers of the built-in checkpoint, and nothing else.")
@click.option("--keep", is_flag=True, help="Leave bank, bundle and indices there.")
def main(pictures: int, kind: Rows, threads: int, folder: Path, builtin: bool, keep: bool) -> None:
    """Build bank, bundle and indices, ask through each, and print a table."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    if builtin:
        click.echo("\n".join(compare_builtin(folder)))
        return
    bank, bundle = folder / "bank", folder / "bundle"
    found: dict[str, Any] = {"pictures": pictures, "rows": kind, "threads": threads}

    def stage(name: str, work: Callable[..., Any], *arguments: object) -> Any:
        result, seconds, peak = run_alone(work, *arguments)
        found[name] = {"seconds": seconds, "peak_bytes": peak, "result": result}
        click.echo(f"{name}: {seconds:.1f} s, peak {peak / _GIB:.2f} GiB", err=True)
        (folder / "external.json").write_text(json.dumps(found, indent=1), encoding="utf-8")
        return result

    size = stage("bank", write_bank, bank, pictures, kind)
    click.echo(f"{pictures} {kind} rows, {size / _GIB:.2f} GiB, on {cpu()}")
    stage("export", export_bundle, bank, bundle)
    stage("ask exact", ask, bundle, None, threads)
    for name in KINDS:
        stage(f"index {name}", make_index, bundle, folder / name, name)
        stage(f"ask {name}", ask, bundle, folder / name, threads)
    click.echo("\n".join(table(found)))
    for place in () if keep else ("bank", "bundle", *KINDS):
        shutil.rmtree(folder / place)


if __name__ == "__main__":
    main()
