"""Commands killed at random moments: their destination is the whole old thing or the whole new one.

``python -m tests.trust.kill`` prints a table. Each command runs once to its end, to know how long it takes
and what it makes. It is then started again and again and gets SIGKILL at a moment drawn between its start and
its end. After each kill the destination must be whole; after the last, the same command must end well and
leave nothing of the killed ones.
"""

import argparse
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from xadapter_export.errors import XAdapterError

OLD, NEW, LOST = "old", "new", "lost"


@dataclass(frozen=True)
class Case:
    """A command that is killed.

    Attributes:
        prepare: Writes into an empty folder what the command reads, and the old thing at ``out``.
        arguments: Of ``xad``, run in that folder.
        read: Returns what a whole thing at ``out`` holds, or raises an error of ours.
    """

    prepare: Callable[[Path], None]
    arguments: tuple[str, ...]
    read: Callable[[Path], object]


def write_bank(folder: Path, seed: int, num_rows: int) -> None:
    import numpy as np

    from xadapter_export.bank import FeatureBank
    from xadapter_export.bundle.bank_rows import unit_rows
    from xadapter_export.bundle.pictures import Picture

    rows = unit_rows(np.random.default_rng(seed).normal(size=(num_rows, 24)).astype(np.float32))
    folder.mkdir(parents=True)
    FeatureBank(rows, [Picture(id=f"{seed}-{i}", caption="") for i in range(num_rows)]).save(folder)


def _read_bank(folder: Path) -> object:
    from xadapter_export.bank import FeatureBank

    return FeatureBank.load(folder).sha256


def _prepare_banks(folder: Path) -> None:
    for seed, name in enumerate(("one", "two", "out")):
        write_bank(folder / name, seed, 4000)


def _prepare_pictures(folder: Path) -> None:
    from PIL import Image

    rng = random.Random(0)
    (folder / "pictures").mkdir()
    for number in range(48):
        color = tuple(rng.randrange(256) for _ in range(3))
        Image.new("RGB", (32, 32), color).save(folder / "pictures" / f"{number}.png")
    write_bank(folder / "out", 0, 30)


def _read_bundle(folder: Path) -> object:
    from xadapter_export.bundle.folder import read_bundle

    manifest = read_bundle(folder).manifest
    return manifest.bank, [(v.expert_set, v.name) for v in manifest.variants]


def _prepare_bundle(folder: Path, *experts: str) -> None:
    from tests.tiny_checkpoint import make_model
    from xadapter_export import export

    model = make_model(folder / "parts")
    model.save_pretrained(folder / "checkpoint", self_contained=True)
    export(model, folder / "out", experts)
    write_bank(folder / "bank", 7, 50)


def _prepare_training(folder: Path) -> None:
    from tests.tiny_checkpoint import make_model, write_parts

    write_parts(folder / "parts")
    make_model(folder / "old").save_pretrained(folder / "out", self_contained=True)
    (folder / "text.txt").write_text("the color of a banana is yellow .\na lime is green .\n" * 20, "utf-8")


def _read_checkpoint(folder: Path) -> object:
    from xadapter_export.model.checkpoint import plugin_sha256
    from xadapter_export.model.x_adapter_model import XAdapterModel

    return plugin_sha256(XAdapterModel.from_pretrained(folder))


_TRAIN = "train --plm parts/plm --clip parts/clip --bank parts/bank --train-files text.txt --steps 6 "
_TRAIN += "--batch-size 4 --save-steps 2 --layers 1 --layers 2 --adapter-width 16 --num-heads 2 "
_TRAIN += "-o out --force --quiet"
CASES = {
    "xad-bank merge": Case(
        _prepare_banks, ("bank", "merge", "one", "two", "-o", "out", "--force"), _read_bank
    ),
    "xad-bank swap": Case(
        lambda folder: _prepare_bundle(folder, "v"),
        ("bank", "swap", "out", "bank", "--assume-clip"),
        _read_bundle,
    ),
    "xad-bank build": Case(
        _prepare_pictures, ("bank", "build", "pictures", "-o", "out", "--force", "--quiet"), _read_bank
    ),
    "xad-export": Case(
        lambda folder: _prepare_bundle(folder, "v"),
        ("export", "checkpoint", "--experts", "t", "-o", "out", "--force", "--quiet"),
        _read_bundle,
    ),
    "xad-train": Case(_prepare_training, tuple(_TRAIN.split()), _read_checkpoint),
}


@dataclass(frozen=True)
class Killed:
    """What one kill left.

    Attributes:
        moment: When it came, as a share of the command's time.
        ended: Whether the command had ended before.
        found: ``old``, ``new`` or ``lost``.
        why: Why it is lost.
        num_leftovers: How many hidden folders lie beside the destination.
    """

    moment: float
    ended: bool
    found: str
    why: str
    num_leftovers: int


def _start(case: Case, folder: Path) -> "subprocess.Popen[bytes]":
    program = "from xadapter_export.cli.main import xad; xad()"
    line = [sys.executable, "-c", program, *case.arguments]
    return subprocess.Popen(line, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def _run(case: Case, folder: Path) -> float:
    """Run the command to its end, and return how long it took."""
    start = time.monotonic()
    process = _start(case, folder)
    said = process.communicate()[1]
    if process.returncode:
        raise RuntimeError(f"{' '.join(case.arguments)} failed: {said.decode()}")
    return time.monotonic() - start


def _leftovers(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if path.name.startswith(".")]


def kill(case: Case, moments: Sequence[float]) -> Iterator[Killed]:
    """Kill a command at some moments, shares of its time, and say what each kill left.

    Raises:
        RuntimeError: If the command fails, or leaves something of the killed ones when it ends well.
    """
    with tempfile.TemporaryDirectory() as place:
        start, folder = Path(place) / "start", Path(place) / "work"
        start.mkdir()
        case.prepare(start)
        shutil.copytree(start, folder)
        seconds = _run(case, folder)
        old, new = case.read(start / "out"), case.read(folder / "out")
        if old == new:
            raise RuntimeError("the old and the new thing are the same; the kills would show nothing")
        shutil.rmtree(folder)
        shutil.copytree(start, folder)
        for moment in moments:
            process = _start(case, folder)
            time.sleep(moment * seconds)
            ended = process.poll() is not None
            process.kill()
            process.communicate()
            found, why = LOST, "something else"
            try:
                content = case.read(folder / "out")
                found = OLD if content == old else NEW if content == new else LOST
            except (XAdapterError, OSError) as error:
                why = str(error)
            yield Killed(moment, ended, found, why if found == LOST else "", len(_leftovers(folder)))
            if found != OLD:  # begin again with the old one
                shutil.rmtree(folder / "out", ignore_errors=True)
                shutil.copytree(start / "out", folder / "out")
        _run(case, folder)
        if case.read(folder / "out") != new:
            raise RuntimeError("after the kills the command makes something else")
        if left := _leftovers(folder):
            raise RuntimeError(f"leftovers of killed runs stay: {', '.join(path.name for path in left)}")


def main() -> int:
    """Print what the kills left; return how many destinations were lost."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=200, help="kills of each command")
    parser.add_argument("--case", choices=CASES, action="append")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    rng, lost = random.Random(options.seed), []
    print("| command | kills | before its end | old | new | lost | most leftovers | after one more run |")
    print("|---|---:|---:|---:|---:|---:|---:|---:|")
    for name in options.case or CASES:
        killed = list(kill(CASES[name], [rng.random() for _ in range(options.count)]))
        counts = Counter(one.found for one in killed)
        lost += [(name, one) for one in killed if one.found == LOST]
        most = max(one.num_leftovers for one in killed)
        real = sum(not one.ended for one in killed)
        row = [f"`{name}`", len(killed), real, counts[OLD], counts[NEW], counts[LOST], most, 0]
        print(f"| {' | '.join(map(str, row))} |", flush=True)
    for name, one in lost:
        print(f"{name}, killed at {one.moment:.3f}: {one.why}")
    return len(lost)


if __name__ == "__main__":
    sys.exit(min(main(), 1))
