"""Part 8, outcomes and a timeline by node: the configuration, or one sick node?"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import datetime, timedelta

from stability_search.records.trial import Outcome
from stability_search.report.context import Row, View
from stability_search.report.control import control_text
from stability_search.report.figures import (
    DataTable,
    Figure,
    Panel,
    Section,
    Spec,
    drawn_text,
    layout,
    mark_of,
    marks_in,
    plot_text,
    spread_evenly,
)
from stability_search.report.wording import count, number, outcomes_text

_STAGES = ("pilot", "search", "confirm")
_EPOCH = datetime(1970, 1, 1)  # noqa: DTZ001 - plotly draws wall clock; every time here is UTC
_UNKNOWN = "unknown"  # node
_LANE = 22  # pixels
_MAX_TIMELINE = 900  # pixels of all lanes
_BETWEEN_NODES = 0.6  # lanes
_NO_RESULT = (Outcome.USER_ERROR, Outcome.INFRASTRUCTURE)

_HEAD = Section(name="outcomes", title="Outcomes", question="The configuration, or one sick node?")


def build(view: View) -> Section:
    """Draw how the trials of each stage ended, and when and where they ran."""
    if not view.trials:
        return replace(_HEAD, absent="No trial has ended yet.")
    figures = [_counts(view)]
    timed = [row for row in view.trials if row["started_at"] and _start(row) is not None]
    if timed:
        figures.append(_timeline(timed))
    return replace(_HEAD, figures=tuple(figures))


def _counts(view: View) -> Figure:
    stages = [stage for stage in _STAGES if view.in_stage(stage)]
    counts = {s: Counter(mark_of(row).key for row in view.in_stage(s)) for s in stages}
    marks = marks_in(view.trials)
    data = [
        {
            "type": "bar",
            "orientation": "h",
            "y": stages,
            "x": [counts[stage][mark.key] for stage in stages],
            "marker": {"color": f"@{mark.key}", "line": {"color": "@surface", "width": 1.5}},
            "text": [str(counts[stage][mark.key] or "") for stage in stages],
            "textposition": "inside",
            "insidetextanchor": "middle",
            "textangle": 0,
            "textfont": {"color": "@on-mark"},
            "hovertext": [
                f"{stage}: {counts[stage][mark.key]} {plot_text(mark.label)}" for stage in stages
            ],
            "hoverinfo": "text",
        }
        for mark in marks
    ]
    spec: Spec = {
        "data": data,
        "layout": layout(
            {"title": {"text": "trials", "standoff": 8}, "rangemode": "tozero"},
            {"type": "category", "autorange": "reversed", "showgrid": False},
            barmode="stack",
            bargap=0.35,
        ),
    }
    return Figure(
        name="outcomes",
        finding=_finding(view),
        panels=(Panel(title="", spec=spec, height=80 + 56 * len(stages)),),
        legend=marks,
        note=control_text(view),
        table=DataTable(
            columns=("end", *stages),
            rows=tuple(
                (mark.label, *(str(counts[stage][mark.key]) for stage in stages)) for mark in marks
            ),
        ),
    )


def _finding(view: View) -> str:
    lost = sum(view.outcomes[outcome] for outcome in _NO_RESULT)
    stable = sum(bool(row["is_stable"]) for row in view.trials)
    text = (
        f"Of {count(len(view.trials), 'trial')}: {outcomes_text(view, view.trials)}; {stable:,} "
        f"{'was' if stable == 1 else 'were'} stable."
    )
    if lost:
        verb = "says" if lost == 1 else "say"
        text += f" {count(lost, 'trial')} {verb} nothing about stability and count against nobody."
    return text


def _start(row: Row) -> datetime | None:
    try:
        return datetime.fromisoformat(row["started_at"]).replace(tzinfo=None)
    except ValueError:
        return None


def _timeline(rows: Sequence[Row]) -> Figure:
    nodes = sorted({row["node"] or _UNKNOWN for row in rows})
    data = []
    marks = marks_in(rows)
    drawn = spread_evenly(rows, len(rows))
    lanes = _lanes(drawn)
    middles, places = _places(nodes, lanes, drawn)
    for mark in marks:
        own = [row for row in drawn if mark_of(row).key == mark.key]
        starts = [_start(row) or _EPOCH for row in own]
        data.append(
            {
                "type": "bar",
                "orientation": "h",
                "base": [start.isoformat(sep=" ", timespec="milliseconds") for start in starts],
                "x": [1000 * max(0.0, row["wall_s"] or 0.0) for row in own],
                "y": [places[id(row)] for row in own],
                "width": [0.82] * len(own),
                "marker": {
                    "color": f"@{mark.key}",
                    "line": {"color": f"@{mark.key}", "width": 1.5},
                },
                "hovertext": [
                    "<br>".join(
                        plot_text(line)
                        for line in (row["trial_id"], mark.label, f"{number(row['wall_s'])} s")
                    )
                    for row in own
                ],
                "hoverinfo": "text",
            }
        )
    spec: Spec = {
        "data": data,
        "layout": layout(
            {"type": "date", "title": {"text": "time, UTC", "standoff": 8}},
            {"range": [max(places.values()) + 0.7, -0.7], "showgrid": False,
             "tickmode": "array", "tickvals": middles,
             "ticktext": [plot_text(node) for node in nodes]},
            barmode="overlay",
        ),
    }  # fmt: skip
    height = 80 + max(44, min(_MAX_TIMELINE, _LANE * round(max(places.values()) + 1)))
    return Figure(
        name="timeline",
        finding=_timeline_finding(rows, nodes),
        panels=(Panel(title="", spec=spec, height=height),),
        legend=marks,
        note=f"A row holds trials that ran one after the other.{drawn_text(len(rows))}",
        table=DataTable.of(
            ("node", "trial", "attempt", "started, UTC", "seconds", "end"),
            rows,
            lambda row: (
                row["node"] or _UNKNOWN,
                row["trial_id"],
                str(row["attempt"]),
                row["started_at"],
                number(row["wall_s"]),
                mark_of(row).label,
            ),
        ),
    )


def _lanes(rows: Sequence[Row]) -> dict[int, int]:
    """Return a lane for each trial, so that no two of a node that ran together share one."""
    busy: dict[str, list[datetime]] = {}
    lanes = {}
    for row in sorted(rows, key=lambda row: (row["started_at"], row["trial_id"])):
        start = _start(row) or _EPOCH
        until = busy.setdefault(row["node"] or _UNKNOWN, [])
        lane = next((i for i, end in enumerate(until) if end <= start), len(until))
        until[lane : lane + 1] = [start + timedelta(seconds=row["wall_s"] or 0.0)]
        lanes[id(row)] = lane
    return lanes


def _places(
    nodes: Sequence[str], lanes: Mapping[int, int], rows: Sequence[Row]
) -> tuple[list[float], dict[int, float]]:
    """Return the middle of each node and the height of each trial, a unit per lane."""
    middles: list[float] = []
    places: dict[int, float] = {}
    top = 0.0
    for node in nodes:
        own = [row for row in rows if (row["node"] or _UNKNOWN) == node]
        num_lanes = 1 + max((lanes[id(row)] for row in own), default=0)
        places |= {id(row): top + lanes[id(row)] for row in own}
        middles.append(top + (num_lanes - 1) / 2)
        top += num_lanes + _BETWEEN_NODES
    return middles, places


def _timeline_finding(rows: Sequence[Row], nodes: Sequence[str]) -> str:
    begin = min(_start(row) or _EPOCH for row in rows)
    end = max((_start(row) or _EPOCH) + timedelta(seconds=row["wall_s"] or 0.0) for row in rows)
    seconds = (end - begin).total_seconds()
    took = count(round(seconds), "second")
    if seconds >= 120:  # noqa: PLR2004 - two minutes
        took = f"{number(round(seconds / 60, 1))} minutes"
    known = [node for node in nodes if node != _UNKNOWN]
    where = count(len(known), "node") if known else "an unknown node"
    text = f"From the first start to the last end it took {took}, on {where}"
    lost = Counter(r["node"] or _UNKNOWN for r in rows if r["outcome"] == Outcome.INFRASTRUCTURE)
    if not lost:
        return f"{text}; no machine was lost."
    node, seen = min(lost.items(), key=lambda item: (-item[1], item[0]))
    total = count(sum(lost.values()), "trial")
    on = "nobody knows where" if node == _UNKNOWN else f"on {node}"
    return f"{text}; {total} lost to a machine, {seen} of them {on}."
