"""What a part of the page is made of, and the marks, colours and axes all figures share.

A figure is a plain dict for plotly.js. Colours in it are names (`@stable`) that the page's
script replaces by the value of its style sheet, so that one figure serves light, dark and print.
"""

import math
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self, TypeVar

from stability_search.inert import plain
from stability_search.records.trial import Outcome
from stability_search.report.context import Row
from stability_search.report.wording import number

Spec = dict[str, Any]
Item = TypeVar("Item")

MAX_ROWS = 300
"""Rows of a figure's table; the others stand in the files of the run."""

MAX_MARKS = 1000
"""Trials that a figure draws one by one; of more it draws so many, evenly chosen."""

_MARGIN = {"l": 58, "r": 14, "t": 8, "b": 46}
GUIDE_MARGIN = {**_MARGIN, "r": 40}
"""Margin of a panel with a `guide_label`."""

_MAX_LABEL = 60
_FEW_ZEROS = -3.5  # lowest rate, as its decadic logarithm, whose axis needs no exponents
_SHORT_AXIS = 1.3  # decades, up to which an axis of rates has three ticks in each


@dataclass(frozen=True, kw_only=True, slots=True)
class Mark:
    """How one kind of end is drawn: shape and colour both tell it apart.

    Attributes:
        key: Name of the kind, and of its colour in the style sheet.
        label: What the legend says.
        symbol: plotly's name of the shape.
    """

    key: str
    label: str
    symbol: str


MARKS: tuple[Mark, ...] = (
    Mark(key="stable", label="stable (completed, q at least 1/2)", symbol="circle"),
    Mark(key="weak", label="completed, q below 1/2", symbol="circle-open"),
    Mark(key="pruned", label="killed for bad steps", symbol="x"),
    Mark(key="diverged", label="diverged", symbol="triangle-up"),
    Mark(key="scale_collapse", label="loss scale collapsed", symbol="square"),
    Mark(key="nonfinite_parameters", label="parameters non-finite", symbol="diamond"),
    Mark(key="out_of_memory", label="out of memory", symbol="cross"),
    Mark(key="timed_out", label="timed out", symbol="hourglass"),
    Mark(key="user_error", label="error in the task", symbol="star"),
    Mark(key="infrastructure", label="lost to a machine", symbol="star-diamond"),
)
_MARK_OF = {mark.key: mark for mark in MARKS}


@dataclass(frozen=True, kw_only=True, slots=True)
class DataTable:
    """The data of a figure as a table.

    Attributes:
        columns: Headings.
        rows: Cells as text.
        num_left_out: Rows that stand only in the files of the run.
    """

    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    num_left_out: int = 0

    @classmethod
    def of(
        cls,
        columns: tuple[str, ...],
        items: Sequence[Item],
        cells: Callable[[Item], tuple[str, ...]],
    ) -> Self:
        """Return a row for each of the first items; `cells` gives its text."""
        rows = tuple(cells(item) for item in items[:MAX_ROWS])
        return cls(columns=columns, rows=rows, num_left_out=len(items) - len(rows))


@dataclass(frozen=True, kw_only=True, slots=True)
class Panel:
    """One drawing of a figure.

    Attributes:
        title: Heading above it; empty where the figure has but one.
        about: A line below the heading; may be empty.
        spec: `data` and `layout` for plotly.js.
        height: Pixels.
        series: Names and colours of its lines, in order.
        is_wide: True if it takes the whole width, above the others.
    """

    title: str
    about: str = ""
    spec: Spec
    height: int = 320
    series: tuple[tuple[str, str], ...] = ()
    is_wide: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Figure:
    """Panels with one finding.

    Attributes:
        name: Name of the figure in the page's addresses.
        finding: One sentence computed from the data.
        panels: What is drawn.
        legend: Kinds of marks, in order.
        is_legend_plain: True if colour says something else here than how a trial ended.
        series: Names and colours of lines, in order.
        note: How to read it; may be empty.
        table: The same data as a table.
        table_title: What the fold with the table is called.
        is_table_open: True if the fold is open from the start.
        max_columns: Panels side by side on a wide page, 1 to 3.
    """

    name: str
    finding: str
    panels: tuple[Panel, ...]
    legend: tuple[Mark, ...] = ()
    is_legend_plain: bool = False
    series: tuple[tuple[str, str], ...] = ()
    note: str = ""
    table: DataTable
    table_title: str = "The data of this figure"
    is_table_open: bool = False
    max_columns: int = 3


@dataclass(frozen=True, kw_only=True, slots=True)
class Section:
    """One part of the page.

    Attributes:
        name: Name of the part in the page's addresses.
        title: Its heading.
        question: The question it answers.
        figures: Its figures; empty where there is no data.
        absent: Why there is no figure; empty where there is one.
    """

    name: str
    title: str
    question: str
    figures: tuple[Figure, ...] = ()
    absent: str = ""


def mark_of(row: Row) -> Mark:
    """Return how the end of a trial is drawn."""
    key = row["outcome"]
    if key == Outcome.COMPLETED:
        key = "stable" if row["is_stable"] else "weak"
    return _MARK_OF[key]


def marks_in(rows: Iterable[Row]) -> tuple[Mark, ...]:
    """Return the kinds of marks that occur, in the order of the legend."""
    seen = {mark_of(row).key for row in rows}
    return tuple(mark for mark in MARKS if mark.key in seen)


def spread_evenly(rows: Sequence[Row], num_trials: int) -> list[Row]:
    """Return trials evenly chosen in their order, where a figure has too many to draw each.

    Args:
        rows: Some of the trials of a figure.
        num_trials: All of its trials; their share of `MAX_MARKS` is drawn.
    """
    if num_trials <= MAX_MARKS or len(rows) < 2:  # noqa: PLR2004 - one cannot be thinned
        return list(rows)
    last, limit = len(rows) - 1, max(2, MAX_MARKS * len(rows) // num_trials)
    return [rows[round(k * last / (limit - 1))] for k in range(limit)]


def drawn_text(num_trials: int) -> str:
    """Say that not every trial is drawn, where that is so; begins with a space."""
    if num_trials <= MAX_MARKS:
        return ""
    return (
        f" Of {num_trials:,} trials, {MAX_MARKS:,} are drawn one by one, evenly chosen; all count."
    )


def plot_text(text: str) -> str:
    """Neutralise text for plotly, which reads pseudo-HTML and, between dollars, formulas."""
    short = plain(text)
    short = short if len(short) <= _MAX_LABEL else f"{short[: _MAX_LABEL - 1]}\u2026"
    for char, inert in (("&", "&amp;"), ("<", "&lt;"), (">", "&gt;"), ("$", "&#36;")):
        short = short.replace(char, inert)
    return short


def figure_key(section: Section, figure: Figure, panel: Panel) -> Spec:
    """Return the title and the legend of a drawing, which stand beside it on the page.

    A picture of the drawing alone needs both: the title in lines, and of each entry its label,
    its classes in the style sheet, and its shape, empty for a line.
    """
    title = textwrap.wrap(panel.title or section.title, _MAX_LABEL) or [section.title]
    lines = [(label, f"swatch {token}", "") for label, token in (*figure.series, *panel.series)]
    tone = "plain" if figure.is_legend_plain else ""
    marks = [(mark.label, f"mark-{tone or mark.key}", mark.symbol) for mark in figure.legend]
    return {
        "title": "<br>".join(map(plot_text, title)),
        "legend": [(plot_text(label), look, symbol) for label, look, symbol in (*lines, *marks)],
    }


def scatter(  # noqa: PLR0913 - the parts of a plotly trace
    x: Sequence[Any],
    y: Sequence[Any],
    *,
    color: str,
    symbol: str = "circle",
    hover: Sequence[str] = (),
    size: int = 9,
    **more: Any,  # noqa: ANN401 - plotly's own keys
) -> Spec:
    """Return a trace of marks; `hover` lines must have gone through `plot_text`."""
    return {
        "type": "scatter",
        "mode": "markers",
        "x": list(x),
        "y": list(y),
        "hovertext": list(hover),
        "hoverinfo": "text" if hover else "skip",
        "marker": {
            "size": round(1.3 * size) if symbol.startswith("triangle") else size,
            "symbol": symbol,
            "color": color,
            "line": {"width": 2 if symbol.endswith("-open") else 0.8,
                     "color": color if symbol.endswith("-open") else "@surface"},
        },
        **more,
    }  # fmt: skip


def layout(xaxis: Mapping[str, Any], yaxis: Mapping[str, Any], **more: Any) -> Spec:  # noqa: ANN401
    """Return the layout all figures share."""
    return {
        "xaxis": {**_axis(), **xaxis},
        "yaxis": {**_axis(), **yaxis},
        "margin": _MARGIN,
        "paper_bgcolor": "@surface",
        "plot_bgcolor": "@surface",
        "font": {"family": "system-ui, sans-serif", "size": 12, "color": "@muted"},
        "hoverlabel": {"bgcolor": "@surface", "bordercolor": "@line",
                       "font": {"color": "@ink", "size": 12}, "align": "left"},
        "hovermode": "closest",
        "dragmode": False,
        "showlegend": False,
        **more,
    }  # fmt: skip


def rate_axis(rates: Sequence[float]) -> Spec:
    """Return a log axis for learning rates with a tick at every decade, or more on a short one."""
    low, high = math.log10(min(rates)), math.log10(max(rates))
    digits = (1,) if high - low > _SHORT_AXIS else (1, 2, 5)
    decades = range(math.floor(low) - 1, math.ceil(high) + 1)
    ticks = [digit * 10.0**decade for decade in decades for digit in digits]
    return {
        "type": "log",
        "range": [low - 0.12, high + 0.12],
        "tickmode": "array",
        "tickvals": ticks,
        "ticktext": [_rate_text(tick, low) for tick in ticks],
        "title": {"text": "learning rate", "standoff": 8},
        "fixedrange": True,
    }


def _rate_text(tick: float, low: float) -> str:
    """Return a rate as its axis names it: all with an exponent where the lowest needs one."""
    if tick >= 1 or low > _FEW_ZEROS:
        return number(tick if tick < 1 else round(tick))
    mantissa, _, exponent = f"{tick:.0e}".partition("e")
    return f"{mantissa}e{int(exponent)}"


def line_shape(x: tuple[float, float], y: tuple[float, float], color: str, **more: Any) -> Spec:  # noqa: ANN401
    """Return a straight line across a panel."""
    return {
        "type": "line",
        "x0": x[0],
        "x1": x[1],
        "y0": y[0],
        "y1": y[1],
        "line": {"color": color, "width": 1.5, "dash": "dot"},
        "layer": "below",
        **more,
    }


def guide_label(text: str, y: float, anchor: str) -> Spec:
    """Return what stands beside a straight line across a panel, outside at its right end.

    There it covers no mark. The panel needs `GUIDE_MARGIN` for it.

    Args:
        text: A word of ours.
        y: Where the line lies; on a log axis its decadic logarithm, as plotly has it.
        anchor: `bottom` to stand above the height of the line, `top` to stand below it.
    """
    return {
        "xref": "paper",
        "x": 1,
        "xanchor": "left",
        "xshift": 3,
        "yref": "y",
        "y": y,
        "yanchor": anchor,
        "text": text,
        "showarrow": False,
        "font": {"size": 11, "color": "@ink"},
    }


def _axis() -> Spec:
    return {
        "gridcolor": "@grid",
        "linecolor": "@line",
        "tickcolor": "@line",
        "zeroline": False,
        "fixedrange": True,
        "automargin": True,
    }
