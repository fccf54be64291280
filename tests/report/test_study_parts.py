"""Card, map, sensitivity, outcomes, ladders, effects, appendix: what they say, and what not."""

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import pytest

from stability_search.records import Outcome, Stage, TrialRow
from stability_search.report import render_html
from stability_search.report.context import View
from stability_search.report.effects import WORTH_NAMING, configurations_of, estimate
from stability_search.report.figures import rate_axis
from stability_search.report.grouping import applying
from stability_search.report.parts import (
    appendix,
    effects,
    guard_ledger,
    ladders,
    outcomes,
    sensitivity,
    stability_map,
    survival,
    verdict_card,
)
from tests.report.study_reports import report_of
from tests.study_rows import (
    CANDIDATES,
    StudyCase,
    active_id,
    empty_study,
    hopeless_study,
    interrupted_study,
    ladder_rows,
    stable_study,
)

Change = Callable[[TrialRow], TrialRow]


def view_of(case: StudyCase, change: Change = lambda row: row, **more: Any) -> View:  # noqa: ANN401
    return View(report_of(replace(case, rows=tuple(map(change, case.rows))), **more))


@cache
def stable_view() -> View:
    return View(report_of(stable_study()))


# ---------------------------------------------------------------------------------- card


def test_the_card_of_a_choice_says_what_broke_the_others_and_how_today_s_did() -> None:
    card = verdict_card.build(stable_view())
    assert card.lead.startswith("Train with the settings below.")
    assert card.broke_title == "What broke the others"
    assert any("killed for bad steps" in text for text in card.broke)
    today = active_id(CANDIDATES[2])
    assert card.today.startswith(f"{today}: ")
    assert "seeds stable over 400 steps" in card.today


@pytest.mark.parametrize(
    ("make", "title"),
    [(hopeless_study, "What broke the others"), (interrupted_study, "What broke the trials"),
     (empty_study, "How the trials ended")],
)  # fmt: skip
def test_the_card_speaks_of_others_only_beside_a_configuration(
    make: Callable[[], StudyCase], title: str
) -> None:
    assert verdict_card.build(View(report_of(make()))).broke_title == title


def test_a_score_stands_with_everything_it_is_made_of() -> None:
    card = verdict_card.build(stable_view())
    value = {factor.letter: factor.value for factor in card.factors}
    assert list(value) == ["A", "B", "C", "P", "Q", "M"]
    row = stable_view().by_id[str(stable_view().verdict.choice)]
    assert 100 * value["Q"] * (1 + value["M"]) / 2 == pytest.approx(row["score"])


def test_every_configuration_beside_the_choice_says_whether_it_met_the_bar() -> None:
    comparison = verdict_card.build(stable_view()).comparison
    assert comparison is not None
    cells = dict(comparison.rows)["the bar"]
    shown = [config_id for _, config_id in comparison.headings]
    for config_id, cell in zip(shown, cells, strict=True):
        assert (cell == "met") is bool(stable_view().by_id[config_id]["meets_bar"])
    assert any(cell.startswith("missed: ") for cell in cells)


def test_steps_whose_batch_was_at_fault_are_told_beside_those_that_were_judged() -> None:
    def change(row: TrialRow) -> TrialRow:
        return replace(row, summary=replace(row.summary, num_data_steps=2))

    def note(view: View) -> str:
        return next(fact.note for fact in verdict_card.build(view).facts if "Bad" in fact.label)

    assert note(view_of(stable_study(), change)).endswith("10 steps with a faulty batch left out")
    assert "faulty" not in note(stable_view())


# ------------------------------------------------------------------------- map and rates


def test_the_map_is_drawn_over_a_setting_that_applies_to_every_trial() -> None:
    """`init_scale` tells trials of fp16 apart and means nothing in the other panels."""
    columns = stability_map.build(stable_view()).figures[0].table.columns
    assert columns[3] not in {"init_scale", "precision", "learning_rate"}
    only_fp16 = replace(
        stable_study(),
        rows=tuple(r for r in stable_study().rows if r.settings["precision"] == "fp16"),
    )
    assert stability_map.build(view_of(only_fp16)).figures[0].table.columns[3] == "init_scale"


def test_a_value_that_was_not_tried_in_a_panel_is_not_shaded() -> None:
    def change(row: TrialRow) -> TrialRow:
        is_half = row.settings["precision"] == "bf16"
        return replace(row, settings={**row.settings, "clip_norm": 1.0 if is_half else None})

    rows = tuple(row for row in stable_study().rows if row.settings["precision"] != "fp16")
    figure = stability_map.build(
        view_of(replace(stable_study(), rows=rows), change, varying=("learning_rate", "clip_norm"))
    ).figures[0]
    for panel in figure.panels:
        shade = panel.spec["data"][0]["z"]
        assert [any(z is not None for z in row) for row in shade].count(True) == 1


def test_no_ring_is_spoken_of_where_there_is_none() -> None:
    assert "The ring marks" in stability_map.build(stable_view()).figures[0].note
    unfinished = View(report_of(interrupted_study()))
    assert "The ring marks" not in stability_map.build(unfinished).figures[0].note


@pytest.mark.parametrize(
    ("rates", "texts"),
    [
        ([1e-6, 0.1], ["1e-6", "1e-5", "1e-4", "1e-3", "1e-2", "1e-1"]),
        ([10.0, 1000.0], ["10", "100", "1,000"]),
        ([0.002, 0.004], ["0.002", "0.005"]),
    ],
)
def test_an_axis_of_rates_has_ticks_within_its_range(rates: list[float], texts: list[str]) -> None:
    axis = rate_axis(rates)
    low, high = (10**end for end in axis["range"])
    pairs = zip(axis["tickvals"], axis["ticktext"], strict=True)
    assert [text for tick, text in pairs if low <= tick <= high] == texts


def test_where_colour_is_the_line_s_the_legend_of_shapes_has_none() -> None:
    assert sensitivity.build(stable_view()).figures[0].is_legend_plain
    assert not stability_map.build(stable_view()).figures[0].is_legend_plain
    html = render_html(stable_view().report)
    assert html.count('class="mark mark-plain"') >= 2


def test_the_lines_of_the_start_and_of_no_progress_have_names() -> None:
    layout = sensitivity.build(stable_view()).figures[0].panels[0].spec["layout"]
    lines = [shape for shape in layout["shapes"] if shape["type"] == "line"]
    assert len(lines) == len(layout["annotations"]) > 0


# ------------------------------------------------------------------------------ survival


def test_the_trials_under_observation_are_counted_below_the_survival() -> None:
    for panel in survival.build(stable_view()).figures[0].panels:
        counts = [trace for trace in panel.spec["data"] if trace["mode"] == "text"]
        assert len(counts) == len(panel.series)
        for trace in counts:
            numbers = [int(text.replace(",", "")) for text in trace["text"]]
            assert numbers == sorted(numbers, reverse=True)


def test_a_loss_scale_says_nothing_of_trials_in_another_precision() -> None:
    """The pilot runs in fp32 with the other settings of a study in fp16."""

    def change(row: TrialRow) -> TrialRow:
        precision = "fp32" if row.stage is Stage.PILOT else "fp16"
        scale = 1024 if row.index % 2 else 65536
        return replace(row, settings={**row.settings, "precision": precision, "init_scale": scale})

    view = view_of(stable_study(), change, varying=("learning_rate", "init_scale"))
    table = survival.build(view).figures[0].table
    counted = sum(int(row[2]) for row in table.rows if row[0] == "init_scale")
    assert counted == sum(row["precision"] == "fp16" for row in view.results)


@pytest.mark.parametrize("is_off_at_will", [False, True])
def test_a_setting_that_two_others_switch_off_is_not_compared_as_off(
    *, is_off_at_will: bool
) -> None:
    rows = [
        {"fusion": fusion, "precision": precision, "cap": "b" if k % 2 else "a"}
        for fusion in ("attention", "sum")
        for precision in ("fp32", "fp16")
        for k in range(6)
    ]
    for k, row in enumerate(rows):
        applies = row["fusion"] == "attention" and row["precision"] == "fp16"
        row["cap"] = row["cap"] if applies or (is_off_at_will and k % 3) else None
    rows += [row for row in rows if row["cap"] is not None] * 2
    found = applying(rows, "cap", ("fusion", "precision", "cap"))
    assert any(row["cap"] is None for row in found) is is_off_at_will


def test_survival_says_that_its_settings_were_picked_for_their_difference() -> None:
    note = survival.build(stable_view()).figures[0].note
    assert "differ most and are shown for that" in note
    assert "95 % intervals (log-log)" in note


# ------------------------------------------------------------------------------- ladders


def second_base() -> View:
    """Return a study in which two configurations of one ladder had all seeds."""
    case = stable_study()
    more = ladder_rows(CANDIDATES[0], 900, octaves=(1,), base=1)
    known = {(row.config_id, row.seed_index) for row in case.rows if row.stage is Stage.CONFIRM}
    new = [row for row in more if (row.config_id, row.seed_index) not in known]
    verdict = replace(case.verdict, confirmed=(*case.verdict.confirmed, new[0].config_id))
    return View(report_of(replace(case, rows=(*case.rows, *new), verdict=verdict)))


def test_a_ladder_is_drawn_once_however_many_of_its_rates_had_all_seeds() -> None:
    once = ladders.build(stable_view()).figures[0].panels
    twice = ladders.build(second_base()).figures[0].panels
    assert [panel.title for panel in twice] == [panel.title for panel in once]

    def bands(panel: Any) -> int:  # noqa: ANN401 - a panel
        return sum(shape["type"] == "rect" for shape in panel.spec["layout"]["shapes"])

    assert (bands(once[0]), bands(twice[0])) == (1, 2)


def test_a_ladder_is_named_by_few_settings_and_its_rungs_stay_upright() -> None:
    many = tuple(f"s{k}" for k in range(19))
    report = stable_view().report

    def wide(frame: Any) -> Any:  # noqa: ANN401 - a data frame
        return frame.assign(**dict.fromkeys(many, frame["config_id"]))

    tables = replace(report.tables, configurations=wide(report.tables.configurations))
    changed = replace(
        report,
        tables=tables,
        varying=("learning_rate", *many),
    )
    for panel in ladders.build(View(changed)).figures[0].panels:
        assert panel.about.count(",") <= 6
        assert panel.about.endswith("and 13 more")
        assert panel.spec["layout"]["xaxis"]["tickangle"] == 0
        assert len(panel.title) < 60


def test_rungs_with_fewer_seeds_than_the_base_are_no_proof() -> None:
    figure = ladders.build(stable_view()).figures[0]
    assert "Other rates had 2 seeds: one that held there may break on more." in figure.note
    assert "on 2 seeds each" in figure.finding


# ------------------------------------------------------------------------------- effects


def test_a_difference_is_clear_only_with_every_setting_taken_into_account() -> None:
    configurations = configurations_of(stable_view().results)
    found = estimate(configurations, stable_view().report.varying)
    clear = [effect for effect in found.effects if effect.is_clear]
    assert all(effect.size.low > WORTH_NAMING for effect in clear)
    alone = [estimate(configurations, (effect.name,)).effects for effect in found.effects]
    assert sum(one[0].is_clear for one in alone if one) >= len(clear)
    figure = effects.build(stable_view()).figures[0]
    assert f"with all {len(found.effects)} settings taken into account" in figure.note
    assert "proves a cause" in figure.note


# ----------------------------------------------------------------------------- the others


def test_trials_that_ran_together_on_a_node_do_not_hide_each_other() -> None:
    def change(row: TrialRow) -> TrialRow:
        return replace(row, started_at="2026-03-01T09:00:00+00:00", node="one")

    case = replace(interrupted_study(), rows=interrupted_study().rows[:6])
    figure = outcomes.build(view_of(case, change)).figures[1]
    heights = [y for trace in figure.panels[0].spec["data"] for y in trace["y"]]
    assert sorted(heights) == list(range(6))


def test_a_bar_too_short_for_its_number_has_none() -> None:
    def texts(num_steps: int) -> set[str]:
        report = stable_view().report
        trials = report.tables.trials
        trials = trials[trials["outcome"] == Outcome.PRUNED].assign(num_steps=num_steps)
        view = View(replace(report, tables=replace(report.tables, trials=trials)))
        bars = guard_ledger.build(view).figures[0].panels[0].spec["data"]
        return {bar["text"][1] for bar in bars}

    assert texts(1) == {""}
    assert "" not in texts(100)


def test_the_appendix_names_the_command_that_made_the_run_and_nothing_twice() -> None:
    made = {"command": "stability-search run --space a.yaml", "device": "cpu", "python": "3.11"}
    view = view_of(stable_study(), environment=made, command="stability-search report x")
    facts = appendix.build(view).facts
    assert dict(facts)["command"] == made["command"]
    assert len(dict(facts)) == len(facts)
    assert "stability-search report x" not in render_html(view.report)
