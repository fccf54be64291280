"""When a trial started, although the study hears of it late."""

from datetime import UTC, datetime, timedelta

import pytest

from stability_search.events import stamp
from stability_search.search.study_source import earlier_start

NOON = datetime(2026, 3, 1, 12, tzinfo=UTC)


def at(seconds: float) -> datetime:
    return NOON + timedelta(seconds=seconds)


@pytest.mark.parametrize(
    ("heard", "ended", "expected"),
    [
        (0.05, 4.0, 0.0),  # the start was heard of late
        (0.0, 4.3, 0.0),  # the end was
        (0.2, 4.1, 0.1),  # both
    ],
)
def test_of_two_times_that_are_both_late_the_earlier_one_counts(
    heard: float, ended: float, expected: float
) -> None:
    found = earlier_start(stamp(at(heard)), ended=at(ended), wall_s=4.0)
    assert found == stamp(at(expected))


def test_the_next_trial_of_a_slot_starts_after_the_end_of_the_one_before() -> None:
    """Its start is heard of, and its worker starts it, after the end before it was heard of."""
    first = earlier_start(stamp(at(0.4)), ended=at(4.1), wall_s=4.0)
    second = earlier_start(stamp(at(4.35)), ended=at(8.15), wall_s=4.0)
    assert datetime.fromisoformat(second) >= datetime.fromisoformat(first) + timedelta(seconds=4)
    naive = datetime.fromisoformat(stamp(at(0.4))) + timedelta(seconds=4)
    assert datetime.fromisoformat(second) < naive
