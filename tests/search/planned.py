"""A plan of a scripted study, and what it asks for."""

import dataclasses
from pathlib import Path

from stability_search import space as spaces
from stability_search.records.trial import Outcome, Stage, TrialRow, TrialSummary
from stability_search.search.plan import StudyPlan
from stability_search.search.request import TrialRequest
from stability_search.space import Space
from tests.search.inline_study import pretend, write_space


def plan_of(space: Space, rows: tuple[TrialRow, ...] = (), **kwargs: object) -> StudyPlan:
    return StudyPlan(space, device="cpu", rows=rows, **kwargs)  # type: ignore[arg-type]


def load(folder: Path, *overrides: str, sampler: str = "tpe") -> Space:
    return spaces.load(write_space(folder, sampler=sampler), overrides)


def settings_of(rows: list[TrialRow], stage: Stage) -> list[object]:
    return [dict(row.settings) for row in rows if row.stage is stage]


def unstable(request: TrialRequest) -> TrialSummary:
    """Learn in the pilot, and be killed at step 3 ever after."""
    if request.stage is Stage.PILOT:
        return pretend(request)
    return TrialSummary(
        outcome=Outcome.PRUNED,
        reason="3 bad steps of 3",
        num_planned_steps=request.config.num_planned_steps,
        num_steps=3,
        num_judged_steps=3,
        num_bad_steps=3,
        judged_losses=(None, None, None),
        judged_steps=(1, 2, 3),
    )


def lost_like(row: TrialRow) -> TrialSummary:
    return TrialSummary(
        outcome=Outcome.INFRASTRUCTURE, num_planned_steps=row.summary.num_planned_steps
    )


def alike(request: TrialRequest) -> TrialSummary:
    """Learn in the pilot as the rate allows, and ever after as the best rate would."""
    if request.stage is Stage.PILOT:
        return pretend(request)
    engine = dataclasses.replace(request.config.engine, learning_rate=0.03)
    return pretend(
        dataclasses.replace(request, config=dataclasses.replace(request.config, engine=engine))
    )
