"""The kinds of experts that a plug-in may hold, and the sets that they make.

A set is any of them together: its name is their letters in the order of ``KINDS``, or ``none``. Adapters in a
checkpoint, taps and weights in a graph are named by the letter. So is what a graph takes and gives that is
exported with explanations; docs/explaining.md says what it means.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import combinations
from typing import Final, Literal

from xadapter_export.errors import UnsupportedError

Read = Literal["bank", "text"]


@dataclass(frozen=True)
class ExpertKind:
    """One kind of expert.

    Attributes:
        name: Its letter.
        title: What tables call it.
        reads: What it attends to: rows of a feature ``bank``, or the states of the ``text`` in CLIP's text
            tower. Top-k retrieval needs that tower too, to search the bank. A static bank is folded into the
            graph, and distilled to, for ``V`` alone.
    """

    name: str
    title: str
    reads: Read


V: Final = ExpertKind("v", "V-expert", "bank")
T: Final = ExpertKind("t", "T-expert", "text")
KINDS: Final = {kind.name: kind for kind in (V, T)}
NONE: Final = "none"


def set_of(experts: Iterable[str]) -> str:
    """Return the name of the set of some experts: ``vt`` of ``t`` and ``v``, ``none`` of nothing."""
    held = set(experts)
    return "".join(name for name in KINDS if name in held) or NONE


def keep_name(expert: str) -> str:
    """Return the name of the input that says which items of an expert's memory are kept: 1, or 0."""
    return f"keep_{expert}"


def length_names(expert: str) -> tuple[str, str]:
    """Return the names of the outputs that say how far items, and the rest, carry an expert's contributions.

    The rest are the layer's own rows beside the memory, and its bias.
    """
    return f"lengths_{expert}", f"rest_{expert}"


def all_sets() -> tuple[str, ...]:
    """Return the name of every set, the empty one first."""
    sizes = range(len(KINDS) + 1)
    return tuple(set_of(some) for size in sizes for some in combinations(KINDS, size))


EXPERT_SETS: Final = all_sets()


def experts_of(expert_set: str) -> tuple[str, ...]:
    """Return the experts of a set: ``("v", "t")`` of ``vt``, nothing of ``none``.

    Raises:
        UnsupportedError: If there is no such set.
    """
    return () if expert_set == NONE else tuple(known_set(expert_set))


def reads_bank(experts: str | Iterable[str]) -> bool:
    """Whether one of some experts, or of a set by its name, reads a feature bank."""
    return any(kind.reads == "bank" for kind in _kinds(experts))


def reads_text(experts: str | Iterable[str]) -> bool:
    """Whether one of some experts, or of a set by its name, reads the states of CLIP's text tower."""
    return any(kind.reads == "text" for kind in _kinds(experts))


def title_of(expert_set: str) -> str:
    """Return what tables call a set: ``V-expert``, ``V + T``, or ``frozen PLM`` without experts."""
    kinds = _kinds(expert_set)
    if len(kinds) == 1:
        return kinds[0].title
    return " + ".join(kind.name.upper() for kind in kinds) or "frozen PLM"


def known_set(name: str) -> str:
    """Return the name of an expert set.

    Raises:
        UnsupportedError: If there is no such set.
    """
    return _known("expert set", name, EXPERT_SETS)


def known_experts(name: str) -> str:
    """Return the name of a set that holds an expert.

    Raises:
        UnsupportedError: If there is no such set.
    """
    return _known("set of experts", name, EXPERT_SETS[1:])


def known_expert(name: str) -> str:
    """Return the letter of an expert.

    Raises:
        UnsupportedError: If there is no such expert.
    """
    return _known("expert", name, KINDS)


def _known(what: str, name: str, names: Iterable[str]) -> str:
    if name not in names:
        raise UnsupportedError(f"there is no such {what}", got=name, expected=f"one of {', '.join(names)}")
    return name


def _kinds(experts: str | Iterable[str]) -> list[ExpertKind]:
    return [KINDS[name] for name in (experts_of(experts) if isinstance(experts, str) else experts)]
