"""Small text files of bundles, banks and checkpoints, which may come from anybody.

A file is read only if it is a regular one of a size that its kind can have. JSON is one object whose keys are
there once, so that every reader of it finds the same.
"""

import json
import stat
from pathlib import Path
from typing import Any, Final, TypeVar

from pydantic import BaseModel, ValidationError

from xadapter_export.errors import BundleError, XAdapterError

MIB: Final = 1 << 20
LARGEST_RECORD: Final = 16 * MIB  # a manifest of fifty variants takes 100 KiB
LARGEST_TEXT: Final = 256 * MIB  # any JSON or text of a checkpoint; a tokenizer of 250,000 words takes 17 MiB

AnyModel = TypeVar("AnyModel", bound=BaseModel)


def read_text(
    path: Path, what: str, error: type[XAdapterError] = BundleError, *, largest: int = LARGEST_RECORD
) -> str:
    """Read a text file as UTF-8.

    Args:
        path: The file.
        what: What it is, for the error: ``the manifest``.
        error: Kind of error to raise.
        largest: How many bytes it may have.

    Raises:
        error: If it is missing, no regular file, too large, or not UTF-8.
    """
    try:
        size = check_file(path, what, error, largest=largest)
        with path.open("rb") as stream:
            return stream.read(size).decode("utf-8")
    except (OSError, UnicodeDecodeError) as problem:
        if isinstance(problem, XAdapterError):
            raise
        raise error(f"{what} cannot be read", where=path, got=problem) from problem


def check_file(
    path: Path, what: str, error: type[XAdapterError] = BundleError, *, largest: int | None = None
) -> int:
    """Refuse what is no regular file, or a larger one than its kind can be; return its size in bytes.

    Raises:
        error: If it is one of these.
        OSError: If it is missing.
    """
    found = path.stat()
    if not stat.S_ISREG(found.st_mode):
        raise error(f"{what} cannot be read", where=path, expected="a regular file")
    if largest is not None and found.st_size > largest:
        raise error(
            f"{what} is too large", where=path, expected=f"{largest} bytes at most", got=found.st_size
        )
    return found.st_size


def check_files(folder: Path, what: str, error: type[XAdapterError]) -> None:
    """Refuse a folder that holds anything but folders and regular files, or a text that is too large.

    For folders that other libraries read whole: they would read a device until memory ends.

    Raises:
        error: If there is something else.
    """
    try:
        for path in sorted(folder.rglob("*")):
            is_text = path.suffix in {".json", ".jsonl", ".txt"}
            if not path.is_dir() and (path.exists() or path.is_symlink()):
                check_file(path, what, error, largest=LARGEST_TEXT if is_text else None)
    except (OSError, RuntimeError) as problem:  # RuntimeError: a loop of links
        if isinstance(problem, XAdapterError):
            raise
        raise error(f"{what} cannot be read", where=folder, got=problem) from problem


def parse_object(
    text: str, what: str, where: object, error: type[XAdapterError] = BundleError
) -> dict[str, Any]:
    """Parse a text as one JSON object.

    Raises:
        error: If it is not one, nests too deep, repeats a key, or has NaN or an infinite number.
    """
    try:
        found = json.loads(text, object_pairs_hook=_unique, parse_constant=_refuse)
    except RecursionError as problem:
        raise error(f"{what} is not a JSON object", where=where, got="too many levels") from problem
    except ValueError as problem:
        raise error(f"{what} is not a JSON object", where=where, got=problem) from problem
    if not isinstance(found, dict):
        raise error(f"{what} is not a JSON object", where=where, got=type(found).__name__)
    return found


def read_object(
    path: Path, what: str, error: type[XAdapterError] = BundleError, *, largest: int = LARGEST_RECORD
) -> dict[str, Any]:
    """Read a file that holds one JSON object; see ``read_text`` and ``parse_object``."""
    return parse_object(read_text(path, what, error, largest=largest), what, path, error)


def read_model(
    path: Path, model: type[AnyModel], what: str, error: type[XAdapterError] = BundleError
) -> AnyModel:
    """Read a file that holds a pydantic model as JSON; see ``read_object``.

    Raises:
        error: Also if it has a wrong or an unknown key.
    """
    text = read_text(path, what, error)
    parse_object(text, what, path, error)
    try:
        return model.model_validate_json(text)
    except ValidationError as problem:
        raise error(f"{what} is not valid", where=path, got=describe(problem)) from problem


def describe(error: ValidationError) -> str:
    """Return what pydantic found wrong as one line, each complaint after the key that it is about."""
    return "; ".join(
        f"{'.'.join(map(str, item['loc'])) or 'manifest'}: {item['msg']}" for item in error.errors()
    )


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        repeated = next(name for name, _ in pairs if name in seen or seen.add(name))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {repeated!r} is there twice")
    return found


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no number of JSON")
