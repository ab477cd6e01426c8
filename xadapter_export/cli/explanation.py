"""Why a text was answered as it was, on the terminal and as a page."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from xadapter_export.cli.command import make_console
from xadapter_export.experts import KINDS

if TYPE_CHECKING:
    from rich.table import Table

    from xadapter_export.runtime.explain import ExplainedExpert, Explanation

_BAR_COLUMNS = 16
_MOST_ROWS = 12


def write_page(path: Path, explanations: "Sequence[Explanation]", pictures: Path | None) -> None:
    """Write a page with the thumbnails that are in a folder.

    Raises:
        CheckpointError: If the thumbnails are broken.
        MissingExtraError: If there are pictures, and Pillow is not installed.
        OutputWriteError: If the page cannot be written.
    """
    from xadapter_export.bank.contact_sheet import find_thumbnails
    from xadapter_export.bundle.staging import staged_file
    from xadapter_export.runtime.explanation_page import render_explanations

    answers = [answer for explanation in explanations for answer in explanation.answers]
    items = [item for answer in answers for expert in answer.experts for item in expert.items]
    ids = {item.row: item.id for item in items if item.row is not None and item.id is not None}
    thumbnails = {} if pictures is None else find_thumbnails(pictures, ids, pictures)
    with staged_file(path) as staged:
        staged.write_text(render_explanations(explanations, thumbnails), encoding="utf-8")


def show_explanations(explanations: "Sequence[Explanation]") -> None:
    """Print a table for each answer and expert: shares, and the answer without each item."""
    console = make_console()
    is_utf = console.encoding.startswith("utf")
    for explanation in explanations:
        for answer in explanation.answers:
            for expert in answer.experts:
                mask = answer.mask if len(explanation.answers) > 1 else None
                where = "" if mask is None else f", mask {mask + 1}"
                console.print(f"\n  {KINDS[expert.expert].title}{where}", style="bold")
                console.print(_table(expert, "\u2588" if is_utf else "#", "\u2591" if is_utf else "-"))


def _table(expert: "ExplainedExpert", plus: str, minus: str) -> "Table":
    from rich.table import Table

    has_pictures = any(item.row is not None for item in expert.items)
    table = Table(show_edge=False, pad_edge=True, box=None, padding=(0, 2, 0, 2), header_style="dim")
    table.add_column("share", justify="right")
    table.add_column("", width=_BAR_COLUMNS)
    table.add_column("image" if has_pictures else "CLIP token")
    table.add_column("without it")
    items = sorted(expert.items, key=lambda item: -abs(item.share))
    most = abs(items[0].share) if items else 0.0
    times = Counter(item.name for item in items)
    for item in items[:_MOST_ROWS]:
        size = round(_BAR_COLUMNS * abs(item.share) / most) if most else 0
        bar = (plus if item.share > 0 else minus) * size
        style = "bold" if item.without.changes else None
        name = f"{item.name} ({item.id})" if item.id is not None and times[item.name] > 1 else item.name
        table.add_row(f"{item.share:.1%}", bar, name, item.without.summary, style=style)
    if others := items[_MOST_ROWS:]:
        share = sum(item.share for item in others)
        table.add_row(f"{share:.1%}", "", f"{len(others)} more", "", style="dim")
    if expert.null_share:
        table.add_row(f"{expert.null_share:.1%}", "", "null rows", "", style="dim")
    table.add_row(f"{expert.bias_share:.1%}", "", "bias", "", style="dim")
    whole = expert.without
    title = f"without the {KINDS[expert.expert].title}"
    table.add_row("", "", title, whole.summary, style="bold" if whole.changes else None)
    return table
