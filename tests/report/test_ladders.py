"""Part 10 and the chips of the card: where a ladder breaks, and where nobody can say."""

from collections.abc import Callable
from dataclasses import replace

import pytest

from stability_search.records.trial import Outcome, Stage, TrialRow
from stability_search.report import render_html
from stability_search.report.context import Rung, RungState, View
from stability_search.report.parts import ladders, verdict_card
from tests.report.study_reports import report_of
from tests.study_rows import StudyCase, ladder_rows, settings, stable_study

Wanted = Callable[[TrialRow], bool]


def lost(case: StudyCase, is_lost: Wanted) -> View:
    """Return a study in which a machine took some trials of the choice's ladder."""

    def change(row: TrialRow) -> TrialRow:
        if row.candidate_id != case.verdict.choice or not is_lost(row):
            return row
        return replace(row, summary=replace(row.summary, outcome=Outcome.INFRASTRUCTURE))

    return View(report_of(replace(case, rows=tuple(map(change, case.rows)))))


def chips(view: View) -> dict[str, tuple[str, str]]:
    return {step.times: (step.state, step.note) for step in verdict_card.build(view).ladder}


@pytest.mark.parametrize(
    ("qs", "outcomes", "state"),
    [
        ((0.9, 0.5), ("completed", "completed"), RungState.HELD),
        ((0.9, 0.4), ("completed", "completed"), RungState.BROKE),
        ((0.9, 0.9), ("completed", "pruned"), RungState.BROKE),
        ((0.9, None), ("completed", "infrastructure"), RungState.LOST),
        ((0.4, None), ("completed", "infrastructure"), RungState.BROKE),
        ((None,), ("user_error",), RungState.LOST),
    ],
)
def test_a_rung_is_judged_by_the_seeds_that_say_something(
    qs: tuple[float | None, ...], outcomes: tuple[str, ...], state: RungState
) -> None:
    assert Rung(octave=1, learning_rate=0.1, qs=qs, outcomes=outcomes).state is state


def test_a_seed_lost_to_a_machine_breaks_no_rung() -> None:
    whole = View(report_of(stable_study()))
    assert chips(whole)["\u00d72"] == ("held", "2 of 2 seeds")
    view = lost(stable_study(), lambda row: row.octave == 1 and row.seed_index == 0)
    assert chips(view)["\u00d72"] == ("lost", "1 of 1 seed, 1 lost")
    assert "seed lost" in render_html(view.report)
    finding = ladders.build(view).figures[0].finding
    assert finding.startswith(
        "Choice: held at every one of 3 doublings, on 1 seed or more, "
        "and a seed was lost at \u00d72; "
    )


def test_a_seed_lost_at_its_own_rate_is_no_bar_missed() -> None:
    view = lost(stable_study(), lambda row: row.octave == 0 and row.seed_index == 0)
    assert chips(view)["base"] == ("lost", "4 of 4 seeds, 1 lost")
    finding = ladders.build(view).figures[0].finding.partition(";")[0]
    assert "misses the bar" not in finding
    assert finding.endswith("and a seed was lost at base")


def test_a_rung_of_which_every_seed_was_lost_has_neither_held_nor_broken() -> None:
    view = lost(stable_study(), lambda row: (row.octave or 0) > 0)
    assert chips(view)["\u00d72"] == ("lost", "2 lost")
    finding = ladders.build(view).figures[0].finding.partition(";")[0]
    assert finding.startswith("Choice: nothing broke up to 3 doublings, and a seed was lost at ")


def test_what_breaks_is_told_beside_what_was_lost() -> None:
    case = stable_study()

    def change(row: TrialRow) -> TrialRow:
        if row.candidate_id != case.verdict.choice or row.octave != 2:
            return row
        return replace(row, summary=replace(row.summary, outcome=Outcome.DIVERGED))

    broken = replace(case, rows=tuple(map(change, case.rows)))
    view = lost(broken, lambda row: row.octave == 1 and row.seed_index == 0)
    finding = ladders.build(view).figures[0].finding.partition(";")[0]
    assert finding.startswith("Choice: not every seed held at \u00d74 (0.032), and a seed was")
    assert chips(view)["\u00d74"] == ("broke", "0 of 2 seeds")


def test_ladders_beyond_the_panels_stand_in_the_table_and_are_counted() -> None:
    case = stable_study()
    more: list[TrialRow] = []
    for k in range(8):
        candidate = settings(learning_rate=1e-3, precision="bf16", clip_norm=2.0 + k)
        more += ladder_rows(candidate, 900 + 10 * k, octaves=(0, 1), base=0)
    view = View(report_of(replace(case, rows=(*case.rows, *more))))
    figure = ladders.build(view).figures[0]
    assert len(figure.panels) == 8
    assert " 3 more ladders stand in the table alone." in figure.note
    confirmed = sum(row.stage is Stage.CONFIRM for row in (*case.rows, *more))
    assert len(figure.table.rows) == confirmed
    few = ladders.build(View(report_of(case))).figures[0]
    assert "in the table alone" not in few.note


def test_a_rung_that_was_a_base_itself_counts_with_the_seeds_that_the_margin_counts() -> None:
    case = stable_study()
    choice = next(row for row in case.rows if row.config_id == case.verdict.choice)
    twice = {**choice.settings, "learning_rate": 2 * choice.settings["learning_rate"]}
    base = ladder_rows(twice, 900, octaves=(0,), base=0)
    broken = replace(base[4], summary=replace(base[4].summary, outcome=Outcome.DIVERGED))
    view = View(report_of(replace(case, rows=(*case.rows, *base[2:4], broken))))
    row = view.by_id[case.verdict.choice or ""]
    assert row["margin_octaves"] == 3  # of the first two seeds of every rung
    assert chips(view)["\u00d72"] == ("held", "2 of 2 seeds, then 2 of 3")
    finding = ladders.build(view).figures[0].finding.partition(";")[0]
    assert finding.endswith("but not every later seed held at \u00d72 (2 of 3)")
