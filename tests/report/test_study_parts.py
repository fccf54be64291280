"""Card, map, sensitivity, outcomes, ladders, effects, appendix: what they say, and what not."""

from collections.abc import Callable
from dataclasses import replace
from datetime import datetime, timedelta
from functools import cache
from itertools import pairwise
from typing import Any

import pytest

from stability_search.records.trial import Outcome, Stage, TrialRow
from stability_search.report import render_html, render_markdown, verdict_lines
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
from stability_search.settings.study import Resources
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


def test_the_chips_show_what_was_searched_and_chosen_to_be_off() -> None:
    view = stable_view()
    chips = dict(verdict_card.build(view).settings)
    assert chips["precision"] == "bf16"
    assert chips["clip_norm"] == "1"
    assert chips["attention_clamp"] == "null"  # a choice like any other
    assert "init_scale" not in chips  # bf16 has no loss scale


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


def with_verdict(case: StudyCase, **changed: Any) -> View:  # noqa: ANN401 - any field of it
    return View(report_of(replace(case, verdict=replace(case.verdict, **changed))))


def test_a_choice_that_is_also_the_fastest_is_called_that() -> None:
    assert "its margin is 2 doublings against" in verdict_card.build(stable_view()).trade
    view = with_verdict(stable_study(), fastest=stable_study().verdict.choice)
    said = "The choice is also the fastest configuration that meets the bar."
    assert verdict_card.build(view).trade == said


def test_a_choice_alone_has_its_numbers_too() -> None:
    """A gate confirms one configuration: the task's metrics stand nowhere else."""
    case = replace(stable_study(), start_config_ids=())
    choice = str(case.verdict.choice)
    view = with_verdict(case, fastest=choice, tied=(), confirmed=(choice,))
    html = render_html(view.report)
    assert '<th scope="row">word_error_rate</th>' in html
    assert "<h2>In numbers</h2>" in html
    assert "<h2>Beside the others</h2>" not in html
    assert "<h2>Beside the others</h2>" in render_html(stable_view().report)


def test_configurations_without_a_column_are_counted_everywhere() -> None:
    case = stable_study()
    searched = dict.fromkeys(r.config_id for r in case.rows if r.stage is Stage.SEARCH)
    view = with_verdict(case, confirmed=(*case.verdict.confirmed, *list(searched)[:10]))
    others = set(searched) & set(case.verdict.confirmed)
    said = f"{7 - len(others)} more stand in configurations.csv"
    assert said in render_html(view.report)
    assert said in verdict_lines(view.report)
    assert f"{said}." in render_markdown(view.report).splitlines()
    assert "more stand in" not in render_html(stable_view().report)


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


def test_the_bar_of_the_ring_is_as_long_as_the_margin() -> None:
    view = stable_view()
    row = view.by_id[str(view.verdict.choice)]
    assert row["margin_octaves"] == 3
    panels = stability_map.build(view).figures[0].panels
    bars = [
        trace["x"]
        for panel in panels
        for trace in panel.spec["data"]
        if trace.get("mode") == "lines+markers"
    ]
    assert bars == [[row["learning_rate"], 8 * row["learning_rate"]]]


def rings(view: View) -> list[tuple[float, float]]:
    return [
        (trace["x"][0], trace["y"][0])
        for panel in stability_map.build(view).figures[0].panels
        for trace in panel.spec["data"]
        if trace.get("marker", {}).get("symbol") == "circle-open"
        and trace["marker"]["color"] == "@ink"
    ]


def test_the_ring_has_a_place_where_only_learning_rate_and_precision_vary() -> None:
    choice = stable_view().by_id[str(stable_view().verdict.choice)]
    view = View(report_of(stable_study(), varying=("learning_rate", "precision")))
    figure = stability_map.build(view).figures[0]
    assert figure.table.columns[3] == "stage"
    texts = figure.panels[0].spec["layout"]["yaxis"]["ticktext"]
    assert rings(view) == [(choice["learning_rate"], float(texts.index("confirm")))]
    assert "The ring marks" in figure.note


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


def test_bars_of_one_row_of_the_timeline_do_not_overlap_by_a_part_of_a_second() -> None:
    def change(row: TrialRow) -> TrialRow:
        start = f"2026-03-01T09:00:0{row.index}.{row.index}50Z"
        summary = replace(row.summary, wall_s=1.1)
        return replace(row, started_at=start, node="one", summary=summary)

    case = replace(interrupted_study(), rows=interrupted_study().rows[:6])
    figure = outcomes.build(view_of(case, change)).figures[1]
    bars = sorted(
        (y, datetime.fromisoformat(base), x)
        for trace in figure.panels[0].spec["data"]
        for y, base, x in zip(trace["y"], trace["base"], trace["x"], strict=True)
    )
    assert {y for y, _, _ in bars} == {0}
    for (_, start, length), (_, following, _) in pairwise(bars):
        assert start + timedelta(milliseconds=length) == following


def test_a_run_that_was_resumed_is_not_said_to_have_trained_in_between() -> None:
    def change(row: TrialRow) -> TrialRow:
        return replace(row, started_at=f"2026-03-0{1 + 3 * (row.index % 2)}T09:00:00+00:00")

    case = replace(interrupted_study(), rows=interrupted_study().rows[:6])
    finding = outcomes.build(view_of(case, change)).figures[1].finding
    assert finding.startswith("From the first start to the last end it took 4,320 minutes, on ")


@pytest.mark.parametrize(
    ("hosts", "words"),
    [
        (("one", ""), "on 1 node; 3 trials lost to a machine, 3 of them nobody knows where."),
        (
            ("", ""),
            "on an unknown node; 3 trials lost to a machine, 3 of them nobody knows where.",
        ),
        (("one", "two"), "on 2 nodes; 3 trials lost to a machine, 3 of them on node-2."),
    ],
)
def test_a_node_that_nobody_knows_is_neither_counted_nor_named(
    hosts: tuple[str, str], words: str
) -> None:
    def change(row: TrialRow) -> TrialRow:
        if row.index % 2 == 0:
            return replace(row, node=hosts[0])
        summary = replace(row.summary, outcome=Outcome.INFRASTRUCTURE)
        return replace(row, node=hosts[1], summary=summary)

    case = replace(interrupted_study(), rows=interrupted_study().rows[:6])
    assert outcomes.build(view_of(case, change)).figures[1].finding.endswith(words)


def test_saved_hours_count_every_device_of_a_trial() -> None:
    def saved(resources: Resources) -> float:
        case = stable_study()
        search = replace(case.study.search, resources=resources)
        only = tuple(row for row in case.rows if row.trial_id != killed.trial_id)
        study = replace(case.study, search=search)
        view = View(report_of(replace(case, study=study, rows=(*only, slow))))
        table = guard_ledger.build(view).figures[0].table
        at = table.columns.index("device-hours saved")
        [row] = [row for row in table.rows if row[0] == slow.trial_id]
        return float(row[at].replace(",", ""))

    killed = next(r for r in stable_study().rows if r.summary.outcome is Outcome.PRUNED)
    steps = killed.summary.num_planned_steps - 100
    slow = replace(killed, summary=replace(killed.summary, num_steps=100, train_s=36_000.0))
    assert saved(Resources(cpu=1)) == pytest.approx(steps * 0.1, rel=5e-3)
    assert saved(Resources(cpu=4)) == pytest.approx(steps * 0.4, rel=5e-3)


@pytest.mark.parametrize("num_saved", [0, 1])
def test_a_saved_share_is_never_zero_per_cent(num_saved: int) -> None:
    case = stable_study()
    ends = {row.trial_id: row.summary.num_planned_steps for row in case.rows}
    first = next(r.trial_id for r in case.rows if r.summary.outcome is Outcome.PRUNED)

    def change(row: TrialRow) -> TrialRow:
        if not row.summary.outcome.is_unstable:
            return row
        steps = ends[row.trial_id] - (num_saved if row.trial_id == first else 0)
        return replace(row, summary=replace(row.summary, num_steps=steps))

    finding = guard_ledger.build(view_of(case, change)).figures[0].finding
    assert ("(less than 0.1 %)" if num_saved else "planned steps and ") in finding
    assert finding.count("(") == num_saved
    assert "(0 %)" not in finding


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


def test_the_appendix_names_no_host_however_short_and_nothing_that_is_empty() -> None:
    made = {"nodes": [{"node": "vm", "cuda": "", "cpu": "Xeon vmx", "gpus": []}]}
    view = view_of(stable_study(), lambda row: replace(row, node="vm"), environment=made)
    assert dict(appendix.build(view).facts)["nodes"] == "cpu Xeon vmx, node node-1"
