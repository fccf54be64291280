"""Part 6, gradients: does clipping help, or is it a hidden learning rate?"""

from collections.abc import Sequence
from dataclasses import replace
from statistics import median

from stability_search.report.context import Row, View
from stability_search.report.curve_data import (
    curves_note,
    ends,
    headline_series,
    line,
    log_axis,
    num_broken,
    split,
    with_rail,
)
from stability_search.report.figures import (
    DataTable,
    Figure,
    Panel,
    Section,
    mark_of,
    marks_in,
)
from stability_search.report.strips import strip
from stability_search.report.wording import count, number, part, setting_value

_HEAD = Section(
    name="gradients",
    title="Gradients",
    question="Does clipping help, or is it a hidden learning rate?",
)


def build(view: View) -> Section:
    """Draw the gradient norm before clipping, and the share of steps that were clipped."""
    rows = [row for row in view.results if row["grad_norm_median"] is not None]
    if not rows:
        if not view.results:
            return replace(_HEAD, absent="No trial has ended with a result yet.")
        return replace(_HEAD, absent="No finite gradient was seen in any trial.")
    clipped = [row for row in rows if row["clip_frac"] is not None]
    panels = [*_norms(view), *_shares(view, clipped)]
    finding = _finding(view, rows, clipped)
    if not panels:
        return replace(_HEAD, absent=f"{finding} No step file could be read to draw the norms.")
    curves = [curve for curve in view.curves.shown if _has_norm(curve.steps)]
    figure = Figure(
        name="gradients",
        finding=finding,
        panels=tuple(panels),
        legend=marks_in([*(curve.row for curve in curves), *clipped]),
        series=headline_series(view.verdict.choice is not None, curves),
        note=_note(view),
        table=_table(rows),
        max_columns=2,
    )
    return replace(_HEAD, figures=(figure,))


def _has_norm(steps: Sequence[object]) -> bool:
    return any(getattr(step, "grad_norm", None) for step in steps)


def _norms(view: View) -> list[Panel]:
    """Return the panel of the norms; none where no steps were read."""
    shown = [(i, c) for i, c in enumerate(view.curves.shown) if _has_norm(c.steps)]
    if not shown:
        return []
    norms = [step.grad_norm for _, c in shown for step in c.steps if step.grad_norm]
    axis = log_axis(norms, "gradient norm")
    sides = split(shown)
    rows = max(num_broken(curve for _, curve in own) for _, own in sides)
    panels = []
    for text, own in sides:
        curves = [curve for _, curve in own]
        data = [line(i, curve, "norm") for i, curve in own] + ends(curves, "grad_norm")
        spec, height = with_rail(data, curves, axis, height=300, num_rows=rows)
        title = f"Gradient norm before clipping{text}"
        panels.append(Panel(title=title, spec=spec, height=height, is_wide=len(sides) == 1))
    return panels


def _shares(view: View, clipped: Sequence[Row]) -> list[Panel]:
    """Return the panel of the clipped shares; none where nothing is clipped."""
    if not clipped:
        return []
    alarm = view.study.alarms.clip_frac
    title = f"Share of updates that were clipped; dotted, the alarm ({100 * alarm:g} %)"
    panel = strip(clipped, "clip_norm", "clip_frac", alarm=alarm, title=title)
    return [replace(panel, is_wide=True)]


def _finding(view: View, rows: Sequence[Row], clipped: Sequence[Row]) -> str:
    if not clipped:
        typical = number(median(row["grad_norm_median"] for row in rows))
        return (
            f"No trial clipped its gradients; the typical norm was {typical} (median over "
            f"{count(len(rows), 'trial')})."
        )
    alarm = view.study.alarms.clip_frac
    over = [row for row in clipped if row["clip_frac"] > alarm]
    limit = f"more than {100 * alarm:g} % of their updates"
    if not over:
        return f"None of {count(len(clipped), 'trial')} that clip clipped {limit}."
    return (
        f"{len(over):,} of {count(len(clipped), 'trial')} that clip clipped {limit}{_own(view)}: "
        "there clip_norm, not the gradient, sets the size of a step, a hidden cut of the learning "
        f"rate. {_what_to_do(view)}"
    )


def _what_to_do(view: View) -> str:
    """Say what clipping asks for; what was confirmed with it stands."""
    if view.verdict.choice:
        return "The choice stands as it was confirmed."
    return "Lower the learning rate instead."


def _own(view: View) -> str:
    """Say how much the configuration of the verdict clipped."""
    seeds = view.seeds_of(view.headline_id) if view.headline_id else []
    shares = [row["clip_frac"] for row in seeds if row["clip_frac"] is not None]
    if not shares:
        return ""
    who = "the choice" if view.verdict.choice else "the closest"
    return f" ({who}: {part(median(shares))})"


def _note(view: View) -> str:
    shown = [curve for curve in view.curves.shown if _has_norm(curve.steps)]
    text = "A norm of 0 and one that is not finite have no place on a log axis and leave a gap."
    return f"{text} {curves_note(view.curves, shown)}" if shown else text


def _table(rows: Sequence[Row]) -> DataTable:
    return DataTable.of(
        ("trial", "end", "clip_norm", "median norm", "largest norm", "clipped updates"),
        rows,
        lambda row: (
            row["trial_id"],
            mark_of(row).label,
            setting_value(row.get("clip_norm")),
            number(row["grad_norm_median"]),
            number(row["grad_norm_max"]),
            "" if row["clip_frac"] is None else f"{100 * row['clip_frac']:.3g} %",
        ),
    )
