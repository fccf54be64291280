"""Part 7, attention: does the clamp cure or mask?"""

from collections.abc import Sequence
from dataclasses import replace
from math import log10

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
from stability_search.report.curves import Curve
from stability_search.report.figures import (
    DataTable,
    Figure,
    Panel,
    Section,
    Spec,
    line_shape,
    mark_of,
    marks_in,
)
from stability_search.report.strips import strip
from stability_search.report.wording import count, number, setting_value

# A guard of the attention: its setting, the share it saturates, and what that is a share of.
_GUARDS = (
    ("attention_clamp", "clamp_frac", "attention outputs beyond the clamp"),
    ("attention_logit_cap", "cap_frac", "attention logits beyond the cap"),
)
_HEAD = Section(name="attention", title="Attention", question="Does the clamp cure or mask?")


def build(view: View) -> Section:
    """Draw the largest attention logit before cap and clamp, and the shares that saturated."""
    if not view.results:
        return replace(_HEAD, absent="No trial has ended with a result yet.")
    rows = [
        row
        for row in view.results
        if any(row[name] is not None for name in ("attention_max", "clamp_frac", "cap_frac"))
    ]
    if not rows:
        return replace(
            _HEAD, absent="No attention was seen in any trial: nothing to clamp or to cap."
        )
    shown = [(i, curve) for i, curve in enumerate(view.curves.shown) if _has_logits(curve)]
    panels = [*_logits(view, shown), *_saturations(view, rows)]
    finding = _finding(view, rows)
    if not panels:
        return replace(_HEAD, absent=f"{finding} No step file could be read to draw the logits.")
    saturated = [row for row in rows if any(row[share] is not None for _, share, _ in _GUARDS)]
    curves = [curve for _, curve in shown]
    figure = Figure(
        name="attention",
        finding=finding,
        panels=tuple(panels),
        legend=marks_in([*(curve.row for curve in curves), *saturated]),
        series=headline_series(view.verdict.choice is not None, curves),
        note=(
            "Read before cap, clamp and mask; for fused attention without a cap it is an upper "
            f"bound. {curves_note(view.curves, curves)}"
        ),
        table=_table(rows),
        max_columns=2,
    )
    return replace(_HEAD, figures=(figure,))


def _has_logits(curve: Curve) -> bool:
    return any(step.attention_max for step in curve.steps)


def _limits(view: View) -> tuple[tuple[float, str], ...]:
    alarms = view.study.alarms
    return (
        (alarms.attention_max, "to be watched"),
        (alarms.attention_max_degraded, "degraded"),
        (alarms.attention_max_diverging, "diverging"),
    )


def _logits(view: View, shown: Sequence[tuple[int, Curve]]) -> list[Panel]:
    """Return the panel of the logits; none where no steps were read."""
    if not shown:
        return []
    values = [step.attention_max for _, c in shown for step in c.steps if step.attention_max]
    limits = _limits(view)
    axis = log_axis([*values, limits[0][0], limits[-1][0]], "largest attention logit")
    sides = split(shown)
    rows = max(num_broken(curve for _, curve in own) for _, own in sides)
    panels = []
    for text, own in sides:
        curves = [curve for _, curve in own]
        data = [line(i, curve, "attention") for i, curve in own] + ends(curves, "attention_max")
        spec, height = with_rail(
            data,
            curves,
            axis,
            height=340,
            num_rows=rows,
            shapes=[line_shape((0, 1), (at, at), "@ink", xref="paper") for at, _ in limits],
            annotations=[_beside(at, word) for at, word in limits],
            margin={"l": 58, "r": 98, "t": 8, "b": 46},
        )
        title = f"Largest attention logit before cap and clamp{text}"
        panels.append(Panel(title=title, spec=spec, height=height, is_wide=len(sides) == 1))
    return panels


def _beside(at: float, word: str) -> Spec:
    """Return the name of a limit to the right of its line, where no curve hides it."""
    return {
        "xref": "paper", "x": 1.008, "xanchor": "left", "yref": "y", "y": log10(at),
        "yanchor": "middle", "text": word, "showarrow": False,
        "font": {"size": 11, "color": "@ink"},
    }  # fmt: skip


def _saturations(view: View, rows: Sequence[Row]) -> list[Panel]:
    panels = []
    for setting, share, what in _GUARDS:
        own = [row for row in rows if row[share] is not None]
        if own:
            alarm = getattr(view.study.alarms, share)
            title = f"Share of {what}; dotted, the alarm ({100 * alarm:g} %)"
            panels.append(strip(own, setting, share, alarm=alarm, title=title))
    return [replace(panel, is_wide=len(panels) == 1) for panel in panels]


def _finding(view: View, rows: Sequence[Row]) -> str:
    seen = [row for row in rows if row["attention_max"] is not None]
    parts = []
    if seen:
        high = view.study.alarms.attention_max_diverging
        over = [row for row in seen if row["attention_max"] > high]
        largest = max(row["attention_max"] for row in seen)
        held = sum(bool(row["is_stable"]) for row in over)
        parts.append(
            f"attention logits passed {number(high)} in {len(over):,} of "
            f"{count(len(seen), 'trial')}, {held or 'none'} of them stable"
            if over
            else f"attention logits stayed below {number(high)} in all of "
            f"{count(len(seen), 'trial')} (largest {number(largest)})"
        )
    masks = False
    for setting, share, what in _GUARDS:
        own = [row for row in rows if row[share] is not None]
        alarm = getattr(view.study.alarms, share)
        over = [row for row in own if row[share] > alarm]
        masks = masks or bool(over)
        if own:
            parts.append(
                f"with {setting}, {len(over):,} of {count(len(own), 'trial')} had more than "
                f"{100 * alarm:g} % of {what}"
                if over
                else f"no trial with {setting} had more than {100 * alarm:g} % of {what}"
            )
    if masks:
        parts[-1] += ": there it masks growth, it does not cure it"
    text = "; ".join(parts)
    return f"{text[:1].upper()}{text[1:]}."


def _table(rows: Sequence[Row]) -> DataTable:
    return DataTable.of(
        ("trial", "end", "largest logit", "attention_clamp", "outputs beyond it",
         "attention_logit_cap", "logits beyond it"),
        rows,
        lambda row: (
            row["trial_id"],
            mark_of(row).label,
            number(row["attention_max"]),
            setting_value(row.get("attention_clamp")),
            _percent(row["clamp_frac"]),
            setting_value(row.get("attention_logit_cap")),
            _percent(row["cap_frac"]),
        ),
    )  # fmt: skip


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.3g} %"
