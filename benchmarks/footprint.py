"""``python -m benchmarks.footprint``: load time and resident memory of a contestant, in a fresh process.

Resident memory is what loading and one run add to a process that has imported its engine, so that Python and
its libraries, the same for a large model as for a small one, are not counted. Files that are mapped count as
far as they were read.
"""

import gc
import json
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path

import numpy as np

from benchmarks.contestants import Place, find
from benchmarks.feeds import feed_as
from benchmarks.prepare import ROOT
from benchmarks.worker import ContestantError

KEPT = ", compiled graph kept"  # after the name of a contestant that is loaded with a ``cache_dir``
_IMPORTS = {
    "eager": ("benchmarks.cases",),
    "compile": ("benchmarks.cases",),
    "ort": ("onnxruntime",),
    "openvino": ("openvino",),
    "executorch": ("torch", "executorch.runtime"),
    "litert": ("ai_edge_litert.interpreter",),
    "ctranslate2": ("ctranslate2",),
    "ours": ("xadapter_export", "xadapter_export.runtime.session", "onnxruntime"),
}


@dataclass(frozen=True)
class Footprint:
    """What having a contestant costs.

    Attributes:
        load_s: From imported libraries to ready.
        first_run_s: The first run.
        one_mib: Resident memory that loading and one run added.
        two_mib: The same with a second one of the same files in the same process.
        total_mib: Resident memory of the whole process with one.
    """

    load_s: float
    first_run_s: float
    one_mib: float
    two_mib: float
    total_mib: float


def measure(
    contestant: str,
    place: Place,
    feed: Path,
    context: int | None,
    env: Mapping[str, str],
    python: Path | None = None,
) -> Footprint:
    """Measure in a child process, of another interpreter if ``python`` names one.

    Raises:
        ContestantError: If it ends without an answer.
    """
    arguments = json.dumps([contestant, place.as_json(), str(feed), context])
    child = subprocess.run(
        [str(python or sys.executable), "-m", "benchmarks.footprint", arguments],
        cwd=ROOT, env=dict(env), capture_output=True, text=True,
    )  # fmt: skip
    if child.returncode:
        said = (child.stderr.splitlines() or ["no message"])[-1]
        raise ContestantError("a contestant ended", where=contestant, got=f"exit {child.returncode}: {said}")
    return Footprint(**json.loads(child.stdout.splitlines()[-1]))


def _measure_here(contestant: str, place: Place, feed_file: Path, context: int | None) -> Footprint:
    family = contestant.removeprefix("plm-").split("-")[0].replace("transformers", "ort")
    for module in _IMPORTS[family]:
        import_module(module)
    if place.variant is not None and place.variant.startswith("openvino"):
        import_module("openvino")
    with np.load(feed_file) as arrays:
        feed = feed_as(dict(arrays), "equal", context)
    load = find(contestant).load
    gc.collect()
    before = _resident_mib()
    start = time.perf_counter()
    one = load(place)
    loaded = time.perf_counter()
    one(feed)
    ran = time.perf_counter()
    gc.collect()
    with_one = _resident_mib()
    two = load(place)
    two(feed)
    gc.collect()
    return Footprint(
        load_s=loaded - start,
        first_run_s=ran - loaded,
        one_mib=with_one - before,
        two_mib=_resident_mib() - before,
        total_mib=with_one,
    )


def _resident_mib() -> float:
    """Resident size of this process, as Linux tells it, in MiB."""
    return int(Path("/proc/self/status").read_text().split("VmRSS:")[1].split()[0]) / 1024


if __name__ == "__main__":
    _name, _setup, _feed, _context = json.loads(sys.argv[1])
    print(json.dumps(asdict(_measure_here(_name, Place.from_json(_setup), Path(_feed), _context))))
