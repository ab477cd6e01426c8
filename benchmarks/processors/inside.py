"""``python -m benchmarks.processors.inside JOB.json``: the answers of bundles on the processor it runs on.

Runs with the base package and onnxruntime alone, natively or emulated, and writes two files beside the job:
``answers.npz``, ``(n, C) float32`` for each case, expert set, variant and route, and ``report.json``.
"""

import json
import platform
import sys
import time
import warnings
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from itertools import cycle
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from xadapter_export import XAdapterError, XAdapterSession
from xadapter_export.bundle.folder import Bundle, read_bundle
from xadapter_export.bundle.manifest import ExpertSet, Variant
from xadapter_export.parity import prove_bundle
from xadapter_export.runtime.encoders import load_encoders
from xadapter_export.tasks import TASKS

REFERENCE: Final = "onnx-fp32"
_FEW_BATCHES: Final = 2
_BATCH_SIZES: Final = (1, 4, 8, 2)  # as the gates of the exporter are measured
_PACKAGES: Final = ("numpy", "onnxruntime", "openvino", "tokenizers")

Feed = dict[str, NDArray[np.int64]]
Float32Array = NDArray[np.float32]


def answer(job: dict[str, Any], folder: Path) -> None:
    """Do a job: its ``routes``, and ``cases`` by name: ``bundle``, ``texts``, ``sets``, and sets to prove.

    A case with ``variants`` is asked of those and the fp32 that they are compared with; else of all.
    Emulation is slow, and fp32 is the slowest. All texts go to what is rounded, in the first of its routes,
    and natively to the fp32 that it is compared with; all else is asked the first two batches.
    """
    arrays: dict[str, Float32Array] = {}
    rows: list[dict[str, Any]] = []
    parity: dict[str, dict[str, Any]] = {}
    for case, asked in job["cases"].items():
        bundle = read_bundle(asked["bundle"])
        if asked["proven"]:
            parity[case] = _parity(bundle, asked["proven"])
            print(f"{case}: parity {'passed' if parity[case]['passed'] else 'FAILED'}", flush=True)
        for experts in asked["sets"]:
            start = time.process_time()
            feeds = _feeds(bundle, experts, asked["texts"])
            for variant in bundle.manifest.variants_of(experts):
                if variant.is_for_gpu or variant.name not in asked.get("variants", (variant.name,)):
                    continue
                routes = job["routes"] if variant.target != "openvino" else ("session",)
                for route in routes:
                    is_asked = variant.agreement or (job["is_native"] and variant.name == REFERENCE)
                    is_whole = route == routes[0] and is_asked
                    row, found = _ask(bundle, variant, route, feeds if is_whole else feeds[:_FEW_BATCHES])
                    rows.append({"case": case, **row})
                    if found is not None:
                        arrays[f"{case}/{experts}/{variant.name}/{route}"] = found
            print(
                f"{case}: experts {experts} answered in {time.process_time() - start:.0f} s of CPU",
                flush=True,
            )
    np.savez(folder / "answers.npz", **arrays)  # type: ignore[arg-type]  # numpy's stub takes them for allow_pickle
    report = {"machine": _describe(), "parity": parity, "rows": rows}
    (folder / "report.json").write_text(json.dumps(report), encoding="utf-8")


def _ask(
    bundle: Bundle, variant: Variant, route: str, feeds: list[Feed]
) -> tuple[dict[str, Any], Float32Array | None]:
    """Return what became of a variant, and its answers: None where it was refused."""
    row: dict[str, Any] = {
        "experts": variant.expert_set,
        "variant": variant.name,
        "route": route,
        "reason": "",
    }
    task = TASKS[bundle.manifest.task]
    try:
        run = _open_plain(bundle, variant) if route == "plain" else _open_session(bundle, variant)
    except (XAdapterError, LookupError) as error:
        return {**row, "reason": str(error)}, None
    found = [np.asarray(run(feed, task.compared), np.float32) for feed in feeds]
    answers = [array[:, 0] if task.reads_masks else array for array in found]  # first mask
    return row, np.concatenate(answers)


def _open_session(bundle: Bundle, variant: Variant) -> Any:
    """Return a function from inputs to an output of the variant, opened as an app of ours does."""
    session = XAdapterSession.load(
        bundle.folder, experts=variant.expert_set, variant=variant.name, num_threads=1, verify=False
    )
    if session.answered_by != variant.name:
        raise LookupError(f"refused; {session.answered_by} answered")
    return lambda feed, output: session.run(feed, outputs=(output,))[output]


def _open_plain(bundle: Bundle, variant: Variant) -> Any:
    """Return the same of a session with no option but one thread, as Triton, a browser or Node opens it."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(
        str(bundle.file(variant.file)), options, providers=["CPUExecutionProvider"]
    )
    return lambda feed, output: session.run([output], feed)[0]


def _feeds(bundle: Bundle, experts: ExpertSet, texts: list[str]) -> list[Feed]:
    """Return the inputs of an expert set for the texts, in batches of always the same sizes."""
    names = [tensor.name for tensor in bundle.manifest.expert_sets[experts].inputs]
    encoder = load_encoders(bundle)[1 if "clip_input_ids" in names else 0]
    return [
        {name: array for name, array in encoder.encode(batch).items() if name in names}
        for batch in _batches(texts)
    ]


def _batches(texts: list[str]) -> Iterator[list[str]]:
    sizes, start = cycle(_BATCH_SIZES), 0
    while start < len(texts):
        size = next(sizes)
        yield texts[start : start + size]
        start += size


def _parity(bundle: Bundle, sets: list[ExpertSet]) -> dict[str, Any]:
    """Return what ``xad-parity`` says of the fp32 variants that run here."""
    variants = [
        variant
        for variant in bundle.manifest.variants_of(sets[0])
        if variant.precision == "fp32" and not variant.is_for_gpu and _has_engine(variant)
    ]
    report = prove_bundle(
        bundle.folder, sets, variants=[variant.name for variant in variants], num_threads=1, verify=False
    )
    errors = [cell.max_abs or 0.0 for cell in report.cells]
    return {"passed": report.passed, "cells": len(errors), "max_abs": max(errors)}


def _has_engine(variant: Variant) -> bool:
    return variant.target != "openvino" or "openvino" in _versions()


def _versions() -> dict[str, str]:
    found = {}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _describe() -> dict[str, Any]:
    return {"python": platform.python_version(), "architecture": platform.machine(), "versions": _versions()}


if __name__ == "__main__":
    warnings.simplefilter("ignore")  # texts that are cut, and processors that onnxruntime does not know
    file = Path(sys.argv[1])
    answer(json.loads(file.read_text(encoding="utf-8")), file.parent)
