"""Shares with intervals and the staircase of survival, held to numbers worked out by hand."""

import math

import pytest

from stability_search.report.estimates import clopper_pearson, kaplan_meier


def test_an_exact_interval_is_that_of_the_tables() -> None:
    share = clopper_pearson(2, 10)
    assert share.value == 0.2
    assert round(share.low, 4) == 0.0252
    assert round(share.high, 4) == 0.5561
    assert round(clopper_pearson(0, 10).high, 4) == 0.3085
    assert clopper_pearson(10, 10).high == 1.0
    nothing = clopper_pearson(0, 0)
    assert (nothing.low, nothing.high) == (0.0, 1.0)


def test_part_of_a_hit_counts_in_part() -> None:
    assert clopper_pearson(2, 10).low < clopper_pearson(2.5, 10).low < clopper_pearson(3, 10).low


def test_survival_is_the_product_of_what_each_step_left() -> None:
    # Ten trials: events at 2 and 5 (two of them), one censored at 3, the others at 9.
    ends = [2, 3, 5, 5, 9, 9, 9, 9, 9, 9]
    survival = kaplan_meier(ends, [True, False, True, True, *[False] * 6])
    assert survival.steps == (2, 5)
    assert survival.num_at_risk == (10, 8)
    assert [share.value for share in survival.shares] == pytest.approx([0.9, 0.9 * 0.75])
    assert survival.num_events == 3
    assert survival.at(1).value == 1.0
    assert survival.at(4).value == pytest.approx(0.9)
    assert [survival.at_risk(step) for step in (1, 2, 3, 5, 9)] == [10, 9, 8, 6, 0]


def test_a_trial_that_ends_at_the_step_of_an_event_was_under_observation_there() -> None:
    assert kaplan_meier([4, 4], [True, False]).shares[0].value == 0.5


def test_the_interval_is_greenwoods_on_the_log_log_scale() -> None:
    survival = kaplan_meier([1, 2, 3, 4], [True, False, False, False])
    share, variance = 0.75, 1 / (4 * 3)
    width = 1.959963984540054 * math.sqrt(variance) / -math.log(share)
    assert survival.shares[0].low == pytest.approx(share ** math.exp(width))
    assert survival.shares[0].high == pytest.approx(share ** math.exp(-width))


def test_all_gone_and_nothing_gone_keep_an_interval() -> None:
    gone = kaplan_meier([1, 1, 1], [True, True, True]).shares[-1]
    assert gone.value == 0.0
    assert round(gone.high, 4) == 0.7076  # exact, none of three
    untouched = kaplan_meier([8, 8, 8], [False, False, False])
    assert untouched.shares == ()
    assert untouched.at(5).value == 1.0
    assert round(untouched.at(5).low, 4) == 0.2924
