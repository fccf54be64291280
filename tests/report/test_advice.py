"""Warnings beside the verdict that the tables alone give."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pandas as pd
import pytest

from stability_search.errors import UsageError
from stability_search.records.step import StepRecord
from stability_search.records.trial import Outcome, Stage, TrialRow
from stability_search.report.advice import contrasts, warnings, what_broke, what_to_widen
from stability_search.report.context import View
from stability_search.report.curves import choose
from stability_search.report.terminal import verdict_lines
from tests.report.study_reports import report_of
from tests.study_rows import StudyCase, hopeless_study, stable_study


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


@pytest.mark.parametrize(
    ("interval", "words"), [(5000, "lies beyond the trials"), (7, "is below")]
)
def test_the_growth_of_a_loss_scale_matters_to_a_verdict_in_fp16_alone(
    interval: int, words: str
) -> None:
    report = report_of(stable_study())

    def is_said(precision: str) -> bool:
        tables = report.tables
        chosen = tables.configurations["config_id"] == report.verdict.choice
        changed = tables.configurations["precision"].mask(chosen, precision)
        found = replace(
            tables,
            trials=tables.trials.assign(growth_interval=interval),
            configurations=tables.configurations.assign(precision=changed),
        )
        said = warnings(View(replace(report, tables=found)))
        return any(one.startswith("growth_interval ") and words in one for one in said)

    assert [is_said(name) for name in ("fp32", "bf16", "fp16")] == [False, False, True]


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


def test_where_low_rates_held_and_did_not_learn_longer_trials_are_the_advice() -> None:
    def change(row: TrialRow) -> TrialRow:
        broke = row.settings["learning_rate"] > 0.05
        how = Outcome.DIVERGED if broke else Outcome.COMPLETED
        return broken(how, probe_losses=(33.7,) * 11)(row)

    said = hint(lambda row: row.stage is not Stage.CONFIRM, change)
    assert said == (
        "Raise trial.steps: below 0.0545 nothing broke, and nothing had learned anything yet."
    )


def between(low: float, high: float) -> Callable[[TrialRow], TrialRow]:
    """Let low rates learn nothing, those in the middle train well and high ones diverge."""

    def change(row: TrialRow) -> TrialRow:
        rate = row.settings["learning_rate"]
        if rate > high:
            return broken(Outcome.DIVERGED)(row)
        start = row.summary.probe_losses[0]
        losses = (start, *(start if rate < low else start / 40,) * 10)
        return broken(Outcome.COMPLETED, probe_losses=losses)(row)

    return change


@pytest.mark.parametrize(
    ("low", "high", "begins", "names"),
    [
        (0.005, 0.05, "Widening learning_rate helps at neither end: below ", "trial.steps"),
        (1e-5, 0.05, "Lower the upper end of learning_rate: above ", "were not stable."),
        (0.005, 100.0, "Raise the lower end of learning_rate: below ", "too little progress."),
        (1e-5, 100.0, "Neither end of learning_rate asks for more: ", "run more trials"),
    ],
)
def test_what_to_change_follows_the_side_on_which_trials_failed(
    low: float, high: float, begins: str, names: str
) -> None:
    change = between(low, high)

    def confirm_breaks(row: TrialRow) -> TrialRow:
        return row if row.stage is Stage.CONFIRM else change(row)

    said = hint(lambda _: True, confirm_breaks)
    assert said.startswith(begins)
    assert names in said
    assert "downwards" not in said


@pytest.mark.parametrize(
    ("progress", "begins"),
    [
        (0.3, "Lower the upper end of learning_rate: above 0.03, "),
        (1.0, "Widen learning_rate downwards: the closest lies at its lower end "),
    ],
)
def test_below_a_closest_that_learned_too_little_there_is_nothing_to_find(
    progress: float, begins: str
) -> None:
    report = report_of(hopeless_study())
    trials = report.tables.trials.query("stage == 'confirm' or learning_rate > 0.022")
    weak = {"calm": 1.0, "smooth": 1.0, "kept": 1.0, "progress": progress}
    trials = trials.assign(is_stable=False)
    trials.loc[trials["outcome"] == "completed", list(weak)] = list(weak.values())
    configurations = report.tables.configurations.assign(**weak)
    tables = replace(report.tables, trials=trials, configurations=configurations)
    assert what_to_widen(View(replace(report, tables=tables))).startswith(begins)


@pytest.mark.parametrize("stage", [Stage.PILOT, Stage.SEARCH])
def test_a_probe_that_is_never_finite_is_said_before_all_else(stage: Stage) -> None:
    def change(row: TrialRow) -> TrialRow:
        nothing = (None,) * len(row.summary.probe_losses)
        return replace(row, summary=replace(row.summary, probe_losses=nothing))

    case = hopeless_study()
    view = View(report_of(replace(case, rows=tuple(map(change, case.rows)))))
    first, second, *_ = what_broke(view)
    num = len(view.results)
    assert first.startswith(f"The probe loss was not finite at step 0 in any of {num} trials")
    assert second.endswith(" stable.")
    assert what_to_widen(view).startswith("Look at the data of the probe")
    some = tuple(change(row) if row.stage is stage else row for row in case.rows)
    measured = View(report_of(replace(case, rows=some)))
    assert "finite at step 0" not in what_broke(measured)[0]
    assert "Look at" not in what_to_widen(measured)


def test_a_loss_that_is_never_finite_is_said_before_all_else() -> None:
    case = hopeless_study()

    def change(row: TrialRow) -> TrialRow:
        num = row.summary.num_steps
        return broken(
            Outcome.COMPLETED, num_data_steps=num, num_judged_steps=0, num_bad_steps=0,
            judged_losses=(), judged_steps=(), bad_steps=(),
        )(row)  # fmt: skip

    rows = tuple(change(row) for row in case.rows)
    view = View(report_of(replace(case, rows=rows)))
    assert what_broke(view)[0].endswith(
        "the training loss was not finite, even with the initial model in fp32."
    )
    assert what_to_widen(view).startswith("Look at the training data and at the task's loss")
    one = View(report_of(replace(case, rows=(*rows[1:], case.rows[0]))))
    assert "training loss" not in what_broke(one)[0]


def test_where_only_the_fp32_pilot_held_another_precision_is_the_advice() -> None:
    def change(row: TrialRow) -> TrialRow:
        if row.stage is Stage.PILOT:
            return row
        return broken(Outcome.PRUNED)(replace(row, settings={**row.settings, "precision": "fp16"}))

    said = hint(lambda row: row.stage is not Stage.CONFIRM, change)
    assert said.startswith("Let precision vary: all 24 trials in fp16 broke, while ")
    assert "precision" not in hint(lambda row: row.stage is not Stage.CONFIRM, lambda row: row)


def lines_without_steps(case: StudyCase, lost: set[str]) -> list[str]:
    def read(trial_id: str) -> Sequence[StepRecord]:
        if trial_id in lost:
            raise UsageError("damaged", hint="Move it away.")
        return ()

    return verdict_lines(report_of(case, read_steps=read))


def test_step_files_that_cannot_be_read_are_warned_of_beside_the_verdict() -> None:
    case = stable_study()
    seeds = View(report_of(case)).seeds_of(case.verdict.choice or "")
    chosen = choose(View(report_of(case)).results, case.verdict.choice)
    one = next(row["trial_id"] for row, why in chosen if why == "best")
    begins = "warning: The steps of "
    found = lines_without_steps(case, {seeds[0]["trial_id"], seeds[1]["trial_id"], one})
    (said,) = (line for line in found if line.startswith(begins))
    assert said == (
        f"{begins}3 trials could not be read, 2 seeds of the choice among them: their files are "
        "missing or damaged, and figures of steps leave them out. The verdict needs no step file."
    )
    alone = lines_without_steps(case, {one})
    assert any(
        line.startswith(f"{begins}1 trial could not be read: its file is") for line in alone
    )
    assert not any(line.startswith(begins) for line in lines_without_steps(case, set()))


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
    assert any(one.startswith("Apart from learning_rate, search trials") for one in others)
    held = View(report_of(stable_study(), varying=("precision", "clip_norm")))
    assert any(one.startswith("Search trials differed most in ") for one in what_broke(held))
