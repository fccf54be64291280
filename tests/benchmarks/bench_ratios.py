"""Ratios of seconds that were taken in pairs, and how sure their median is."""

import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

_SIGMAS = 1.96


# Wall-clock and processor seconds: another program's turn on the core lengthens only the first.
Seconds = tuple[float, float]


def clock() -> Seconds:
    return time.perf_counter(), time.thread_time()


def since(started: Seconds) -> Seconds:
    wall, processor = clock()
    return wall - started[0], processor - started[1]


@dataclass(kw_only=True, slots=True)
class Pairs:
    """Seconds of plain steps and of others, in turns, in rounds with fresh models.

    Attributes:
        plain: Seconds of the plain steps, by round.
        other: Seconds of the steps compared with them, likewise.
    """

    plain: list[list[Seconds]] = field(default_factory=list)
    other: list[list[Seconds]] = field(default_factory=list)

    def add(self, plain: list[Seconds], other: list[Seconds]) -> None:
        """Keep a round; both must have as many steps."""
        assert len(plain) == len(other)
        self.plain.append(plain)
        self.other.append(other)

    def ratios(self, kind: int = 0) -> list[list[float]]:
        """Return the ratios of each round: of wall-clock time, or with 1 of processor time."""
        return [
            [b[kind] / a[kind] for a, b in zip(plain, other, strict=True)]
            for plain, other in zip(self.plain, self.other, strict=True)
        ]

    @property
    def ratio(self) -> float:
        """Median of all wall-clock ratios."""
        return _median(self.ratios())

    @property
    def plain_s(self) -> float:
        """Median wall-clock seconds of a plain step."""
        return statistics.median(wall for row in self.plain for wall, _ in row)

    @property
    def other_s(self) -> float:
        """Median wall-clock seconds of a step compared with it."""
        return statistics.median(wall for row in self.other for wall, _ in row)

    def spell(self) -> str:
        """Write the median ratio and its 95 % interval, both again by processor, and the rounds.

        The interval is by signs: it asks of the pairs only that they do not depend on each other.
        The rounds show what it cannot: each has models of its own, at other places in memory.
        """
        found = []
        for kind in (0, 1):
            ratios = self.ratios(kind)
            low, high = interval([ratio for row in ratios for ratio in row])
            found.append(f"{_median(ratios):.3f} [{low:.3f}, {high:.3f}]")
        rounds = [statistics.median(row) for row in self.ratios()]
        return f"{found[0]}  cpu {found[1]}  rounds {min(rounds):.3f} to {max(rounds):.3f}"


def _median(rows: Sequence[Sequence[float]]) -> float:
    return statistics.median(ratio for row in rows for ratio in row)


def interval(numbers: Sequence[float]) -> tuple[float, float]:
    """Return the 95 % interval of the median by order statistics, at least two numbers."""
    ordered = sorted(numbers)
    half = _SIGMAS * math.sqrt(len(ordered)) / 2
    low = max(0, math.floor(len(ordered) / 2 - half))
    high = min(len(ordered) - 1, math.ceil(len(ordered) / 2 + half))
    return ordered[low], ordered[high]
