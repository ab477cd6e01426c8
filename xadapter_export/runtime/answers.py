"""What the experts looked at for an answer; the answers themselves are their task's."""

from dataclasses import dataclass


@dataclass(frozen=True)
class RetrievedPicture:
    """A picture that the model looked at: its bank row, and the cosine that it was chosen by."""

    row: int
    id: str
    caption: str
    score: float
