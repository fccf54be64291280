"""What was spent is added up, and the budget that is named next is one that is not used up."""

from dataclasses import replace
from pathlib import Path

import pytest

from stability_search.errors import StoppedEarlyError
from stability_search.next_command import next_command
from stability_search.records.trial import ControlEnd, Outcome, Stage, TrialRow
from stability_search.records.verdict import Verdict, VerdictKind
from stability_search.report.context import View
from stability_search.report.wording import next_step
from stability_search.search.plan import StudyPlan
from stability_search.settings.study import ConfirmSettings, SearchSettings, StudySettings
from stability_search.space import Space
from stability_search.spending import (
    EndedTrial,
    Spent,
    busy_seconds,
    ended_trial,
    enough_steps,
    larger_seconds,
    larger_steps,
    spent_by,
)
from tests.report.study_reports import report_of
from tests.search.inline_study import pretend
from tests.search.planned import load, plan_of
from tests.study_rows import stable_study


def trial(stage: str = "pilot", started_at: str = "", wall_s: float = 10.0) -> EndedTrial:
    return EndedTrial(stage=stage, num_steps=120, started_at=started_at, wall_s=wall_s)


def study_of(**budgets: float) -> StudySettings:
    search = SearchSettings(trials=3, **budgets)  # type: ignore[arg-type]
    confirm = ConfirmSettings(seeds=3, steps=120, octaves=1)
    return StudySettings(name="small", trial_steps=120, search=search, confirm=confirm)


def spent_of(num_steps: int = 840, seconds: float = 40.0, *, is_all_pilot: bool = True) -> Spent:
    return Spent(num_steps=num_steps, seconds=seconds, is_all_pilot=is_all_pilot, has_search=True)


def pilot_of(plan: StudyPlan) -> Verdict | None:
    """Run trials until the search begins or the study ends; return how it ended."""
    while plan.verdict is None:
        request = plan.next_trial()
        if request is None:
            continue
        if request.stage is not Stage.PILOT:
            return None
        summary = replace(pretend(request), wall_s=2.0)
        plan.finish(request, summary, started_at="", node="here")
    return plan.verdict


def rows_after_pilot(space: Space) -> tuple[TrialRow, ...]:
    """Return the rows of a study that its pilot's cost has ended."""
    plan = plan_of(space, clock=lambda: 0.0)
    end = pilot_of(plan)
    assert end is not None
    assert "Half of the budget went to the pilot" in end.reason
    return tuple(plan.rows)


def test_the_printed_step_budget_lets_the_search_begin_where_its_double_does_not(
    tmp_path: Path,
) -> None:
    space = load(tmp_path, "search.step_budget=160")
    rows = rows_after_pilot(space)
    spent = spent_by(map(ended_trial, rows), has_search=True)
    assert spent.num_steps > 160

    assert pilot_of(plan_of(load(tmp_path, "search.step_budget=320"), rows)) is not None
    budget = larger_steps(space.study, spent)
    assert pilot_of(plan_of(load(tmp_path, f"search.step_budget={budget}"), rows)) is None


def test_the_printed_time_budget_lets_the_search_begin_where_its_double_does_not(
    tmp_path: Path,
) -> None:
    space = load(tmp_path, "search.time_budget_s=8")
    plan = plan_of(space, clock=iter([0.0, *[14.0] * 99]).__next__)
    assert pilot_of(plan) is not None
    rows = tuple(plan.rows)  # 7 trials of 2 s
    spent = spent_by(map(ended_trial, rows), has_search=True)
    assert spent.seconds == 14.0

    for seconds, is_over in ((16, True), (larger_seconds(space.study, spent), False)):
        later = load(tmp_path, f"search.time_budget_s={seconds}")
        end = pilot_of(plan_of(later, rows, clock=iter([0.0, *[5.0] * 99]).__next__))
        assert (end is not None) == is_over


def test_enough_steps_are_twice_pilot_and_search_and_leave_confirm_a_ladder() -> None:
    study = study_of()
    assert enough_steps(study, 840, has_search=True) == 2 * (840 + 3 * 120)
    assert enough_steps(study, 840, has_search=False) == 2 * 840
    long = replace(study, confirm=ConfirmSettings(seeds=5, steps=1000, octaves=2))
    assert enough_steps(long, 840, has_search=True) == 840 + 3 * 120 + 3 * 5 * 1000


@pytest.mark.parametrize(
    ("budget", "spent", "larger"),
    [
        (700, spent_of(), 2400),
        (1400, spent_of(), 2800),  # at least the double
        (700, None, 1400),  # nobody knows
        (700, spent_of(is_all_pilot=False), 1400),
    ],
)
def test_steps_rise_to_at_least_the_double(budget: int, spent: Spent | None, larger: int) -> None:
    assert larger_steps(study_of(step_budget=budget), spent) == larger


@pytest.mark.parametrize(
    ("budget", "spent", "larger"),
    [
        (8.0, spent_of(), 4 * (40 + 15)),
        (200.0, spent_of(), 400.0),
        (8.0, None, 16.0),
        (60.0, spent_of(is_all_pilot=False), 120.0),
        (30.0, spent_of(is_all_pilot=False), 4 * (40 + 15)),  # more than all was spent
    ],
)
def test_seconds_rise_to_four_times_what_was_spent_where_the_double_would_be_spent(
    budget: float, spent: Spent | None, larger: float
) -> None:
    assert larger_seconds(study_of(time_budget_s=budget), spent) == larger


def test_without_a_budget_none_is_raised() -> None:
    assert larger_steps(study_of(), spent_of()) is None
    assert larger_seconds(study_of(), spent_of()) is None


def test_what_was_spent_is_that_of_all_trials_and_of_the_time_in_which_any_ran() -> None:
    begins = [f"2026-01-01T00:00:{second:02d}Z" for second in (6, 0, 5)]
    spent = spent_by([trial(started_at=one) for one in begins], has_search=True)
    assert spent == spent_of(num_steps=360, seconds=16.0)
    assert not spent_by([trial(), trial("search")], has_search=True).is_all_pilot
    assert busy_seconds([trial(), trial()]) == 20.0  # nobody knows when: one after the other
    assert busy_seconds([]) == 0.0


def test_the_ledger_and_the_tables_say_the_same_of_what_was_spent() -> None:
    case = stable_study()
    pilot = [row for row in case.rows if row.stage is Stage.PILOT]
    first, rest = pilot[0], pilot[1:]
    on = ControlEnd(outcome=Outcome.COMPLETED, num_steps=5000)  # its steps after the kill count
    killed = replace(first.summary, outcome=Outcome.PRUNED, num_steps=3, control=on)
    rows = (replace(first, summary=killed), *rest)
    search = replace(case.study.search, step_budget=700, time_budget_s=1.0)
    study = replace(case.study, search=search)
    verdict = Verdict(kind=VerdictKind.INCOMPLETE, exit_code=StoppedEarlyError.exit_code)
    spent = spent_by(map(ended_trial, rows), has_search=True)
    assert spent.num_steps > 5000

    stopped = replace(case, rows=rows, study=study, verdict=verdict)
    page = next_step(View(report_of(stopped, run_directory="a")))
    assert page == next_command(verdict, "a", study=study, spent=spent, made_by="")
    assert f"search.step_budget={larger_steps(study, spent)}" in page
    assert f"search.time_budget_s={larger_seconds(study, spent):g}" in page
