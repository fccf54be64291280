"""What the report says of the control: counts, and a bound that is never rounded down."""

import json
from dataclasses import replace

import jsonschema
import pytest

from stability_search.records.trial import ControlEnd, Outcome, Stage, TrialRow
from stability_search.report import (
    Report,
    json_schema,
    render_html,
    render_json,
    render_markdown,
    verdict_lines,
)
from stability_search.report.context import View
from stability_search.report.control import Control, control_of, control_text
from stability_search.report.parts import guard_ledger
from stability_search.table import records
from tests.report.study_reports import report_of
from tests.study_rows import settings, stable_study, summary_of

_SOUND = summary_of(settings(learning_rate=8e-3), steps=200)  # what a calm run reaches


def end_of(outcome: Outcome, *, is_sound: bool = True) -> ControlEnd:
    """Return the end of a control whose run as a whole was calm and learned, or did not."""
    probes = _SOUND.probe_losses if is_sound else (_SOUND.probe_losses[0],) * 11
    return ControlEnd(
        outcome=outcome,
        num_steps=200,
        num_judged_steps=200,
        judged_losses=_SOUND.judged_losses,
        probe_steps=_SOUND.probe_steps,
        probe_losses=probes,
    )


def controlled(*ends: ControlEnd | None, share: float = 0.05) -> Report:
    """Return a study whose killed search trials ended like this; the others are left out."""
    case = stable_study()
    killed = [r for r in case.rows if is_killed(r)]
    assert len(killed) >= len(ends)
    let_run_on = [
        replace(row, summary=replace(row.summary, control=end))
        for row, end in zip(killed, ends, strict=False)
    ]
    rows = (*(row for row in case.rows if not is_killed(row)), *let_run_on)
    return report_of(replace(case, rows=rows, study=replace(case.study, control=share)))


def is_killed(row: TrialRow) -> bool:
    return row.stage is Stage.SEARCH and row.summary.outcome is Outcome.PRUNED


SOUND = end_of(Outcome.COMPLETED)
LEARNED_NOTHING = end_of(Outcome.COMPLETED, is_sound=False)
DIVERGED = end_of(Outcome.DIVERGED)
ERROR = end_of(Outcome.USER_ERROR)


def test_one_of_three_would_have_been_sound_and_the_bound_is_clopper_and_pearsons() -> None:
    view = View(controlled(SOUND, LEARNED_NOTHING, DIVERGED, None))
    found = control_of(view)
    assert found is not None
    assert found == Control(
        num_killed=4, num_run_on=3, num_results=3, num_sound=1, bound=found.bound
    )
    # P(at most 1 of 3) = .05 at that rate.
    p = found.bound
    assert (1 - p) ** 3 + 3 * p * (1 - p) ** 2 == pytest.approx(0.05)
    assert control_text(view) == (
        "Control: 3 of 4 killed trials were let run on; 1 of them would have completed with q of "
        "at least 1/2: at most 87 % of kills at 95 % confidence."
    )


@pytest.mark.parametrize(
    ("ends", "text"),
    [
        ((), "Control: the kill rule killed no trial of the search."),
        ((None,), "Control: 0 of 1 killed trial were let run on."),
        ((ERROR, None), "Control: 1 of 2 killed trials was let run on, and none gave a result."),
        (
            (ERROR, DIVERGED),
            (
                "Control: 2 of 2 killed trials were let run on; 0 of 1 results would have "
                "completed with q of at least 1/2: at most 95 % of kills at 95 % confidence."
            ),
        ),
        (
            (SOUND,),
            (
                "Control: 1 of 1 killed trial was let run on; 1 of them would have completed with "
                "q of at least 1/2: at most 100 % of kills at 95 % confidence."
            ),
        ),
    ],
)
def test_few_kills_and_ends_that_say_nothing_are_said_as_they_are(
    ends: tuple[ControlEnd | None, ...], text: str
) -> None:
    assert control_text(View(controlled(*ends))) == text


def test_the_users_own_limit_is_no_kill() -> None:
    case = stable_study()
    rows = tuple(
        replace(row, summary=replace(row.summary, reason="max_bad_steps"))
        if is_killed(row)
        else row
        for row in case.rows
    )
    report = report_of(replace(case, rows=rows, study=replace(case.study, control=1.0)))
    assert control_text(View(report)) == "Control: the kill rule killed no trial of the search."


def test_page_summary_terminal_and_json_say_it_and_a_study_without_control_does_not() -> None:
    report = controlled(SOUND, DIVERGED)
    text = control_text(View(report))
    assert "2 of 2 killed trials" in text
    assert text in render_html(report)
    assert text in render_markdown(report)
    assert text in verdict_lines(report)
    document = render_json(report)
    jsonschema.Draft202012Validator(json_schema()).validate(document)
    assert json.loads(json.dumps(document["control"], allow_nan=False))["num_sound"] == 1
    silent = controlled(SOUND, DIVERGED, share=0.0)
    assert render_json(silent)["control"] is None
    jsonschema.Draft202012Validator(json_schema()).validate(render_json(silent))
    for shown in (render_html(silent), render_markdown(silent), *verdict_lines(silent)):
        assert "Control:" not in shown


def test_the_trials_table_keeps_the_kill_and_shows_the_later_end_beside_it() -> None:
    report = controlled(SOUND, LEARNED_NOTHING, ERROR, None)
    rows = [r for r in records(report.tables.trials) if r["outcome"] == "pruned"]
    rows = [r for r in rows if r["stage"] == "search"]
    assert [r["is_control"] for r in rows] == [True, True, True, False]
    ends = [(r["control_outcome"], r["control_num_steps"]) for r in rows]
    assert ends == [("completed", 200), ("completed", 200), ("user_error", 200), (None, None)]
    assert [r["q"] for r in rows] == [0.0] * 4
    assert [r["is_stable"] for r in rows] == [False] * 4
    assert all(r["num_steps"] < 200 for r in rows)
    first, second = rows[0]["control_q"], rows[1]["control_q"]
    assert first >= 0.5 > second == 0.0
    assert rows[2]["control_q"] is rows[3]["control_q"] is None


def test_the_ledger_shows_what_became_of_killed_trials_and_counts_their_steps_as_taken() -> None:
    view = View(controlled(SOUND, LEARNED_NOTHING, DIVERGED, None))
    ledger, control = guard_ledger.build(view).figures
    assert "control" in ledger.table.columns
    run_on = [row for row in ledger.table.rows if row[-1]]
    saved = ledger.table.columns.index("steps saved")
    assert [row[saved] for row in run_on] == ["0", "0", "0"]
    traces = control.panels[0].spec["data"]
    counts = {trace["marker"]["symbol"]: len(trace["x"]) for trace in traces}
    assert counts == {"circle": 1, "x": 2}
    assert control.finding == control_text(view)
    assert control_text(view) not in ledger.note


def test_a_ledger_without_control_says_that_nothing_checks_the_rule() -> None:
    (figure,) = guard_ledger.build(View(report_of(stable_study()))).figures
    assert "prune.control is 0" in figure.note
    assert "control" not in figure.table.columns
