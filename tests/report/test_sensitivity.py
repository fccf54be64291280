"""Part 2, learning-rate sensitivity: its number, its lines, and what it does not show."""

import statistics
from dataclasses import replace
from importlib.resources import files
from typing import Any

import pytest

from stability_search.records.trial import Stage, TrialRow
from stability_search.report.context import View
from stability_search.report.figures import Figure
from stability_search.report.parts import sensitivity
from stability_search.report.wording import number
from tests.report.study_reports import report_of
from tests.study_rows import interrupted_study, stable_study

CLIPS = (None, 0.3, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0)


def view_of(clips: tuple[Any, ...], varying: tuple[str, ...] = ("learning_rate",)) -> View:
    """Return a study in one precision whose search trials have some clip norms in turn."""

    def change(row: TrialRow) -> TrialRow:
        clip = 1.0 if row.stage is Stage.PILOT else clips[row.index % len(clips)]
        return replace(row, settings={**row.settings, "clip_norm": clip, "precision": "fp32"})

    case = interrupted_study()
    rows = tuple(map(change, case.rows))
    return View(report_of(replace(case, rows=rows), varying=varying))


def figure_of(view: View) -> Figure:
    return sensitivity.build(view).figures[0]


def num_marks(figure: Figure) -> int:
    data = figure.panels[0].spec["data"]
    return sum(len(trace["x"]) for trace in data if trace["mode"] == "markers")


def test_the_sensitivity_is_the_mean_excess_of_the_pilot_over_the_best() -> None:
    view = View(report_of(stable_study()))
    pilot = [row for row in view.results if row["stage"] == "pilot"]
    starts = [
        r["probe_first"]
        for r in view.results
        if r["stage"] in {"pilot", "search"} and r["probe_first"] is not None
    ]
    cap = statistics.median(starts)
    ends = [cap if r["probe_last"] is None else min(cap, r["probe_last"]) for r in pilot]
    best = view.report.yardsticks[200].e_star
    assert best is not None
    expected = statistics.fmean(ends) - best
    assert expected > best  # some of the pilot broke: the number is not near zero by chance
    text = sensitivity.build(view).figures[0].finding
    said = float(text.partition("Sensitivity over the pilot: ")[2].split()[0])
    assert said == pytest.approx(expected, rel=5e-3)


def test_the_span_says_of_which_trials_it_is() -> None:
    view = View(report_of(stable_study()))
    rates = [r["learning_rate"] for r in view.in_stage("pilot", "search") if r["is_stable"]]
    assert (
        sensitivity.build(view)
        .figures[0]
        .finding.startswith(
            f"Stable trials of pilot and search span learning rates {number(min(rates))} to "
            f"{number(max(rates))}, "
        )
    )


def test_the_names_of_straight_lines_cover_no_mark_and_do_not_lie_on_each_other() -> None:
    report = report_of(stable_study())
    starts = [r["probe_first"] for r in View(report).in_stage("pilot", "search")]
    near = replace(report.yardsticks[200], e0=0.99 * statistics.median(starts))
    view = View(replace(report, yardsticks={**report.yardsticks, 200: near}))
    layout = figure_of(view).panels[0].spec["layout"]
    named = sorted(layout["annotations"], key=lambda one: one["y"])
    assert [one["text"] for one in named] == ["E_0", "start"]
    assert [one["yanchor"] for one in named] == ["top", "bottom"]
    assert all((one["x"], one["xanchor"]) == (1, "left") for one in named)
    assert layout["margin"]["r"] >= 40


def test_a_line_joins_the_medians_of_its_octaves() -> None:
    case = interrupted_study()
    searched = [row for row in case.rows if row.stage is Stage.SEARCH]
    losses = (0.5, 0.6, 4.0)  # the mean is 1.7, the largest 4
    rows = []
    for i, (row, loss) in enumerate(zip(searched, losses, strict=False)):
        settings = {**row.settings, "learning_rate": 1.1e-3 + 1e-5 * i, "precision": "fp32"}
        readings = tuple(
            None if probe is None else loss if step else 30.0
            for step, probe in enumerate(searched[0].summary.probe_losses)
        )
        summary = replace(searched[0].summary, probe_losses=readings, probe_batch_losses=())
        rows.append(replace(row, settings=settings, summary=summary))
    view = View(report_of(replace(case, rows=tuple(rows))))
    [line] = [t for t in figure_of(view).panels[0].spec["data"] if t["mode"] == "lines"]
    assert line["y"] == [pytest.approx(0.6)]


@pytest.mark.parametrize("clips", [CLIPS, CLIPS[:5]], ids=["bands", "values"])
def test_every_trial_is_drawn_whatever_its_value(clips: tuple[Any, ...]) -> None:
    view = view_of(clips, ("learning_rate", "clip_norm"))
    figure = figure_of(view)
    labels = [label for label, _ in figure.series]
    assert labels[:2] == ["pilot, fp32", "off"] or labels[-1] == "off"
    assert num_marks(figure) == len(figure.table.rows) == len(view.results)
    assert {row[1] for row in figure.table.rows} == set(labels)
    assert "stand in the table alone" not in figure.note
    style = (files("stability_search.report") / "assets" / "report.css").read_text("utf-8")
    for _, token in figure.series:  # a colour in the light and in the dark, and a class
        assert style.count(f"--{token}: ") == 2
        assert f".{token} {{" in style


def test_trials_of_rare_words_are_counted_where_they_are_not_drawn() -> None:
    words = tuple("abcdefg")
    view = view_of(words, ("learning_rate", "clip_norm"))
    figure = figure_of(view)
    left_out = len(figure.table.rows) - num_marks(figure)
    assert left_out > 0
    assert f" {left_out} trials with rarer values stand in the table alone." in figure.note


def test_the_note_says_that_confirm_is_left_out_where_there_is_any() -> None:
    assert "Trials of confirm are left out" in figure_of(View(report_of(stable_study()))).note
    assert "confirm" not in figure_of(View(report_of(interrupted_study()))).note
