"""Survival, loss scale, origins, gradients, attention, ledger: what they say, and what not."""

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import pytest

from stability_search.records.step import StepLabel, StepRecord
from stability_search.records.trial import Outcome, TrialRow
from stability_search.report.context import View
from stability_search.report.figures import Section
from stability_search.report.parts import (
    attention,
    gradients,
    guard_ledger,
    loss_scale,
    origins,
    survival,
)
from tests.report.study_reports import report_with_steps
from tests.report.study_steps import reader_of
from tests.study_rows import StudyCase, empty_study, hopeless_study, stable_study

PARTS = [survival, loss_scale, origins, gradients, attention, guard_ledger]
Change = Callable[[TrialRow], TrialRow]


def view_of(case: StudyCase, change: Change = lambda row: row, **more: Any) -> View:  # noqa: ANN401
    return View(report_with_steps(replace(case, rows=tuple(map(change, case.rows))), **more))


@cache
def plain_view(make: Callable[[], StudyCase]) -> View:
    return view_of(make())


def with_summary(**changed: Any) -> Change:  # noqa: ANN401 - any field of a summary
    return lambda row: replace(row, summary=replace(row.summary, **changed))


def text_of(section: Section) -> str:
    return " ".join([section.absent, *(f.finding + f.note for f in section.figures)])


@pytest.mark.parametrize("part", PARTS, ids=lambda part: part.__name__.rpartition(".")[2])
def test_a_part_without_a_trial_is_one_sentence(part: Any) -> None:  # noqa: ANN401 - a module
    section = part.build(plain_view(empty_study))
    assert section.figures == ()
    assert section.absent == "No trial has ended with a result yet."


@pytest.mark.parametrize("part", PARTS, ids=lambda part: part.__name__.rpartition(".")[2])
def test_every_figure_of_a_study_has_a_finding_and_its_data(part: Any) -> None:  # noqa: ANN401
    for make in (stable_study, hopeless_study):
        for figure in part.build(plain_view(make)).figures:
            assert figure.finding.endswith(".")
            assert figure.panels
            assert figure.table.rows
            assert all(len(row) == len(figure.table.columns) for row in figure.table.rows)


def only(case: StudyCase, keep: Callable[[TrialRow], bool]) -> StudyCase:
    return replace(case, rows=tuple(row for row in case.rows if keep(row)))


def test_survival_counts_a_stop_without_a_bad_step_as_an_event() -> None:
    section = survival.build(plain_view(stable_study))
    rows = plain_view(stable_study).results
    broken = [
        row
        for row in rows
        if row["first_bad_step"] is not None or Outcome(row["outcome"]).is_unstable
    ]
    assert any(row["first_bad_step"] is None for row in broken)  # `diverged`, all of it finite
    assert section.figures[0].finding.startswith(f"{len(broken)} of {len(rows)} trials")


def test_survival_compares_no_trials_to_which_a_setting_does_not_apply() -> None:
    figure = survival.build(plain_view(stable_study)).figures[0]
    assert not [row for row in figure.table.rows if row[0] == "init_scale" and row[1] == "off"]
    assert [row for row in figure.table.rows if row[0] == "init_scale"]


def test_survival_of_trials_that_never_broke_has_nothing_to_time() -> None:
    calm = only(stable_study(), lambda row: row.summary.outcome is Outcome.COMPLETED)
    view = view_of(calm, with_summary(first_bad_step=None, num_bad_steps=0))
    assert "there is nothing to time" in survival.build(view).absent


def test_three_trials_are_drawn_as_one_line() -> None:
    case = only(hopeless_study(), lambda row: row.trial_id in {f"search-00{k}" for k in range(3)})
    figure = survival.build(view_of(case)).figures[0]
    assert len(case.rows) == 3
    assert [row[:2] for row in figure.table.rows] == [("all trials", "all trials")]


def test_a_study_without_fp16_says_that_no_loss_was_scaled() -> None:
    case = only(stable_study(), lambda row: row.settings["precision"] != "fp16")
    assert loss_scale.build(view_of(case)).absent == "No trial ran in fp16, so no loss was scaled."


def test_calibration_is_no_mark_on_the_rail_and_a_bad_step_is() -> None:
    view = plain_view(stable_study)
    panel = loss_scale.build(view).figures[0].panels[0]
    on_rail = {x for trace in panel.spec["data"] if trace.get("yaxis") == "y2" for x in trace["x"]}
    bad = {
        step.step
        for curve in view.curves.shown
        if curve.row["precision"] == "fp16"
        for step in curve.steps
        if step.label == "bad"
    }
    searched = {
        step.step
        for curve in view.curves.shown
        for step in curve.steps
        if step.label == "calibration"
    }
    assert on_rail == bad
    assert searched - bad


@pytest.mark.parametrize(
    ("bad_rate", "texts"),
    [(0.05, ["0 %", "25 %", "50 %", "75 %"]), (0.4, ["0 %", "25 %", "50 %", "75 %", "100 %"])],
)
def test_the_axis_of_bad_steps_has_a_tick_above_the_data(
    bad_rate: float, texts: list[str]
) -> None:
    labels = (StepLabel.OK, StepLabel.BAD, StepLabel.BAD)

    def two_of_three_bad(trial_id: str) -> list[StepRecord]:
        return [replace(s, label=label) for s, label in zip(read(trial_id), labels, strict=False)]

    case = stable_study()
    read = reader_of(case)
    rule = replace(case.study.kill_rule, bad_rate=bad_rate)
    case = replace(case, study=replace(case.study, kill_rule=rule))
    view = view_of(case, read_steps=two_of_three_bad)
    axis = loss_scale.build(view).figures[0].panels[1].spec["layout"]["yaxis"]
    assert axis["ticktext"] == texts
    assert axis["range"][1] > axis["tickvals"][-1]


def test_the_kill_line_stands_where_the_rule_kills() -> None:
    panel = loss_scale.build(plain_view(stable_study)).figures[0].panels[2]
    assert [shape["y0"] for shape in panel.spec["layout"]["shapes"]] == [pytest.approx(100)]
    assert "where it kills (100)" in panel.title


def test_without_step_files_the_parts_of_curves_say_so_and_the_others_stand() -> None:
    view = view_of(stable_study(), read_steps=None)
    assert "None of their step files could be read" in loss_scale.build(view).absent
    assert len(gradients.build(view).figures[0].panels) == 1  # the shares need no steps
    assert survival.build(view).figures


def test_where_it_began_never_says_caused() -> None:
    figure = origins.build(plain_view(hopeless_study)).figures[0]
    assert "first seen in fusion.attention" in figure.finding
    assert "in the forward pass" in figure.finding
    assert "does not say caused by" in figure.note


def test_a_module_that_was_not_found_is_not_invented() -> None:
    change = with_summary(first_nonfinite_module=None, first_nonfinite_phase=None)
    figure = origins.build(view_of(hopeless_study(), change)).figures[0]
    assert figure.finding.startswith("No module was found")


def test_passing_faults_are_told() -> None:
    change = with_summary(is_first_bad_transient=True)
    assert "passing fault" in origins.build(view_of(hopeless_study(), change)).figures[0].note
    plain = origins.build(plain_view(hopeless_study)).figures[0].note
    assert "passing fault" not in plain


@pytest.mark.parametrize(("share", "is_warned"), [(0.51, True), (0.5, False)])
def test_clipping_warns_above_half(share: float, is_warned: bool) -> None:
    def change(row: TrialRow) -> TrialRow:
        clipped = None if row.settings["clip_norm"] is None else share
        return replace(row, summary=replace(row.summary, clip_frac=clipped))

    chosen = gradients.build(view_of(stable_study(), change)).figures[0].finding
    assert ("a hidden cut of the learning rate" in chosen) is is_warned
    assert ("The choice stands as it was confirmed." in chosen) is is_warned
    assert "Lower the learning rate" not in chosen  # the verdict says: train with it
    without = gradients.build(view_of(hopeless_study(), change)).figures[0].finding
    assert ("Lower the learning rate" in without) is is_warned


def test_a_study_that_never_clips_says_so() -> None:
    figure = gradients.build(view_of(stable_study(), with_summary(clip_frac=None))).figures[0]
    assert figure.finding.startswith("No trial clipped its gradients")


@pytest.mark.parametrize(("share", "is_warned"), [(0.011, True), (0.01, False)])
def test_saturation_warns_above_one_per_cent(share: float, is_warned: bool) -> None:
    def change(row: TrialRow) -> TrialRow:
        clamped = None if row.settings["attention_clamp"] is None else share
        return replace(row, summary=replace(row.summary, clamp_frac=clamped))

    finding = attention.build(view_of(stable_study(), change)).figures[0].finding
    assert ("it masks growth, it does not cure it" in finding) is is_warned


def test_the_lines_of_the_attention_stand_at_100_and_1e3_and_1e4() -> None:
    panel = attention.build(plain_view(stable_study)).figures[0].panels[0]
    lines = [s["y0"] for s in panel.spec["layout"]["shapes"] if s["type"] == "line"]
    assert lines == [100, 1e3, 1e4]


def test_a_model_without_attention_has_nothing_to_clamp() -> None:
    view = view_of(stable_study(), with_summary(attention_max=None))
    assert attention.build(view).absent.startswith("No attention was seen in any trial")


def test_the_ledger_lists_every_stop_and_what_it_saved() -> None:
    view = plain_view(stable_study)
    stops = [row for row in view.results if Outcome(row["outcome"]).is_unstable]
    figure = guard_ledger.build(view).figures[0]
    saved = sum(row["num_planned_steps"] - row["num_steps"] for row in stops)
    assert len(figure.table.rows) == len(stops)
    assert f"{len(stops)} trials of" in figure.finding
    assert f"saved {saved:,} of" in figure.finding


def test_device_hours_are_the_missing_steps_at_the_trials_own_pace() -> None:
    def change(row: TrialRow) -> TrialRow:
        is_killed = row.summary.outcome is Outcome.PRUNED
        changed = {"num_steps": 50, "num_planned_steps": 200, "train_s": 600.0}
        return replace(row, summary=replace(row.summary, **changed)) if is_killed else row

    case = only(stable_study(), lambda row: row.summary.outcome is Outcome.PRUNED)
    figure = guard_ledger.build(view_of(case, change)).figures[0]
    hours = figure.table.columns.index("device-hours saved")
    assert {row[hours] for row in figure.table.rows} == {"0.5"}


def test_a_study_that_stopped_nothing_says_so() -> None:
    calm = only(stable_study(), lambda row: row.summary.outcome is Outcome.COMPLETED)
    assert "was stopped for instability" in text_of(guard_ledger.build(view_of(calm)))
