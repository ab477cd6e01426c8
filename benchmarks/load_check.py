"""``python -m benchmarks.load_check BUNDLE...``: what the check of a graph costs when it is loaded.

Every load is in a fresh process that has imported its engine, with the check and without in turn; medians.
What the check runs first, the app does not: its first answer comes sooner. That gain is not counted.
"""

import json
import subprocess
import sys
import time
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from statistics import median

import click
from rich.console import Console
from rich.table import Table

from benchmarks.prepare import ROOT
from xadapter_export.bundle.folder import read_bundle
from xadapter_export.bundle.machine import read_machine
from xadapter_export.bundle.manifest import Variant


def _measure(bundle: Path, variant: Variant, check: str, threads: int) -> tuple[float, float]:
    """Return milliseconds of a load, and of the check in it, in a child process."""
    arguments = json.dumps([str(bundle), variant.expert_set, variant.name, check, threads])
    child = subprocess.run(
        [sys.executable, "-m", "benchmarks.load_check", "--child", arguments],
        cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    load_ms, check_ms = json.loads(child.stdout.splitlines()[-1])
    return load_ms, check_ms


def _measure_here(bundle: str, experts: str, variant: str, check: str, threads: int) -> tuple[float, float]:
    from xadapter_export import XAdapterSession

    for module in ("onnxruntime", "xadapter_export.runtime.session"):
        import_module(module)
    if variant.startswith("openvino"):
        import_module("openvino")
    start = time.perf_counter()
    session = XAdapterSession.load(
        bundle, experts=experts, variant=variant, num_threads=threads, check=check  # type: ignore[arg-type]  # names that came as JSON, typed str
    )  # fmt: skip
    load_ms = 1e3 * (time.perf_counter() - start)
    return load_ms, sum(found.milliseconds for found in session.checks)


def table_of(bundles: Sequence[Path], rounds: int, threads: int) -> Table:
    """Measure every variant that a CPU runs of every bundle's default set."""
    table = Table(caption=f"{read_machine()}, {threads} threads, medians of {rounds} loads", show_edge=False)
    for column in ("bundle", "experts", "variant"):
        table.add_column(column)
    for column in ("load without, ms", "load with, ms", "check, ms", "share of the load"):
        table.add_column(column, justify="right")
    for bundle in bundles:
        manifest = read_bundle(bundle, verify=False).manifest
        for variant in manifest.variants_of(manifest.default_expert_set):
            if variant.is_for_gpu:
                continue
            both = [
                (_measure(bundle, variant, "never", threads), _measure(bundle, variant, "always", threads))
                for _ in range(rounds)
            ]
            without = median(load for (load, _), _ in both)
            with_it = median(load for _, (load, _) in both)
            check = median(took for _, (_, took) in both)
            numbers = (f"{without:.0f}", f"{with_it:.0f}", f"{check:.1f}", f"{check / with_it:.1%}")
            table.add_row(bundle.name, variant.expert_set, variant.name, *numbers)
    return table


@click.command()
@click.argument("bundles", nargs=-1, required=True, type=click.Path(path_type=Path, exists=True))
@click.option("--rounds", default=7, show_default=True, help="Loads with the check, and as many without.")
@click.option("--threads", default=2, show_default=True, help="Threads inside one operator.")
def main(bundles: tuple[Path, ...], rounds: int, threads: int) -> None:
    """Print what the check costs for each variant of BUNDLES."""
    Console().print(table_of(bundles, rounds, threads))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        print(json.dumps(_measure_here(*json.loads(sys.argv[2]))))
    else:
        main()
