"""Warnings beside the verdict that the tables alone give."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pandas as pd
import pytest

from stability_search.records import Outcome, Stage, TrialRow
from stability_search.report.advice import contrasts, warnings, what_broke, what_to_widen
from stability_search.report.context import View
from tests.report.study_reports import report_of
from tests.study_rows import hopeless_study, stable_study


def test_a_study_whose_every_step_is_the_batch_s_fault_says_so() -> None:
    case = stable_study()
    rows = tuple(
        replace(
            row,
            summary=replace(
                row.summary, num_judged_steps=0, num_bad_steps=0, num_data_steps=2,
                judged_losses=(), judged_steps=(), bad_steps=(),
            ),
        )
        for row in case.rows
    )  # fmt: skip
    said = warnings(View(report_of(replace(case, rows=rows))))
    assert any("steps were labelled `data`" in one for one in said)
    assert not any("labelled `data`" in one for one in warnings(View(report_of(case))))


@pytest.mark.parametrize(("steps", "is_said"), [(400, False), (200, True)])
def test_a_schedule_over_two_horizons_is_warned_of(steps: int, *, is_said: bool) -> None:
    case = stable_study()
    rows = tuple(replace(row, settings={**row.settings, "clip_norm": 1.0}) for row in case.rows)
    study = replace(case.study, trial_steps=200, confirm=replace(case.study.confirm, steps=400))
    report = report_of(replace(case, rows=rows, study=study))
    trials = report.tables.trials.assign(schedule="cosine")
    study = replace(study, trial_steps=steps)
    scheduled = replace(report, study=study, tables=replace(report.tables, trials=trials))
    assert any("schedule depends" in one for one in warnings(View(scheduled))) is is_said
    assert not any("schedule depends" in one for one in warnings(View(report)))


def test_where_every_trial_broke_the_lowest_learning_rate_is_the_one_to_go_below() -> None:
    """Also where nothing is called the closest, because there was no signal to rank by."""
    case = stable_study()
    ended = {"outcome": Outcome.PRUNED, "reason": "3 bad steps of 3"}
    rows = tuple(
        replace(row, summary=replace(row.summary, **ended))
        for row in case.rows
        if row.stage is not Stage.CONFIRM
    )
    broken = replace(case, rows=rows, verdict=replace(case.verdict, closest=None))
    said = what_to_widen(View(report_of(broken)))
    assert said.startswith("Widen learning_rate downwards: every trial from ")
    assert said.endswith(" on broke.")
    assert not what_to_widen(View(report_of(case))).endswith(" on broke.")


@pytest.mark.parametrize("is_checkpointed", [False, True])
def test_after_out_of_memory_the_same_step_in_smaller_parts_is_advised(
    *, is_checkpointed: bool
) -> None:
    report = report_of(stable_study())
    trials = report.tables.trials.assign(
        batch_size=8, accumulation_steps=8, gradient_checkpointing=is_checkpointed
    )

    def said(trials: pd.DataFrame) -> list[str]:
        shown = replace(report, tables=replace(report.tables, trials=trials))
        return [one for one in warnings(View(shown)) if "memory" in one]

    assert not said(trials[trials["outcome"] != Outcome.OUT_OF_MEMORY])
    found = said(trials)
    assert found[0] == (
        "Out of memory at batch_size=8, accumulation_steps=8: half the batch with twice the "
        "accumulation is a step of the same size (batch_size=4, accumulation_steps=16)."
    )
    assert any("gradient_checkpointing=true" in one for one in found) is not is_checkpointed


def broken(outcome: Outcome, **changed: Any) -> Callable[[TrialRow], TrialRow]:  # noqa: ANN401
    def change(row: TrialRow) -> TrialRow:
        return replace(row, summary=replace(row.summary, outcome=outcome, **changed))

    return change


def hint(keep: Callable[[TrialRow], bool], change: Callable[[TrialRow], TrialRow]) -> str:
    case = hopeless_study()
    rows = tuple(change(row) for row in case.rows if keep(row))
    return what_to_widen(View(report_of(replace(case, rows=rows))))


def test_where_rates_broke_and_none_learned_longer_trials_are_not_the_advice() -> None:
    """Rates of 10 to 1000: half of the trials blew up, the others drifted away."""
    starts = {"probe_losses": (33.7,) * 11}

    def change(row: TrialRow) -> TrialRow:
        how = Outcome.DIVERGED if row.index % 2 else Outcome.COMPLETED
        return broken(how, **starts)(row)

    said = hint(lambda row: row.stage is not Stage.CONFIRM, change)
    assert said.startswith("Widen learning_rate downwards: from ")
    assert said.endswith("broke, and none that completed had learned anything.")
    calm = hint(lambda row: row.stage is not Stage.CONFIRM, broken(Outcome.COMPLETED, **starts))
    assert calm == "Raise trial.steps: what completed had not yet learned anything."


def test_where_only_the_fp32_pilot_held_another_precision_is_the_advice() -> None:
    def change(row: TrialRow) -> TrialRow:
        if row.stage is Stage.PILOT:
            return row
        return broken(Outcome.PRUNED)(replace(row, settings={**row.settings, "precision": "fp16"}))

    said = hint(lambda row: row.stage is not Stage.CONFIRM, change)
    assert said.startswith("Let precision vary: all 24 trials in fp16 broke, while ")
    assert "precision" not in hint(lambda row: row.stage is not Stage.CONFIRM, lambda row: row)


def test_an_odd_batch_is_not_halved() -> None:
    report = report_of(stable_study())
    for size, is_said in ((3, False), (4, True)):
        trials = report.tables.trials.assign(batch_size=size, accumulation_steps=1)
        said = warnings(View(replace(report, tables=replace(report.tables, trials=trials))))
        assert any(f"Out of memory at batch_size={size}" in one for one in said) is is_said


@pytest.mark.parametrize(("num", "is_said"), [(4, False), (5, True)])
def test_values_are_compared_from_five_trials_on(num: int, *, is_said: bool) -> None:
    rows = [
        {"clip_norm": value, "is_stable": value == 1.0} for value in (1.0, 5.0) for _ in range(num)
    ]
    view = View(report_of(stable_study(), varying=("learning_rate", "clip_norm")))
    assert bool(contrasts(view, rows)) is is_said


def test_what_broke_names_what_weak_trials_lacked_and_where_it_began() -> None:
    first, *others = what_broke(View(report_of(stable_study())))
    assert (
        first.startswith("23 of 44 search trials were stable. The others: ") or "stable." in first
    )
    assert "completed with a run score q below 1/2 (" in first
    assert any(one.startswith("Non-finite values were first seen in") for one in others)
    assert not any("caused" in one for one in others)
