"""Which trials the page shows step by step, and what of them."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from stability_search.errors import UsageError
from stability_search.records.step import StepLabel, StepRecord
from stability_search.records.trial import Stage
from stability_search.report.curve_data import columns_of
from stability_search.report.curves import (
    MAX_CURVES,
    MAX_POINTS,
    choose,
    read_curves,
    thinned,
)
from tests.report.study_steps import steps_of
from tests.study_rows import settings, stable_study, summary_of, trial_row


def trial(index: int, *, rate: float, is_stable: bool, **more: Any) -> dict[str, Any]:  # noqa: ANN401
    return {
        "trial_id": f"search-{index:04}",
        "config_id": f"c{index}",
        "stage": "search",
        "learning_rate": rate,
        "precision": "fp32",
        "is_stable": is_stable,
        "outcome": "completed" if is_stable else "pruned",
        "q": 0.9 if is_stable else 0.0,
        **more,
    }


def long_run(num_steps: int, bad: Sequence[int]) -> list[StepRecord]:
    values = settings(precision="fp16")
    row = trial_row(Stage.SEARCH, 0, values, summary_of(values, steps=20))
    plain = steps_of(replace(row, summary=replace(row.summary, num_steps=num_steps)))
    return [
        replace(step, label=StepLabel.BAD, loss=None) if step.step in bad else step
        for step in plain
    ]


def test_a_long_curve_is_thinned_and_keeps_every_bad_step() -> None:
    bad = range(1001, 1400)
    kept = thinned(long_run(5000, bad))
    assert {step.step for step in kept if step.label is StepLabel.BAD} == set(bad)
    assert sum(step.label is not StepLabel.BAD for step in kept) <= MAX_POINTS
    steps = [step.step for step in kept]
    assert (steps[0], steps[-1]) == (1, 5000)
    assert steps == sorted(set(steps))


def test_a_short_curve_is_whole() -> None:
    steps = long_run(MAX_POINTS, [7])
    assert thinned(steps) == tuple(steps)


def test_the_rate_of_bad_steps_counts_what_thinning_leaves_out() -> None:
    steps = long_run(3000, [1500])
    row = trial(0, rate=0.01, is_stable=True)
    curve = read_curves([row], None, lambda _: steps).shown[0]
    assert curve.num_steps == 3000
    judged = sum(step.label.is_judged for step in steps)
    assert curve.bad_rates[-1] == pytest.approx(1 / judged)


def test_failures_near_the_cliff_come_before_those_far_beyond_it() -> None:
    stable = [trial(k, rate=0.01, is_stable=True) for k in range(30)]
    far = [trial(100 + k, rate=1.0 + k / 100, is_stable=False) for k in range(60)]
    near = [trial(200 + k, rate=0.02 + k / 1e5, is_stable=False) for k in range(10)]
    chosen = choose([*far, *stable, *near], None)
    names = [row["trial_id"] for row, why in chosen if why == "near the cliff"]
    assert len(chosen) == MAX_CURVES
    assert names[:10] == [row["trial_id"] for row in near]


def test_the_seeds_of_the_verdict_come_first_and_every_precision_has_a_turn() -> None:
    rows = [trial(k, rate=0.01, is_stable=True) for k in range(90)]
    rows += [trial(90 + k, rate=0.01, is_stable=True, precision="fp16", q=0.6) for k in range(3)]
    rows += [
        trial(200 + k, rate=0.01, is_stable=True, stage="confirm", config_id="c0")
        for k in range(5)
    ]
    chosen = choose(rows, "c0")
    assert [why for _, why in chosen[:6]] == ["headline"] * 5 + ["best"]
    assert sum(row["precision"] == "fp16" for row, _ in chosen) == 3
    assert len(chosen) == MAX_CURVES


def test_a_step_file_that_cannot_be_read_is_counted_and_stops_nothing() -> None:
    def read(trial_id: str) -> list[StepRecord]:
        if trial_id == "search-0001":
            raise UsageError("damaged", hint="Move it away.")
        return long_run(20, [])

    rows = [trial(k, rate=0.01, is_stable=True) for k in range(3)]
    curves = read_curves(rows, None, read)
    assert [curve.row["trial_id"] for curve in curves.shown] == ["search-0000", "search-0002"]
    assert curves.num_lost == 1


def test_columns_hold_four_digits_and_leave_out_what_was_never_measured() -> None:
    steps = [replace(step, loss=1 / 3, scale=None) for step in long_run(5, [])]
    row = trial(0, rate=0.01, is_stable=True)
    columns = columns_of(read_curves([row], None, lambda _: steps).shown[0])
    assert columns["step"] == [1, 2, 3, 4, 5]
    assert set(columns["loss"]) == {0.3333}
    assert "scale" not in columns


def test_a_study_has_the_same_curves_every_time() -> None:
    rows = [
        trial(k, rate=0.01 * 2**k, is_stable=k < 4, trial_id=row.trial_id)
        for k, row in enumerate(stable_study().rows[:8])
    ]
    assert choose(rows, None) == choose(rows, None)
