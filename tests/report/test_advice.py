"""Warnings beside the verdict that the tables alone give."""

from dataclasses import replace

import pandas as pd
import pytest

from stability_search.records import Outcome, Stage
from stability_search.report.advice import warnings, what_to_widen
from stability_search.report.context import View
from tests.report.study_reports import report_of
from tests.study_rows import stable_study


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
