"""Answers of one processor, compared with fp32 there and with the same variant on this machine.

Dimensions: n answers, C logits of a mask or numbers of an embedding.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from benchmarks.processors.inside import REFERENCE
from xadapter_export.bundle.manifest import Manifest
from xadapter_export.errors import XAdapterError
from xadapter_export.tasks import TASKS

MOST_POINTS: Final = 1.0  # between what a variant keeps of fp32 here and natively
_ROUNDING: Final = 1e-9

Float32Array = NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class Ran:
    """What a processor answered.

    Attributes:
        machine: Python, architecture and versions there.
        parity: For each case, whether fp32 passed, how many cells, and the largest difference.
        rows: For each variant and route, what it is and why it was refused, if it was.
        answers: ``(n, C) float32`` of each that was not, by ``case/experts/variant/route``.
    """

    machine: dict[str, Any]
    parity: dict[str, dict[str, Any]]
    rows: list[dict[str, Any]]
    answers: Mapping[str, Float32Array]

    @classmethod
    def read(cls, folder: Path) -> "Ran":
        """Read what ``inside`` wrote."""
        report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
        with np.load(folder / "answers.npz") as file:
            return cls(report["machine"], report["parity"], report["rows"], dict(file))


@dataclass(frozen=True)
class Finding:
    """How a variant answers on a processor.

    Attributes:
        processor: The processor.
        case: The model.
        experts: The expert set.
        variant: The variant.
        route: ``session``, opened by ours, or ``plain``, by onnxruntime without options.
        gate: What the manifest says it keeps of fp32's answers; None of an fp32 variant.
        kept: What it keeps there: the share of top answers that are fp32's; of embeddings the mean cosine.
        kept_natively: The same on this machine, of the same texts.
        same_as_native: Share of its top answers, or mean cosine, that are its own on this machine.
        max_difference: Largest difference of a logit to its own on this machine.
        reason: Why there is no answer; empty where there is one.
        is_of_more_texts: Whether it was off, and was asked more texts than the others.
    """

    processor: str
    case: str
    experts: str
    variant: str
    route: str
    gate: float | None
    kept: float = 0.0
    kept_natively: float = 0.0
    same_as_native: float = 0.0
    max_difference: float = 0.0
    reason: str = ""
    is_of_more_texts: bool = False

    @property
    def key(self) -> tuple[str, str, str, str, str]:
        """What it is about."""
        return self.processor, self.case, self.experts, self.variant, self.route

    @property
    def is_right(self) -> bool:
        """Whether it keeps as much of fp32 as natively, within a point; what was refused answers nothing."""
        return not self.reason and abs(self.kept - self.kept_natively) * 100 <= MOST_POINTS + _ROUNDING


def compare(processor: str, here: Ran, native: Ran, manifests: Mapping[str, Manifest]) -> Iterator[Finding]:
    """Yield a finding for each variant and route that this machine answers with too.

    Raises:
        XAdapterError: If there is no fp32 answer, or the two are of different texts.
    """
    for row in here.rows:
        case, experts, variant, route = (str(row[key]) for key in ("case", "experts", "variant", "route"))
        name = f"{case}/{experts}/{variant}/{route}"
        if name not in native.answers:
            continue
        agreement = next(
            v for v in manifests[case].variants if (v.expert_set, v.name) == (experts, variant)
        ).agreement
        is_embedding = TASKS[manifests[case].task].head is None
        gate = None
        if agreement is not None:
            gate = agreement.cosine if agreement.same_top is None else agreement.same_top
        if row["reason"]:
            yield Finding(processor, case, experts, variant, route, gate, reason=str(row["reason"]))
            continue
        fp32_there, fp32_natively = _reference(case, experts, here, native)
        ours, theirs = here.answers[name], native.answers[name]
        if variant == REFERENCE:
            theirs = theirs[: len(ours)]
        if ours.shape != theirs.shape:
            raise XAdapterError("answers to other texts", where=name, expected=theirs.shape, got=ours.shape)
        yield Finding(
            processor,
            case,
            experts,
            variant,
            route,
            gate,
            kept=alike(fp32_there[: len(ours)], ours, is_embedding=is_embedding),
            kept_natively=alike(fp32_natively[: len(theirs)], theirs, is_embedding=is_embedding),
            same_as_native=alike(theirs, ours, is_embedding=is_embedding),
            max_difference=float(np.abs(ours - theirs).max()),
        )


def _reference(case: str, experts: str, here: Ran, native: Ran) -> tuple[Float32Array, Float32Array]:
    """Return fp32's answers there and natively, ``(n, C)`` each.

    There fp32 is asked the first texts only, and proven; this machine's answers stand for the others.
    """
    names = [f"{case}/{experts}/{REFERENCE}/{each}" for each in ("plain", "session")]
    name = next(each for each in names if each in here.answers)
    there, natively = here.answers[name], native.answers[name]
    return np.concatenate([there, natively[len(there) :]]), natively


def alike(first: Float32Array, second: Float32Array, *, is_embedding: bool) -> float:
    """Return the share of ``(n, C)`` answers with the same top entry, or the mean cosine; not finite is 0."""
    if not (np.isfinite(first).all() and np.isfinite(second).all()):
        return 0.0
    if not is_embedding:
        return float((first.argmax(1) == second.argmax(1)).mean())
    a, b = first.astype(np.float64), second.astype(np.float64)
    return float(((a * b).sum(1) / (np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1))).mean())


def wrong(findings: Iterable[Finding]) -> list[Finding]:
    """Return what answered and is not right."""
    return [finding for finding in findings if not finding.reason and not finding.is_right]
