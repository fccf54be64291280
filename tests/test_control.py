"""A killed trial that is let run on: the trial stays what it was, its later end stands apart."""

import itertools
import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from stability_search.records.trial import ControlEnd, Outcome, Stage, TrialRow, TrialSummary
from stability_search.settings.trial import KillRule, TaskReference, TrialConfig, TrialConstants
from stability_search.testing import BrokenLoss, plant
from stability_search.trial import Clock, Progress, is_drawn_for_control, run_trial
from stability_search.yardstick import probe_steps
from tests.test_trial import STEPS, configure

TIMINGS = {"train_s": 0.0, "wall_s": 0.0, "peak_memory_mib": 0.0}
NEVER = KillRule(bad_rate=0.5, false_kill=1e-300)


def run(
    config: TrialConfig,
    *,
    control: float,
    bad: Sequence[int] = (1, 2, 3),
    clock: Clock | None = None,
    **constants: Any,  # noqa: ANN401 - of TrialConstants
) -> tuple[list[Progress], TrialSummary]:
    steps = probe_steps(config.num_planned_steps)
    generator = run_trial(
        config,
        constants=TrialConstants(probe_steps=steps, control=control, **constants),
        faults=plant(BrokenLoss(step=bad)) if bad else None,
        clock=clock or itertools.count().__next__,
    )
    seen = []
    while True:
        try:
            seen.append(next(generator))
        except StopIteration as end:
            return seen, end.value


def untimed(summary: TrialSummary) -> dict[str, Any]:
    return {**summary.to_json(), **TIMINGS}


def test_the_trial_is_what_it_would_be_without_control_field_by_field() -> None:
    plain_steps, plain = run(configure(timeout_s=1e9), control=0)
    steps, let_run_on = run(configure(timeout_s=1e9), control=1)
    assert (plain.outcome, plain.num_steps, plain.control) == (Outcome.PRUNED, 3, None)
    assert let_run_on.control is not None
    assert untimed(replace(let_run_on, control=None)) == untimed(plain)
    assert let_run_on.metrics_last == plain.metrics_last != {}
    own = [replace(p.record, step_s=0.0) for p in steps if not p.is_control]
    assert own == [replace(p.record, step_s=0.0) for p in plain_steps]
    assert [p.record.step for p in steps if p.is_control] == list(range(4, STEPS + 1))
    assert (plain.num_executed_steps, let_run_on.num_executed_steps) == (3, STEPS)
    assert let_run_on.wall_s > plain.wall_s


def test_the_whole_run_is_bit_for_bit_the_one_that_nobody_killed() -> None:
    _, let_run_on = run(configure(timeout_s=1e9), control=1)
    _, free = run(configure(timeout_s=1e9, kill_rule=NEVER), control=1)
    assert (free.outcome, free.control) == (Outcome.COMPLETED, None)
    assert let_run_on.control == ControlEnd(
        outcome=Outcome.COMPLETED,
        num_steps=STEPS,
        num_judged_steps=STEPS,
        num_bad_steps=3,
        judged_losses=free.judged_losses,
        probe_steps=free.probe_steps,
        probe_losses=free.probe_losses,
    )
    whole = let_run_on.without_the_kill()
    assert (whole.outcome, whole.num_steps, whole.control) == (Outcome.COMPLETED, STEPS, None)
    assert (whole.judged_losses, whole.num_bad_steps) == (free.judged_losses, 3)
    with pytest.raises(ValueError, match="let run on must be given"):
        free.without_the_kill()


def test_an_error_after_the_kill_is_the_controls_end_and_not_the_trials() -> None:
    config = configure(behaviour="raise", timeout_s=1e9)
    _, summary = run(config, control=1)
    assert (summary.outcome, summary.num_steps, summary.error_type) == (Outcome.PRUNED, 3, "")
    assert summary.control is not None
    assert (summary.control.outcome, summary.control.num_steps) == (Outcome.USER_ERROR, 5)
    assert "a bug of the user's" in summary.control.reason


def test_stops_and_the_clock_end_a_control_as_they_would_end_the_trial() -> None:
    _, limited = run(configure(max_bad_steps=4, timeout_s=1e9), control=1, bad=(1, 2, 3, 4))
    assert limited.control is not None
    assert (limited.outcome, limited.num_steps) == (Outcome.PRUNED, 3)
    assert (limited.control.reason, limited.control.num_steps) == ("max_bad_steps", 4)
    seconds = itertools.chain([0.0] * 30, itertools.repeat(100.0))
    _, late = run(configure(), control=1, clock=lambda: next(seconds))
    assert late.control is not None
    assert (late.outcome, late.control.outcome) == (Outcome.PRUNED, Outcome.TIMED_OUT)
    assert 3 < late.control.num_steps < STEPS


@pytest.mark.parametrize(
    ("changed", "bad", "outcome"),
    [
        ({"max_bad_steps": 2}, (1, 2, 3), Outcome.PRUNED),  # the user's own limit
        ({"max_bad_steps": 3}, (1, 2, 3), Outcome.PRUNED),  # and at the very step of the kill
        ({"behaviour": "diverge", "steps": 80}, (), Outcome.DIVERGED),
        ({}, (), Outcome.COMPLETED),
    ],
)
def test_only_a_kill_of_the_kill_rule_is_let_run_on(
    changed: dict[str, Any], bad: tuple[int, ...], outcome: Outcome
) -> None:
    _, summary = run(configure(timeout_s=1e9, **changed), control=1, bad=bad, delta=1.0)
    assert (summary.outcome, summary.control) == (outcome, None)


def test_the_draw_depends_on_seed_and_settings_alone_and_follows_the_share() -> None:
    configs = [configure(seed=i % 7, weight_decay=i / 1000) for i in range(400)]
    drawn = [is_drawn_for_control(config, 0.2) for config in configs]
    assert 0.14 < sum(drawn) / 400 < 0.26  # 3 standard deviations
    elsewhere = [
        replace(
            config, timeout_s=1.0, device="cuda", task=TaskReference(module="m", class_name="C")
        )
        for config in configs
    ]
    assert [is_drawn_for_control(config, 0.2) for config in elsewhere] == drawn
    assert not any(is_drawn_for_control(config, 0) for config in configs)
    assert all(is_drawn_for_control(config, 1) for config in configs)
    more = [is_drawn_for_control(config, 0.4) for config in configs]
    assert all(late for early, late in zip(drawn, more, strict=True) if early)
    one = configure()
    others = [replace(one, seed=1), replace(one, batch_size=9), replace(one, task_args={})]
    draws = {tuple(is_drawn_for_control(c, k / 500) for k in range(500)) for c in [one, *others]}
    assert len(draws) == 4


def test_a_row_survives_json_and_rows_of_earlier_versions_are_read() -> None:
    _, summary = run(configure(timeout_s=1e9), control=1)
    row = TrialRow(
        trial_id="search-0000",
        stage=Stage.SEARCH,
        index=0,
        config_id="c",
        seed=0,
        settings={"learning_rate": 0.01},
        summary=summary,
    )
    assert row.is_control
    again = TrialRow.from_json(json.loads(json.dumps(row.to_json(), allow_nan=False)))
    assert again == row
    plain = replace(row, summary=replace(summary, control=None))
    earlier = json.loads(json.dumps(plain.to_json()))
    del earlier["summary"]["control"]
    assert TrialRow.from_json({**earlier, "is_control": False}) == plain
    assert not plain.is_control
