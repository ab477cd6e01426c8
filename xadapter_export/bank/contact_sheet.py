"""A page that shows what a search found: one HTML file, with its pictures inside."""

import html
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from xadapter_export.bank.thumbnails import inside_or_none, read_thumbnails, small_picture
from xadapter_export.bundle.pictures import Picture
from xadapter_export.runtime.page import render_figure, render_page

_THUMBNAIL_PX = 256


@dataclass(frozen=True)
class Hit:
    """One row that a search found.

    Attributes:
        row: Its number in the bank.
        picture: Id and caption.
        score: Cosine with the query.
    """

    row: int
    picture: Picture
    score: float


def render_sheet(query: str, about: str, hits: Sequence[Hit], thumbnails: dict[int, bytes]) -> str:
    """Return the page.

    Args:
        query: What was searched.
        about: A line below it.
        hits: What was found, best first.
        thumbnails: WebP by row; a row without one is shown as its caption.
    """
    best = max((hit.score for hit in hits), default=1.0)
    cards = "\n".join(_card(number, hit, best, thumbnails.get(hit.row)) for number, hit in enumerate(hits))
    heading = f'<h1>{html.escape(query)}</h1>\n<p class="about">{html.escape(about)}</p>'
    return render_page(query, f'{heading}\n<main class="cards">\n{cards}\n</main>')


def find_thumbnails(bank: Path, ids: Mapping[int, str], pictures: Path | None) -> dict[int, bytes]:
    """Return the WebP of rows: from ``thumbnails.zip`` of a bank, or else made from a folder of pictures.

    Args:
        bank: Folder of the bank; there need be no thumbnails.
        ids: Id of each row.
        pictures: Folder to which the ids are relative; a file outside it is not read.

    Raises:
        MissingExtraError: If Pillow is needed and not installed.
        CheckpointError: If the thumbnails are broken.
    """
    found = dict(read_thumbnails(bank, set(ids)))
    for row, name in ids.items():
        path = None if pictures is None or row in found else inside_or_none(pictures, name)
        webp = None if path is None else _shrink(path)
        if webp is not None:
            found[row] = webp
    return found


def _shrink(path: Path) -> bytes | None:
    small = small_picture(path, _THUMBNAIL_PX, "bank")
    if small is None:
        return None  # the caption is shown in its place
    stream = io.BytesIO()
    small.save(stream, "webp", quality=80)
    return stream.getvalue()


def _card(number: int, hit: Hit, best: float, webp: bytes | None) -> str:
    width = 100 * max(0.0, hit.score) / best if best > 0 else 0
    bar = f'<span class="score">{hit.score:.3f}<i><b style="width: {width:.0f}%"></b></i></span>'
    return render_figure(number, hit.picture.caption, hit.picture.id, webp, bar)
