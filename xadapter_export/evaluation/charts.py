"""Charts of what was said: true color against answer, and every object with the pictures it was read from.

Dimensions: P prompts, n objects, C colors.
"""

import math
import textwrap
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np

from xadapter_export.errors import import_extra
from xadapter_export.evaluation.color_answers import SHOWN_PICTURES, ColorAnswers
from xadapter_export.evaluation.thumbnails import Image
from xadapter_export.runtime.answers import RetrievedPicture

PAINTS: Final = {
    "black": "#26262b",
    "blue": "#3b78c4",
    "brown": "#8a5a35",
    "gray": "#9a9da3",
    "green": "#4a9b54",
    "grey": "#9a9da3",
    "orange": "#ee8a2c",
    "pink": "#f08fb4",
    "purple": "#7f57a8",
    "red": "#cf3a3a",
    "white": "#ffffff",
    "yellow": "#f2cb3d",
}
_OTHER_PAINT = "#c9c2b8"
_INK, _FAINT, _LINE, _PAPER = "#26262b", "#77777f", "#c8c8ce", "#fbfaf7"
_DPI = 130
_CONFUSION_NOTE = "Area and number: % of the questions about objects of that color."
_NOTE_LETTERS = 14  # to an inch
_SMALLEST_PANEL = 4.2  # inches: its title is one line
_MOST_OBJECTS = 180
_ROWS_PER_COLUMN = 45
_ROW_INCHES, _BAR_INCHES = 0.27, 1.84
_LEFT, _SEEN, _RIGHT = -1.0, 1.62, 2.7  # of a column, in lengths of a bar; its pictures start at _SEEN


def paint(color: str) -> str:
    """Return how a color word is painted; a quiet beige where it is not one that is known."""
    return PAINTS.get(color.casefold(), _OTHER_PAINT)


def draw_confusion(answers: Sequence[ColorAnswers], path: Path) -> None:
    """Draw the true color against the answer, in percent of the true color's questions.

    Args:
        answers: The rows to draw side by side, with the same colors.
        path: PNG file.

    Raises:
        MissingExtraError: If matplotlib is not installed.
    """
    colors = answers[0].colors
    size = max(_SMALLEST_PANEL, 1.5 + 0.47 * len(colors))
    figure = _figure(size * len(answers) + 0.4, size + 0.3)
    panels = figure.subplots(1, len(answers), squeeze=False)[0]
    for axes, one in zip(panels, answers, strict=True):
        counts = _count_answers(one)  # (C, C)
        shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
        axes.set_xlim(-0.5, len(colors) - 0.4)  # a number next to a small box may be wider than its cell
        axes.set_ylim(len(colors) - 0.5, -0.5)
        axes.set_aspect("equal")
        for (row, column), share in np.ndenumerate(shares):
            if not counts[row, column]:
                continue
            side = 0.94 * math.sqrt(share)  # area is the share
            box = column - side / 2, row - side / 2
            axes.add_patch(_rectangle(box, side, side, paint(colors[column])))
            if share >= 0.05:
                dark = colors[column] in {"black", "blue", "brown", "purple", "red", "green"}
                inside = side > 0.45
                axes.text(
                    column if inside else column + side / 2 + 0.04,
                    row,
                    f"{100 * share:.0f}",
                    ha="center" if inside else "left",
                    va="center",
                    fontsize=7.5,
                    color="white" if dark and inside else _INK,
                )
        for place in range(len(colors)):  # what is right lies on these
            axes.add_patch(_rectangle((place - 0.5, place - 0.5), 1, 1, "none", _FAINT, 0.9))
        places = range(len(colors))
        totals = counts.sum(1) // len(one.said)
        axes.set_xticks(places, colors, rotation=40, ha="right", rotation_mode="anchor")
        axes.set_yticks(places, [f"{c} ({n})" for c, n in zip(colors, totals, strict=True)])
        axes.set_xlabel("answer")
        axes.set_ylabel("color that people say (objects)")
        axes.set_title(f"{one.reading.name}: {100 * one.is_right.mean():.1f} % right", loc="left")
        axes.set_xticks(np.arange(-0.5, len(colors)), minor=True)
        axes.set_yticks(np.arange(-0.5, len(colors)), minor=True)
        axes.grid(which="minor", color=_LINE, linewidth=0.4)
        _bare(axes)
    note = textwrap.fill(_CONFUSION_NOTE, round(_NOTE_LETTERS * figure.get_figwidth()))
    figure.supxlabel(note, fontsize=8.5, color=_FAINT)
    figure.savefig(path)


def draw_objects(
    answers: ColorAnswers,
    pictures: Sequence[Sequence[RetrievedPicture]],
    thumbnails: Mapping[int, Image],
    path: Path,
) -> None:
    """Draw a bar for every object: the share of prompts right, then what was said instead.

    Next to it are the pictures that were looked at, or their captions where a picture is not at hand. Of
    very many objects, evenly spaced ones are drawn.

    Args:
        answers: The row.
        pictures: n lists of pictures; a list may be empty.
        thumbnails: Pictures by their bank row, as ``load_thumbnails`` gives them.
        path: PNG file.

    Raises:
        MissingExtraError: If matplotlib is not installed.
    """
    order = _order(answers)
    shown = [order[i] for i in np.linspace(0, len(order) - 1, min(len(order), _MOST_OBJECTS)).astype(int)]
    num_columns = math.ceil(len(shown) / _ROWS_PER_COLUMN)
    per_column = math.ceil(len(shown) / num_columns)
    right = _RIGHT if any(pictures) else _SEEN
    figure = _figure(_BAR_INCHES * (right - _LEFT) * num_columns, _ROW_INCHES * per_column + 1.1)
    panels = figure.subplots(1, num_columns, squeeze=False)[0]
    for place, axes in enumerate(panels):
        axes.set_xlim(_LEFT, right)
        axes.set_ylim(per_column - 0.4, -1.3)
        _bare(axes)
        axes.set_xticks([])
        axes.set_yticks([])
        heading = {"fontsize": 7.5, "color": _FAINT, "va": "center"}
        axes.text(0, -0.8, "share of prompts right, then what was said", **heading)
        axes.text(_SEEN, -0.8, "looked at" if any(pictures) else "", **heading)
        for row, i in enumerate(shown[place * per_column : (place + 1) * per_column]):
            _draw_object(axes, row, i, answers, pictures[i], thumbnails)
    some = "" if len(shown) == len(order) else f"; {len(shown)} of {len(order)} objects drawn"
    figure.suptitle(
        f"{answers.reading.scorer.name}, {answers.reading.name}: {100 * answers.is_right.mean():.1f} % right"
        f" ({len(order)} objects, {len(answers.said)} prompts{some})",
        x=0.01,
        ha="left",
        fontsize=11,
        color=_INK,
    )
    figure.savefig(path)


def _draw_object(
    axes: Any,
    row: int,
    i: int,
    answers: ColorAnswers,
    pictures: Sequence[RetrievedPicture],
    thumbnails: Mapping[int, Image],
) -> None:
    thing, num_prompts = answers.objects[i], len(answers.said)
    axes.text(-0.1, row, _shorten(thing.name, 26), ha="right", va="center", fontsize=8.5, color=_INK)
    axes.add_patch(_rectangle((-0.075, row - 0.2), 0.045, 0.4, paint(thing.color), _FAINT, 0.5))
    right = int(answers.is_right[:, i].sum())
    axes.add_patch(_rectangle((0, row - 0.34), 1, 0.68, "none", _LINE, 0.5))
    if right:
        axes.add_patch(
            _rectangle((0, row - 0.34), right / num_prompts, 0.68, paint(thing.color), _FAINT, 0.5)
        )
    start = right / num_prompts
    wrong = Counter(answers.colors[c] for c in answers.said[~answers.is_right[:, i], i])
    for color, count in wrong.most_common():
        width = count / num_prompts
        axes.add_patch(_rectangle((start, row - 0.13), width, 0.26, paint(color), _FAINT, 0.4))
        start += width
    words = ", ".join(color for color, _ in wrong.most_common(2)) + (", ..." if len(wrong) > 2 else "")
    axes.text(1.03, row, words, va="center", fontsize=7.5, color=_FAINT)
    _draw_pictures(axes, row, pictures, thumbnails)


def _draw_pictures(
    axes: Any, row: int, pictures: Sequence[RetrievedPicture], thumbnails: Mapping[int, Image]
) -> None:
    """Draws the pictures, or the captions as one text where one of them is not at hand."""
    offset = import_extra("matplotlib.offsetbox", "report")
    pictures = pictures[:SHOWN_PICTURES]
    images = [thumbnails[picture.row] for picture in pictures if picture.row in thumbnails]
    if images and len(images) == len(pictures):
        for place, image in enumerate(images):
            zoom = 72 * _ROW_INCHES * 0.86 / max(image.shape[:2])  # points, for a side of a row's height
            box = offset.OffsetImage(image, zoom=zoom, interpolation="lanczos", resample=True)
            x = _SEEN + 0.06 + 0.155 * place
            axes.add_artist(offset.AnnotationBbox(box, (x, row), frameon=False, pad=0))
        return
    counts = Counter(picture.caption for picture in pictures)
    text = ", ".join(f"{caption} x{n}" if n > 1 else caption for caption, n in counts.items())
    axes.text(_SEEN, row, _shorten(text, 36), va="center", fontsize=7, color=_FAINT)


def _order(answers: ColorAnswers) -> list[int]:
    """Return the objects by their color, and within it those that were right most often first."""
    share = answers.is_right.mean(0)
    names = [thing.name for thing in answers.objects]
    colors = [thing.color for thing in answers.objects]
    return sorted(range(len(names)), key=lambda i: (colors[i], -share[i], names[i]))


def _count_answers(answers: ColorAnswers) -> np.ndarray[tuple[int, ...], np.dtype[np.int64]]:
    """Return ``(C, C) int64``: how often each color was said of objects of each color."""
    counts = np.zeros((len(answers.colors),) * 2, np.int64)
    truth = [answers.colors.index(thing.color) for thing in answers.objects]
    for said in answers.said:
        np.add.at(counts, (truth, said), 1)
    return counts


def _figure(width: float, height: float) -> Any:
    figure = import_extra("matplotlib.figure", "report").Figure(
        figsize=(width, height), dpi=_DPI, layout="constrained", facecolor=_PAPER
    )
    import_extra("matplotlib.backends.backend_agg", "report").FigureCanvasAgg(figure)
    return figure


def _rectangle(
    corner: tuple[float, float],
    width: float,
    height: float,
    face: str,
    edge: str = _FAINT,
    line: float = 0.5,
) -> Any:
    patches = import_extra("matplotlib.patches", "report")
    return patches.Rectangle(corner, width, height, facecolor=face, edgecolor=edge, linewidth=line)


def _bare(axes: Any) -> None:
    """Takes away the frame and the ticks, and leaves the labels."""
    axes.set_facecolor(_PAPER)
    axes.tick_params(which="both", length=0, labelsize=8, labelcolor=_INK)
    for side in axes.spines.values():
        side.set_visible(False)
    for label in (axes.xaxis.label, axes.yaxis.label):
        label.set(fontsize=8.5, color=_FAINT)
    axes.title.set(fontsize=10, color=_INK)


def _shorten(text: str, length: int) -> str:
    return text if len(text) <= length else f"{text[: length - 3]}..."
