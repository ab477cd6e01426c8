"""The check of a graph when it is opened: one reference case, once in a process for each file by default."""

import threading
import time
from dataclasses import replace
from typing import Literal

from xadapter_export.bundle.folder import Bundle
from xadapter_export.bundle.manifest import Variant
from xadapter_export.parity.recorded import Check, files_of_record, opened_record
from xadapter_export.sessions.session import OnnxSession
from xadapter_export.sessions.shared import identify

CheckWhen = Literal["always", "once", "never"]
CHECK_WHEN: tuple[CheckWhen, ...] = ("always", "once", "never")

_passed: dict[tuple[object, ...], Check] = {}
_lock = threading.Lock()


def check_graph(
    bundle: Bundle, variant: Variant, session: OnnxSession, when: CheckWhen, how: tuple[object, ...]
) -> Check:
    """Ask a graph one case that the bundle carries, and compare.

    Args:
        bundle: The bundle.
        variant: The variant that ``session`` runs.
        session: What was opened.
        when: ``once`` for what was found earlier in this process, if these files passed then; ``always`` for
            a run in any case.
        how: What else decides who computes: providers and threads.

    Raises:
        BundleError: If the reference is missing or cannot be read.
    """
    files = identify(bundle, *variant.all_files, *files_of_record(bundle))
    key = (variant.expert_set, variant.name, files, *how)
    with _lock:
        if when == "once" and key in _passed:
            return _passed[key]
    start = time.perf_counter()
    with opened_record(bundle) as record:
        check = record.check(session, variant, record.typical_case)
    check = replace(check, milliseconds=1e3 * (time.perf_counter() - start))  # opening the record included
    if check.passed:
        with _lock:
            _passed[key] = check
    return check
