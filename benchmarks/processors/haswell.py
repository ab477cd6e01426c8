"""``python -m benchmarks.processors.haswell``: this project's own work on an x86 processor without VNNI.

``tests`` runs test files there, ``export`` exports a checkpoint natively and there, and compares what the
manifests say. PyTorch under emulation takes a minute or more to import.
"""

import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Final
from xml.etree import ElementTree

import click
from rich.console import Console

from benchmarks.processors.emulated import CACHE, PROCESSORS, ROOT, Machine, build, native
from material.tables import Grid, print_grid, write_results
from xadapter_export.bundle.folder import read_bundle
from xadapter_export.bundle.manifest import Agreement
from xadapter_export.cli.command import XadCommand

_TESTS: Final = ("tests/exporters/test_rounding.py", "tests/exporters/test_quantize.py")
_SECTION: Final = "benchmarks.processors.haswell"
_MOST_POINTS: Final = 0.5


@click.group()
def main() -> None:
    """Run tests or an export on an emulated Haswell: AVX2 and no VNNI."""


@main.command(cls=XadCommand)
@click.argument("files", nargs=-1, type=click.Path(exists=True))
@click.option("--select", default="", help="As pytest's -k.")
@click.option("--write", is_flag=True, help="Write the table to docs/results.md.")
def tests(files: tuple[str, ...], select: str, write: bool) -> None:
    """Run test files there. [default: tests of int8, int4 and Q/DQ]."""
    emulated = build(PROCESSORS["haswell"])
    with tempfile.TemporaryDirectory() as temporary:
        junit = Path(temporary) / "tests.xml"
        command = ["-m", "pytest", "-p", "no:cacheprovider", "-v", f"--junitxml={junit}", *(files or _TESTS)]
        code = _run(emulated, [*command, *(("-k", select) if select else ())]).returncode
        grid = tests_grid(junit)
    print_grid(grid, Console(width=160, highlight=False))
    if write:
        says = f"by emulation with {emulated.emulator}"
        write_results(ROOT / "docs" / "results.md", f"{_SECTION} tests", [grid], (), says)
    sys.exit(code)


def tests_grid(junit: Path) -> Grid:
    """Return what became of each test function of a JUnit report, its cases added up."""
    outcomes: dict[str, list[str]] = {}
    seconds: dict[str, float] = {}
    for case in ElementTree.parse(junit).iter("testcase"):
        name = f"{case.attrib['classname'].rpartition('.')[2]}, {case.attrib['name'].partition('[')[0]}"
        marks = {child.tag for child in case}
        failed = bool(marks & {"failure", "error"})
        outcomes.setdefault(name, []).append(
            "failed" if failed else "skipped" if "skipped" in marks else "passed"
        )
        seconds[name] = seconds.get(name, 0.0) + float(case.attrib["time"])
    columns = ("passed", "failed", "skipped")
    rows = [
        (name, *(str(found.count(each)) for each in columns), f"{seconds[name]:.0f}")
        for name, found in outcomes.items()
    ]
    return Grid(
        "Tests of int8, int4 and Q/DQ on an emulated Haswell", ("test", *columns, "seconds"), tuple(rows)
    )


@main.command(cls=XadCommand)
@click.argument("checkpoint", default="builtin")
@click.option("--experts", default="vt", show_default=True)
@click.option("--write", is_flag=True, help="Write the table to docs/results.md.")
def export(checkpoint: str, experts: str, write: bool) -> None:
    """Export a checkpoint to int8 and int4 natively and there, and compare the agreements."""
    agreements: dict[str, dict[str, Agreement]] = {}
    refused: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as temporary:
        for name, machine in {"natively": native(), "Haswell": build(PROCESSORS["haswell"])}.items():
            folder = Path(temporary) / name
            code = "from xadapter_export.cli.export import export; export()"
            flags = ["--experts", experts, "--precision", "int8", "--precision", "int4", "--quiet"]
            done = _run(machine, ["-c", code, checkpoint, *flags, "-o", str(folder)])
            if done.returncode:
                refused[name] = done.stderr.strip().splitlines()[-1]
                click.echo(f"{name}: {refused[name]}", err=True)
                folder = folder.with_name(f"{name}.rejected")
            agreements[name] = _agreements(folder)
    grid = _grid(agreements, checkpoint)
    print_grid(grid, Console(width=160, highlight=False))
    notes = [f"{name}: {reason}." for name, reason in refused.items()]
    if write:
        write_results(ROOT / "docs" / "results.md", _SECTION, [grid], notes, f"checkpoint {checkpoint}")
    (CACHE / "haswell.json").write_text(
        json.dumps(
            {name: {v: a.model_dump() for v, a in found.items()} for name, found in agreements.items()}
        ),
        encoding="utf-8",
    )
    here, there = agreements["natively"], agreements["Haswell"]
    # Nothing to compare, as where neither export wrote a bundle, shows nothing.
    alike = (
        bool(here)
        and here.keys() == there.keys()
        and all(_points(here[n], there[n]) < _MOST_POINTS for n in here)
    )
    sys.exit(0 if alike and len(refused) != 1 else 1)


def _run(machine: Machine, arguments: Sequence[str]) -> subprocess.CompletedProcess[str]:
    """Run Python with what the machine needs; stdout goes to the terminal."""
    return subprocess.run(
        [*machine.command, *arguments],
        cwd=ROOT,
        env=machine.whole_environment(),
        check=False,
        text=True,
        stderr=subprocess.PIPE,
    )


def _agreements(folder: Path) -> dict[str, Agreement]:
    """Return what the manifest says of each lossy variant; nothing where no bundle was written."""
    if not folder.is_dir():
        return {}
    variants = read_bundle(folder, verify=False).manifest.variants
    return {f"{v.expert_set}, {v.name}": v.agreement for v in variants if v.agreement is not None}


def _points(first: Agreement, second: Agreement) -> float:
    """Return by how many percentage points two agreements differ."""
    if first.same_top is None or second.same_top is None:
        return 100 * abs(first.cosine - second.cosine)
    return 100 * abs(first.same_top - second.same_top)


def _grid(agreements: dict[str, dict[str, Agreement]], checkpoint: str) -> Grid:
    names = dict.fromkeys(name for found in agreements.values() for name in found)
    rows = [
        (
            name,
            *(
                f"{100 * (a.cosine if a.same_top is None else a.same_top):.2f}"
                if (a := found.get(name))
                else "-"
                for found in agreements.values()
            ),
        )
        for name in names
    ]
    return Grid(
        f"The same export of {checkpoint}: answers equal to fp32's, %", ("variant", *agreements), tuple(rows)
    )


if __name__ == "__main__":
    main()
