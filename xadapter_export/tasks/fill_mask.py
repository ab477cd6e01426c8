"""Which words fill the masks of a text.

Dimensions: B batch, M masks, V vocabulary or candidates.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Final

from xadapter_export.tasks.spec import Asked, Head, Output, Reads, TaskSpec, best

if TYPE_CHECKING:
    from numpy.typing import NDArray


@dataclass(frozen=True)
class FillMaskAnswer:
    """One word for one mask.

    Attributes:
        token: The word.
        token_id: Its id in the language model's vocabulary.
        score: Its probability among the words that could be answered: the vocabulary, or the candidates.
        logit: The number that the graph gave.
        sequence: The text with this mask filled by this word.
        mask: Which mask of the text, counted from 0.
    """

    token: str
    token_id: int
    score: float
    logit: float
    sequence: str
    mask: int

    @property
    def word(self) -> str:
        """The word."""
        return self.token


class FillMask(TaskSpec):
    """See the module."""

    name = pipeline_tag = "fill-mask"
    says = "which words fill the masks of a text"
    reads: ClassVar[Reads] = "masks"
    head: ClassVar[Head | None] = "mlm"
    outputs = (Output("logits", ("batch", "masks", "words")),)
    compared = "logits"
    most_texts = 8  # the head answers with a whole vocabulary for every mask
    example = "The color of a banana is {mask}."
    torch_half = "xadapter_export.model.tasks:FillMaskHead"

    def rows(self, values: "NDArray[Any]", feed: "Mapping[str, NDArray[Any]]") -> "NDArray[Any]":
        """Return what stands at each mask once, ``(n, V)``: unused slots of a row repeat its first mask."""
        import numpy as np

        places = [np.unique(row, return_index=True)[1] for row in feed["mask_positions"]]
        return np.concatenate([row[place] for row, place in zip(values, places, strict=True)])

    def answers(self, values: "NDArray[Any]", asked: Asked) -> list[list[FillMaskAnswer]]:
        """Return for each text the best words, mask by mask."""
        found: list[list[FillMaskAnswer]] = []
        mask_token = str(asked.manifest.plm.mask_token)
        positions_of = asked.feed["mask_positions"].tolist()
        for rows, positions, text in zip(values, positions_of, asked.texts, strict=True):
            answers = []
            for mask in range(len(set(positions))):  # unused slots repeat the first
                row = rows[mask] if asked.columns is None else rows[mask, asked.columns]
                for i, score in best(row, asked.top_k):
                    if asked.candidates is None:
                        word, token_id = asked.tokenizer.decode([i], skip_special_tokens=False).strip(), i
                    else:
                        word, token_id = asked.candidates[i].word, asked.candidates[i].token_id
                    filled = _fill(text, mask_token, mask, word)
                    answers.append(FillMaskAnswer(word, token_id, score, float(row[i]), filled, mask))
            found.append(answers)
        return found


def _fill(text: str, mask_token: str, mask: int, word: str) -> str:
    pieces = text.split(mask_token)
    return mask_token.join(pieces[: mask + 1]) + word + mask_token.join(pieces[mask + 1 :])


FILL_MASK: Final = FillMask()
