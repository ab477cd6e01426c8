"""The cells of the table, and the two ways of feeding a contestant. Imports no PyTorch: workers read this.

Dimensions: B batch, T PLM tokens, S CLIP tokens, P masks per text.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Literal

import numpy as np
from numpy.typing import NDArray

from xadapter_export.bundle.manifest import ExpertSet, Task

Head = Literal["full", "candidates", "features"]
Feeding = Literal["user", "equal"]
Feed = dict[str, NDArray[np.int64]]

CANDIDATES: Final = (
    "black", "blue", "brown", "gray", "green", "orange", "pink", "purple", "red", "white", "yellow",
)  # fmt: skip
SHAPES: Final = ((1, 12), (1, 32), (1, 128), (8, 32), (32, 64))


@dataclass(frozen=True)
class Cell:
    """One square of the table: B texts of T tokens, through an expert set, for one kind of answer."""

    case: str
    experts: ExpertSet
    batch: int
    seq: int
    head: Head

    @property
    def shape(self) -> str:
        """``8x32``: texts and tokens."""
        return f"{self.batch}x{self.seq}"

    def __str__(self) -> str:
        return f"{self.case} {self.experts} {self.shape} {self.head}"


def task_of(head: Head) -> Task:
    """Return the task that gives this kind of answer."""
    return "feature-extraction" if head == "features" else "fill-mask"


def heads_of(case: str) -> tuple[Head, ...]:
    """Return the kinds of answer that a case has.

    MiniLM has no MLM head, and the tokenizer of the RoBERTa case knows bytes, so no word is one token of it.
    """
    special: dict[str, tuple[Head, ...]] = {"minilm": ("features",), "roberta-base": ("full", "features")}
    return special.get(case, ("full", "candidates", "features"))


def feed_as(feed: Mapping[str, NDArray[np.int64]], feeding: Feeding, clip_context: int | None) -> Feed:
    """Feed a contestant as its user would, or at our lengths.

    Args:
        feed: From ``make_feed``.
        feeding: ``user``: CLIP ids padded to CLIP's context, as CLIP's own tokenizer gives them, and logits
            at every position; ``equal``: CLIP at its true length, answers only at the masks where the
            contestant can.
        clip_context: CLIP's context length, if there is a CLIP.
    """
    fed = dict(feed)
    if feeding == "user":
        fed.pop("mask_positions", None)
        if "clip_input_ids" in fed and clip_context is not None:
            ids = fed["clip_input_ids"]
            fed["clip_input_ids"] = np.pad(ids, ((0, 0), (0, clip_context - ids.shape[1])))
    return fed
