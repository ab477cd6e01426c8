"""The place where a bank is written: staged, and never over anything that is not a bank."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from xadapter_export.bank.record import CHECKPOINT_RECORD_NAME, RECORD_NAME
from xadapter_export.bundle.staging import StagedFolder, staged_folder
from xadapter_export.errors import OutputExistsError


@contextmanager
def staged_bank(output: Path, *, force: bool) -> Iterator[StagedFolder]:
    """Write a bank beside its place and move it there when the block ends well.

    Args:
        output: Where the bank goes.
        force: Whether a bank that is there may be replaced.

    Raises:
        OutputExistsError: If something is there, or, with ``force``, something that is no bank alone.
        OutputWriteError: If the disk is full or the place cannot be written.
    """
    if (output / CHECKPOINT_RECORD_NAME).exists():
        raise OutputExistsError(
            "the output path holds a checkpoint, not a bank", where=output, hint="choose another path"
        )
    with staged_folder(output, force=force, marker=RECORD_NAME) as staged:
        yield staged


def check_output(output: Path, *, force: bool) -> None:
    """Check now that ``staged_bank`` will be able to write later, after much work.

    Raises:
        OutputExistsError: As ``staged_bank``.
        OutputWriteError: As ``staged_bank``.
    """

    class Enough(Exception):  # noqa: N818  # no error: it ends the block before anything is moved
        pass

    try:
        with staged_bank(output, force=force):
            raise Enough
    except Enough:
        return
