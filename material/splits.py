"""Which objects train a plug-in and which it is tested on, and what pictures alone tell of their colors.

C colors (11).
"""

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from material.pictures import COLORS, DemoObject, Material

_CLEAR_PEAK = 0.5  # share of the color mass that makes a color clear
_SMALL_WORDS = frozenset(
    (
        "a",
        "an",
        "and",
        "at",
        "behind",
        "by",
        "for",
        "in",
        "no",
        "of",
        "on",
        "or",
        "over",
        "the",
        "to",
        "with",
        "without",
    )
)
_WORD = re.compile(r"\w+")

# Where the eleven names lie in sRGB: the most common answers of the xkcd color survey (CC0).
_SURVEY_COLORS = {
    "black": 0x000000, "blue": 0x0343DF, "brown": 0x653700, "green": 0x15B01A, "grey": 0x929591,
    "orange": 0xF97306, "pink": 0xFF81C0, "purple": 0x7E1E9C, "red": 0xE50000, "white": 0xFFFFFF,
    "yellow": 0xFFFF14,
}  # fmt: skip


@dataclass(frozen=True)
class Split:
    """Which objects train the plug-ins, and which they are tested on.

    Attributes:
        training: Rows of objects none of whose names has a word of ``held_out_words``.
        held_out: Rows of objects with a clear color.
        held_out_words: Every word of every name of the held-out objects, in the singular.
    """

    training: tuple[int, ...]
    held_out: tuple[int, ...]
    held_out_words: frozenset[str]

    def names_held_out(self, text: str) -> bool:
        """Whether a word of the text belongs to a held-out object."""
        return not self.held_out_words.isdisjoint(content_words(text))

    def majority(self, objects: Sequence[DemoObject]) -> float:
        """Accuracy of always saying the color that most training objects of a clear color have."""
        seen = [objects[row].color for row in self.training if _is_clear(objects[row])]
        commonest = max(sorted(COLORS), key=seen.count)
        return sum(objects[row].color == commonest for row in self.held_out) / len(self.held_out)


def _is_clear(entry: DemoObject) -> bool:
    return max(entry.color_shares, default=0.0) >= _CLEAR_PEAK


def split_objects(objects: Sequence[DemoObject], share: float, always: Sequence[str], seed: int) -> Split:
    """Hold out a share of the objects of a clear color, whole head nouns at a time.

    Args:
        objects: All objects.
        share: Of the objects with a clear color.
        always: Names, as CoDa has them, that are held out in any case.
        seed: Of the order in which head nouns are drawn.
    """
    clear = [row for row, entry in enumerate(objects) if _is_clear(entry)]
    heads: dict[str, list[int]] = {}
    for row in clear:
        heads.setdefault(_singular(str(objects[row].coda_name).split()[-1]), []).append(row)
    order = sorted(heads)
    random.Random(seed).shuffle(order)
    order.sort(key=lambda head: not any(objects[row].coda_name in always for row in heads[head]))
    held_out: list[int] = []
    for head in order:
        if len(held_out) < share * len(clear):
            held_out += heads[head]
    words = frozenset(word for row in held_out for name in objects[row].names for word in content_words(name))
    training = [
        row for row, entry in enumerate(objects) if words.isdisjoint(content_words(" ".join(entry.names)))
    ]
    return Split(tuple(training), tuple(sorted(held_out)), words)


def content_words(text: str) -> set[str]:
    """Words of a text in the singular, without the small ones."""
    return {_singular(word) for word in _WORD.findall(text.lower())} - _SMALL_WORDS


def _singular(word: str) -> str:
    for ending, singular in (
        ("ies", "y"),
        ("ses", "s"),
        ("ches", "ch"),
        ("oes", "o"),
        ("ss", "ss"),
        ("s", ""),
    ):
        if word.endswith(ending) and len(word) > len(ending) + 1:
            return word.removesuffix(ending) + singular
    return word


def measure_pixel_colors(material: Material) -> NDArray[np.float64]:
    """Share of the eleven colors in the drawings of each object: ``(objects, 11) float64``.

    Every covered pixel counts for the nearest survey color in CIELAB.
    """
    anchors = _to_lab(
        np.array([[code >> 16, code >> 8 & 255, code & 255] for code in _SURVEY_COLORS.values()])
    )
    shares = np.zeros((len(material.images), len(COLORS)))
    for row, (image, coverage) in enumerate(zip(material.images, material.coverage, strict=True)):
        lab = _to_lab(image[coverage > 127])
        nearest = ((lab[:, None] - anchors) ** 2).sum(-1).argmin(1)
        shares[row] = np.bincount(nearest, minlength=len(COLORS)) / max(len(lab), 1)
    sums = np.zeros((len(material.objects), len(COLORS)))
    np.add.at(sums, material.object_of, shares)
    mean: NDArray[np.float64] = sums / np.bincount(material.object_of)[:, None]
    return mean


def _to_lab(rgb: NDArray[np.generic]) -> NDArray[np.float64]:
    """``(..., 3)`` sRGB from 0 to 255 to ``(..., 3) float64`` CIELAB, white point D65."""
    value = np.asarray(rgb, np.float64) / 255
    linear = np.where(value <= 0.04045, value / 12.92, ((value + 0.055) / 1.055) ** 2.4)
    xyz = linear @ np.array([[0.4339, 0.2126, 0.0178], [0.3762, 0.7152, 0.1095], [0.1899, 0.0722, 0.8727]])
    f = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    lab: NDArray[np.float64] = np.stack(
        [116 * f[..., 1] - 16, 500 * (f[..., 0] - f[..., 1]), 200 * (f[..., 1] - f[..., 2])], -1
    )
    return lab


def color_targets(objects: Sequence[DemoObject], pixel_colors: NDArray[np.float64]) -> NDArray[np.float64]:
    """What a plug-in learns: CoDa's shares, and where CoDa has none the main color of the pictures."""
    main = np.eye(len(COLORS))[pixel_colors.argmax(1)]
    return np.stack(
        [
            np.array(entry.color_shares) / sum(entry.color_shares) if entry.color_shares else main[row]
            for row, entry in enumerate(objects)
        ]
    )


def pixel_accuracy(
    material: Material, pixel_colors: NDArray[np.float64], targets: NDArray[np.float64], split: Split
) -> float:
    """How often a linear probe on the pixels of an object's pictures, trained like a plug-in, is right."""
    tint = np.stack(
        [
            _tints(image[coverage > 127])
            for image, coverage in zip(material.images, material.coverage, strict=True)
        ]
    )
    sums = np.zeros((len(material.objects), tint.shape[1]))
    np.add.at(sums, material.object_of, tint)
    features = np.concatenate([pixel_colors, sums / np.bincount(material.object_of)[:, None]], 1)
    labels = targets.argmax(1)
    probe = make_pipeline(StandardScaler(), LogisticRegression(C=0.03, max_iter=2000))
    training, held_out = list(split.training), list(split.held_out)
    probe.fit(features[training], labels[training])
    return float((probe.predict(features[held_out]) == labels[held_out]).mean())


def _tints(pixels: NDArray[np.uint8]) -> NDArray[np.float64]:
    """``(pixels, 3) uint8`` to ``(64,) float64``: share of each of 4 x 4 x 4 cells of RGB."""
    cell = (pixels // 64).astype(np.int64) @ np.array([16, 4, 1])
    return np.bincount(cell, minlength=64) / max(len(cell), 1)
