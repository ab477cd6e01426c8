"""Pages for people: one HTML file with its pictures inside, light or dark as the reader's system is."""

import base64
import html

_STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --soft: #667080; --page: #f6f7f9; --card: #fff;
  --line: #e3e6ea; --bar: #2f6feb; --minus: #c2410c; }
@media (prefers-color-scheme: dark) { :root { --ink: #e8eaed; --soft: #9aa4b2; --page: #14171b;
  --card: #1d2126; --line: #2c323a; --bar: #6ea0ff; --minus: #fb923c; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 72rem; padding: 2.5rem clamp(.75rem, 4vw, 1.5rem); background: var(--page);
  color: var(--ink); font: 16px/1.45 system-ui, sans-serif; }
h1 { margin: 0; font-size: 1.6rem; font-weight: 650; overflow-wrap: anywhere; }
p.about { margin: .3rem 0 1.8rem; color: var(--soft); font-size: .9rem; }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(11rem, 42%), 1fr)); gap: 1rem; }
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


def render_page(title: str, body: str, style: str = "") -> str:
    """Return a page.

    Args:
        title: Its title, as text.
        body: What it shows, as HTML.
        style: CSS besides that of all pages.
    """
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html.escape(title)}</title>\n"
        f"<style>{_STYLE}{style}</style>\n</head>\n<body>\n{body}\n</body>\n</html>\n"
    )


def render_figure(number: int, caption: str, name: str, webp: bytes | None, below: str) -> str:
    """Return a picture with what is said of it.

    Args:
        number: Which of the page's pictures it is; one without a thumbnail gets its color from it.
        caption: The caption, as text.
        name: The id, as text.
        webp: The thumbnail; where there is none, the caption is shown large.
        below: What comes after the caption, as HTML.
    """
    caption, name = html.escape(caption), html.escape(name)
    if webp is None:
        face = f'<div class="picture words" style="--hue: {number * 47 % 360}">{caption or name}</div>'
    else:
        data = base64.b64encode(webp).decode("ascii")
        face = f'<div class="picture"><img alt="{caption}" src="data:image/webp;base64,{data}"></div>'
    return (
        f'<figure>{face}<figcaption><span class="caption">{caption}</span>'
        f'<span class="id" title="{name}">{name}</span>{below}</figcaption></figure>'
    )
