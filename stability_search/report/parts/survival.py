"""Part 3, survival: when does it break?"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import log10
from statistics import median_high

from stability_search.inert import plain
from stability_search.records.trial import Outcome
from stability_search.report.context import Row, View
from stability_search.report.estimates import Share, Survival, kaplan_meier
from stability_search.report.figures import (
    DataTable,
    Figure,
    Panel,
    Section,
    Spec,
    layout,
    plot_text,
)
from stability_search.report.grouping import applying, groups_of
from stability_search.report.wording import count, half_by

_MAX_PANELS = 3
_MIN_GROUP = 5  # trials a line needs
_READINGS = 4  # steps at which the table reads the staircase
_EARLY = 0.05  # of the axis: where half of the events come before, it is logarithmic
_FIRST = 0.8  # where step 0 is drawn on a logarithmic axis
_PLOT = 290  # pixels of the staircase
_ROW = 17  # pixels of a row of counts
_THINNEST, _THICKER = 2.0, 1.3  # pixels of a line

_HEAD = Section(name="survival", title="Survival", question="When does it break?")


@dataclass(frozen=True, kw_only=True, slots=True)
class _Line:
    """The trials of one value of a setting."""

    label: str
    survival: Survival


def build(view: View) -> Section:
    """Draw the share of trials without a bad step or a stop, by step and setting."""
    rows = [row for row in view.results if row["num_steps"]]
    if not rows:
        return replace(_HEAD, absent="No trial has ended with a result yet.")
    if not any(_breaks(row) for row in rows):
        steps = max(row["num_steps"] for row in rows)
        absent = (
            f"None of {count(len(rows), 'trial')} had a bad step or was stopped for instability, "
            f"over at most {count(steps, 'step')}: there is nothing to time."
        )
        return replace(_HEAD, absent=absent)
    splits = _splits(view, rows) or [("all trials", [_line("all trials", rows)])]
    figure = Figure(
        name="survival",
        finding=_finding(view, rows, splits),
        panels=tuple(_panel(name, lines, is_log=_is_early(rows)) for name, lines in splits),
        note=(
            "Kaplan-Meier with pointwise 95 % intervals (log-log). An event is the first bad "
            "step, or the stop for instability if that came earlier; every other trial is "
            "watched until it ended (a tick), and the numbers count those still watched. Seeds of "
            "one configuration count one by one, which makes the intervals too narrow. The "
            "search chose these trials, most of them where it hoped for stable ones: the lines "
            f"promise no rate.{_picked_text(view, splits)}"
        ),
        table=_table(splits),
    )
    return replace(_HEAD, figures=(figure,))


def _is_early(rows: Sequence[Row]) -> bool:
    """Return True where half of the events lie at the very left of the axis."""
    broken = [_end(row) for row in rows if _breaks(row)]
    last: int = max(row["num_steps"] for row in rows)
    return median_high(broken) < _EARLY * last


def _picked_text(view: View, splits: Sequence[tuple[str, list[_Line]]]) -> str:
    """Say that the settings were picked for how they differ, which flatters the difference."""
    picked = [name for name, _ in splits if name != "learning_rate"]
    num_others = sum(name != "learning_rate" for name in view.report.varying)
    if not picked or len(picked) == num_others:
        return ""
    return (
        f" Of {num_others:,} settings, {' and '.join(map(plain, picked))} differ most and are "
        "shown for that: some of it is chance, or another setting's doing."
    )


def _breaks(row: Row) -> bool:
    """Return True where a trial had a bad step or was stopped for instability."""
    return row["first_bad_step"] is not None or Outcome(row["outcome"]).is_unstable


def _end(row: Row) -> int:
    """Return the step of the event, or the last step seen without one."""
    step = row["first_bad_step"]
    return int(row["num_steps"] if step is None else min(step, row["num_steps"]))


def _line(label: str, rows: Sequence[Row]) -> _Line:
    estimate = kaplan_meier([_end(row) for row in rows], [_breaks(row) for row in rows])
    return _Line(label=label, survival=estimate)


def _splits(view: View, rows: Sequence[Row]) -> list[tuple[str, list[_Line]]]:
    """Return the settings whose values survive most differently, the learning rate first."""
    horizon = view.study.trial_steps
    found = []
    for name in view.report.varying:
        applied = applying(rows, name, view.report.varying)
        groups = [(text, own) for text, own in groups_of(applied, name) if len(own) >= _MIN_GROUP]
        if len(groups) > 1:
            lines = [_line(text, own) for text, own in groups]
            worst, best = _extremes(lines, horizon)
            found.append((_left(best, horizon) - _left(worst, horizon), name, lines))
    found.sort(key=lambda one: (one[1] != "learning_rate", -one[0]))  # stable: ties keep order
    return [(name, lines) for _, name, lines in found[:_MAX_PANELS]]


def _panel(name: str, lines: Sequence[_Line], *, is_log: bool) -> Panel:
    last = max(line.survival.ends[-1] for line in lines)
    data: list[Spec] = []
    for i, line in enumerate(lines):
        width = _THINNEST + _THICKER * (len(lines) - 1 - i)  # where lines coincide, all are seen
        data += [_band(line.survival, i), _stairs(line, i, width), _ticks(line.survival, i)]
    readings = _readings(last, is_log=is_log)
    data += [_at_risk(line.survival, i, readings) for i, line in enumerate(lines)]
    if is_log:
        for trace in data:
            trace["x"] = [max(x, _FIRST) for x in trace["x"]]
    height = _PLOT + _ROW * len(lines)
    counts = _ROW * len(lines) / height
    spec = {
        "data": data,
        "layout": layout(
            {**_step_axis(last, readings, is_log=is_log), "anchor": "y2"},
            {
                "domain": [counts + 0.03, 1],
                "range": [-0.03, 1.04],
                "tickvals": [0, 0.25, 0.5, 0.75, 1],
                "ticktext": ["none", "25 %", "50 %", "75 %", "all"],
                "title": {"text": "without a bad step", "standoff": 6},
            },
            yaxis2={
                "domain": [0, counts],
                "range": [len(lines) - 0.4, -0.6],
                "tickvals": [(len(lines) - 1) / 2],
                "ticktext": ["watched"],
                "showgrid": False,
                "zeroline": False,
                "fixedrange": True,
                "automargin": True,
            },
        ),
    }
    series = tuple(
        (f"{line.label} ({line.survival.num_trials:,})", f"series-{i}")
        for i, line in enumerate(lines)
    )
    return Panel(title=plain(name), spec=spec, height=height, series=series)


def _readings(last: int, *, is_log: bool) -> list[int]:
    """Return the steps below which the trials under observation are counted."""
    if is_log:
        return [10**k for k in range(len(str(last))) if 3 * 10**k <= last] + [last]
    return [round(last * k / _READINGS) for k in range(_READINGS + 1)]


def _step_axis(last: int, readings: Sequence[int], *, is_log: bool) -> Spec:
    shared = {
        "tickmode": "array",
        "tickvals": list(readings),
        "ticktext": [f"{step:,}" for step in readings],
    }
    if is_log:
        bounds = [log10(_FIRST * 0.9), log10(1.15 * last)]
        title = {"text": "step (log scale)", "standoff": 8}
        return {**shared, "type": "log", "range": bounds, "title": title}
    title = {"text": "step", "standoff": 8}
    return {**shared, "range": [-0.03 * last, 1.05 * last], "title": title}


def _at_risk(survival: Survival, i: int, readings: Sequence[int]) -> Spec:
    """Return how many trials were still watched just before some steps, as a row of numbers."""
    return {
        "type": "scatter",
        "mode": "text",
        "x": list(readings),
        "y": [i] * len(readings),
        "text": [f"{survival.at_risk(step - 1):,}" for step in readings],
        "textfont": {"size": 11, "color": f"@series-{i}"},
        "yaxis": "y2",
        "cliponaxis": False,
        "hoverinfo": "skip",
    }


def _corners(survival: Survival) -> tuple[list[int], list[Share]]:
    """Return the staircase from step 0 to the last step that anybody saw."""
    start = Share(value=1.0, low=1.0, high=1.0) if survival.steps else survival.at(0)
    steps = [0, *survival.steps, survival.ends[-1]]
    shares = [start, *survival.shares]
    return steps, [*shares, shares[-1]]


def _stairs(line: _Line, i: int, width: float) -> Spec:
    steps, shares = _corners(line.survival)
    left = [line.survival.num_trials, *line.survival.num_at_risk, line.survival.at_risk(steps[-1])]
    return {
        "type": "scatter",
        "mode": "lines",
        "x": steps,
        "y": [round(share.value, 4) for share in shares],
        "line": {"color": f"@series-{i}", "width": width, "shape": "hv"},
        "hovertext": [
            f"{plot_text(line.label)}, step {step}: {share_text(share)}, {num:,} watched"
            for step, share, num in zip(steps, shares, left, strict=True)
        ],
        "hoverinfo": "text",
    }


def _band(survival: Survival, i: int) -> Spec:
    steps, shares = _corners(survival)
    xs, lows, highs = [], [], []
    for k, share in enumerate(shares):
        begin, end = steps[k], steps[min(k + 1, len(steps) - 1)]
        xs += [begin, end]
        lows += [share.low, share.low]
        highs += [share.high, share.high]
    return {
        "type": "scatter",
        "mode": "lines",
        "x": [*xs, *reversed(xs)],
        "y": [round(y, 4) for y in (*highs, *reversed(lows))],
        "fill": "toself",
        "fillcolor": f"@series-{i}",
        "line": {"width": 0, "color": f"@series-{i}"},
        "opacity": 0.13,
        "hoverinfo": "skip",
    }


def _ticks(survival: Survival, i: int) -> Spec:
    """Return a mark at every step at which a trial ended without an event."""
    events = dict.fromkeys(survival.steps)
    ends = sorted({end for end in survival.ends if end not in events})
    return {
        "type": "scatter",
        "mode": "markers",
        "x": ends,
        "y": [round(survival.at(end).value, 4) for end in ends],
        "marker": {"symbol": "line-ns-open", "size": 9, "color": f"@series-{i}",
                   "line": {"width": 1.6, "color": f"@series-{i}"}},
        "hoverinfo": "skip",
    }  # fmt: skip


def share_text(share: Share) -> str:
    """Return a share with its interval in per cent; a bare 0 or 100 would promise too much."""
    low, value, high = (f"{100 * part:.0f}" for part in (share.low, share.value, share.high))
    if share.value in {0, 1}:
        return f"all (at least {low} %)" if share.value else f"none (at most {high} %)"
    said = {"0": "below 1 %", "100": "above 99 %"}.get(value, f"{value} %")
    return f"{said} ({low} to {high} %)"


def _finding(view: View, rows: Sequence[Row], splits: Sequence[tuple[str, list[_Line]]]) -> str:
    broken = [_end(row) for row in rows if _breaks(row)]
    text = (
        f"{len(broken):,} of {count(len(rows), 'trial')} had a bad step or "
        f"{'was' if len(broken) == 1 else 'were'} stopped for instability, {half_by(broken)}"
    )
    horizon = view.study.trial_steps
    extremes = [(name, *_extremes(lines, horizon)) for name, lines in splits]
    name, worst, best = max(
        extremes, key=lambda one: _left(one[2], horizon) - _left(one[1], horizon)
    )
    if _left(best, horizon) == _left(worst, horizon):
        return f"{text}."
    return (
        f"{text}; by step {horizon:,}, of {best.survival.num_trials:,} with {plain(name)} "
        f"{best.label} {_kept(best, horizon)} were still without one, of "
        f"{worst.survival.num_trials:,} with {worst.label} {_kept(worst, horizon)}."
    )


def _extremes(lines: Sequence[_Line], step: int) -> tuple[_Line, _Line]:
    """Return the lines with the fewest and the most trials left."""
    ranked = sorted(lines, key=lambda line: _left(line, step))
    return ranked[0], ranked[-1]


def _left(line: _Line, step: int) -> float:
    return line.survival.at(step).value


def _kept(line: _Line, step: int) -> str:
    return share_text(line.survival.at(step))


def _table(splits: Sequence[tuple[str, list[_Line]]]) -> DataTable:
    last = max(line.survival.ends[-1] for _, lines in splits for line in lines)
    steps = sorted({max(1, round(last * k / _READINGS)) for k in range(1, _READINGS + 1)})
    return DataTable(
        columns=("setting", "value", "trials", "broke", *(f"left at step {s:,}" for s in steps)),
        rows=tuple(
            (
                plain(name),
                line.label,
                str(line.survival.num_trials),
                str(line.survival.num_events),
                *(_reading(line.survival, step) for step in steps),
            )
            for name, lines in splits
            for line in lines
        ),
    )


def _reading(survival: Survival, step: int) -> str:
    if survival.ends[-1] < step:
        return ""
    return f"{share_text(survival.at(step))}, {survival.at_risk(step - 1):,} watched"
