"""A page that shows why a text was answered as it was: its pictures and tokens, and what without each."""

import html
from collections.abc import Mapping, Sequence

from xadapter_export.experts import KINDS
from xadapter_export.runtime.explain import (
    ExplainedAnswer,
    ExplainedExpert,
    ExplainedItem,
    Explanation,
    Without,
)
from xadapter_export.runtime.page import render_figure, render_page

_STYLE = """
section { margin: 2.2rem 0; }
h2 { margin: 0 0 .2rem; font-size: 1.25rem; overflow-wrap: anywhere; }
h3 { margin: 1.6rem 0 .2rem; font-size: 1rem; }
p { margin: .2rem 0 .9rem; color: var(--soft); font-size: .9rem; }
.minus b { background: var(--minus); }
.without { display: block; margin-top: .35rem; color: var(--soft); font-size: .8rem; }
.changed { color: var(--minus); font-weight: 600; }
.tokens { display: flex; flex-wrap: wrap; gap: .5rem; }
.token { min-width: 4.5rem; padding: .5rem .7rem; background: var(--card); border: 1px solid var(--line);
  border-radius: .6rem; font-size: .9rem; }
"""
_NOTE = (
    "A share is the part of what an expert adds that comes from one image or token. The shares of an expert, "
    "its bias and its null rows add up to 100%; one that works against the others is negative. Shares do not "
    "show what causes an answer. The answer without the image or token does."
)


def render_explanations(explanations: Sequence[Explanation], thumbnails: Mapping[int, bytes]) -> str:
    """Return the page.

    Args:
        explanations: Texts with their answers.
        thumbnails: WebP by bank row; a picture without one is shown as its caption.
    """
    title = explanations[0].text if len(explanations) == 1 else f"{len(explanations)} texts explained"
    parts = []
    for explanation in explanations:
        parts.append(f"<h1>{html.escape(explanation.text)}</h1>")
        parts.append(f"<p>{html.escape(f'experts {explanation.experts}, {explanation.variant}')}</p>")
        several = len(explanation.answers) > 1
        parts += [_answer(answer, thumbnails, several=several) for answer in explanation.answers]
    parts.append(f'<p class="about">{html.escape(_NOTE)}</p>')
    return render_page(title, "\n".join(parts), _STYLE)


def _answer(explained: ExplainedAnswer, thumbnails: Mapping[int, bytes], *, several: bool) -> str:
    which = f"mask {explained.mask + 1}: " if several and explained.mask is not None else ""
    answers = [f"{answer.word} {answer.score:.1%}" for answer in explained.answers]
    first = which + (answers[0] if answers else "embedding")
    experts = "\n".join(_expert(expert, thumbnails) for expert in explained.experts)
    others = f"<p>then {html.escape(', '.join(answers[1:]))}</p>" if answers[1:] else ""
    return f"<section><h2>{html.escape(first)}</h2>{others}\n{experts}</section>"


def _expert(expert: ExplainedExpert, thumbnails: Mapping[int, bytes]) -> str:
    most = max((abs(item.share) for item in expert.items), default=0.0)
    tokens = [item for item in expert.items if item.row is None]
    figures = [
        render_figure(number, item.name, item.id or "", thumbnails.get(item.row), _share(item, most))
        for number, item in enumerate(expert.items)
        if item.row is not None
    ]
    chips = "".join(
        f'<div class="token"><span class="caption">{html.escape(item.name)}</span>{_share(item, most)}</div>'
        for item in tokens
    )
    rest = f"bias {expert.bias_share:.0%}"
    rest += f", null rows {expert.null_share:.0%}" if expert.null_share else ""
    title = html.escape(KINDS[expert.expert].title)
    shown = (
        f'<div class="cards">{"".join(figures)}</div>' if figures else f'<div class="tokens">{chips}</div>'
    )
    return f"<h3>{title}</h3><p>{rest}; without it: {_without(expert.without)}</p>{shown}"


def _share(item: ExplainedItem, most: float) -> str:
    width = 100 * abs(item.share) / most if most else 0.0
    sign = "score minus" if item.share < 0 else "score"
    bar = f'<span class="{sign}">{item.share:.0%}<i><b style="width: {width:.0f}%"></b></i></span>'
    return f'{bar}<span class="without">without: {_without(item.without)}</span>'


def _without(without: Without) -> str:
    said = html.escape(without.summary)
    return f'<span class="changed">{said}</span>' if without.changes else said
