"""The expected course of a training: a few epochs, and what should have been reached by then."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

Interval = tuple[float, float]


@dataclass(frozen=True, kw_only=True, slots=True)
class CourseRow:
    """What is expected at the end of one epoch.

    Attributes:
        epoch: Its number, >= 1.
        intervals: Best and worst expected value, low <= high, of `loss`, `grad_norm` or a metric
            of the task. A row is reached by what is at most the upper end of each.
    """

    epoch: int
    intervals: Mapping[str, Interval]


class Pace(StrEnum):
    """Where a training is beside its expected course."""

    AHEAD = "ahead"
    ON_COURSE = "on course"
    BEHIND = "behind"


@dataclass(frozen=True, kw_only=True, slots=True)
class CourseStanding:
    """How far along its expected course a training is.

    Attributes:
        pace: Whether the row reached is later than the one due, it, or earlier.
        reached: Epoch of the last row that was reached; None if none was.
        due: Epoch of the last row that was to be reached by now; None before the first.
        missing: What the row due lacks, such as `loss 9.1 > 8`; empty where it is reached.
    """

    pace: Pace
    reached: int | None
    due: int | None
    missing: tuple[str, ...] = ()

    def __str__(self) -> str:
        """Return the line for the log, without its head."""
        row = "no row" if self.reached is None else f"the row of epoch {self.reached}"
        lacks = f"; the row of epoch {self.due} lacks {', '.join(self.missing)}"
        return f"{self.pace}: {row} is reached{lacks if self.missing else ''}"


def stand_on_course(
    rows: Sequence[CourseRow], *, epoch: int, values: Mapping[str, float | None]
) -> CourseStanding:
    """Say which row of the expected course has been reached.

    Args:
        rows: The course, epochs rising; at least one.
        epoch: The epoch that has just ended, from 1.
        values: `loss`, `grad_norm` and the task's metrics at its end; what is None or absent is
            never as good as asked for.

    Example:
        >>> rows = [CourseRow(epoch=1, intervals={"loss": (10, 12)}),
        ...         CourseRow(epoch=5, intervals={"loss": (8, 10)})]
        >>> print(stand_on_course(rows, epoch=6, values={"loss": 11.0}))
        behind: the row of epoch 1 is reached; the row of epoch 5 lacks loss 11 > 10
    """
    reached = max((row.epoch for row in rows if not _lacks(row, values)), default=None)
    due = max((row for row in rows if row.epoch <= epoch), key=_epoch, default=None)
    first, last = reached or 0, 0 if due is None else due.epoch
    pace = Pace.AHEAD if first > last else Pace.BEHIND if first < last else Pace.ON_COURSE
    return CourseStanding(
        pace=pace,
        reached=reached,
        due=None if due is None else due.epoch,
        missing=() if due is None else _lacks(due, values),
    )


def _epoch(row: CourseRow) -> int:
    return row.epoch


def _lacks(row: CourseRow, values: Mapping[str, float | None]) -> tuple[str, ...]:
    """Say what keeps a row from being reached; NaN is above every end."""
    lacks = []
    for name, (_, upper) in row.intervals.items():
        value = values.get(name)
        if value is None:
            lacks.append(f"a finite {name}")
        elif not value <= upper:
            lacks.append(f"{name} {value:.4g} > {upper:.4g}")
    return tuple(lacks)
