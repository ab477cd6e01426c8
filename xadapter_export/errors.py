"""Every error this package raises on purpose, and the one way to import a module of an extra.

Each leaf also inherits the builtin that it specializes, so ``except ValueError`` still works for a caller who
does not know this package, and ``except XAdapterError`` catches everything that was foreseen. A message is
one line that says what, where, expected, got, and what to do; each part is also an attribute.
"""

import importlib
import re
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Final, Self

# Controls, which a terminal obeys; direction overrides, which reorder a line; halves of surrogate pairs.
_UNPRINTABLE: Final = re.compile("[\0-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
_LONGEST_PART: Final = 1000  # characters of one part of an error; what is quoted may come from an attacker


def printable(text: str, *, keep: str = "") -> str:
    r"""Return a text that a terminal only prints: control characters become escapes such as ``\x1b``.

    Args:
        text: Any text, also from a file that nobody trusts.
        keep: Control characters that stay as they are.
    """
    return _UNPRINTABLE.sub(lambda found: found[0] if found[0] in keep else ascii(found[0])[1:-1], text)


def shortened(text: str, longest: int = _LONGEST_PART) -> str:
    """Return a text, cut with a note of its length if it has more than ``longest`` characters."""
    return text if len(text) <= longest else f"{text[:longest]}... ({len(text)} characters)"


class XAdapterError(Exception):
    """Base of every error that this package raises on purpose.

    Attributes:
        what: What went wrong, as a clause without a full stop.
        where: The file, key, tensor or text concerned.
        expected: What would have been right.
        got: What was found.
        hint: What the reader can do about it.
    """

    def __init__(
        self,
        what: str,
        *,
        where: object = None,
        expected: object = None,
        got: object = None,
        hint: str | None = None,
    ) -> None:
        self.what, self.where, self.expected, self.got, self.hint = what, where, expected, got, hint
        line = shortened(what) + ("" if where is None else f": {shortened(str(where))}")
        if isinstance(got, OSError) and got.strerror:  # its number and its path tell the reader nothing new
            got = got.strerror
        facts = [
            f"{k} {shortened(str(v))}" for k, v in (("expected", expected), ("got", got)) if v is not None
        ]
        if facts:
            line += f" ({', '.join(facts)})"
        if hint is not None:
            line += f"; {shortened(hint)}"
        super().__init__(printable(" ".join(line.split())))  # one line, whatever was quoted in it

    def __str__(self) -> str:
        """Return the line; ``OSError`` and ``ImportError`` would format their arguments their own way."""
        return str(self.args[0])

    def with_hint(self, more: str) -> Self:
        """Return the same error with another hint after its own."""
        hint = more if self.hint is None else f"{self.hint}; {more}"
        return type(self)(self.what, where=self.where, expected=self.expected, got=self.got, hint=hint)


class ConfigError(XAdapterError, ValueError):
    """A setting or an argument that makes no sense, alone or beside the others."""


class UnsupportedError(XAdapterError, ValueError):
    """Something real that this package does not handle: an unknown PLM family, an opset, a CLIP tower."""


class CheckpointError(XAdapterError, ValueError):
    """A checkpoint, PLM or CLIP folder that is missing, incomplete, or not what it says it is."""


class BundleError(XAdapterError, ValueError):
    """A bundle that is missing, incomplete, or not what its manifest says."""


class HashMismatchError(CheckpointError, BundleError):
    """A file or a set of weights that is not the one that was recorded."""


class SignatureError(BundleError):
    """A bundle that is not signed, or whose signature is of other files or by somebody else."""


class HubError(CheckpointError, BundleError):
    """The Hugging Face Hub could not give or take what was asked of it."""


class ShapeError(XAdapterError, ValueError):
    """An array whose shape or dtype is not the one in the contract."""


class InputTextError(XAdapterError, ValueError):
    """A text that cannot be answered: empty, without a mask, or with masks too far apart."""


class OutputExistsError(XAdapterError, FileExistsError):
    """Something is already at the place where the output should go."""


class OutputWriteError(XAdapterError, OSError):
    """The output could not be written: no space, no permission, no such parent folder."""


class ParityError(XAdapterError, ArithmeticError):
    """A graph does not say what PyTorch said, or the comparison would have compared nothing."""


class ProviderError(XAdapterError, RuntimeError):
    """An execution provider that was asked for is not there, or did not start."""


class MissingExtraError(XAdapterError, ImportError):
    """A package that belongs to an optional extra is not installed."""


@contextmanager
def panics_as(error: type[XAdapterError], what: str, *, where: object = None) -> Iterator[None]:
    """Raise an error of ours where a library in Rust gives up: its panic is no ``Exception``.

    Raises:
        error: If the body panics; an expression of a tokenizer that never ends does.
    """
    try:
        yield
    except BaseException as panic:
        if type(panic).__name__ != "PanicException":  # pyo3's, which each of its modules has as its own
            raise
        raise error(what, where=where, got=panic) from panic


def import_extra(module: str, *extras: str) -> ModuleType:
    """Import a module that only an extra installs.

    Args:
        module: Dotted module name, ``"torch"``.
        extras: The extra that brings it, ``"export"``, or several of which one is enough.

    Raises:
        MissingExtraError: If the module, or something it needs, cannot be imported.
    """
    return import_installed(module, *(f"xadapter-export[{extra}]" for extra in extras))


def import_installed(module: str, *requirements: str) -> ModuleType:
    """Import a module that may not be installed.

    Args:
        module: Dotted module name, ``"ncnn"``.
        requirements: What pip installs to bring it, ``"my-package[export]"``; one of several is enough.

    Raises:
        MissingExtraError: If the module, or something it needs, cannot be imported.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        lines = " or ".join(f'pip install "{requirement}"' for requirement in requirements)
        missing = f"this needs {' or '.join(requirements)}, which is not installed"
        raise MissingExtraError(missing, where=module, got=error, hint=f"install it with: {lines}") from error
