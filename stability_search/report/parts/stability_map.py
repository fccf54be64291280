"""Part 1, stability map: where is the cliff?"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stability_search.report.advice import contrasts
from stability_search.report.context import Row, View
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
    rate_axis,
    scatter,
    spread_evenly,
)
from stability_search.report.grouping import applying, is_number, label, value_order
from stability_search.report.wording import count, number, setting_value

Floats = NDArray[np.float64]

_MAX_CATEGORIES = 8
_GRID = 40  # columns of the smoothed share behind the marks
_OCTAVES_WIDE = 1.0  # of the smoothing kernel
_ROWS_WIDE = 0.2  # rows: a value that was not tried borrows nothing from its neighbours
_PRIOR = 0.25  # of a trial each way: keeps an empty region at one half
_MIN_WEIGHT = 0.35  # trials near a cell before it is coloured
_MIN_PANEL = 3  # trials that a panel needs to say anything of a setting
_STAGE = "stage"  # what stands upright where nothing else varies
_PANEL_PRECISIONS = ("fp32", "bf16", "fp16")


@dataclass(frozen=True, kw_only=True, slots=True)
class _Vertical:
    """The upright axis: a setting's values at places one unit apart, or a log scale."""

    name: str
    values: tuple[Any, ...]  # categories; empty on a log scale
    span: tuple[float, float]

    def place(self, row: Row) -> float:
        value = row.get(self.name)
        if self.values:
            return float(self.values.index(value))
        return math.log2(float(value)) if value else self.span[0]

    def axis(self) -> Spec:
        low, high = self.span
        if self.values:
            ticks = [float(i) for i in range(len(self.values))]
            labels = [plot_text(label(value)) for value in self.values]
        else:
            ticks = [low + (high - low) * k / 4 for k in range(5)]
            labels = [number(2**tick) for tick in ticks]
        return {
            "range": [low - 0.6, high + 0.6],
            "tickmode": "array",
            "tickvals": ticks,
            "ticktext": labels,
            "title": {"text": plot_text(self.name), "standoff": 6},
            "showgrid": False,
        }


_HEAD = Section(name="map", title="Stability map", question="Where is the cliff?")


def build(view: View) -> Section:
    """Draw every result over learning rate and the next strongest setting."""
    rows = [row for row in view.results if row.get("learning_rate")]
    if not rows:
        return replace(_HEAD, absent="No trial has ended with a result yet.")
    vertical = _vertical(view, rows)
    rates = [row["learning_rate"] for row in rows]
    precisions = [p for p in _PANEL_PRECISIONS if any(_precision(view, r) == p for r in rows)]
    panels = []
    for precision in precisions:
        chosen = [row for row in rows if _precision(view, row) == precision]
        panels.append(
            Panel(
                title=f"{precision} \u2014 {_stable_words(chosen)}",
                spec=_spec(view, chosen, vertical, rates, precision),
                height=140 + 50 * max(3, min(len(vertical.values), 6)),
            )
        )
    has_ring = any(_verdict_marks(view, vertical, precision) for precision in precisions)
    ring = " The ring marks the configuration of the verdict, its bar the margin." * has_ring
    figure = Figure(
        name="map",
        finding=_finding(view, rows, precisions),
        panels=tuple(panels),
        legend=marks_in(rows),
        note=(
            "The shade is the smoothed share of stable trials; where it is missing, too little "
            f"was tried.{ring}{drawn_text(len(rows))}"
        ),
        table=_table(view, rows, vertical),
    )
    return replace(_HEAD, figures=(figure,))


def _precision(view: View, row: Row) -> str:
    return str(view.setting(row, "precision"))


def _stable_words(rows: Sequence[Row]) -> str:
    return f"{sum(bool(r['is_stable']) for r in rows):,} of {len(rows):,} stable"


def _vertical(view: View, rows: Sequence[Row]) -> _Vertical:
    """Choose `init_scale` where fp16 varies it, else the setting that tells trials apart most."""
    varying = [n for n in view.report.varying if n not in {"learning_rate", "precision"}]
    if "init_scale" in varying and all(_precision(view, r) == "fp16" for r in rows):
        name = "init_scale"
    else:
        ranked = [c.name for c in contrasts(view, rows) if c.name in varying]
        names = [n for n in [*ranked, *varying] if n != "init_scale"] or varying
        everywhere = [name for name in names if _varies_everywhere(view, rows, name)]
        name = next(iter([*everywhere, *names]), _STAGE)
    values = sorted({row.get(name) for row in rows}, key=value_order)
    numbers = [value for value in values if is_number(value) and value > 0]
    if len(values) > _MAX_CATEGORIES and len(numbers) >= len(values) - 1:
        return _Vertical(
            name=name, values=(), span=(math.log2(min(numbers)), math.log2(max(numbers)))
        )
    return _Vertical(name=name, values=tuple(values), span=(0.0, len(values) - 1.0))


def _varies_everywhere(view: View, rows: Sequence[Row], name: str) -> bool:
    """Return True for a setting that applies to every trial and that every panel varies."""
    if len(applying(rows, name, view.report.varying)) < len(rows):
        return False
    found: dict[str, list[Any]] = {}
    for row in rows:
        found.setdefault(_precision(view, row), []).append(row.get(name))
    return all(len(own) < _MIN_PANEL or len(set(own)) > 1 for own in found.values())


def _spec(
    view: View, rows: Sequence[Row], vertical: _Vertical, rates: Sequence[float], precision: str
) -> Spec:
    data = [_shade(rows, vertical, rates)]
    drawn = spread_evenly(rows, len(rates))
    for mark in marks_in(drawn):
        own = [row for row in drawn if mark_of(row).key == mark.key]
        data.append(
            scatter(
                [row["learning_rate"] for row in own],
                [vertical.place(row) + _jitter(row) for row in own],
                color=f"@{mark.key}",
                symbol=mark.symbol,
                hover=[_hover(view, row) for row in own],
            )
        )
    data += _verdict_marks(view, vertical, precision)
    # The verdict's margin may reach beyond the rates that were searched.
    xs = [x for trace in data[1:] for x in trace["x"]]
    return {"data": data, "layout": layout(rate_axis([*rates, *xs]), vertical.axis())}


def _verdict_marks(view: View, vertical: _Vertical, precision: str) -> list[Spec]:
    row = view.by_id.get(view.headline_id or "")
    if row is None or _precision(view, row) != precision or not row.get("learning_rate"):
        return []
    if vertical.name == _STAGE:  # a configuration has none of its own
        row = {**row, _STAGE: "confirm" if row["num_seeds"] else "search"}
    if vertical.values and row.get(vertical.name) not in vertical.values:
        return []
    rate, y = row["learning_rate"], vertical.place(row)
    margin = row.get("margin_octaves") or 0
    role = "choice" if view.verdict.choice else "closest"
    ring = scatter([rate], [y], color="@ink", symbol="circle-open", size=19, hover=[f"the {role}"])
    bar = scatter([rate, rate * 2**margin], [y, y], color="@ink", symbol="line-ns-open", size=10)
    bar |= {"mode": "lines+markers", "line": {"color": "@ink", "width": 2.5}}
    return [bar, ring] if margin else [ring]


def _jitter(row: Row) -> float:
    """Spread trials of one category a little, the same way every time."""
    return 0.085 * ((int(row["index"]) * 7) % 5 - 2)


def _hover(view: View, row: Row) -> str:
    named = [f"{n} {setting_value(row.get(n))}" for n in view.report.varying if n in row]
    q = "" if row["q"] is None else f", q {row['q']:.2f}"
    lines = [f"{row['trial_id']}{q}", mark_of(row).label, *named]
    return "<br>".join(plot_text(line) for line in lines)


def _shade(rows: Sequence[Row], vertical: _Vertical, rates: Sequence[float]) -> Spec:
    """Smooth the share of stable trials over learning rate and the upright axis."""
    low, high = math.log2(min(rates)), math.log2(max(rates))
    xs = [low + (high - low) * k / (_GRID - 1) for k in range(_GRID)]
    if vertical.values:
        ys, wide = [float(i) for i in range(len(vertical.values))], _ROWS_WIDE
    else:
        ys = [vertical.span[0] + (vertical.span[1] - vertical.span[0]) * k / 15 for k in range(16)]
        wide = max(1e-9, (vertical.span[1] - vertical.span[0]) / 6)
    shares = _smoothed(
        np.array([math.log2(row["learning_rate"]) for row in rows]),
        np.array([vertical.place(row) / wide for row in rows]),
        np.array([bool(row["is_stable"]) for row in rows], dtype=float),
        (np.array(xs), np.array(ys) / wide),
    )
    return {
        "type": "heatmap",
        "x": [2**x for x in xs],
        "y": ys,
        "z": shares,
        "zmin": 0,
        "zmax": 1,
        "colorscale": [[0, "@share-low"], [0.5, "@share-mid"], [1, "@share-high"]],
        "showscale": False,
        "hoverinfo": "skip",
    }


def _smoothed(
    x: Floats, y: Floats, is_stable: Floats, grid: tuple[Floats, Floats]
) -> list[list[float | None]]:
    """Return the share of stable trials near each point of a grid; None where there are none."""
    near_x = np.exp(-(((grid[0][:, None] - x) / _OCTAVES_WIDE) ** 2) / 2)
    near_y = np.exp(-((grid[1][:, None] - y) ** 2) / 2)
    total, good = near_y @ near_x.T, near_y @ (near_x * is_stable).T
    share = (good + _PRIOR) / (total + 2 * _PRIOR)
    return [
        [round(float(s), 3) if t >= _MIN_WEIGHT else None for s, t in zip(*pair, strict=True)]
        for pair in zip(share, total, strict=True)
    ]


def _finding(view: View, rows: Sequence[Row], precisions: Sequence[str]) -> str:
    """Say up to which rate trials held, per precision."""
    parts = []
    for precision in precisions:
        own = [r for r in rows if _precision(view, r) == precision]
        stable = [r["learning_rate"] for r in own if r["is_stable"]]
        parts.append(
            f"in {precision} the highest rate of a stable trial was {number(max(stable))}"
            if stable
            else f"in {precision} none of {count(len(own), 'trial')} was stable"
        )
    text = "; ".join(parts)
    return f"{text[:1].upper()}{text[1:]}."


def _table(view: View, rows: Sequence[Row], vertical: _Vertical) -> DataTable:
    return DataTable.of(
        ("trial", "precision", "learning rate", vertical.name, "end", "q"),
        rows,
        lambda row: (
            row["trial_id"],
            _precision(view, row),
            number(row["learning_rate"]),
            setting_value(row.get(vertical.name)),
            mark_of(row).label,
            number(row["q"]),
        ),
    )
