"""What the splits' results become: tables, and JSON between stages."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from statistics import mean

from train.demo.plugin import Language, SplitResult
from train.tables import Grid, spread


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


def language_grid(
    splits: Sequence[Mapping[str, Language]], names: Iterable[str] | None = None, where: str = ""
) -> Grid:
    """The language check, over all splits.

    Args:
        splits: What was measured of each split, by arm; the frozen PLM is among them.
        names: The arms to show; all if None.
        where: Words of the title: `` on MiniLM-L6``.
    """

    def row(name: str) -> tuple[str, ...]:
        checks = [split[name] for split in splits]
        ratio = mean(split[name].loss / split["frozen PLM"].loss for split in splits)
        return (
            name,
            spread([check.loss for check in checks], 3),
            f"{100 * (ratio - 1):+.1f} %",
            spread([100 * check.top1 for check in checks], 1),
            spread([100 * check.color_rate for check in checks], 2),
        )

    return Grid(
        f"Language check{where}: one masked word of sentences that were kept from training",
        ("", "MLM loss (nats)", "against frozen PLM", "top-1 %", "answers that are a color %"),
        tuple(row(name) for name in names or splits[0]),
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
