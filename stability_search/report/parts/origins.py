"""Part 5, where it began: which module was non-finite first, forward or backward?"""

import math
import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

from stability_search.inert import plain
from stability_search.report.context import Row, View
from stability_search.report.figures import (
    DataTable,
    Figure,
    Mark,
    Panel,
    Section,
    Spec,
    layout,
    plot_text,
    scatter,
)
from stability_search.report.wording import count, half_by, number

_MAX_MODULES = 12
_BINS_PER_DOUBLING = 2  # of the step, for the marks
_NOT_LOCATED = "not located"
_UNKNOWN = "unknown"
_PLACES = 0.2  # between the marks of two phases, in rows
_LARGEST = 22.0  # pixels of the largest mark
_SMALLEST = 11.0

_PHASES: tuple[tuple[Mark, str], ...] = (
    (Mark(key="forward", label="forward pass", symbol="triangle-right"), "@series-3"),
    (Mark(key="loss", label="loss", symbol="square"), "@series-1"),
    (Mark(key="backward", label="backward pass", symbol="triangle-left"), "@series-2"),
    (Mark(key="update", label="update", symbol="diamond"), "@series-4"),
    (Mark(key="unknown", label="phase unknown", symbol="circle"), "@series-0"),
)
_HEAD = Section(
    name="origins",
    title="Where it began",
    question="Which module was non-finite first, forward or backward?",
)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Place:
    """Trials whose first bad step lies together: one mark."""

    module: str
    phase: str
    step: float
    num_trials: int
    steps: tuple[int, int]


def build(view: View) -> Section:
    """Draw the module and the phase of every first bad step."""
    rows = [row for row in view.results if row["first_bad_step"] is not None]
    if not rows:
        if not view.results:
            return replace(_HEAD, absent="No trial has ended with a result yet.")
        absent = f"None of {count(len(view.results), 'trial')} had a bad step."
        return replace(_HEAD, absent=absent)
    counts = Counter(_module(row) for row in rows)
    ranked = sorted(counts, key=lambda name: (-counts[name], name))
    shown = ranked[:_MAX_MODULES]
    figure = Figure(
        name="origins",
        finding=_finding(rows, counts, ranked[0]),
        panels=(Panel(title="", spec=_spec(rows, shown), height=110 + 46 * max(2, len(shown))),),
        legend=tuple(mark for mark, _ in _phases_in(rows)),
        note=_note(rows, ranked),
        table=_table(rows, ranked),
    )
    return replace(_HEAD, figures=(figure,))


def _module(row: Row) -> str:
    return plain(row["first_nonfinite_module"] or "") or _NOT_LOCATED


def _phase(row: Row) -> str:
    phase = row["first_nonfinite_phase"]
    return phase if any(phase == mark.key for mark, _ in _PHASES) else _UNKNOWN


def _phases_in(rows: Sequence[Row]) -> list[tuple[Mark, str]]:
    seen = {_phase(row) for row in rows}
    return [(mark, color) for mark, color in _PHASES if mark.key in seen]


def _places(rows: Sequence[Row]) -> list[_Place]:
    """Gather first bad steps of one module, phase and half-doubling of the step."""
    found: dict[tuple[str, str, int], list[int]] = {}
    for row in rows:
        half = round(_BINS_PER_DOUBLING * math.log2(max(1, row["first_bad_step"])))
        found.setdefault((_module(row), _phase(row), half), []).append(row["first_bad_step"])
    return [
        _Place(
            module=module,
            phase=phase,
            step=2 ** statistics.fmean(math.log2(max(1, step)) for step in steps),
            num_trials=len(steps),
            steps=(min(steps), max(steps)),
        )
        for (module, phase, _), steps in sorted(found.items())
    ]


def _spec(rows: Sequence[Row], shown: Sequence[str]) -> Spec:
    places = [place for place in _places(rows) if place.module in shown]
    largest = max(place.num_trials for place in places)
    phases = _phases_in(rows)
    data = []
    for k, (mark, color) in enumerate(phases):
        own = [place for place in places if place.phase == mark.key]
        offset = _PLACES * (k - (len(phases) - 1) / 2)
        sizes = [
            _SMALLEST
            + (_LARGEST - _SMALLEST) * math.sqrt((p.num_trials - 1) / max(1, largest - 1))
            for p in own
        ]
        trace = scatter(
            [round(place.step, 3) for place in own],
            [shown.index(place.module) + offset for place in own],
            color=color,
            symbol=mark.symbol,
            hover=[_hover(place, mark.label) for place in own],
        )
        trace["marker"] |= {"size": [round(size, 1) for size in sizes], "opacity": 0.88}
        trace |= {
            "mode": "markers+text",
            "text": [f"{p.num_trials:,}" if p.num_trials > 1 else "" for p in own],
            "textposition": "top center",
            "textfont": {"size": 11, "color": "@ink"},
        }
        data.append(trace)
    return {"data": data, "layout": layout(_step_axis(rows), _module_axis(shown))}


def _step_axis(rows: Sequence[Row]) -> Spec:
    last = max(row["first_bad_step"] for row in rows)
    ticks = [
        digit * 10**decade
        for decade in range(math.floor(math.log10(last)) + 1)
        for digit in (1, 2, 5)
        if digit * 10**decade <= 2 * last
    ]
    return {
        "type": "log",
        "range": [-0.12, math.log10(max(last, 10)) + 0.12],
        "tickmode": "array",
        "tickvals": ticks,
        "ticktext": [f"{tick:,}" for tick in ticks],
        "title": {"text": "first bad step", "standoff": 8},
    }


def _module_axis(shown: Sequence[str]) -> Spec:
    return {
        "range": [len(shown) - 0.4, -0.6],  # the most frequent on top
        "tickmode": "array",
        "tickvals": list(range(len(shown))),
        "ticktext": [plot_text(name) for name in shown],
    }


def _hover(place: _Place, phase: str) -> str:
    low, high = place.steps
    steps = f"step {low:,}" if low == high else f"steps {low:,} to {high:,}"
    lines = (place.module, phase, f"{steps}, {count(place.num_trials, 'trial')}")
    return "<br>".join(plot_text(line) for line in lines)


def _finding(rows: Sequence[Row], counts: Counter[str], first: str) -> str:
    own = [row for row in rows if _module(row) == first]
    when = half_by([row["first_bad_step"] for row in own])
    known = [mark for mark, _ in _phases_in(own) if mark.key != _UNKNOWN]
    counted = [sum(_phase(row) == mark.key for row in own) for mark in known]
    where = ", ".join(
        f"{'all' if num == len(own) > 1 else f'{num:,}'} in the {mark.label}"
        for mark, num in zip(known, counted, strict=True)
    )
    seen = f"{counts[first]:,} of {count(len(rows), 'trial')} with a bad step"
    end = f"{', ' + where if where else ''}, {when}."
    if first == _NOT_LOCATED:
        return f"No module was found that turned non-finite first in {seen}{end}"
    return f"Non-finite values were first seen in {first} in {seen}{end}"


def _note(rows: Sequence[Row], ranked: Sequence[str]) -> str:
    text = (
        "First seen there, which does not say caused by. A number counts trials that lie together."
    )
    passed = sum(row["is_first_bad_transient"] is True for row in rows)
    looked = sum(row["is_first_bad_transient"] is not None for row in rows)
    if passed:
        text += (
            f" In {passed:,} of {count(looked, 'trial')} that were looked at, the fault did not "
            "show again on the same inputs: a passing fault, of the machine or of random numbers."
        )
    left_out = len(ranked) - _MAX_MODULES
    if left_out > 0:
        text += f" {count(left_out, 'module')} with fewer trials stand in the table only."
    return text


def _table(rows: Sequence[Row], ranked: Sequence[str]) -> DataTable:
    cells = []
    for module in ranked:
        own = [row for row in rows if _module(row) == module]
        for mark, _ in _phases_in(own):
            of_phase = [row for row in own if _phase(row) == mark.key]
            steps = sorted(row["first_bad_step"] for row in of_phase)
            largest = [
                row["last_finite_max"] for row in of_phase if row["last_finite_max"] is not None
            ]
            cells.append(
                (
                    module,
                    mark.label,
                    str(len(steps)),
                    f"{steps[0]:,}",
                    f"{int(statistics.median_high(steps)):,}",
                    f"{steps[-1]:,}",
                    number(statistics.median(largest)) if largest else "",
                )
            )
    return DataTable(
        columns=("module", "phase", "trials", "earliest", "median step", "latest",
                 "median of the largest finite value before"),
        rows=tuple(cells),
    )  # fmt: skip
