"""``make processors``: ask every variant of two models on emulated processors, and compare the answers.

Each processor is one process of qemu on one core; two run at a time. What is downloaded is kept in
``build/processors``, and so are the bundles.
"""

import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Final

import click
from rich.console import Console

from benchmarks.machine import cpu
from benchmarks.prepare import OUR_CODE, key, versions
from benchmarks.processors import report
from benchmarks.processors.compare import MOST_POINTS, Finding, Ran, compare, wrong
from benchmarks.processors.debian import UnavailableError
from benchmarks.processors.emulated import CACHE, PROCESSORS, ROOT, Machine, build, native
from benchmarks.processors.inside import REFERENCE
from benchmarks.processors.pythons import VERSIONS, build_python
from benchmarks.processors.run import NATIVE, RunError, run_all, say
from material.tables import Grid, print_grid, write_results
from xadapter_export.bundle.folder import read_bundle
from xadapter_export.bundle.manifest import ExpertSet
from xadapter_export.cli.command import XadCommand
from xadapter_export.experts import EXPERT_SETS

NUM_TEXTS: Final = 50  # for each variant
NUM_MORE_TEXTS: Final = 250  # of what is off: one text of 50 is two points
MAX_SEQ: Final = {"builtin": None, "minilm": 8}  # tokens: MiniLM takes six times as long


def get_machines(names: Sequence[str], cache: Path) -> tuple[dict[str, Machine], dict[str, str]]:
    """Return this machine and the processors, and why others cannot be had."""
    machines: dict[str, Machine] = {NATIVE: native()}
    left_out: dict[str, str] = {}
    for name in names:
        processor = PROCESSORS[name]
        try:
            machines[processor.name] = build(processor, cache)
            say(f"{processor.name}: ready")
        except UnavailableError as error:
            left_out[processor.name] = str(error)
            say(f"{processor.name}: left out: {error}")
    return machines, left_out


def make_bundle(case: str, cache: Path = CACHE) -> Path:
    """Export a case with every expert set and each variant for CPUs that passes its gate, or find it."""
    from material.models import CASES as MODELS
    from xadapter_export import export

    folder = cache / "bundles" / key(case, OUR_CODE) / case
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        export(
            MODELS[case](),
            folder,
            EXPERT_SETS,
            opset=17,
            precisions=("fp32", "int8", "int4"),
            targets=("onnx", "cpu", "openvino") if case == "builtin" else ("onnx", "cpu"),
            max_seq=MAX_SEQ[case],
            skip_failed=True,
        )
    return folder


def read_texts(case: str, count: int) -> list[str]:
    """Return texts of the kind that the gates are measured on, spread over all of them."""
    from material.models import CASES as MODELS
    from xadapter_export.exporters.judge.calibration import read_calibration

    model = MODELS[case]()
    texts = read_calibration(model, None, model.config.task).compared_on.texts
    return [texts[number * len(texts) // count] for number in range(count)]


@click.command(cls=XadCommand)
@click.option(
    "--processor",
    "names",
    type=click.Choice(list(PROCESSORS)),
    multiple=True,
    help="[default: all that compute rightly]",
)
@click.option("--case", "cases", type=click.Choice(list(MAX_SEQ)), multiple=True, help="[default: both]")
@click.option("--experts", type=click.Choice(EXPERT_SETS), multiple=True, help="[default: all]")
@click.option(
    "--texts", type=click.IntRange(1, 255), default=NUM_TEXTS, show_default=True, help="For each variant."
)
@click.option("--write", is_flag=True, help="Write the tables to docs/results.md.")
def main(
    names: tuple[str, ...],
    cases: tuple[str, ...],
    experts: tuple[ExpertSet, ...],
    texts: int,
    write: bool,
) -> None:
    """Ask every variant on emulated processors, and compare with fp32 there and with this machine."""
    cache = CACHE
    bundles = {}
    for case in cases or MAX_SEQ:
        say(f"{case}: bundle")
        bundles[case] = make_bundle(case, cache)
    sets = experts or EXPERT_SETS
    job: dict[str, Any] = {
        "routes": ["plain", "session"],
        "cases": {
            case: {
                "bundle": str(bundle),
                "texts": read_texts(case, texts),
                "sets": sets,
                "proven": sets if case == "builtin" else sets[-1:],
            }
            for case, bundle in bundles.items()
        },
    }
    machines, left_out = get_machines(
        names or [name for name, each in PROCESSORS.items() if not each.is_faulty], cache
    )
    ran, failed = run_all(machines, job, cache / "answers")
    left_out.update(failed)
    pythons = _run_pythons(next(iter(job["cases"].items())), cache, left_out)
    if NATIVE not in ran:
        raise RunError("this machine gave no answers to compare with", got=left_out[NATIVE])
    manifests = {case: read_bundle(bundle, verify=False).manifest for case, bundle in bundles.items()}
    findings = [
        finding
        for name, found in ran.items()
        if name != NATIVE
        for finding in compare(name, found, ran[NATIVE], manifests)
    ]
    findings = ask_again(findings, machines, bundles, cache)
    _finish(findings, ran, pythons, machines, left_out, texts, cache, write=write)


def ask_again(
    findings: Sequence[Finding], machines: Mapping[str, Machine], bundles: Mapping[str, Path], cache: Path
) -> list[Finding]:
    """Ask what is off more texts, there and on this machine; return the findings with the new ones in place.

    Args:
        findings: Of all processors.
        machines: The processors by name, this machine among them.
        bundles: The folder of each case.
        cache: Where answers go.
    """
    found = {finding.key: finding for finding in findings}
    groups: dict[tuple[str, str], list[Finding]] = {}
    for finding in wrong(findings):
        groups.setdefault((finding.processor, finding.route), []).append(finding)
    for (processor, route), off in groups.items():
        say(f"{processor}: {len(off)} of its variants are asked more texts")
        cases = {}
        for case in dict.fromkeys(finding.case for finding in off):
            of_case = [finding for finding in off if finding.case == case]
            cases[case] = {
                "bundle": str(bundles[case]),
                "texts": read_texts(case, NUM_MORE_TEXTS),
                "sets": sorted({finding.experts for finding in of_case}),
                "variants": [REFERENCE, *sorted({finding.variant for finding in of_case})],
                "proven": [],
            }
        both = {name: machines[name] for name in (NATIVE, processor)}
        folder = cache / "answers" / "again" / f"{processor}-{route}".replace(" ", "-")
        ran, failed = run_all(both, {"routes": [route], "cases": cases}, folder)
        if failed:
            raise RunError("a processor did not answer again", got="; ".join(failed.values()))
        manifests = {case: read_bundle(bundles[case], verify=False).manifest for case in cases}
        again = {
            finding.key: finding for finding in compare(processor, ran[processor], ran[NATIVE], manifests)
        }
        found.update({finding.key: replace(again[finding.key], is_of_more_texts=True) for finding in off})
    return list(found.values())


def _run_pythons(case: tuple[str, dict[str, Any]], cache: Path, left_out: dict[str, str]) -> dict[str, Ran]:
    """Run a case's first expert set and ten texts on this processor with each version of Python."""
    machines = {}
    for version in VERSIONS:
        name = f"Python {version}"
        try:
            machines[name] = build_python(version, cache)
        except UnavailableError as error:
            left_out[name] = str(error)
            say(f"{name}: left out: {error}")
    first = case[1]["sets"][:1]
    few = {**case[1], "texts": case[1]["texts"][:10], "sets": first, "proven": first}
    job = {"routes": ["session"], "cases": {case[0]: few}}
    ran, failed = run_all(machines, job, cache / "answers")
    left_out.update(failed)
    return ran


def _finish(
    findings: Sequence[Finding],
    ran: dict[str, Ran],
    pythons: dict[str, Ran],
    machines: Mapping[str, Machine],
    left_out: Mapping[str, str],
    num_texts: int,
    cache: Path,
    *,
    write: bool,
) -> None:
    """Print, write and judge."""
    processors = [name for name in ran if name != NATIVE]
    grids = [
        report.kept_grid(findings, processors),
        report.native_grid(findings, processors),
        report.parity_grid(ran),
        report.python_grid(pythons),
    ]
    console = Console(width=220, markup=False, highlight=False)
    for grid in grids:
        print_grid(grid, console)
    bad = wrong(findings)
    faulty = {processor.name for processor in PROCESSORS.values() if processor.is_faulty}
    file = cache / "processors.json"
    file.write_text(
        json.dumps(
            {
                **_as_json(findings, ran, machines, left_out, num_texts),
                "pythons": {
                    name: {**found.machine, "parity": found.parity} for name, found in pythons.items()
                },
            },
            indent=1,
        )
        + "\n",
        encoding="utf-8",
    )
    if write:
        _write(grids, _notes(machines, left_out, num_texts))
    for finding in bad:
        click.echo(
            f"{finding.processor}, {finding.case}, {finding.experts}, {finding.variant}, {finding.route}: "
            f"keeps {finding.kept:.1%} of fp32's answers, natively {finding.kept_natively:.1%}"
        )
    refused = [finding for finding in findings if finding.reason.startswith("refused")]
    unexpected = [finding for finding in (*bad, *refused) if finding.processor not in faulty]
    click.echo(f"processors: {len(findings) - len(bad)} right, {len(bad)} not; {file}")
    unproven = [
        name
        for name, found in {**ran, **pythons}.items()
        if not all(p["passed"] for p in found.parity.values())
    ]
    sys.exit(1 if unexpected or set(unproven) - faulty or left_out else 0)


def _as_json(
    findings: Iterable[Finding],
    ran: Mapping[str, Ran],
    machines: Mapping[str, Machine],
    left_out: Mapping[str, str],
    num_texts: int,
) -> dict[str, Any]:
    return {
        "versions": versions(),
        "texts": num_texts,
        "processors": {
            name: {**found.machine, "emulator": machines[name].emulator, "parity": found.parity}
            for name, found in ran.items()
        },
        "left_out": dict(left_out),
        "findings": [{**asdict(finding), "is_right": finding.is_right} for finding in findings],
    }


def _write(grids: Sequence[Grid], notes: Sequence[str]) -> None:
    write_results(
        ROOT / "docs" / "results.md", "benchmarks.processors", grids, notes, "by emulation with qemu"
    )


def _notes(machines: Mapping[str, Machine], left_out: Mapping[str, str], num_texts: int) -> list[str]:
    emulated = [
        f"{processor.name} ({processor.has}; `{machines[processor.name].emulator} -cpu {processor.cpu}`)"
        for processor in PROCESSORS.values()
        if processor.name in machines
    ]
    return [
        f"Processors: {', '.join(emulated)}.",
        f"This machine: {cpu()}. onnxruntime {versions()['onnxruntime']}, OpenVINO {versions()['openvino']}.",
        f"Each variant that is rounded runs {num_texts} texts of the kind that the gates are measured on, in "
        "batches of 1, 4, 8 and 2, in a plain session of onnxruntime. fp32 and our session run the first "
        "five; for the other texts, fp32's answers on this machine are used. Cells that were more than a "
        f"point off were run again, with {NUM_MORE_TEXTS} texts (the cell shows what the variant keeps of "
        "those natively). The column manifest is the gate's figure, of up to 1,000 texts. "
        f"A number in bold differs by more than {MOST_POINTS:g} point from what the variant keeps natively "
        "of the same texts.",
        "MiniLM gives embeddings: its numbers are mean cosines, times 100. Its plug-in is random, and its "
        f"texts are cut to {MAX_SEQ['minilm']} tokens.",
        *(f"Left out: {name}: {reason}." for name, reason in left_out.items()),
    ]


if __name__ == "__main__":
    main()
