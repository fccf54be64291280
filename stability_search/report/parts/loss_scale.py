"""Part 4, loss scale: is fp16 calibrating or failing?"""

from collections.abc import Sequence
from dataclasses import replace
from math import ceil

from stability_search.records.trial import Outcome
from stability_search.report.context import Row, View
from stability_search.report.curve_data import (
    binary_axis,
    curves_note,
    ends,
    headline_series,
    line,
    log_axis,
    num_broken,
    with_rail,
)
from stability_search.report.curves import Curve
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
)
from stability_search.report.wording import count, number, setting_value

_HEAD = Section(name="scale", title="Loss scale", question="Is fp16 calibrating or failing?")

Indexed = Sequence[tuple[int, Curve]]


def build(view: View) -> Section:
    """Draw the loss scale of fp16 trials; below it their bad steps and the kill rule."""
    if not view.results:
        return replace(_HEAD, absent="No trial has ended with a result yet.")
    rows = [row for row in view.results if view.setting(row, "precision") == "fp16"]
    if not rows:
        return replace(_HEAD, absent="No trial ran in fp16, so no loss was scaled.")
    shown = [
        (i, curve)
        for i, curve in enumerate(view.curves.shown)
        if any(step.scale for step in curve.steps)
    ]
    if not shown:
        absent = f"{_finding(rows)} None of their step files could be read, so no line is drawn."
        return replace(_HEAD, absent=absent)
    curves = [curve for _, curve in shown]
    figure = Figure(
        name="scale",
        finding=_finding(rows),
        panels=(_scale_panel(shown), _rate_panel(view, shown), _evidence_panel(view, shown)),
        legend=marks_in(curve.row for curve in curves),
        series=headline_series(view.verdict.choice is not None, curves),
        note=(
            "An overflow while the scale is still searched for is a calibration, and looks like "
            f"any sound step here. {curves_note(view.curves, curves)}"
        ),
        table=_table(rows),
    )
    return replace(_HEAD, figures=(figure,))


def _scale_panel(shown: Indexed) -> Panel:
    curves = [curve for _, curve in shown]
    data = [line(i, c, "scale", **_stairs(i, c)) for i, c in shown] + ends(curves, "scale")
    scales = [step.scale for curve in curves for step in curve.steps if step.scale]
    rows = num_broken(curves)
    spec, height = with_rail(data, curves, binary_axis(scales), height=300, num_rows=rows)
    return Panel(title="Loss scale", spec=spec, height=height, is_wide=True)


def _stairs(i: int, curve: Curve) -> Spec:
    """Keep the corners: a scale changes between two steps."""
    own = line(i, curve, "scale")["line"]
    return {"line": {**own, "shape": "hv"}}


def _rate_panel(view: View, shown: Indexed) -> Panel:
    accepted = view.study.kill_rule.bad_rate
    rates = [rate for _, curve in shown for rate in curve.bad_rates if rate is not None]
    every, top = _round_top(max([min(1.0, 2 * accepted), *rates]))
    spec: Spec = {
        "data": [line(i, curve, "rate") for i, curve in shown],
        "layout": layout(
            _steps(shown),
            {"range": [-0.02 * top, 1.03 * top], **_percent_ticks(every, top),
             "title": {"text": "bad so far", "standoff": 6}},
            shapes=[line_shape((0, 1), (accepted, accepted), "@ink", xref="paper")],
        ),
    }  # fmt: skip
    title = f"Rate of bad steps; dotted, what is accepted ({100 * accepted:g} %)"
    return Panel(title=title, spec=spec, height=230)


def _round_top(share: float) -> tuple[float, float]:
    """Return a round distance of ticks, and the first of these that a share does not pass."""
    every = next(step for step in (0.01, 0.02, 0.05, 0.1, 0.25, 0.5) if step >= share / 5)
    return every, every * ceil(round(share / every, 6))


def _percent_ticks(every: float, top: float) -> Spec:
    ticks = [round(k * every, 2) for k in range(round(top / every) + 1)]
    return {"tickvals": ticks, "ticktext": [f"{100 * tick:g} %" for tick in ticks]}


def _evidence_panel(view: View, shown: Indexed) -> Panel:
    kill = 1 / view.study.kill_rule.false_kill
    values = [
        step.evidence for _, curve in shown for step in curve.steps if step.evidence is not None
    ]
    spec: Spec = {
        "data": [line(i, curve, "evidence") for i, curve in shown],
        "layout": layout(
            _steps(shown),
            log_axis([*values, kill, 1.0], "evidence"),
            shapes=[line_shape((0, 1), (kill, kill), "@ink", xref="paper")],
        ),
    }
    title = f"Evidence of the kill rule; dotted, where it kills ({number(kill)})"
    return Panel(title=title, spec=spec, height=230)


def _steps(shown: Indexed) -> Spec:
    last = max(curve.steps[-1].step for _, curve in shown)
    return {"range": [0, 1.02 * last], "title": {"text": "step", "standoff": 8}}


def _finding(rows: Sequence[Row]) -> str:
    bad = [row for row in rows if row["num_bad_steps"]]
    searching = sum(row["num_calibration_steps"] or 0 for row in rows)
    collapsed = sum(row["outcome"] == Outcome.SCALE_COLLAPSE for row in rows)
    total = sum(row["num_bad_steps"] or 0 for row in rows)
    trials = count(len(rows), "fp16 trial")
    overflows = count(searching, "overflow") if searching else "no overflow"
    text = (
        f"Of {trials}, {len(bad):,} had bad steps ({total:,} in all); {overflows} only calibrated "
        "the scale"
        if bad
        else f"None of {trials} had a bad step; {overflows} calibrated the scale"
    )
    return f"{text}, and it collapsed in {collapsed:,}." if collapsed else f"{text}."


def _table(rows: Sequence[Row]) -> DataTable:
    return DataTable.of(
        ("trial", "end", "first scale", "last scale", "calibration steps", "bad steps",
         "judged steps", "evidence at the end"),
        rows,
        lambda row: (
            row["trial_id"],
            mark_of(row).label,
            setting_value(row.get("init_scale")) if row.get("init_scale") else "",
            number(row["final_scale"]),
            f"{row['num_calibration_steps'] or 0:,}",
            f"{row['num_bad_steps'] or 0:,}",
            f"{row['num_judged_steps'] or 0:,}",
            number(row["evidence"]),
        ),
    )  # fmt: skip
