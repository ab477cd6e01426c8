"""Run ``inside`` on machines, two at a time."""

import json
import shutil
import subprocess
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final

import click

from benchmarks.processors.compare import Ran
from benchmarks.processors.emulated import ROOT, Machine
from xadapter_export.errors import XAdapterError

NATIVE: Final = "this machine"
_PROGRAM: Final = "benchmarks.processors.inside"


class RunError(XAdapterError, RuntimeError):
    """A program on an emulated processor failed."""


def say(text: str, start: float = time.perf_counter()) -> None:
    """Print progress on stderr, after the seconds since the start."""
    click.echo(f"{time.perf_counter() - start:6.0f} s  {text}", err=True)


def run(name: str, machine: Machine, job: Mapping[str, Any], folder: Path) -> Ran:
    """Run ``inside`` on a machine.

    Raises:
        RunError: If it fails; the reason is its last line.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    file = folder / "job.json"
    file.write_text(json.dumps({**job, "is_native": name == NATIVE}), encoding="utf-8")
    with (folder / "errors.txt").open("w+", encoding="utf-8") as errors:
        command = [*machine.command, "-m", _PROGRAM, str(file)]
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=machine.whole_environment(),
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        )
        assert process.stdout is not None
        with process, process.stdout as lines:
            for line in lines:
                say(f"{name}: {line.strip()}")
        if process.returncode:
            errors.seek(0)
            reason = ([line.strip() for line in errors if line.strip()] or ["no message"])[-1]
            raise RunError("a processor failed", where=name, got=f"exit {process.returncode}: {reason}")
    return Ran.read(folder)


def run_all(
    machines: Mapping[str, Machine], job: Mapping[str, Any], folder: Path
) -> tuple[dict[str, Ran], dict[str, str]]:
    """Run the job on each machine, two at a time; return their answers, and why others gave none."""
    ran: dict[str, Ran] = {}
    failed: dict[str, str] = {}
    with ThreadPoolExecutor(max_workers=2) as pool:
        running = {
            name: pool.submit(run, name, machine, job, folder / name.replace(" ", "-"))
            for name, machine in machines.items()
        }
        for name, future in running.items():
            try:
                ran[name] = future.result()
            except RunError as error:
                failed[name] = str(error)
                say(str(error))
    return ran, failed
