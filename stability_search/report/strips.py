"""A strip of marks: a share per trial over the values of one setting, with an alarm line."""

from collections.abc import Sequence

from stability_search.report.context import Row
from stability_search.report.figures import (
    Panel,
    layout,
    line_shape,
    mark_of,
    marks_in,
    plot_text,
    scatter,
    spread_evenly,
)
from stability_search.report.grouping import groups_of
from stability_search.report.wording import setting_value

_WIDTH = 0.56  # of the marks of one value, in columns


def strip(rows: Sequence[Row], setting: str, share: str, *, alarm: float, title: str) -> Panel:
    """Return a panel with a mark per trial: the share over the value of a setting.

    Args:
        rows: Trials of which the share was measured.
        setting: The setting; each of its values, or bands of values, is a column.
        share: The column that is drawn, in [0, 1].
        alarm: The share from which it is worth a warning, drawn as a dotted line.
        title: Heading of the panel.
    """
    groups = groups_of(rows, setting)
    ordered = [
        sorted(spread_evenly(own, len(rows)), key=lambda row: row[share]) for _, own in groups
    ]
    data = []
    for mark in marks_in(rows):
        points = [
            (k + _WIDTH * _place(place, len(ordered[k])), row)
            for k in range(len(groups))
            for place, row in enumerate(ordered[k])
            if mark_of(row).key == mark.key
        ]
        data.append(
            scatter(
                [round(x, 3) for x, _ in points],
                [round(100 * row[share], 3) for _, row in points],
                color=f"@{mark.key}",
                symbol=mark.symbol,
                size=8,
                opacity=0.85,
                hover=[_hover(row, setting, share) for _, row in points],
            )
        )
    top = 100 * max(1.25 * alarm, 1.06 * max(row[share] for row in rows))
    spec = {
        "data": data,
        "layout": layout(
            {
                "range": [-0.6, len(groups) - 0.4],
                "tickmode": "array",
                "tickvals": list(range(len(groups))),
                "ticktext": [plot_text(text) for text, _ in groups],
                "title": {"text": plot_text(setting), "standoff": 8},
                "showgrid": False,
            },
            {"range": [-0.03 * top, min(top, 105)], "ticksuffix": " %"},
            shapes=[line_shape((0, 1), (100 * alarm, 100 * alarm), "@ink", xref="paper")],
        ),
    }
    return Panel(title=title, spec=spec, height=250)


def _place(place: int, num_marks: int) -> float:
    """Return where a mark stands in its column, from -1/2 to 1/2."""
    return place / (num_marks - 1) - 0.5 if num_marks > 1 else 0.0


def _hover(row: Row, setting: str, share: str) -> str:
    lines = (
        row["trial_id"],
        mark_of(row).label,
        f"{setting} {setting_value(row.get(setting))}",
        f"{100 * row[share]:.3g} %",
    )
    return "<br>".join(plot_text(text) for text in lines)
