"""Memory Colors and ColorTerms: objects that the bank has pictures for, none of them trained on."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from material.pictures import DemoObject
from material.splits import Split, content_words
from material.tables import Grid
from train.color.laboratory import Arm
from xadapter_export.evaluation.color import PUBLISHED, evaluate_color
from xadapter_export.evaluation.objects import ObjectSet, read_colors, select_objects
from xadapter_export.evaluation.opening import open_scorer
from xadapter_export.evaluation.prompts import read_prompts
from xadapter_export.evaluation.readings import Reading
from xadapter_export.experts import V

_PROTOCOLS = {"valm": "9 prompts (VaLM)", "norlund": "13 prompts (Norlund et al.)"}


def hold_out_named(objects: Sequence[DemoObject], paths: Sequence[Path]) -> Split:
    """Hold out every object that a file names: neither it nor what shares a word with it trains anything."""
    asked = {
        thing.name.casefold() for path in paths for thing in _in_bank(read_colors(path), objects).objects
    }
    held_out = tuple(
        row
        for row, entry in enumerate(objects)
        if any(name.casefold() in asked or f"{name.casefold()}s" in asked for name in entry.names)
    )
    words = frozenset(
        word
        for text in [*asked, *(name for row in held_out for name in objects[row].names)]
        for word in content_words(text)
    )
    training = tuple(
        row for row, entry in enumerate(objects) if words.isdisjoint(content_words(" ".join(entry.names)))
    )
    return Split(training, held_out, words)


def _in_bank(data: ObjectSet, objects: Sequence[DemoObject]) -> ObjectSet:
    return select_objects(data, only=[{name for entry in objects for name in entry.names}])


def score_published(
    path: Path, title: str, folders: Mapping[str, Path], arms: Sequence[Arm], objects: Sequence[DemoObject]
) -> tuple[Grid, str]:
    """Score every arm's checkpoint with both protocols.

    Args:
        path: The benchmark's file.
        title: Its name.
        folders: Checkpoint of each arm, by its name.
        arms: What to measure of each.
        objects: Whose pictures are in the bank.

    Returns:
        The table, and the line that says what differs from the published figures.
    """
    everything = read_colors(path)
    data = _in_bank(everything, objects)
    readings = []
    for arm in arms:
        scorer = open_scorer(folders[arm.name], batch_size=128)
        for experts, name in arm.measured.items():
            readings.append(Reading(name, scorer, experts))
            if name == V.title:
                readings.append(Reading(f"{name}, shuffled pictures", scorer, experts, is_shuffled=True))
    columns: dict[str, list[str]] = {}
    for protocol in _PROTOCOLS:
        evaluation = evaluate_color(readings, data, read_prompts(protocol), prompts_name=protocol).evaluation
        for row in evaluation.rows:
            accuracy, spread = row.values["accuracy"], row.values.get("accuracy_sd")
            cell = f"{100 * (accuracy or 0):.1f}" + (f" ± {100 * spread:.1f}" if spread else "")
            columns.setdefault(row.name, []).append(cell)
    published = []
    for name, value in PUBLISHED.get(data.benchmark, {}).items():
        cells = ("", f"{100 * value:.1f}") if "Hagstrom" in name else (f"{100 * value:.1f}", "")
        published.append((f"published, all {len(everything.objects)} objects: {name}", *cells))
    grid = Grid(
        f"{title}: {len(data.objects)} of {len(everything.objects)} objects, accuracy over "
        f"{len(data.colors)} colors, %, mean ± sd over prompts",
        ("", *_PROTOCOLS.values()),
        (*((name, *cells) for name, cells in columns.items()), *published),
    )
    note = (
        f"{title}: only the {len(data.objects)} objects that the bank has pictures for, drawn as emoji, on a "
        "6-layer MiniLM whose MLM head was trained here; the published rows are BERT-base with photographs, "
        "on all objects, each with its own prompts. They show the scale of the benchmark and are no contest."
    )
    return grid, note
