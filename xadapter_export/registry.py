"""What installed packages bring: their versions, and things that a user names, ours and those of others."""

import importlib
from collections.abc import Iterator
from importlib.metadata import EntryPoint, PackageNotFoundError, entry_points, version
from typing import Any, Generic, Protocol, TypeVar, cast

from xadapter_export.errors import ConfigError, UnsupportedError


class Named(Protocol):
    """Something with a name to choose it by."""

    @property
    def name(self) -> str:
        """The name, the same on every machine."""


Entry = TypeVar("Entry", bound=Named)


class Registry(Generic[Entry]):
    """A table by name. What installed packages add comes after ours, and is loaded when it is asked for.

    Args:
        group: Entry point group, such as ``xadapter_export.tasks``. An entry point has the name of what it
            loads; ours are never replaced.
        what: What an entry is, for messages: ``task``.
        own: Our entries, in the order in which they are listed.
    """

    def __init__(self, group: str, what: str, *own: Entry) -> None:
        self._group = group
        self._what = what
        self._loaded: dict[str, Entry] = {entry.name: entry for entry in own}

    def __getitem__(self, name: str) -> Entry:
        """Return an entry.

        Raises:
            UnsupportedError: If there is none of this name, or its package cannot be used.
        """
        if name not in self._loaded:
            self._loaded[name] = self._load(name)
        return self._loaded[name]

    def __iter__(self) -> Iterator[str]:
        """Yield the names, ours first; nothing is loaded."""
        return iter(dict.fromkeys((*self._loaded, *self._points())))

    def __contains__(self, name: object) -> bool:
        return name in self._loaded or name in self._points()

    def _points(self) -> dict[str, EntryPoint]:
        return {point.name: point for point in entry_points(group=self._group)}

    def _load(self, name: str) -> Entry:
        point = self._points().get(name)
        if point is None:
            raise UnsupportedError(f"there is no such {self._what}", got=name, expected=", ".join(self))
        where = f"{self._group}: {name} = {point.value}"
        try:
            entry = point.load()
        except Exception as error:  # whatever the other package raises while it is imported
            raise UnsupportedError(f"a {self._what} cannot be loaded", where=where, got=error) from error
        if getattr(entry, "name", None) != name:
            raise UnsupportedError(
                f"an entry point gives another {self._what}", where=where, got=getattr(entry, "name", entry)
            )
        return cast(Entry, entry)


def load_named(place: str) -> Any:
    """Import what an entry names, ``module:attribute``: so a table imports nothing that is heavy.

    Raises:
        ConfigError: If there is no such attribute.
    """
    module, _, attribute = place.partition(":")
    try:
        return getattr(importlib.import_module(module), attribute)
    except AttributeError as error:
        raise ConfigError("a table names what is not there", where=place, got=error) from error


def installed_version(distribution: str) -> str | None:
    """Return the version of an installed package, by the name that pip knows; None where it is not there."""
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None
