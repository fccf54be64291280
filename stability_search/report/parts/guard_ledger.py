"""Part 11, guard ledger: was killing right?"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from stability_search.inert import plain
from stability_search.records.trial import Outcome
from stability_search.report.context import Row, View
from stability_search.report.control import OWN_LIMIT, control_text
from stability_search.report.figures import (
    DataTable,
    Figure,
    Panel,
    Section,
    Spec,
    layout,
    line_shape,
    mark_of,
    marks_in,
    plot_text,
    scatter,
)
from stability_search.report.wording import OUTCOME_WORDS, count, number, part
from stability_search.table import STABLE_Q

_HOUR = 3600.0
_LEAST_LABELLED = 0.04  # of all planned steps, that a bar needs for its number
_MAX_OPEN = 12  # stops up to which the ledger is open from the start

_HEAD = Section(name="guard", title="Guard ledger", question="Was killing right?")


@dataclass(frozen=True, kw_only=True, slots=True)
class _Kill:
    """One trial that was stopped for instability, and what that saved.

    Attributes:
        row: The trial.
        num_saved: Steps that were not taken.
        hours_saved: Device-hours they would have taken at the pace of the steps before.
    """

    row: Row
    num_saved: int
    hours_saved: float


def build(view: View) -> Section:
    """List every stop for instability: its evidence and what it saved; then the control."""
    if not view.results:
        return replace(_HEAD, absent="No trial has ended with a result yet.")
    kills = [_kill(view, row) for row in view.results if Outcome(row["outcome"]).is_unstable]
    if not kills:
        absent = f"None of {count(len(view.results), 'trial')} was stopped for instability."
        return replace(_HEAD, absent=absent)
    figures = [_savings(view, kills)]
    control = [kill.row for kill in kills if kill.row["control_q"] is not None]
    if control:
        figures.append(_control(view, control))
    return replace(_HEAD, figures=tuple(figures))


def _kill(view: View, row: Row) -> _Kill:
    """Work out what a stop saved; a trial that was let run on saved nothing."""
    if row["is_control"]:
        return _Kill(row=row, num_saved=0, hours_saved=0.0)
    num_saved = max(0, row["num_planned_steps"] - row["num_steps"])
    per_step = (row["train_s"] or row["wall_s"] or 0.0) / max(1, row["num_steps"])
    resources = view.study.search.resources
    devices = resources.cpu if row["device"] == "cpu" else resources.gpu or 1.0
    return _Kill(row=row, num_saved=num_saved, hours_saved=num_saved * per_step * devices / _HOUR)


def _savings(view: View, kills: Sequence[_Kill]) -> Figure:
    rows = [kill.row for kill in kills]
    marks = marks_in(rows)
    total = sum(row["num_planned_steps"] for row in rows)
    data = []
    for mark in marks:
        own = [kill.row for kill in kills if mark_of(kill.row).key == mark.key]
        planned = sum(row["num_planned_steps"] for row in own)
        taken = sum(row["num_steps"] + _run_on(row) for row in own)
        data.append(
            {
                "type": "bar",
                "orientation": "h",
                "y": ["planned", "taken"],
                "x": [planned, taken],
                "text": [
                    f"{n:,}" if n >= _LEAST_LABELLED * total else "" for n in (planned, taken)
                ],
                "textposition": "inside",
                "insidetextanchor": "middle",
                "textangle": 0,
                "textfont": {"color": "@on-mark"},
                "marker": {"color": f"@{mark.key}", "line": {"color": "@surface", "width": 1.5}},
                "hovertext": [plot_text(f"{mark.label}: {taken:,} of {planned:,} steps taken")]
                * 2,
                "hoverinfo": "text",
            }
        )
    spec: Spec = {
        "data": data,
        "layout": layout(
            {"title": {"text": "steps of the trials that were stopped", "standoff": 8},
             "rangemode": "tozero", "tickformat": ",d"},
            {"type": "category", "autorange": "reversed", "showgrid": False},
            barmode="stack",
            bargap=0.35,
        ),
    }  # fmt: skip
    return Figure(
        name="guard",
        finding=_finding(view, kills),
        panels=(Panel(title="", spec=spec, height=190),),
        legend=marks,
        note=_note(view, kills),
        table=_table(kills),
        table_title=f"The ledger: {count(len(kills), 'stop')}",
        is_table_open=len(kills) <= _MAX_OPEN,
    )


def _run_on(row: Row) -> int:
    """Return the steps that a trial of the control took after its kill."""
    return max(0, row["control_num_steps"] - row["num_steps"]) if row["is_control"] else 0


def _finding(view: View, kills: Sequence[_Kill]) -> str:
    saved = sum(kill.num_saved for kill in kills)
    hours = sum(kill.hours_saved for kill in kills)
    planned = sum(row["num_planned_steps"] for row in view.results)
    return (
        f"{count(len(kills), 'trial')} of {len(view.results):,} "
        f"{'was' if len(kills) == 1 else 'were'} stopped for instability, which saved "
        f"{saved:,} of {count(planned, 'planned step')}"
        f"{f' ({part(saved / planned)})' if saved else ''} and {_hours(hours)}."
    )


def _hours(hours: float) -> str:
    if hours >= 1:
        return f"about {number(hours)} device-hours"
    minutes = 60 * hours
    return "less than a device-minute" if minutes < 1 else f"about {minutes:.0f} device-minutes"


def _note(view: View, kills: Sequence[_Kill]) -> str:
    rule = view.study.kill_rule
    num_killed = sum(_is_killed(kill.row) for kill in kills)
    text = (
        f"The kill rule ends a trial once its evidence reaches {number(1 / rule.false_kill)}: if "
        f"the rate of bad steps was really {100 * rule.bad_rate:g} % or less, that happens to at "
        f"most {100 * rule.false_kill:g} % of trials. It ended {num_killed:,} of these "
        f"{count(len(kills), 'trial')}. Device-hours are those that the missing "
        "steps would have taken at the trial's own pace; a device is a GPU or a CPU core."
    )
    has_figure = any(kill.row["control_q"] is not None for kill in kills)
    if has_figure or not num_killed:
        return text
    control = control_text(view)
    missing = (
        "No killed trial was let run on (prune.control is 0), so nothing here checks the rule."
    )
    return f"{text} {control or missing}"


def _table(kills: Sequence[_Kill]) -> DataTable:
    has_control = any(kill.row["is_control"] for kill in kills)
    return DataTable.of(
        (
            "trial", "stopped because", "evidence", "bad steps", "stopped at step", "steps saved",
            "device-hours saved", *(("control",) if has_control else ()),
        ),
        sorted(kills, key=lambda kill: -kill.num_saved),
        lambda kill: (
            kill.row["trial_id"],
            _why(kill.row),
            number(kill.row["evidence"]),
            f"{kill.row['num_bad_steps']:,} of {kill.row['num_judged_steps']:,}",
            f"{kill.row['num_steps']:,} of {kill.row['num_planned_steps']:,}",
            f"{kill.num_saved:,}",
            number(kill.hours_saved),
            *((_control_end(kill.row),) if has_control else ()),
        ),
    )  # fmt: skip


def _is_killed(row: Row) -> bool:
    """Return True where the kill rule ended a trial, and not its own limit of bad steps."""
    return bool(row["outcome"] == Outcome.PRUNED and row["reason"] != OWN_LIMIT)


def _why(row: Row) -> str:
    reason = plain(row["reason"] or "")
    return (
        f"{OUTCOME_WORDS[row['outcome']]}: {reason}" if reason else OUTCOME_WORDS[row["outcome"]]
    )


def _control_end(row: Row) -> str:
    if not row["is_control"]:
        return ""
    end = OUTCOME_WORDS.get(row["control_outcome"] or "", "unknown end")
    return f"run on: {end}, q {number(row['control_q'])}"


def _control(view: View, rows: Sequence[Row]) -> Figure:
    """Draw what killed trials became that were let run on."""
    wrong = [row for row in rows if _was_sound(row)]
    data = [
        scatter(
            [row["num_steps"] for row in own],
            [row["control_q"] for row in own],
            color=f"@{color}",
            symbol=symbol,
            size=11,
            hover=[_hover(row) for row in own],
        )
        for own, color, symbol in (
            ([row for row in rows if row not in wrong], "pruned", "x"),
            (wrong, "stable", "circle"),
        )
        if own
    ]
    last = max(row["num_planned_steps"] for row in rows)
    spec = {
        "data": data,
        "layout": layout(
            {"range": [0, last], "title": {"text": "step of the kill", "standoff": 8}},
            {"range": [-0.06, 1.06], "tickvals": [0, 0.5, 1],
             "title": {"text": "q of the whole run"}},
            shapes=[line_shape((0, 1), (STABLE_Q, STABLE_Q), "@ink", xref="paper")],
        ),
    }  # fmt: skip
    return Figure(
        name="control",
        finding=control_text(view)
        or f"{count(len(rows), 'killed trial')} were let run on; {len(wrong):,} became sound.",
        panels=(Panel(title="", spec=spec, height=260),),
        note=(
            "Every mark is a killed trial that was let run on. At or above the dotted line, and "
            "completed, it would have been sound: killed wrongly."
        ),
        table=DataTable.of(
            ("trial", "killed at step", "evidence", "end of the whole run", "its steps", "its q"),
            rows,
            lambda row: (
                row["trial_id"],
                f"{row['num_steps']:,}",
                number(row["evidence"]),
                OUTCOME_WORDS.get(row["control_outcome"] or "", ""),
                f"{row['control_num_steps']:,}",
                number(row["control_q"]),
            ),
        ),
    )


def _was_sound(row: Row) -> bool:
    return bool(row["control_outcome"] == Outcome.COMPLETED and row["control_q"] >= STABLE_Q)


def _hover(row: Row) -> str:
    lines = (
        row["trial_id"],
        f"killed at step {row['num_steps']:,}, evidence {number(row['evidence'])}",
        _control_end(row),
    )
    return "<br>".join(plot_text(line) for line in lines)
