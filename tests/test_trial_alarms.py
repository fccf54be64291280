"""A trial counts alarms and is otherwise the same trial."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from stability_search.alarms.watch import AlarmWatch
from stability_search.records.step import StepLabel
from stability_search.records.trial import Outcome, TrialSummary
from stability_search.settings.alarms import AlarmSettings, OnAlarm
from stability_search.settings.trial import KillRule
from stability_search.tally import Tally
from tests.test_alarms import FP16, OVERFLOW, Change, steps
from tests.test_trial import BreakWeights, configure, run

TRIGGER_HAPPY = AlarmSettings(
    epoch_steps=5,
    on_alarm=OnAlarm.END_RUN,
    grad_norm=1e-9,
    grad_norm_late=1e-9,
    late_epoch=1,
    grad_norm_jump=1e-9,
    bad_steps=1,
    skipped_frac=0.1,
    stale_epochs=1,
    update_ratio=1e-12,
)
DOCUMENTATION = (Path(__file__).parents[1] / "search_spaces" / "README.md").read_text("utf-8")
DEAF = AlarmSettings(grad_norm=1e30, grad_norm_jump=1e30, stale_epochs=10**6, update_ratio=1e30)
LENIENT = KillRule(bad_rate=0.9, false_kill=1e-12)


def without_clocks(summary: TrialSummary) -> dict[str, Any]:
    timings = {"train_s": 0.0, "wall_s": 0.0, "peak_memory_mib": 0.0}
    return {**summary.to_json(), **timings, "alarms": {}}


def test_a_trial_counts_how_often_each_alarm_rose() -> None:
    config = replace(configure(), alarms=TRIGGER_HAPPY)
    seen, summary = run(config)
    assert summary.outcome is Outcome.COMPLETED
    assert summary.alarms["grad_norm"] == 6  # once in each epoch of 5 of 30 steps
    assert summary.alarms["grad_norm_jump"] == 6
    by = AlarmWatch(replace(TRIGGER_HAPPY, on_alarm=OnAlarm.WARN), num_planned_steps=30)
    names = [alarm.name for step in seen for alarm in by.see(step.record)]
    assert summary.alarms == {name: names.count(name) for name in names}


def test_a_trial_counts_as_a_watch_that_only_warns_does() -> None:
    config = replace(configure(kill_rule=LENIENT), alarms=TRIGGER_HAPPY)
    seen, summary = run(config, faults=BreakWeights(12))

    def counts(alarms: AlarmSettings) -> dict[str, int]:
        by = AlarmWatch(alarms, num_planned_steps=30)
        names = [alarm.name for step in seen for alarm in by.see(step.record)]
        return {name: names.count(name) for name in names}

    assert summary.alarms == counts(replace(TRIGGER_HAPPY, on_alarm=OnAlarm.WARN))
    assert summary.alarms != counts(TRIGGER_HAPPY)  # whose epochs end early


@pytest.mark.parametrize("breaks_at", [None, 1, 12])
@pytest.mark.parametrize("rule", [KillRule(), LENIENT])
def test_no_alarm_changes_how_a_trial_ends(breaks_at: int | None, rule: KillRule) -> None:
    config = configure(kill_rule=rule)
    faults = None if breaks_at is None else BreakWeights(breaks_at)
    (heard, loud), (_, quiet) = (
        run(replace(config, alarms=alarms), faults=faults) for alarms in (TRIGGER_HAPPY, DEAF)
    )
    assert without_clocks(loud) == without_clocks(quiet)
    assert loud.alarms
    assert len(heard) == loud.num_steps


def test_the_same_alarms_would_have_ended_a_long_run() -> None:
    """The twin: a loop that listens ends where the trial goes on."""
    config = replace(configure(kill_rule=LENIENT), alarms=TRIGGER_HAPPY)
    seen, summary = run(config, faults=BreakWeights(12))
    assert summary.num_steps == 30
    by = AlarmWatch(TRIGGER_HAPPY, num_planned_steps=30)
    ended = []
    for step in seen:
        by.see(step.record)
        if by.must_end:
            ended.append(step.record.step)
    assert ended[0] == 13  # the second bad step


def test_the_rate_of_overflows_leaves_out_what_the_alarm_leaves_out() -> None:
    """Bad data is neither a step nor an overflow, whether it overflowed or not."""
    data: list[Change] = [{**FP16, "label": StepLabel.DATA}] * 20
    bad_data: list[Change] = [{**FP16, **OVERFLOW, "label": StepLabel.DATA}] * 20
    overflow: Change = {**FP16, **OVERFLOW}

    def rate_of(*changes: Change) -> float | None:
        tally = Tally()
        for record in steps(*[FP16] * 20, *changes):
            tally.add(record)
        return tally.overflows.rate

    assert rate_of(*[FP16] * 19, overflow) == 1 / 20
    assert rate_of(*data, *[FP16] * 10, *bad_data, *[FP16] * 9, overflow) == 1 / 20
    assert rate_of(*[FP16] * 18, overflow, overflow) == 2 / 20
    assert rate_of(*data, *bad_data) is None


def test_what_every_fourth_step_shows_is_judged_from_80_steps_on() -> None:
    alarms = AlarmSettings(update_ratio=1e-12, zero_grad_frac=1e-12, grad_rms_over_eps=1e12)
    names = {"update_ratio", "zero_grad_frac", "grad_rms_over_eps"}
    records = [step.record for step in run(configure(steps=80))[0]]
    for name in names:  # measured, though the one share may well be 0
        assert [r.step for r in records if getattr(r, name) is not None] == [*range(4, 81, 4)]
    records = [r if r.zero_grad_frac is None else replace(r, zero_grad_frac=0.5) for r in records]

    def risen(num_steps: int) -> set[str]:
        by = AlarmWatch(alarms, num_planned_steps=num_steps, fp32_zero_grad_frac=0.0)
        return {alarm.name for record in records[:num_steps] for alarm in by.see(record)}

    assert risen(80) >= names
    assert not risen(79) & names
    [said] = [line for line in DOCUMENTATION.splitlines() if "in every fourth step" in line]
    assert all(f"`{name}`" in said for name in names)
