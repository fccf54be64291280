"""The curves as columns: what the page holds once, for its figures and for the drawer."""

from collections.abc import Iterable, Sequence
from math import ceil, floor, log2, log10
from typing import Any

from stability_search.records.step import StepLabel, StepRecord
from stability_search.report.curves import Curve, Curves
from stability_search.report.figures import Mark, Spec, layout, mark_of, plot_text, scatter
from stability_search.report.wording import count

Column = list[float | int | None]

_DIGITS = 4
_RAIL_ROW = 7  # pixels of one trial on the rail
_RAIL = (30, 150)  # pixels of the rail, least and most
_MAX_DECADES = 9  # or powers of two: of a log axis with a tick at each


def columns_of(curve: Curve) -> dict[str, Column]:
    """Return what a curve shows, step by step; a column without a number is left out."""
    steps = curve.steps
    columns: dict[str, Column] = {
        "step": [step.step for step in steps],
        "loss": [_short(step.loss) for step in steps],
        "norm": [_short(step.grad_norm) for step in steps],
        "scale": [_short(step.scale) for step in steps],
        "attention": [_short(step.attention_max) for step in steps],
        "evidence": [_short(step.evidence) for step in steps],
        "rate": [_short(rate) for rate in curve.bad_rates],
    }
    return {
        name: column
        for name, column in columns.items()
        if any(value is not None for value in column)
    }


def line(i: int, curve: Curve, name: str, **more: Any) -> Spec:  # noqa: ANN401 - plotly's own keys
    """Return column `name` of curve `i` as a line in the colour of the trial's end."""
    is_headline = curve.why == "headline"
    return {
        "type": "scatter",
        "mode": "lines",
        "x": f"@{i}:step",
        "y": f"@{i}:{name}",
        "line": {
            "color": "@ink" if is_headline else f"@{mark_of(curve.row).key}",
            "width": 1.8 if is_headline else 1.1,
        },
        "opacity": 0.95 if is_headline else 0.5,
        "zorder": 1 if is_headline else 0,
        "hoverinfo": "skip",
        **more,
    }


def ends(curves: Iterable[Curve], name: str) -> list[Spec]:
    """Return a mark at the last number of each line: shape and colour say how the trial ended."""
    found: dict[Mark, list[tuple[int, float, str]]] = {}
    for curve in curves:
        values = [(step.step, getattr(step, name)) for step in curve.steps]
        last = next(((step, y) for step, y in reversed(values) if y), None)
        if last is not None:
            mark = mark_of(curve.row)
            hover = "<br>".join(plot_text(text) for text in (curve.row["trial_id"], mark.label))
            found.setdefault(mark, []).append((last[0], last[1], hover))
    return [
        scatter(
            [step for step, _, _ in points],
            [_short(y) for _, y, _ in points],
            color=f"@{mark.key}",
            symbol=mark.symbol,
            size=7,
            hover=[hover for *_, hover in points],
        )
        for mark, points in found.items()
    ]


def split(
    shown: Sequence[tuple[int, Curve]],
) -> list[tuple[str, Sequence[tuple[int, Curve]]]]:
    """Return stable and other trials apart, to be drawn side by side on the same axis.

    Each with the end of its title, which is empty where there is but one side.
    """
    stable = [(i, curve) for i, curve in shown if curve.row["is_stable"]]
    others = [(i, curve) for i, curve in shown if not curve.row["is_stable"]]
    if not stable or not others:
        return [("", shown)]
    return [(", stable trials", stable), (", other trials", others)]


def with_rail(
    data: Sequence[Spec],
    curves: Sequence[Curve],
    yaxis: Spec,
    *,
    height: int,
    num_rows: int,
    **more: Any,  # noqa: ANN401 - plotly's own keys
) -> tuple[Spec, int]:
    """Put the bad steps of some curves on a rail above their lines, a row per trial.

    Args:
        data: The lines.
        curves: Their trials.
        yaxis: The axis of the lines.
        height: Pixels of the lines alone.
        num_rows: Rows the rail has room for, the same in panels side by side; 0 for no rail.
        more: More of the layout.

    Returns:
        The whole panel and its height.
    """
    last = max((curve.steps[-1].step for curve in curves), default=1)
    xaxis = {"range": [0, 1.02 * last], "title": {"text": "step", "standoff": 8}}
    if not num_rows:
        return {"data": list(data), "layout": layout(xaxis, yaxis, **more)}, height
    pixels = min(max(_RAIL_ROW * num_rows + 12, _RAIL[0]), _RAIL[1])
    share = pixels / (height + pixels)
    broken = [(curve, bad) for curve in curves if (bad := bad_steps(curve))]
    marks = [
        scatter(
            [step.step for step in bad],
            [row] * len(bad),
            color=f"@{mark_of(curve.row).key}",
            symbol="line-ns-open",
            size=max(4, min(9, int(pixels / num_rows))),
            hover=[_hover(curve, step) for step in bad],
            yaxis="y2",
        )
        for row, (curve, bad) in enumerate(broken)
    ]
    rail = {
        "domain": [1 - share, 1],
        "range": [num_rows - 0.2, -0.8],
        "tickvals": [(num_rows - 1) / 2],
        "ticktext": ["bad steps"],
        "showgrid": False,
        "zeroline": False,
        "fixedrange": True,
        "automargin": True,
        "anchor": "x",
    }
    band = {
        "type": "rect", "xref": "paper", "yref": "paper", "layer": "below", "line": {"width": 0},
        "x0": 0, "x1": 1, "y0": 1 - share, "y1": 1, "fillcolor": "@rail",
    }  # fmt: skip
    shapes = [*more.pop("shapes", []), band]
    lines = {**yaxis, "domain": [0, 0.97 - share]}
    notes = [*more.pop("annotations", []), *([] if broken else [_calm_rail(1 - share / 2)])]
    spec = layout(xaxis, lines, yaxis2=rail, shapes=shapes, annotations=notes, **more)
    return {"data": [*data, *marks], "layout": spec}, height + pixels


def _calm_rail(y: float) -> Spec:
    return {
        "xref": "paper", "x": 0.5, "yref": "paper", "y": y, "showarrow": False,
        "text": "no bad step in any of these", "font": {"size": 11, "color": "@muted"},
    }  # fmt: skip


def num_broken(curves: Iterable[Curve]) -> int:
    """Return how many of some trials had a bad step."""
    return sum(bool(bad_steps(curve)) for curve in curves)


def bad_steps(curve: Curve) -> list[StepRecord]:
    """Return the bad steps of a curve."""
    return [step for step in curve.steps if step.label is StepLabel.BAD]


def log_axis(values: Iterable[float], title: str, *guides: float) -> Spec:
    """Return a log axis around some numbers > 0, with room for the guides near them."""
    shown = [value for value in values if value > 0] or [1.0]
    low, high = log10(min(shown)), log10(max(shown))
    near = [log10(guide) for guide in guides if low - 1 <= log10(guide) <= high + 1]
    low, high = min(low, *near, high), max(high, *near, low)
    pad = 0.05 * (high - low) or 0.3
    every = 1 + int((high - low) // _MAX_DECADES)
    decades = range(floor(low), floor(high) + 2)
    digits = (1,) if high - low > 2 else (1, 2, 5)  # noqa: PLR2004 - decades
    ticks = [digit * 10.0**k for k in decades if k % every == 0 for digit in digits]
    return {
        "type": "log",
        "range": [low - pad, high + pad],
        "tickmode": "array",
        "tickvals": ticks,
        "ticktext": [_tick(tick) for tick in ticks],
        "title": {"text": title, "standoff": 6},
    }


def binary_axis(scales: Sequence[float]) -> Spec:
    """Return a log axis whose ticks are powers of two, around some scales > 0."""
    low, high = floor(log2(min(scales))), ceil(log2(max(scales)))
    every = max(1, ceil((high - low + 1) / _MAX_DECADES))
    powers = range(low, high + 1, every)
    pad = 0.15 * max(1.0, 0.2 * (high - low))
    return {
        "type": "log",
        "range": [(low - pad) / log2(10), (high + pad) / log2(10)],  # plotly counts in decades
        "tickmode": "array",
        "tickvals": [2.0**power for power in powers],
        "ticktext": [f"2<sup>{power}</sup>" for power in powers],
        "title": {"text": "loss scale", "standoff": 6},
    }


def headline_series(view_has_choice: bool, curves: Iterable[Curve]) -> tuple[tuple[str, str], ...]:
    """Return the entry of the legend for the lines of the verdict's configuration."""
    if not any(curve.why == "headline" for curve in curves):
        return ()
    return (("the choice" if view_has_choice else "what came closest", "ink"),)


def curves_note(curves: Curves, shown: Sequence[Curve]) -> str:
    """Say which trials are drawn, and what of them."""
    has_headline = any(curve.why == "headline" for curve in shown)
    verdict = "the configuration of the verdict (thick), " if has_headline else ""
    text = (
        f"Lines of {count(len(shown), 'trial')}: {verdict}the best, and failures near the cliff; "
        "the mark at the end says how a trial ended."
    )
    if any(curve.num_steps > len(curve.steps) for curve in shown):
        text += " Long curves show every k-th step and every bad one."
    if curves.num_lost:
        text += f" The steps of {curves.num_lost:,} more could not be read."
    return text


def _hover(curve: Curve, step: StepRecord) -> str:
    lines = (curve.row["trial_id"], f"step {step.step:,}: {step.reason}")
    return "<br>".join(plot_text(text) for text in lines)


def _tick(value: float) -> str:
    if 0.01 <= value < 10_000:  # noqa: PLR2004 - what is read at a glance
        return f"{value:,g}"
    return f"{value:.0e}".replace("e-0", "e-").replace("e+0", "e").replace("e+", "e")


def _short(value: float | None) -> float | int | None:
    """Return a number to four digits, whole where it is."""
    if value is None:
        return None
    short = float(f"{value:.{_DIGITS}g}")
    return int(short) if short.is_integer() and abs(short) < 10**_DIGITS else short
