"""Which trials of the search become candidates."""
# ruff: noqa: S311 - dice for tests, not for secrets

import random
from dataclasses import replace

import pytest

from stability_search.records.trial import ControlEnd, Outcome, TrialRow
from stability_search.search.candidates import Grid, find_candidates, learning_rate_of
from stability_search.space import Space
from tests.search.confirm_world import config, make_space, searched


def rates(space: Space, rows: list[TrialRow]) -> list[tuple[float, float | None]]:
    """Return learning rate and clip norm of each candidate; q is read off the rows."""
    found = find_candidates(rows, space, lambda row: row.told_value)
    return [(c.learning_rate, c.settings["clip_norm"]) for c in found]


def test_the_lowest_rate_within_two_hundredths_of_the_highest_q_is_taken() -> None:
    space = make_space(top=1)
    rows = searched(space, (0.90, config(0.5)), (0.88, config(0.01)), (0.879, config(0.001)))
    assert rates(space, rows) == [(0.01, 1.0)]


def test_a_neighbour_within_an_octave_is_skipped_unless_another_setting_differs() -> None:
    space = make_space(top=3)
    rows = searched(
        space,
        (0.9, config(0.01)),
        (0.8, config(0.02)),  # an octave from the first: skipped
        (0.7, config(0.021)),  # more than that
        (0.6, config(0.01, None)),  # another clip norm
    )
    assert rates(space, rows) == [(0.01, 1.0), (0.021, 1.0), (0.01, None)]


def test_the_skip_looks_at_earlier_candidates_and_not_at_skipped_trials() -> None:
    space = make_space(top=3)
    rows = searched(space, (0.9, config(0.01)), (0.8, config(0.018)), (0.7, config(0.03)))
    assert rates(space, rows) == [(0.01, 1.0), (0.03, 1.0)]


def test_no_more_than_top_are_taken_and_only_completed_trials_with_q() -> None:
    space = make_space(top=2)
    rows = searched(
        space,
        (Outcome.DIVERGED, config(0.9)),
        (0.0, config(0.7)),
        (0.5, config(0.3)),
        (0.4, config(0.1)),
        (0.3, config(0.01)),
    )
    assert rates(space, rows) == [(0.3, 1.0), (0.1, 1.0)]


def test_a_trial_of_the_control_is_no_candidate() -> None:
    space = make_space()
    *before, last = searched(space, (0.9, config(0.3)))
    assert rates(space, [*before, last]) == [(0.3, 1.0)]
    control = ControlEnd(outcome=Outcome.COMPLETED, num_steps=last.summary.num_steps)
    killed = replace(last.summary, outcome=Outcome.PRUNED, control=control)
    assert rates(space, [*before, replace(last, summary=killed)]) == []


def test_todays_configuration_is_added_whatever_its_q_and_never_twice() -> None:
    today = config(0.02)
    space = make_space(top=2, start_with=(today,))
    rows = searched(space, (Outcome.PRUNED, today), (0.9, config(0.01)))
    assert rates(space, rows) == [(0.01, 1.0), (0.02, 1.0)]
    rows = searched(space, (0.9, today), (0.8, config(0.001)))
    assert rates(space, rows) == [(0.02, 1.0), (0.001, 1.0)]
    rows = searched(space, (Outcome.INFRASTRUCTURE, today))
    assert rates(space, rows) == [(0.02, 1.0)]


def test_the_order_of_the_rows_does_not_matter() -> None:
    space = make_space(top=4, start_with=(config(0.5),))
    rows = searched(
        space,
        *(
            (0.3 + 0.01 * (k % 5), config(1e-3 * 1.7**k, (None, 1.0, 2.0)[k % 3]))
            for k in range(9)
        ),
    )
    expected = rates(space, rows)
    assert len(expected) == 5
    for seed in range(20):
        random.Random(seed).shuffle(rows)
        assert rates(space, rows) == expected


def test_a_file_without_a_space_is_its_own_only_candidate() -> None:
    space = make_space(low=0.25, high=0.25)
    (only,) = find_candidates([], space, lambda _: None)
    assert only.settings == {"learning_rate": 0.25, "clip_norm": 1.0}
    assert only.config_id == space.config_id(only.settings)


def test_a_ladder_stays_in_range_below_and_leaves_it_above() -> None:
    space = make_space(low=0.01, high=0.3, octaves=3)
    (candidate,) = find_candidates(
        searched(space, (0.9, config(0.1))), space, lambda row: row.told_value
    )
    grid = Grid(candidate, space)
    assert grid.lowest == -3  # .1/8 = .0125; .1/16 would lie below .01
    assert [grid.rung(k).is_in_range for k in (-4, -3, 0, 1, 2)] == [
        False,
        True,
        True,
        True,
        False,
    ]
    assert grid.rung(3).learning_rate == 0.8
    assert grid.rung(3).settings == {"learning_rate": 0.8, "clip_norm": 1.0}


def test_a_ladder_goes_down_twice_as_many_octaves_as_up_at_most() -> None:
    space = make_space(low=1e-9, octaves=2)
    (candidate,) = find_candidates(
        searched(space, (0.9, config(0.1))), space, lambda row: row.told_value
    )
    assert Grid(candidate, space).lowest == -4


def test_a_configuration_without_a_learning_rate_is_refused() -> None:
    with pytest.raises(ValueError, match="learning_rate: a number must be set, but got None"):
        learning_rate_of({})
