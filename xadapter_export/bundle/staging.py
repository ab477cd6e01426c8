"""Folders and files that are complete or not there: written beside the final place, synced, renamed.

Whoever writes a folder holds a lock on it, which the system drops when the process ends, however it ends. So
the next run knows what a killed one left behind.
"""

import ctypes
import errno
import os
import re
import secrets
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from xadapter_export.bundle.folder import MANIFEST_NAME
from xadapter_export.errors import ConfigError, OutputExistsError, OutputWriteError, XAdapterError

_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # of Linux: relative to the current folder; linux/fs.h

# What an error raised inside the block must be to be about the output; see ``_concerns`` too.
_UNWRITABLE = {
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG),
    *(errno.EACCES, errno.EPERM, errno.EROFS),
    *(errno.ENOTDIR, errno.ENAMETOOLONG),
}


class StagedFolder:
    """A folder being written, at ``path``, that will be moved to ``final``."""

    def __init__(self, path: Path, final: Path, marker: str) -> None:
        self.path = path
        self.final = final
        self.rejected: Path | None = None
        self._marker = marker

    def __truediv__(self, relative: str) -> Path:
        """Return a path inside the folder."""
        return self.path / relative

    def keep_as_rejected(self) -> Path:
        """Move what was written to ``<name>.rejected`` for a look at it, and return that path.

        An earlier rejected one there is replaced.

        Raises:
            OutputExistsError: If something of another kind is there.
            OutputWriteError: If it cannot be moved there.
        """
        rejected = self.final.with_name(f"{self.final.name}.rejected")
        with _blame_the_output(rejected):
            check_replaceable(rejected, self._marker, force=True)
            _move_into_place(self.path, rejected)
        self.rejected = rejected
        return rejected


@contextmanager
def staged_folder(
    final: Path | str, *, force: bool = False, marker: str = MANIFEST_NAME
) -> Iterator[StagedFolder]:
    """Write a folder beside its final place, and move it there when the block ends well.

    Whatever ends the block early, Ctrl-C included, removes the temporary folder and leaves the old one alone.
    What a killed run left beside ``final`` is removed first.

    Args:
        final: Where the folder goes. Missing parents are made.
        force: Whether what is there may be replaced, if it is a folder with ``marker`` in it or an empty one.
            It is replaced only after the new one is complete.
        marker: The file by which a folder is known to be of the same kind.

    Raises:
        OutputExistsError: If something is at ``final``, or, with ``force``, something of another kind.
        OutputWriteError: If the disk is full or the place cannot be written.
        ConfigError: If ``final`` is a root, which has no name.
    """
    final = resolved(Path(final))
    temporary = _hidden(final, "tmp")
    staged = StagedFolder(temporary, final, marker)
    made: list[Path] = []
    lock: int | None = None
    try:
        with _blame_the_output(final):
            _clear_leftovers(final)
            check_replaceable(final, marker, force=force)
            made = [parent for parent in final.parents if not parent.exists()]
            while lock is None or not temporary.exists():  # who clears leftovers may come before the lock
                _unlock(lock)
                temporary.mkdir(parents=True)
                lock = _lock(temporary, wait=True)
                if lock is None:
                    break
        try:
            yield staged
        except OSError as error:
            if isinstance(error, XAdapterError) or not _concerns(error, staged):
                raise
            raise _unwritable(error, final) from error
        if staged.rejected is None:
            with _blame_the_output(final):
                _sync(temporary)
                check_replaceable(final, marker, force=force)
                _move_into_place(temporary, final)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        _unlock(lock)
        for parent in made:  # innermost first
            with suppress(OSError):  # it was never made, or is no longer empty
                parent.rmdir()


@contextmanager
def staged_file(final: Path) -> Iterator[Path]:
    """Write a file beside its final place, and move it there when the block ends well.

    Yields:
        Where to write it. What a killed run left there is gone.

    Raises:
        OutputWriteError: If it cannot be written.
    """
    temporary = final.with_name(f".{final.name}.tmp")
    try:
        with _blame_the_output(final):
            temporary.unlink(missing_ok=True)
            yield temporary
            temporary.replace(final)
    finally:
        with suppress(OSError):  # what could not be written may not be removed either
            temporary.unlink(missing_ok=True)


def resolved(final: Path) -> Path:
    """Return the place of a folder, links followed.

    Raises:
        OutputWriteError: If there can be none.
        ConfigError: If it is a root, which has no name.
    """
    try:
        resolved = final.resolve()
    except (OSError, RuntimeError, ValueError) as error:  # RuntimeError: a loop of links; ValueError: a NUL
        raise _unwritable(error, final) from error
    if not resolved.name:
        raise ConfigError(
            "the output path is a root folder",
            where=resolved,
            hint="add the name of a new folder",
        )
    return resolved


@contextmanager
def _blame_the_output(final: Path) -> Iterator[None]:
    """Make of any error of the operating system one about the output; for our own calls only."""
    try:
        yield
    except OSError as error:
        if isinstance(error, XAdapterError):
            raise
        raise _unwritable(error, final) from error


def _unwritable(error: Exception, final: Path) -> OutputWriteError:
    return OutputWriteError(
        "the output cannot be written",
        where=final,
        got=getattr(error, "strerror", None) or error,
        hint="free some space, or choose a folder that you can write to",
    )


def _concerns(error: OSError, staged: StagedFolder) -> bool:
    """Whether an error is about writing the folder, and not about some other file that was being read."""
    if error.errno not in _UNWRITABLE:
        return False
    if not isinstance(error.filename, str | bytes):
        return True
    path = Path(os.fsdecode(error.filename)).absolute()
    return path.is_relative_to(staged.path) or staged.final.is_relative_to(path)


def check_replaceable(final: Path, marker: str, *, force: bool) -> None:
    """Refuse a place that ``staged_folder`` would refuse, before any work is done for it.

    Raises:
        OutputExistsError: As ``staged_folder``.
    """
    if not final.exists():
        return
    if not force:
        raise OutputExistsError(
            "the output path already exists",
            where=final,
            hint="choose another path, or replace it with --force (force=True)",
        )
    if not final.is_dir() or (any(final.iterdir()) and not (final / marker).is_file()):
        raise OutputExistsError(
            "the output path holds something that xadapter-export did not write",
            where=final,
            expected=f"a folder with {marker}",
            hint="choose another path, or remove it yourself",
        )


def _move_into_place(temporary: Path, final: Path) -> None:
    """Rename ``temporary`` to ``final``; what was there goes only once the new folder is in its place.

    Where the system cannot exchange two folders, nothing is at ``final`` between two renames.
    """
    if final.exists() and _exchange(temporary, final):
        _sync_folder(final.parent)
        shutil.rmtree(temporary, ignore_errors=True)
        return
    old = _hidden(final, "old")
    lock = _lock(final)
    try:
        if final.exists():
            final.rename(old)
        temporary.rename(final)
    except BaseException as error:
        if old.exists() and not final.exists():
            try:
                old.rename(final)
            except OSError:
                raise OutputWriteError(
                    "the output cannot be moved into place, and the old one cannot be moved back",
                    where=final,
                    got=error,
                    hint=f"rename {old} to {final.name}",
                ) from error
        raise
    finally:
        _unlock(lock)
    _sync_folder(final.parent)
    shutil.rmtree(old, ignore_errors=True)


def _hidden(final: Path, kind: str) -> Path:
    return final.with_name(f".{final.name}.{secrets.token_hex(4)}.xad.{kind}")


def _clear_leftovers(final: Path) -> None:
    """Remove what killed runs left beside a folder, and move back an old one if nothing took its place."""
    ours = re.compile(rf"\.{re.escape(final.name)}\.[0-9a-f]{{8}}\.xad\.(tmp|old)")
    try:
        found = [path for path in final.parent.iterdir() if ours.fullmatch(path.name)]
    except OSError:
        return
    for path in found:
        if path.is_symlink() or not path.is_dir() or (lock := _lock(path)) is None:
            continue
        if path.suffix == ".old" and not final.exists():
            with suppress(OSError):
                path.rename(final)
        else:
            shutil.rmtree(path, ignore_errors=True)
        _unlock(lock)


def _lock(folder: Path, *, wait: bool = False) -> int | None:
    """Lock a folder; None where another process holds it, unless it is waited for, or there are no locks."""
    if sys.platform == "win32":
        return None
    import fcntl

    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError:
        os.close(descriptor)
        return None
    return descriptor


def _unlock(lock: int | None) -> None:
    if lock is not None:
        os.close(lock)


def _exchange(one: Path, other: Path) -> bool:
    """Let two folders change places in one step; False where that cannot be, as outside of Linux."""
    try:
        renameat2 = ctypes.CDLL(None).renameat2
    except (OSError, AttributeError, TypeError):  # TypeError: Windows has no CDLL(None)
        return False
    return bool(renameat2(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) == 0)


def write_whole(path: Path, text: str) -> None:
    """Write a file that is there as a whole or not at all, also where two processes write it.

    Raises:
        OSError: If it cannot be written; what was there before still is.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with temporary.open("x", encoding="utf-8") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(path)
    except BaseException:
        with suppress(OSError):  # what could not be written may not be removed either
            temporary.unlink(missing_ok=True)
        raise


def _sync(folder: Path) -> None:
    """Flush every file and folder below, and the folder itself, to the disk."""
    for path in [*folder.rglob("*"), folder]:
        if path.is_dir():
            _sync_folder(path)
        else:
            with path.open("rb+") as stream:
                os.fsync(stream.fileno())


def _sync_folder(folder: Path) -> None:
    if os.name != "posix":  # elsewhere a folder cannot be opened, and needs no flush
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
