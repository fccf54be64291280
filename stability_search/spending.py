"""What a study has spent of its budgets, and the budgets with which it gets further."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime

from stability_search.records.trial import Stage, TrialRow
from stability_search.settings.study import StudySettings

_START_S = 15.0  # workers take as long to start: the clock runs then, and no trial does


@dataclass(frozen=True, kw_only=True, slots=True)
class EndedTrial:
    """What one attempt of a trial cost.

    Attributes:
        stage: Its stage.
        num_steps: Steps that it executed, those after a kill included.
        started_at: UTC, ISO 8601; empty where nobody knows.
        wall_s: Seconds from its start to its end.
    """

    stage: str
    num_steps: int
    started_at: str
    wall_s: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Spent:
    """What a study has spent so far.

    Attributes:
        num_steps: Optimizer steps of all trials.
        seconds: For how long any trial ran.
        is_all_pilot: True if no trial of a later stage has ended.
        has_search: True where settings vary, so that a search follows the pilot.
    """

    num_steps: int
    seconds: float
    is_all_pilot: bool
    has_search: bool


def ended_trial(row: TrialRow) -> EndedTrial:
    """Return what a row of the ledger says of its cost."""
    return EndedTrial(
        stage=row.stage.value,
        num_steps=row.summary.num_executed_steps,
        started_at=row.started_at,
        wall_s=row.summary.wall_s,
    )


def spent_by(trials: Iterable[EndedTrial], *, has_search: bool) -> Spent:
    """Add up what trials cost.

    Args:
        trials: Every attempt that has ended, in any order.
        has_search: True where settings vary.
    """
    ended = list(trials)
    return Spent(
        num_steps=sum(one.num_steps for one in ended),
        seconds=busy_seconds(ended),
        is_all_pilot=all(one.stage == Stage.PILOT.value for one in ended),
        has_search=has_search,
    )


def busy_seconds(trials: Iterable[EndedTrial]) -> float:
    """Return for how many seconds any of some trials ran; one of unknown start ran alone."""
    total, spans = 0.0, []
    for one in trials:
        begin = _seconds_of(one.started_at)
        if begin is None:
            total += one.wall_s
        else:
            spans.append((begin, begin + one.wall_s))
    until = -math.inf
    for begin, end in sorted(spans):
        total += max(0.0, end - max(begin, until))
        until = max(until, end)
    return total


def _seconds_of(time: str) -> float | None:
    try:
        return datetime.fromisoformat(time).timestamp()
    except (ValueError, OverflowError):  # nobody knows, or somebody wrote something else
        return None


def enough_steps(study: StudySettings, num_pilot_steps: int, *, has_search: bool) -> int:
    """Return a step budget that lets all search trials start, and one candidate be confirmed.

    Args:
        study: Its stages; its own budget is not looked at.
        num_pilot_steps: Steps of the pilot.
        has_search: True where settings vary.
    """
    search = study.search.trials * study.trial_steps if has_search else 0
    ladder = (1 + study.confirm.octaves) * study.confirm.seeds * study.confirm.steps
    before = num_pilot_steps + search
    return before + max(before, ladder)  # the search gets the first half


def larger_steps(study: StudySettings, spent: Spent | None) -> int | None:
    """Return the step budget to go on with; None where there was none.

    It is at least twice what it was. Where the pilot used up what a search may spend, it is
    enough for the whole search: the same pilot would use up a budget that is a little larger.

    Args:
        study: The study's blocks.
        spent: What it has spent; None where nobody knows.
    """
    budget = study.search.step_budget
    if budget is None or spent is None or not spent.is_all_pilot:
        return None if budget is None else 2 * budget
    return max(2 * budget, enough_steps(study, spent.num_steps, has_search=spent.has_search))


def larger_seconds(study: StudySettings, spent: Spent | None) -> float | None:
    """Return the time budget to go on with, in seconds; None where there was none.

    It is at least twice what it was, and four times what was spent where the pilot used it up, or
    more than all was spent.

    Args:
        study: The study's blocks.
        spent: What it has spent; None where nobody knows.
    """
    budget = study.search.time_budget_s
    if budget is None or spent is None or not (spent.is_all_pilot or spent.seconds > budget):
        return None if budget is None else 2 * budget
    return max(2 * budget, math.ceil(4 * (spent.seconds + _START_S)))
