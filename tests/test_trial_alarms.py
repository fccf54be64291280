"""A trial counts alarms and is otherwise the same trial."""

from dataclasses import replace
from typing import Any

import pytest

from stability_search.alarms import AlarmWatch
from stability_search.records import Outcome, TrialSummary
from stability_search.settings import AlarmSettings, KillRule, OnAlarm
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
