"""Damage to bundles, banks, indices and checkpoints: each is refused in one line, or does no harm.

``python -m tests.trust.damage`` prints a table. Half of the damage comes with hashes made right again, as an
attacker would: what is then another whole bundle may give other answers, and nobody can tell.
"""

import argparse
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tests.trust.mutations import mutate
from xadapter_export.errors import XAdapterError

LIMIT_BYTES = 2 << 30  # of address space that a damaged folder may take more than a whole one
LIMIT_S = 60  # for one folder
LONGEST_LINE = 6000
GOOD = ("refused", "equal")
WRONG_ANSWER = "other answers"  # right only where the hashes were made right
TEXTS = ["the color of a banana is [MASK].", "[MASK] very lime", "a [MASK] cherry is red and [MASK]"]


class TinyBundle:
    """A bundle with every expert set."""

    def make(self, folder: Path) -> None:
        """Write it."""
        from tests.tiny_bundle import write_bundle

        write_bundle(folder)

    def use(self, folder: Path) -> object:
        """Answer, and say which pictures were looked at."""
        from xadapter_export import XAdapterSession

        session = XAdapterSession.load(folder, num_threads=1, share_weights=False)
        answers = [asdict(answer) for some in session.fill_mask(TEXTS) for answer in some]
        return answers, session.retrieve(TEXTS), session.answered_by

    def make_hashes_right(self, folder: Path) -> None:
        """Record the files as they are now."""
        from xadapter_export.bundle.folder import list_files

        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        manifest["files"] = {path: entry.model_dump() for path, entry in list_files(folder).items()}
        (folder / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")


class TinyBank:
    """A bank of fp16 rows."""

    def make(self, folder: Path) -> None:
        """Write it."""
        import numpy as np

        from xadapter_export.bank import FeatureBank
        from xadapter_export.bundle.bank_rows import unit_rows
        from xadapter_export.bundle.pictures import Picture

        rows = unit_rows(np.random.default_rng(0).normal(size=(40, 16)).astype(np.float32)).astype(np.float16)
        folder.mkdir()
        FeatureBank(rows, [Picture(id=str(i), caption=f"picture {i}") for i in range(40)]).save(folder)

    def use(self, folder: Path) -> object:
        """Read it whole."""
        from xadapter_export.bank import FeatureBank
        from xadapter_export.bank.reader import BankReader

        bank = FeatureBank.load(folder)
        return bank.sha256, BankReader(folder).sha256(), [picture.caption for picture in bank.pictures]

    def make_hashes_right(self, folder: Path) -> None:
        """Take the hash away, as anybody can."""
        record = json.loads((folder / "bank.json").read_text(encoding="utf-8"))
        record.pop("sha256")
        (folder / "bank.json").write_text(json.dumps(record), encoding="utf-8")


class FlatIndex:
    """An index of faiss."""

    def make(self, folder: Path) -> None:
        """Write it."""
        from xadapter_export.bank.index import IndexOptions, build_index

        bank = folder.with_name("indexed")
        TinyBank().make(bank)
        build_index(bank, folder, "flat", IndexOptions(num_queries=0))

    def use(self, folder: Path) -> object:
        """Search it."""
        import numpy as np

        from xadapter_export.runtime.picture_index import open_index

        index: Any = open_index(folder)
        scores, rows = index.search(np.eye(3, 16, dtype=np.float32), 4)[:2]
        return np.asarray(rows).tolist(), np.asarray(scores).tolist()

    def make_hashes_right(self, folder: Path) -> None:
        """Record the files as they are now."""
        from xadapter_export.bundle.folder import list_files

        record = json.loads((folder / "index.json").read_text(encoding="utf-8"))
        files = {
            path: entry.model_dump() for path, entry in list_files(folder).items() if path != "index.json"
        }
        (folder / "index.json").write_text(json.dumps(record | {"files": files}), encoding="utf-8")


class TinyCheckpoint:
    """A checkpoint with everything in it."""

    def make(self, folder: Path) -> None:
        """Write it."""
        from tests.tiny_checkpoint import make_model

        make_model(folder.with_name("parts")).save_pretrained(folder, self_contained=True)

    def use(self, folder: Path) -> object:
        """Answer."""
        import torch

        from xadapter_export.model.x_adapter_model import XAdapterModel

        model = XAdapterModel.from_pretrained(folder)
        with torch.no_grad():
            return model(**model.encode(TEXTS[0])).logits.tolist()

    def make_hashes_right(self, folder: Path) -> None:
        """Leave them: they are over tensors, and damage to those is what the other half shows."""


SUBJECTS: dict[str, Any] = {
    "bundle": TinyBundle(),
    "bank": TinyBank(),
    "index": FlatIndex(),
    "checkpoint": TinyCheckpoint(),
}


@dataclass(frozen=True)
class Found:
    """What became of one damaged folder."""

    seed: int
    mutation: str
    rehashed: bool
    outcome: str
    line: str

    @property
    def is_good(self) -> bool:
        """Whether nothing was lost, wrong or let in."""
        return self.outcome in GOOD or (self.outcome == WRONG_ANSWER and self.rehashed)


class _OutOfTimeError(BaseException):
    """A damaged folder took too long."""


def _stop(*_: object) -> None:
    raise _OutOfTimeError


def damage(subject: Any, whole: Path, work: Path, seed: int, expected: object) -> Found:
    """Damage a copy and use it.

    Args:
        subject: What it is.
        whole: A whole one, which stays as it is.
        work: A path for the copy.
        seed: Of the damage; hashes are made right where it is odd.
        expected: What a whole one gives.
    """
    shutil.rmtree(work, ignore_errors=True)
    shutil.copytree(whole, work)
    mutation = mutate(work, seed)
    rehashed = seed % 2 == 1 and not mutation.startswith(("make_", "link", "remove"))
    if rehashed:
        try:
            subject.make_hashes_right(work)
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            rehashed = False  # the record itself is what was damaged
    before = signal.signal(signal.SIGALRM, _stop)
    signal.alarm(LIMIT_S)
    line = ""
    try:
        outcome = "equal" if subject.use(work) == expected else WRONG_ANSWER
    except XAdapterError as error:
        line = str(error)
        is_one = len(line) < LONGEST_LINE and line.isprintable()
        outcome = "refused" if is_one else "a bad line"
    except _OutOfTimeError:
        outcome = "too long"
    except BaseException as error:  # whatever it is, it is what this looks for
        outcome, line = "traceback", f"{type(error).__name__}: {error}"[:500]
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    return Found(seed, mutation, rehashed, outcome, line)


def work_on(name: str, whole: Path, first: int, count: int) -> None:
    """Damage folders in this process, with a limit on memory, and print a line of JSON for each."""
    subject = SUBJECTS[name]
    warnings.simplefilter("ignore")
    expected = subject.use(whole)
    used = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (used + LIMIT_BYTES, used + LIMIT_BYTES))
    for seed in range(first, first + count):
        found = damage(subject, whole, whole.with_name("damaged"), seed, expected)
        print(json.dumps(asdict(found)), flush=True)


def run(name: str, count: int, *, first: int = 0, say: bool = False) -> Iterator[Found]:
    """Damage ``count`` folders in processes that may die, and give what became of each."""
    with tempfile.TemporaryDirectory() as place:
        whole = Path(place) / "whole"
        SUBJECTS[name].make(whole)
        end = first + count
        while first < end:
            line = [sys.executable, "-m", "tests.trust.damage", "--worker", name, str(whole)]
            line += [str(first), str(end - first)]
            with subprocess.Popen(
                line, stdout=subprocess.PIPE, stderr=None if say else subprocess.DEVNULL, text=True
            ) as worker:
                assert worker.stdout is not None
                for text in worker.stdout:
                    found = Found(**json.loads(text))
                    first = found.seed + 1
                    yield found
                code = worker.wait()
            if first < end:
                yield Found(first, "", rehashed=False, outcome="the process died", line=f"exit status {code}")
                first += 1


def main() -> int:
    """Print what became of the damage, and what went wrong; return how many did."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--worker", nargs=4, metavar=("SUBJECT", "FOLDER", "FIRST", "COUNT"))
    parser.add_argument("--count", type=int, default=2000, help="damaged folders in all")
    parser.add_argument("--first", type=int, default=0, help="first seed")
    parser.add_argument("--subject", choices=SUBJECTS, action="append")
    parser.add_argument("--verbose", action="store_true")
    options = parser.parse_args()
    if options.worker:
        name, folder, first, count = options.worker
        work_on(name, Path(folder), int(first), int(count))
        return 0
    shares = {"bundle": 0.45, "bank": 0.3, "index": 0.15, "checkpoint": 0.1}
    names = options.subject or list(SUBJECTS)
    total = sum(shares[name] for name in names)
    print("| damaged | hashes | folders | refused | equal answers | other answers | wrong |")
    print("|---|---|---:|---:|---:|---:|---:|")
    wrong: list[tuple[str, Found]] = []
    for name in names:
        found = list(run(name, round(options.count * shares[name] / total), first=options.first))
        for rehashed in (False, True):
            some = [one for one in found if one.rehashed == rehashed]
            counts = Counter(one.outcome for one in some)
            bad = [one for one in some if not one.is_good]
            wrong += [(name, one) for one in bad]
            hashes = "made right" if rehashed else "as they were"
            row = [
                name,
                hashes,
                len(some),
                counts["refused"],
                counts["equal"],
                counts[WRONG_ANSWER],
                len(bad),
            ]
            print(f"| {' | '.join(map(str, row))} |", flush=True)
        if options.verbose:
            for one in found:
                print(one, file=sys.stderr)
    for name, one in wrong:
        print(f"{name}, seed {one.seed}, {one.mutation}: {one.outcome}: {one.line}")
    return len(wrong)


if __name__ == "__main__":
    sys.exit(min(main(), 1))
