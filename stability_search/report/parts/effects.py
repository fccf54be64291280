"""Part 9, effects: which setting matters?"""

from collections.abc import Sequence
from dataclasses import replace

from stability_search.inert import plain
from stability_search.records.trial import Outcome
from stability_search.report.context import View
from stability_search.report.effects import (
    MIN_CONFIGURATIONS,
    MIN_EACH,
    WORTH_NAMING,
    Cell,
    Effect,
    Effects,
    Pair,
    configurations_of,
    estimate,
    has_enough,
)
from stability_search.report.estimates import Share, clopper_pearson
from stability_search.report.figures import (
    DataTable,
    Figure,
    Panel,
    Section,
    Spec,
    layout,
    line_shape,
    plot_text,
)
from stability_search.report.wording import count, number, outcomes_text

_MAX_EFFECTS = 8
_MAX_PAIRS = 2
_CONVINCING = 0.05  # chance of a pair, all pairs considered, below which it is named

_HEAD = Section(name="effects", title="Effect of settings", question="Which setting matters?")


def build(view: View) -> Section:
    """Draw what each setting does to the chance of a stable end, and the strongest pairs."""
    configurations = configurations_of(view.results)
    if not has_enough(configurations):
        return replace(_HEAD, absent=_too_few(view, len(configurations)))
    found = estimate(configurations, view.report.varying)
    if not found.effects:
        return replace(_HEAD, absent="No setting was tried at more than one value.")
    figures = [_effects(view, found)]
    pairs = [pair for pair in found.pairs if len(pair.cells) > 1][:_MAX_PAIRS]
    if pairs:
        figures.append(_pairs(pairs))
    return replace(_HEAD, figures=tuple(figures))


def _too_few(view: View, num_configurations: int) -> str:
    if not view.results:
        return "No trial has ended with a result yet."
    stable = sum(bool(row["is_stable"]) for row in view.results)
    return (
        f"{count(num_configurations, 'configuration')} ended with a result, "
        f"{stable:,} of {count(len(view.results), 'trial')} stable: too few to tell settings "
        f"apart, which takes {MIN_CONFIGURATIONS} configurations, {MIN_EACH} of them stable and "
        f"{MIN_EACH} not."
    )


def _effects(view: View, found: Effects) -> Figure:
    shown = found.effects[:_MAX_EFFECTS]
    return Figure(
        name="effects",
        finding=_finding(shown),
        panels=tuple(_panel(effect) for effect in shown),
        max_columns=2 if len(shown) in {2, 4} else 3,
        note=(
            f"The chance that a configuration is stable if all {found.num_configurations:,} had "
            "that value and kept the rest, with 95 % intervals: our own estimate, by a logistic "
            "regression over all settings at once, killed trials included. Stable means completed "
            "with q of at least 1/2, so a rate too low to learn is not. A configuration counts "
            "once, however many seeds it had. A difference is called clear if it is above "
            f"{100 * WORTH_NAMING:g} points with all {len(found.effects):,} settings taken into "
            f"account; the search chose what was tried, so none of this proves a cause. "
            f"{_left_out(view)}"
        ),
        table=_table(found.effects),
    )


def _left_out(view: View) -> str:
    lost = [row for row in view.trials if not Outcome(row["outcome"]).is_result]
    return f"Left out: {outcomes_text(view, lost)}." if lost else "No trial had to be left out."


def _panel(effect: Effect) -> Panel:
    levels = effect.levels
    is_free = sum(level.number is not None for level in levels) > 1
    places = list(range(len(levels)))
    shares = [level.share for level in levels]
    marks: Spec = {
        "type": "scatter",
        "mode": "lines+markers" if is_free else "markers",
        "x": places,
        "y": [round(share.value, 4) for share in shares],
        "error_y": {
            "type": "data",
            "symmetric": False,
            "array": [round(share.high - share.value, 4) for share in shares],
            "arrayminus": [round(share.value - share.low, 4) for share in shares],
            "color": "@stable",
            "thickness": 1.6,
            "width": 5,
        },
        "line": {"color": "@stable", "width": 1.4, "dash": "dot"},
        "marker": {"size": 10, "color": "@stable", "line": {"width": 0.8, "color": "@surface"}},
        "hovertext": [f"{plot_text(level.text)}: {_interval(level.share)}" for level in levels],
        "hoverinfo": "text",
    }
    spec: Spec = {
        "data": [marks],
        "layout": layout(
            {
                "range": [-0.6, len(levels) - 0.4],
                "tickmode": "array",
                "tickvals": places,
                "ticktext": [plot_text(level.text) for level in levels],
                "tickangle": 0,
                "showgrid": False,
            },
            {"range": [-0.04, 1.04], "tickvals": [0, 0.5, 1], "ticktext": ["0", "50 %", "100 %"],
             "title": {"text": "P(stable)", "standoff": 6}},
            shapes=[line_shape((0, 1), (0.5, 0.5), "@line", xref="paper")],
        ),
    }  # fmt: skip
    return Panel(title=plain(effect.name), spec=spec, height=220)


def _interval(share: Share) -> str:
    return f"{_percent(share.value)} ({_percent(share.low)} to {_percent(share.high)})"


def _percent(value: float) -> str:
    """Return a share that was estimated: never a bare 0 or 100."""
    whole = round(100 * value)
    return {0: "below 1 %", 100: "above 99 %"}.get(whole, f"{whole} %")


def _finding(shown: Sequence[Effect]) -> str:
    clear = [effect for effect in shown if effect.is_clear]
    first = next(iter(clear), shown[0])
    if not clear:
        return (
            "No setting clearly goes with the chance of a stable end; the largest difference is "
            f"that of {plain(first.name)}, {_points(first.size)}."
        )
    best = max(first.levels, key=lambda level: level.share.value)
    worst = min(first.levels, key=lambda level: level.share.value)
    text = (
        f"{plain(first.name)} goes with the largest clear difference: from "
        f"{_percent(best.share.value)} stable at {best.text} to {_percent(worst.share.value)} "
        f"at {worst.text}, a difference of {_points(first.size)}"
    )
    others = [plain(effect.name) for effect in clear if effect is not first]
    return f"{text}; then {', '.join(others[:3])}." if others else f"{text}; no other is clear."


def _points(size: Share) -> str:
    value, low, high = (round(100 * part) for part in (size.value, size.low, size.high))
    return f"{value} points ({low} to {high})"


def _table(effects: Sequence[Effect]) -> DataTable:
    return DataTable(
        columns=("setting", "value", "configurations", "P(stable)", "95 % interval",
                 "best less worst"),
        rows=tuple(
            (
                plain(effect.name),
                level.text,
                "" if level.number is not None else f"{level.num_configurations:,}",
                _percent(level.share.value),
                f"{_percent(level.share.low)} to {_percent(level.share.high)}",
                _points(effect.size) if level is effect.levels[0] else "",
            )
            for effect in effects
            for level in effect.levels
        ),
    )  # fmt: skip


def _pairs(pairs: Sequence[Pair]) -> Figure:
    rows = max(len({cell.second for cell in pair.cells}) for pair in pairs)
    return Figure(
        name="pairs",
        finding=_pair_finding(pairs),
        panels=tuple(_pair_panel(pair, rows) for pair in pairs),
        note=(
            "In every cell, stable configurations of all that were tried there; one that was "
            "stable on some of its seeds counts in part. A pair is strong "
            "where cells differ from what the two settings alone lead to expect; the chance "
            "counts every pair that was looked at."
        ),
        table=_pair_table(pairs),
    )


def _pair_finding(pairs: Sequence[Pair]) -> str:
    first, second = (plain(name) for name in pairs[0].names)
    if pairs[0].p_value > _CONVINCING:
        return (
            "No pair is seen to do more together than its two settings alone; the nearest to it "
            f"is {first} with {second} ({_chance(pairs[0])})."
        )
    cell = max(pairs[0].cells, key=_surprise)
    return (
        f"{first} and {second} do more together than alone ({_chance(pairs[0])}): at "
        f"{cell.first} with {cell.second}, {number(round(cell.num_stable, 1))} of "
        f"{count(cell.num_configurations, 'configuration')} were stable where "
        f"{number(round(cell.expected, 1))} were expected."
    )


def _surprise(cell: Cell) -> float:
    return abs(cell.num_stable - cell.expected)


def _chance(pair: Pair) -> str:
    if pair.p_value < 0.001:  # noqa: PLR2004 - three digits are shown
        return "by chance alone below 0.1 %"
    if pair.p_value > 0.99:  # noqa: PLR2004 - see above
        return "well within chance"
    return f"by chance alone about {100 * pair.p_value:.2g} %"


def _pair_panel(pair: Pair, num_rows: int) -> Panel:
    firsts = list(dict.fromkeys(cell.first for cell in pair.cells))
    seconds = list(dict.fromkeys(cell.second for cell in _by_second(pair)))
    known = {(cell.first, cell.second): cell for cell in pair.cells}
    grid = [[known.get((first, second)) for first in firsts] for second in seconds]
    spec: Spec = {
        "data": [
            {
                "type": "heatmap",
                "z": [[_ratio(cell) for cell in row] for row in grid],
                "zmin": 0,
                "zmax": 1,
                "colorscale": [[0, "@share-low"], [0.5, "@share-mid"], [1, "@share-high"]],
                "showscale": False,
                "xgap": 3,
                "ygap": 3,
                "text": [[_cell_text(cell) for cell in row] for row in grid],
                "texttemplate": "%{text}",
                "textfont": {"color": "@ink", "size": 13},
                "hoverinfo": "skip",
            }
        ],
        "layout": layout(
            _ticks(pair.names[0], firsts),
            _ticks(pair.names[1], seconds),
        ),
    }
    title = f"{plain(pair.names[0])} with {plain(pair.names[1])}"
    return Panel(title=title, spec=spec, height=110 + 46 * num_rows)


def _by_second(pair: Pair) -> list[Cell]:
    """Return the cells so that values of the second setting come in their own order."""
    order = {text: i for i, text in enumerate(pair.second_order)}
    return sorted(pair.cells, key=lambda cell: order[cell.second])


def _ratio(cell: Cell | None) -> float | None:
    return None if cell is None else round(cell.num_stable / cell.num_configurations, 3)


def _cell_text(cell: Cell | None) -> str:
    if cell is None:
        return ""
    return f"{number(round(cell.num_stable, 1))} of {cell.num_configurations:,}"


def _ticks(name: str, labels: Sequence[str]) -> Spec:
    return {
        "tickmode": "array",
        "tickvals": list(range(len(labels))),
        "ticktext": [plot_text(text) for text in labels],
        "title": {"text": plot_text(name), "standoff": 8},
        "showgrid": False,
    }


def _pair_table(pairs: Sequence[Pair]) -> DataTable:
    return DataTable(
        columns=("settings", "first", "second", "stable", "95 % interval", "expected"),
        rows=tuple(
            (
                " with ".join(plain(name) for name in pair.names),
                cell.first,
                cell.second,
                _cell_text(cell),
                "{} to {}".format(*_bounds(cell)),
                number(round(cell.expected, 1)),
            )
            for pair in pairs
            for cell in pair.cells
        ),
    )


def _bounds(cell: Cell) -> tuple[str, str]:
    share = clopper_pearson(cell.num_stable, cell.num_configurations)
    return _percent(share.low), _percent(share.high)
