"""Part 2, learning-rate sensitivity: how wide is the usable range?"""

import math
import statistics
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from stability_search.report.advice import contrasts
from stability_search.report.context import Row, View
from stability_search.report.figures import (
    GUIDE_MARGIN,
    DataTable,
    Figure,
    Panel,
    Section,
    Spec,
    drawn_text,
    guide_label,
    layout,
    line_shape,
    mark_of,
    marks_in,
    plot_text,
    rate_axis,
    scatter,
    spread_evenly,
)
from stability_search.report.grouping import Group, groups_of, label
from stability_search.report.wording import count, number

_PILOT = "pilot, fp32"
_LOG_FROM = 20.0  # ratio of losses above which the axis is logarithmic
_RAIL = "no finite end"

_HEAD = Section(
    name="sensitivity", title="Learning-rate sensitivity", question="How wide is the usable range?"
)


def build(view: View) -> Section:
    """Draw the last probe level of pilot and search trials over the learning rate."""
    rows = [
        row
        for row in view.results
        if row["stage"] in {"pilot", "search"} and row.get("learning_rate")
    ]
    starts = [row["probe_first"] for row in rows if row["probe_first"] is not None]
    if not starts:
        return replace(_HEAD, absent="No trial has read its probe yet.")
    cap = statistics.median(starts)
    name = _splitter(view, rows)
    e0 = view.report.yardsticks[view.study.trial_steps].e0
    series = _series(rows, name)
    label_of = {row["trial_id"]: label for label, own in series for row in own}
    figure = Figure(
        name="sensitivity",
        finding=_finding(view, rows, cap),
        panels=(Panel(title="", spec=_spec(series, len(rows), cap, e0), height=380),),
        legend=marks_in(rows),
        is_legend_plain=True,
        series=tuple((label, f"series-{i}") for i, (label, _) in enumerate(series)),
        note=(
            "Each line joins the median of every octave; dotted, the loss at the start and E_0, "
            "above which nothing was learned. A loss above its start is drawn at the "
            "start; a trial without a finite end stands on the rail at the top. Here colour is "
            f"the line's; shape says how a trial ended.{_left_out(view, rows, series)}"
            f"{drawn_text(len(rows))}"
        ),
        table=DataTable.of(
            ("trial", "series", "learning rate", "first probe", "last probe", "end"),
            rows,
            lambda row: (
                row["trial_id"],
                label_of.get(row["trial_id"], _label(row, name)),
                number(row["learning_rate"]),
                number(row["probe_first"]),
                number(row["probe_last"]),
                mark_of(row).label,
            ),
        ),
    )
    return replace(_HEAD, figures=(figure,))


def _splitter(view: View, rows: Sequence[Row]) -> str:
    """Choose what makes a line: precision, else clipping or clamping, whichever matters most."""
    if "precision" in view.report.varying:
        return "precision"
    names = [c.name for c in contrasts(view, rows)]
    guards = ("clip_norm", "attention_clamp", "attention_logit_cap")
    return next((n for n in names if n in guards), "stage")


def _label(row: Row, name: str) -> str:
    return label(row.get(name))


def _series(rows: Sequence[Row], name: str) -> list[Group]:
    """Return what each line joins: the pilot, then the trials by the value of the setting."""
    pilot = [row for row in rows if row["stage"] == "pilot"]
    search = [row for row in rows if row["stage"] != "pilot"]
    return [*([(_PILOT, pilot)] if pilot else []), *groups_of(search, name)]


def _left_out(view: View, rows: Sequence[Row], series: Sequence[Group]) -> str:
    """Say which trials the figure does not show."""
    text = ""
    if view.in_stage("confirm"):
        text += " Trials of confirm are left out: they run longer and at few rates."
    if num_left := len(rows) - sum(len(own) for _, own in series):
        text += f" {count(num_left, 'trial')} with rarer values stand in the table alone."
    return text


def _level(row: Row, cap: float) -> float | None:
    """Return what is drawn: the last level, capped at the start; None goes on the rail."""
    if row["probe_last"] is None:
        return None
    return float(min(row["probe_last"], cap))


def _spec(series: Sequence[Group], num_rows: int, cap: float, e0: float | None) -> Spec:
    data: list[Spec] = []
    levels = []
    for i, (name, own) in enumerate(series):
        drawn = [(row, level) for row in own if (level := _level(row, cap)) is not None]
        levels += [level for _, level in drawn]
        points = _octave_medians(drawn)
        data.append(
            {
                "type": "scatter",
                "mode": "lines",
                "x": [x for x, _ in points],
                "y": [y for _, y in points],
                "line": {"color": f"@series-{i}", "width": 2, "shape": "linear"},
                "hoverinfo": "skip",
                "name": plot_text(name),
            }
        )
        marked = [(row, _level(row, cap)) for row in spread_evenly(own, num_rows)]
        finite = [(row, level) for row, level in marked if level is not None]
        lost = [(row, 0.5 + 0.12 * ((i % 3) - 1)) for row, level in marked if level is None]
        data += _marks(finite, f"@series-{i}", "y") + _marks(lost, f"@series-{i}", "y2")
    rates = [row["learning_rate"] for _, own in series for row in own]
    axis, high = _loss_axis(levels, cap, e0)
    # The two may lie on each other: the upper one is named above its line, the lower one below.
    both = ((cap, "start"), (e0, "E_0"))
    guides = sorted(((y, text) for y, text in both if y is not None and y <= high), reverse=True)
    is_log = axis["type"] == "log"
    spec_layout = layout(
        rate_axis(rates),
        {
            **axis,
            "domain": [0, 0.85],
            "title": {"text": "last probe loss", "standoff": 6},
        },
        margin=GUIDE_MARGIN,
        yaxis2={
            "domain": [0.89, 1],
            "range": [0, 1],
            "tickvals": [0.5],
            "ticktext": [_RAIL],
            "showgrid": False,
            "zeroline": False,
            "fixedrange": True,
            "automargin": True,
            "anchor": "x",
        },
        annotations=[
            guide_label(text, math.log10(y) if is_log else y, anchor)
            for (y, text), anchor in zip(guides, ("bottom", "top"), strict=False)
        ],
        shapes=[
            *(line_shape((0, 1), (y, y), "@muted", xref="paper") for y, _ in guides),
            {
                "type": "rect", "xref": "paper", "yref": "paper", "layer": "below",
                "x0": 0, "x1": 1, "y0": 0.89, "y1": 1, "fillcolor": "@rail", "line": {"width": 0},
            },
        ],
    )  # fmt: skip
    return {"data": data, "layout": spec_layout}


def _loss_axis(levels: Sequence[float], cap: float, e0: float | None) -> tuple[Spec, float]:
    """Return the axis of the loss, and its upper end.

    The start is shown only where some loss comes near it, so that it does not flatten the rest.
    """
    near = [*levels, *([e0] if e0 is not None else [])] or [cap]
    low, high = min(near), max(near)
    high = cap if high > cap / 4 else high
    if low <= 0 or high / low <= _LOG_FROM:
        pad = 0.06 * (high - low or 1.0)
        return {"type": "linear", "range": [low - pad, high + pad]}, high
    bounds = (math.log10(low), math.log10(high))
    pad = 0.06 * (bounds[1] - bounds[0])
    decades = range(math.floor(bounds[0]), math.ceil(bounds[1]) + 1)
    ticks = [digit * 10.0**decade for decade in decades for digit in (1, 2, 5)]
    return {
        "type": "log",
        "range": [bounds[0] - pad, bounds[1] + pad],
        "tickmode": "array",
        "tickvals": ticks,
        "ticktext": [number(tick) for tick in ticks],
    }, high


def _marks(points: Sequence[tuple[Row, float]], color: str, yaxis: str) -> list[Spec]:
    traces = []
    for mark in marks_in(row for row, _ in points):
        own = [(row, y) for row, y in points if mark_of(row).key == mark.key]
        traces.append(
            scatter(
                [row["learning_rate"] for row, _ in own],
                [y for _, y in own],
                color=color,
                symbol=mark.symbol,
                size=8,
                hover=[_hover(row) for row, _ in own],
                yaxis=yaxis,
                opacity=0.85,
            )
        )
    return traces


def _hover(row: Row) -> str:
    lines = (
        row["trial_id"],
        mark_of(row).label,
        f"learning rate {number(row['learning_rate'])}",
        f"last probe {number(row['probe_last'])}, start {number(row['probe_first'])}",
    )
    return "<br>".join(plot_text(line) for line in lines)


def _octave_medians(drawn: Sequence[tuple[Row, float]]) -> list[tuple[float, float]]:
    bins: dict[int, list[tuple[float, float]]] = {}
    for row, level in drawn:
        rate = row["learning_rate"]
        bins.setdefault(math.floor(math.log2(rate)), []).append((rate, level))
    return [
        (
            2 ** statistics.fmean(math.log2(rate) for rate, _ in points),
            statistics.median(level for _, level in points),
        )
        for _, points in sorted(bins.items())
    ]


def _finding(view: View, rows: Sequence[Row], cap: float) -> str:
    stable = [row["learning_rate"] for row in rows if row["is_stable"]]
    if not stable:
        return "No learning rate of pilot and search gave a stable trial."
    octaves = math.log2(max(stable) / min(stable))
    text = (
        "Stable trials of pilot and search span learning rates "
        f"{number(min(stable))} to {number(max(stable))}, "
        f"{octaves:.1f} doublings."
    )
    sensitivity = _sensitivity(view, rows, cap)
    if sensitivity is not None:
        text += f" Sensitivity over the pilot: {number(sensitivity)} (never ranked by)."
    return text


def _sensitivity(view: View, rows: Sequence[Row], cap: float) -> float | None:
    """Return the mean excess of the pilot's capped last loss over the best one."""
    pilot: list[Any] = [row for row in rows if row["stage"] == "pilot"]
    best = view.report.yardsticks[view.study.trial_steps].e_star
    if not pilot or best is None:
        return None
    ends = [cap if (level := _level(row, cap)) is None else level for row in pilot]
    return statistics.fmean(ends) - best
