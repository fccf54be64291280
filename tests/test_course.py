"""Which row of an expected course has been reached, and whether that is early or late."""

import math

import pytest

from stability_search.course import CourseRow, Pace, stand_on_course

ROWS = (
    CourseRow(epoch=1, intervals={"loss": (10, 12), "wer": (0.95, 0.99)}),
    CourseRow(epoch=5, intervals={"loss": (8, 10), "wer": (0.85, 0.90)}),
    CourseRow(epoch=10, intervals={"loss": (6, 8)}),
)


@pytest.mark.parametrize(
    ("epoch", "loss", "wer", "pace", "reached"),
    [
        (1, 12.0, 0.99, Pace.ON_COURSE, 1),  # as good as the upper ends is reached
        (1, 12.1, 0.5, Pace.BEHIND, None),
        (1, 9.0, 0.9, Pace.AHEAD, 5),
        (4, 11.0, 0.95, Pace.ON_COURSE, 1),
        (5, 11.0, 0.95, Pace.BEHIND, 1),
        (7, 7.0, 0.99, Pace.AHEAD, 10),  # a later row asks for nothing an earlier one did
        (60, 7.0, 0.1, Pace.ON_COURSE, 10),
    ],
)
def test_a_row_is_reached_by_what_is_as_good_as_its_upper_ends(
    epoch: int, loss: float, wer: float, pace: Pace, reached: int | None
) -> None:
    standing = stand_on_course(ROWS, epoch=epoch, values={"loss": loss, "wer": wer})
    assert (standing.pace, standing.reached) == (pace, reached)


def test_before_the_first_row_nothing_is_due_but_may_be_reached() -> None:
    rows = ROWS[1:]
    early = stand_on_course(rows, epoch=2, values={"loss": 11.0, "wer": 1.0})
    assert (early.pace, early.reached, early.due) == (Pace.ON_COURSE, None, None)
    assert str(early) == "on course: no row is reached"
    good = stand_on_course(rows, epoch=2, values={"loss": 9.0, "wer": 0.1})
    assert good.pace is Pace.AHEAD


@pytest.mark.parametrize("loss", [None, math.nan, math.inf])
def test_what_is_not_finite_never_reaches_a_row(loss: float | None) -> None:
    standing = stand_on_course(ROWS, epoch=1, values={"loss": loss, "wer": 0.1})
    assert standing.pace is Pace.BEHIND
    assert standing.reached is None
    assert len(standing.missing) == 1
