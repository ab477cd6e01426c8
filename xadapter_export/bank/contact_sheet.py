"""A page that shows what a search found: one HTML file, with its pictures inside."""

import base64
import html
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from xadapter_export.bank.reader import BankReader
from xadapter_export.bank.thumbnails import inside_or_none, read_thumbnails, small_picture
from xadapter_export.bundle.pictures import Picture

_THUMBNAIL_PX = 256
_STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --soft: #667080; --page: #f6f7f9; --card: #fff;
  --line: #e3e6ea; --bar: #2f6feb; }
@media (prefers-color-scheme: dark) { :root { --ink: #e8eaed; --soft: #9aa4b2; --page: #14171b;
  --card: #1d2126; --line: #2c323a; --bar: #6ea0ff; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 72rem; padding: 2.5rem clamp(.75rem, 4vw, 1.5rem); background: var(--page);
  color: var(--ink); font: 16px/1.45 system-ui, sans-serif; }
h1 { margin: 0; font-size: 1.6rem; font-weight: 650; overflow-wrap: anywhere; }
p.about { margin: .3rem 0 1.8rem; color: var(--soft); font-size: .9rem; }
main { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(11rem, 42%), 1fr)); gap: 1rem; }
figure { margin: 0; overflow: hidden; background: var(--card); border: 1px solid var(--line);
  border-radius: .75rem; }
.picture { display: grid; place-items: center; aspect-ratio: 1; background: #fff; }
.picture img { width: 100%; height: 100%; object-fit: contain; }
.words { padding: 1rem; background: linear-gradient(145deg, hsl(var(--hue) 55% 90%), hsl(var(--hue) 45% 80%));
  color: hsl(var(--hue) 45% 22%); font-size: 1.1rem; font-weight: 600; text-align: center;
  overflow-wrap: anywhere; }
figcaption { padding: .7rem .85rem .85rem; font-size: .9rem; }
.caption { display: block; font-weight: 600; overflow-wrap: anywhere; }
.id { display: block; overflow: hidden; color: var(--soft); font-size: .78rem; text-overflow: ellipsis;
  white-space: nowrap; }
.score { display: flex; align-items: center; gap: .5rem; margin-top: .5rem; color: var(--soft);
  font-size: .8rem; font-variant-numeric: tabular-nums; }
.score i { flex: 1; height: .3rem; overflow: hidden; background: var(--line); border-radius: 1rem; }
.score b { display: block; height: 100%; background: var(--bar); border-radius: 1rem; }
"""


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
    title = html.escape(query)
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n<title>{title}</title>\n'
        f"<style>{_STYLE}</style>\n</head>\n<body>\n<h1>{title}</h1>\n"
        f'<p class="about">{html.escape(about)}</p>\n'
        f"<main>\n{cards}\n</main>\n</body>\n</html>\n"
    )


def find_thumbnails(bank: BankReader, hits: Sequence[Hit], pictures: Path | None) -> dict[int, bytes]:
    """Return the WebP of rows: from the bank's ``thumbnails.zip``, or else made from a folder of pictures.

    Args:
        bank: The bank.
        hits: The rows.
        pictures: Folder to which the pictures' ids are relative; a file outside it is not read.

    Raises:
        MissingExtraError: If Pillow is needed and not installed.
        CheckpointError: If the thumbnails are broken.
    """
    found = dict(read_thumbnails(bank.folder, {hit.row for hit in hits}))
    if pictures is not None:
        for hit in hits:
            path = inside_or_none(pictures, hit.picture.id)
            if hit.row not in found and path is not None:
                webp = _shrink(path)
                if webp is not None:
                    found[hit.row] = webp
    return found


def _shrink(path: Path) -> bytes | None:
    small = small_picture(path, _THUMBNAIL_PX, "bank")
    if small is None:
        return None  # the caption is shown in its place
    stream = io.BytesIO()
    small.save(stream, "webp", quality=80)
    return stream.getvalue()


def _card(number: int, hit: Hit, best: float, webp: bytes | None) -> str:
    caption, name = html.escape(hit.picture.caption), html.escape(hit.picture.id)
    width = 100 * max(0.0, hit.score) / best if best > 0 else 0
    if webp is None:
        face = f'<div class="picture words" style="--hue: {number * 47 % 360}">{caption or name}</div>'
    else:
        data = base64.b64encode(webp).decode("ascii")
        face = f'<div class="picture"><img alt="{caption}" src="data:image/webp;base64,{data}"></div>'
    return (
        f'<figure>{face}<figcaption><span class="caption">{caption}</span>'
        f'<span class="id" title="{name}">{name}</span><span class="score">{hit.score:.3f}'
        f'<i><b style="width: {width:.0f}%"></b></i></span></figcaption></figure>'
    )
