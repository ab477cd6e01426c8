"""The rounds of a cell: which count, and when there are enough."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

from benchmarks.feeds import Feeding
from benchmarks.intervals import ratio

Turn = tuple[int, Feeding]  # number of an entry, and how it is fed

MOST_ROUNDS: Final = 60
NARROW: Final = 0.08  # width of a ratio's interval, beside the ratio, that needs no more rounds
DISTURBED: Final = 0.05  # share of the CPU's time that others took in a round that does not count


@dataclass
class Rounds:
    """Times of turns, round by round, with the share of the CPU's time that others took in each round."""

    times: dict[Turn, list[float]] = field(default_factory=dict)
    shares: list[float] = field(default_factory=list)

    def add(self, found: Mapping[Turn, float], share: float) -> None:
        """Add a round: a time in ms for each turn, the same turns in every round."""
        for turn, ms in found.items():
            self.times.setdefault(turn, []).append(ms)
        self.shares.append(share)

    def drop(self, number: int) -> None:
        """Forget the times of an entry that ended before the cell did."""
        self.times = {turn: found for turn, found in self.times.items() if turn[0] != number}

    @property
    def quiet(self) -> list[int]:
        """Rounds in which others took next to nothing."""
        return [number for number, share in enumerate(self.shares) if share <= DISTURBED]

    def are_done(self, enough: int, *, is_over: bool) -> bool:
        """Whether no more rounds are needed.

        They end once ``enough`` quiet ones are there, and every ratio to the fastest turn has a narrow
        interval or the time of the cell ``is_over``; and after twice ``enough`` without so many quiet ones.
        """
        count = len(self.shares)
        if count >= MOST_ROUNDS:
            return True
        if len(self.quiet) < enough:
            return count >= 2 * enough
        return is_over or self._is_narrow()

    def kept(self, enough: int) -> tuple[dict[Turn, tuple[float, ...]], float]:
        """Return the times of the rounds that count, and the largest share that others took in one of them.

        These are the quiet rounds, or where they are fewer than ``enough``, as many of the least disturbed.
        """
        numbers = self.quiet
        if len(numbers) < enough:
            numbers = sorted(sorted(range(len(self.shares)), key=self.shares.__getitem__)[:enough])
        times = {turn: tuple(found[number] for number in numbers) for turn, found in self.times.items()}
        return times, max((self.shares[number] for number in numbers), default=0.0)

    def _is_narrow(self) -> bool:
        times, _ = self.kept(0)
        fastest = min(times.values(), key=lambda found: sorted(found)[len(found) // 2])
        ratios = [ratio(found, fastest) for found in times.values() if found is not fastest]
        return all(found.high - found.low <= NARROW * found.value for found in ratios)
