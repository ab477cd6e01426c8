"""What a session answers: plain frozen records."""

from dataclasses import dataclass


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


@dataclass(frozen=True)
class LabelAnswer:
    """One label with its probability among the labels, and the number that the graph gave.

    A regression has one label, the name of the value, and that value is score and logit alike.
    """

    label: str
    score: float
    logit: float


@dataclass(frozen=True)
class RetrievedPicture:
    """A picture that the model looked at: its bank row, and the cosine that it was chosen by."""

    row: int
    id: str
    caption: str
    score: float
