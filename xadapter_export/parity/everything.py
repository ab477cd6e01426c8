"""Everything that can be checked of a bundle without PyTorch, a line each.

First the hashes and the signature: where these fail, no graph is opened.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from xadapter_export.bundle.folder import Bundle, verify_files
from xadapter_export.bundle.manifest import Variant
from xadapter_export.bundle.signature import check_signed_files, read_signature, verify_signature
from xadapter_export.errors import MissingExtraError, XAdapterError
from xadapter_export.parity.compare import TOLERANCES
from xadapter_export.parity.prove import check_lossy, prove_bundle, runs_on
from xadapter_export.parity.recorded import describe_checks
from xadapter_export.sessions.session import Provider

Verdict = Literal["passed", "FAILED", "not checked"]


@dataclass(frozen=True)
class Finding:
    """What one check found.

    Attributes:
        check: What was checked.
        verdict: Whether that is right. What cannot be checked on this machine is no failure.
        says: What was found, or why it was not checked.
    """

    check: str
    verdict: Verdict
    says: str


def check_everything(
    bundle: Bundle,
    key: Path | None = None,
    *,
    providers: Sequence[Provider] | None = None,
    num_threads: int | None = None,
) -> Iterator[Finding]:
    """Check hashes, signature, the proof of every fp32 variant and the record of every lossy one.

    Args:
        bundle: The bundle, of which every file is there.
        key: What the bundle must be signed with, see ``verify_signature``. If None, a signature that is there
            must be of these files.
        providers: Execution providers in order of preference; the CPU if None.
        num_threads: Threads inside one operator; the engine's choice if None.
    """
    trusted = True
    for finding in (_check_hashes(bundle), _check_signature(bundle, key)):
        trusted &= finding.verdict != "FAILED"
        yield finding
    for variant in bundle.manifest.variants:
        what = f"{variant.name}, experts {variant.expert_set}"
        if not trusted:
            yield Finding(what, "not checked", "the files are not the ones that were exported or signed")
            continue
        try:
            yield Finding(what, *_check_variant(bundle, variant, providers, num_threads))
        except MissingExtraError as error:
            yield Finding(what, "not checked", str(error))
        except XAdapterError as error:
            yield Finding(what, "FAILED", str(error))
    for made in bundle.manifest.deployments:
        if made.prove_with is not None:
            what = f"{made.name}, experts {made.expert_set}"
            yield Finding(what, "not checked", f"run on the target machine: {made.prove_with}")


def _check_hashes(bundle: Bundle) -> Finding:
    files = bundle.manifest.files
    try:
        verify_files(bundle, files)
    except XAdapterError as error:
        return Finding("hashes", "FAILED", str(error))
    return Finding("hashes", "passed", f"{len(files)} files are as the manifest says")


def _check_signature(bundle: Bundle, key: Path | None) -> Finding:
    try:
        if key is not None:
            return Finding("signature", "passed", f"made with {verify_signature(bundle, key).signer}")
        if (signature := read_signature(bundle)) is None:
            return Finding("signature", "not checked", "the bundle is not signed")
        check_signed_files(bundle, signature)
    except XAdapterError as error:
        return Finding("signature", "FAILED", str(error))
    says = f"it is of these files; give --verify-key to see whether it was made with {signature.signer}"
    return Finding("signature", "not checked", says)


def _check_variant(
    bundle: Bundle, variant: Variant, providers: Sequence[Provider] | None, num_threads: int | None
) -> tuple[Verdict, str]:
    """Return whether a variant is right on this machine, and how nearly.

    Raises:
        XAdapterError: If it is not, or cannot be run.
    """
    sets, names = [variant.expert_set], [variant.name]
    if not runs_on(variant, providers):
        return "not checked", "it does not run with these providers"
    if variant.precision in TOLERANCES:
        report = prove_bundle(
            bundle.folder, sets, variants=names, providers=providers, num_threads=num_threads, verify=False
        )
        report.raise_if_failed()
        difference = report.variant_parity(variant.expert_set, variant.name).max_abs
        return "passed", f"{len(report.cells)} comparisons with PyTorch, max difference {difference:.1e}"
    if variant.agreement is None:
        return "FAILED", "its agreement with fp32 was never measured"
    checks = check_lossy(
        bundle.folder, sets, variants=names, providers=providers, num_threads=num_threads, verify=False
    )
    right = bool(checks) and all(check.passed for check in checks)
    return "passed" if right else "FAILED", f"against its record: {describe_checks(checks)}"
