"""A study without training: rows whose q is exactly what a test says, and a fake executor.

The baseline is 2 and the pilot reaches 1, so Delta is 1; a trial that ends at 2 - .9*q has the
run score q.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from stability_search.records.trial import Outcome, Stage, TrialRow, TrialSummary
from stability_search.records.verdict import Verdict
from stability_search.search.confirm import Confirmation, ConfirmTrial, Need
from stability_search.settings.study import ConfirmSettings, SearchSettings, StudySettings
from stability_search.settings.trial import TaskReference
from stability_search.space import Parameter, Space
from stability_search.yardstick import probe_steps

TRIAL_STEPS = 20
CONFIRM_STEPS = 40
BASELINE = 2.0

Truth = Callable[[Mapping[str, Any], int, int], float | Outcome]  # settings, seed, attempt


def make_space(
    *,
    low: float = 1e-4,
    high: float = 1.0,
    start_with: tuple[Mapping[str, Any], ...] = (),
    max_concurrent: int | None = 1,
    trial_steps: int = TRIAL_STEPS,
    **confirm: Any,  # noqa: ANN401 - fields of ConfirmSettings
) -> Space:
    """Return a space of a learning rate and a clip norm; one configuration if low == high."""
    clip = Parameter(name="clip_norm", kind="choice", choices=(None, 1.0, 2.0, 3.0))
    rate = Parameter(name="learning_rate", kind="loguniform", low=low, high=high)
    is_fixed = low == high
    return Space(
        path=Path("study.yaml"),
        folder=Path("/"),
        text="",
        study=StudySettings(
            name="study",
            trial_steps=trial_steps,
            search=SearchSettings(max_concurrent=max_concurrent),
            confirm=ConfirmSettings(**{"steps": CONFIRM_STEPS, **confirm}),
        ),
        task=TaskReference(module="tasks", class_name="Task"),
        task_name="tasks:Task",
        fixed={"learning_rate": low, "clip_norm": 1.0} if is_fixed else {},
        parameters=() if is_fixed else (rate, clip),
        start_with=start_with,
    )


def summary(
    end: float | Outcome,
    steps: int,
    *,
    probes: tuple[int, ...] = (),
    **more: Any,  # noqa: ANN401
) -> TrialSummary:
    """Return how a trial ended: with a run score, or stopped."""
    at = probes or probe_steps(steps)
    if isinstance(end, Outcome):
        facts: dict[str, Any] = {
            "outcome": end,
            "num_steps": 7,
            "num_judged_steps": 7,
            "judged_losses": (1.0,) * 7,
            "probe_steps": at,
            "probe_losses": (BASELINE,),
            "probe_batch_losses": ((BASELINE,) * 4,),
        }
    else:
        readings = (BASELINE, *((BASELINE - 0.9 * end),) * (len(at) - 1))
        facts = {
            "outcome": Outcome.COMPLETED,
            "num_steps": steps,
            "num_judged_steps": steps,
            "judged_losses": (1.0,) * steps,
            "probe_steps": at,
            "probe_losses": readings,
            "probe_batch_losses": tuple((loss,) * 4 for loss in readings),
        }
    return TrialSummary(**{**facts, "num_planned_steps": steps, "baseline": BASELINE, **more})


def pilot(space: Space, reached: float = 1 / 0.9) -> list[TrialRow]:
    """Return a pilot whose best run ends at 1, or with another run score."""
    horizons = (space.study.trial_steps, space.study.confirm.steps)
    return [
        TrialRow(
            trial_id=f"pilot-{index}",
            stage=Stage.PILOT,
            index=index,
            config_id=f"pilot{index}",
            seed=0,
            settings={"learning_rate": 10.0**-index},
            summary=summary(end, max(horizons), probes=probe_steps(*horizons)),
        )
        for index, end in enumerate([Outcome.DIVERGED, reached, reached / 3, 0.0])
    ]


def config(rate: float, clip: float | None = 1.0) -> dict[str, Any]:
    """Return one configuration."""
    return {"learning_rate": rate, "clip_norm": clip}


def searched(
    space: Space,
    *found: tuple[float | Outcome, Mapping[str, Any]],
    **more: Any,  # noqa: ANN401
) -> list[TrialRow]:
    """Return a pilot and a search that found these run scores."""
    rows = pilot(space) if space.study.trial_steps else []
    for index, (end, values) in enumerate(found):
        settings = space.settings(values)
        told = end if isinstance(end, float) else 0.001
        rows.append(
            TrialRow(
                trial_id=f"search-{index}",
                stage=Stage.SEARCH,
                index=index,
                config_id=space.config_id(settings),
                seed=1,
                settings=settings,
                summary=summary(end, space.study.trial_steps),
                **{"told_value": told, **more},
            )
        )
    return rows


def row_of(
    trial: ConfirmTrial,
    end: float | Outcome,
    steps: int,
    attempt: int = 1,
    **more: Any,  # noqa: ANN401
) -> TrialRow:
    """Return the row of a confirm trial that has ended."""
    return TrialRow(
        trial_id=f"confirm-{trial.config_id}-{trial.seed_index}",
        stage=Stage.CONFIRM,
        index=0,
        config_id=trial.config_id,
        candidate_id=trial.candidate_id,
        octave=trial.octave,
        seed=100 + trial.seed_index,
        seed_index=trial.seed_index,
        settings=trial.settings,
        summary=summary(end, steps, **more),
        attempt=attempt,
    )


def key_of(trial: ConfirmTrial) -> tuple[str, int]:
    """Return what tells one trial from another."""
    return trial.config_id, trial.seed_index


def finish(
    space: Space,
    rows: Sequence[TrialRow],
    truth: Truth,
    *,
    can_afford: Callable[[int, int], bool] = lambda _spent, _more: True,
    pick: Callable[[tuple[ConfirmTrial, ...]], Sequence[ConfirmTrial]] = lambda trials: trials[:1],
    **more: Any,  # noqa: ANN401 - facts of every summary
) -> tuple[Verdict, list[TrialRow]]:
    """Run what confirm needs until there is a verdict; every row is the trial's own."""
    confirmation = Confirmation(space)
    rows = list(rows)
    first = len(rows)
    while True:
        spent = len(rows) - first
        answer = confirmation.next_need(
            rows, can_afford=lambda count, spent=spent: can_afford(spent, count)
        )
        if isinstance(answer, Verdict):
            return answer, rows
        assert isinstance(answer, Need)
        picked = pick(answer.trials)
        assert picked, "an executor must run something"
        for trial in picked:
            attempt = 1 + sum(
                (row.config_id, row.seed_index) == key_of(trial)
                for row in rows
                if row.stage is Stage.CONFIRM
            )
            assert attempt <= 3, "a trial that has ended was asked for again"
            end = truth(trial.settings, trial.seed_index, attempt)
            rows.append(row_of(trial, end, space.study.confirm.steps, attempt, **more))


def executed(rows: Sequence[TrialRow]) -> dict[tuple[float, float | None], int]:
    """Count the confirm trials of each learning rate and clip norm."""
    counts: dict[tuple[float, float | None], int] = {}
    for row in rows:
        if row.stage is Stage.CONFIRM:
            key = (row.settings["learning_rate"], row.settings["clip_norm"])
            counts[key] = counts.get(key, 0) + 1  # type: ignore[index]
    return counts
