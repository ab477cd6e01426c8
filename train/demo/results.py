"""What the splits' results become: tables, and JSON between stages."""

from collections.abc import Sequence
from dataclasses import asdict

from material.tables import Grid, Language, spread
from train.demo.plugin import SplitResult


def color_grid(shipped: SplitResult, splits: Sequence[SplitResult]) -> Grid:
    """Color accuracy of the shipped split, and over the splits."""
    sizes = [split.num_held_out for split in splits]
    return Grid(
        "Color of held-out objects, unseen sentences, 11 colors, % right",
        (
            "",
            f"shipped ({shipped.num_held_out} objects)",
            f"{len(splits)} splits ({min(sizes)} to {max(sizes)} objects), mean ± sd",
        ),
        tuple(
            (name, f"{100 * value:.1f}", spread([100 * split.accuracy[name] for split in splits], 1))
            for name, value in shipped.accuracy.items()
        ),
    )


def measure_grid(title: str, measured: dict[str, str]) -> Grid:
    """A plain list of names and values."""
    return Grid(title, ("", ""), tuple(measured.items()))


def to_json(result: SplitResult) -> dict[str, object]:
    """A split's numbers as JSON."""
    return asdict(result)


def from_json(value: dict[str, object]) -> SplitResult:
    """The inverse of ``to_json``."""
    plain = dict(value)
    language = plain.pop("language")
    assert isinstance(language, dict)
    return SplitResult(**plain, language={name: Language(**check) for name, check in language.items()})  # type: ignore[arg-type]  # JSON
