"""What was spent of a budget, and what may still be."""

from dataclasses import replace

import pytest

from stability_search.records.trial import Outcome, Stage, TrialRow, TrialSummary
from stability_search.search.budget import Budget
from stability_search.search.history import History
from tests.search.confirm_world import make_space

NUM_STEPS = 200


@pytest.mark.parametrize(("at_once", "fits"), [(1, False), (15, True)])
def test_time_is_estimated_by_as_many_trials_at_once_as_there_were(
    at_once: int, fits: bool
) -> None:
    study = make_space().study
    study = replace(study, search=replace(study.search, time_budget_s=100.0))
    history = History()
    now_s = 0.0
    budget = Budget(study, clock=lambda: now_s, history=history)
    for index in range(30):  # 60 s of one worker, or 4 s of fifteen
        history.add(row_at(f"s{index}", index, started_at="", wall_s=2.0))
    now_s = 60.0 / at_once
    assert budget.can_afford(30 * NUM_STEPS // study.confirm.steps) is fits


def test_the_time_of_earlier_runs_is_that_in_which_any_trial_ran() -> None:
    history = History()
    begins = ["2026-01-01T00:00:00Z", "2026-01-01T00:00:05Z", "2026-01-01T00:00:06Z"]
    begins += ["2026-01-01T01:00:00Z", "", "yesterday"]
    for index, started_at in enumerate(begins):
        history.add(row_at(f"s{index}", index, started_at=started_at, wall_s=10.0))
    assert history.busy_s() == 16.0 + 10.0 + 2 * 10.0
    assert History().busy_s() == 0.0


def row_at(trial_id: str, index: int, *, started_at: str, wall_s: float) -> TrialRow:
    summary = TrialSummary(
        outcome=Outcome.COMPLETED,
        num_planned_steps=NUM_STEPS,
        num_steps=NUM_STEPS,
        wall_s=wall_s,
    )
    return TrialRow(
        trial_id=trial_id, stage=Stage.SEARCH, index=index, config_id="c", settings={}, seed=0,
        summary=summary, started_at=started_at,
    )  # fmt: skip
