"""The tables of a run, for the terminal, ``docs/results.md`` and JSON."""

from collections.abc import Iterable, Sequence

from benchmarks.processors.compare import Finding, Ran
from material.tables import Grid


def kept_grid(findings: Sequence[Finding], processors: Sequence[str]) -> Grid:
    """What each variant keeps of fp32's answers on each processor, beside its gate's figure."""
    rows = []
    for (case, experts, variant), group in _grouped(findings):
        gate = next(finding.gate for finding in group)
        cells = [_kept(group, processor) for processor in processors]
        answered = sorted(
            (f for f in group if not f.reason), key=lambda finding: (finding.is_of_more_texts, finding.route)
        )
        native = (
            answered[0].kept_natively if answered else 0.0
        )  # of all texts: a plain session, if there is one
        rows.append((f"{case}, {experts}, {variant}", _share(gate), _share(native), *cells))
    return Grid(
        "Answers equal to fp32's on the same processor, %: opened by a plain session / by ours",
        ("case, experts, variant", "manifest", "natively", *processors),
        tuple(rows),
    )


def native_grid(findings: Sequence[Finding], processors: Sequence[str]) -> Grid:
    """How far each variant's answers are from its own on this machine: the worst expert set and route."""
    groups: dict[tuple[str, str], list[Finding]] = {}
    for finding in findings:
        groups.setdefault((finding.case, finding.variant), []).append(finding)
    rows = []
    for (case, variant), group in groups.items():
        cells = []
        for processor in processors:
            found = [f for f in group if f.processor == processor and not f.reason]
            cells.append(
                f"{_share(min(f.same_as_native for f in found))} ({max(f.max_difference for f in found):.2g})"
                if found
                else "-"
            )
        rows.append((f"{case}, {variant}", *cells))
    return Grid(
        "Answers equal to the same variant's on this machine, % (largest difference of a logit)",
        ("case, variant; worst expert set", *processors),
        tuple(rows),
    )


def parity_grid(ran: dict[str, Ran]) -> Grid:
    """What ``xad-parity`` says of fp32 on each processor."""
    cases = list(dict.fromkeys(case for found in ran.values() for case in found.parity))
    return Grid(
        "xad-parity of fp32: largest difference to PyTorch (cells)",
        ("processor", *cases),
        tuple((processor, *(_parity(found, case) for case in cases)) for processor, found in ran.items()),
    )


def python_grid(ran: dict[str, Ran]) -> Grid:
    """The base package with other versions of Python, on this processor."""
    return Grid(
        "The base package with other versions of Python, on this processor",
        ("version", "onnxruntime", "numpy", "xad-parity of fp32: largest difference (cells)"),
        tuple(
            (
                found.machine["python"],
                found.machine["versions"]["onnxruntime"],
                found.machine["versions"]["numpy"],
                *(_parity(found, case) for case in found.parity),
            )
            for found in ran.values()
        ),
    )


def _parity(found: Ran, case: str) -> str:
    if case not in found.parity:
        return "-"
    parity = found.parity[case]
    verdict = "" if parity["passed"] else "FAILED "
    return f"{verdict}{parity['max_abs']:.1e} ({parity['cells']})"


def _grouped(findings: Iterable[Finding]) -> Iterable[tuple[tuple[str, str, str], list[Finding]]]:
    groups: dict[tuple[str, str, str], list[Finding]] = {}
    for finding in findings:
        if finding.gate is not None:
            groups.setdefault((finding.case, finding.experts, finding.variant), []).append(finding)
    return groups.items()


def _kept(group: Sequence[Finding], processor: str) -> str:
    """``plain / session``, one number where they are equal; bold where it differs by more than a point."""
    by_route = {finding.route: finding for finding in group if finding.processor == processor}
    texts = [_cell(by_route[route]) for route in ("plain", "session") if route in by_route]
    return " / ".join(dict.fromkeys(texts)) or "-"


def _cell(finding: Finding) -> str:
    if finding.reason:
        return "refused" if "refused" in finding.reason else "cannot run"
    text = _share(finding.kept) if finding.is_right else f"**{_share(finding.kept)}**"
    return f"{text} (natively {_share(finding.kept_natively)})" if finding.is_of_more_texts else text


def _share(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f}"
