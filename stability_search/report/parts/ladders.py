"""Part 10, the ladders: better, or luckier? Where does it break?"""

from collections.abc import Sequence
from dataclasses import replace

from stability_search.report.context import Row, Rung, RungState, View
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
    plot_text,
    scatter,
)
from stability_search.report.wording import count, number, setting_value
from stability_search.table import STABLE_Q

_MAX_PANELS = 8
_MAX_SETTINGS = 6  # that name a ladder
_MAX_RATES = 6  # rungs of which each has its rate below it

_HEAD = Section(
    name="ladders", title="The ladders", question="Better, or luckier? Where does it break?"
)


def build(view: View) -> Section:
    """Draw every confirmed trial over the doublings of its learning rate."""
    anchors = _anchors(view)
    if not anchors:
        return replace(_HEAD, absent="No candidate has been confirmed yet.")
    shown = anchors[:_MAX_PANELS]
    rows = [row for anchor in shown for row in view.ladder(anchor) if row["q"] is not None]
    figure = Figure(
        name="ladders",
        finding=_finding(view, shown),
        panels=tuple(_panel(view, anchor, shown) for anchor in shown),
        legend=marks_in(rows),
        note=_note(view, shown, num_others=len(anchors) - len(shown)),
        table=_table(view, anchors),
        max_columns=2,
    )
    return replace(_HEAD, figures=(figure,))


def _anchors(view: View) -> list[str]:
    """Return one configuration per ladder, the one that its rungs are counted from.

    That of the verdict, else the best that had all seeds, else the ladder's candidate.
    """
    named = [view.verdict.choice, view.verdict.closest, *view.verdict.confirmed]
    candidates = [row["candidate_id"] for row in view.in_stage("confirm")]
    found: dict[tuple[object, ...], str] = {}
    for config_id in [*named, *candidates]:
        if config_id in view.by_id and view.ladder(config_id):
            found.setdefault(view.line(view.by_id[config_id]), config_id)
    return list(found.values())


def _note(view: View, anchors: Sequence[str], *, num_others: int) -> str:
    seeds = {len(rung.qs) for anchor in anchors for rung in view.rungs(anchor)}
    text = (
        "One mark per seed. An upright band is a configuration that got all seeds; the dotted "
        "line is the bar: every seed must reach q = 1/2."
    )
    if len(seeds) > 1:
        text += (
            f" Other rates had {count(min(seeds), 'seed')}: one that held there may break on more."
        )
    if num_others:
        verb = "stands" if num_others == 1 else "stand"
        text += f" {count(num_others, 'more ladder')} {verb} in the table alone."
    return text


def role_words(view: View, config_id: str) -> str:
    """Return what a configuration is in this study: the choice, today's, the fastest."""
    verdict = view.verdict
    starts = view.report.start_config_ids
    is_today = config_id in starts or any(
        s in view.by_id and view.line(view.by_id[s]) == view.line(view.by_id[config_id])
        for s in starts[:1]
    )
    words = [
        word
        for word, applies in (
            ("choice", config_id == verdict.choice),
            ("closest", config_id == verdict.closest),
            ("fastest", config_id == verdict.fastest),
            ("tied", config_id in verdict.tied and config_id != verdict.choice),
            ("today's" if config_id in starts else "today's ladder", is_today),
        )
        if applies
    ]
    return ", ".join(words)


def _panel(view: View, anchor: str, shown: Sequence[str]) -> Panel:
    rows = [row for row in view.ladder(anchor) if row["q"] is not None]
    rungs = view.rungs(anchor)
    octaves = [rung.octave for rung in rungs]
    data = [
        scatter(
            [row["doublings"] + _spread(row, rows) for row in own],
            [row["q"] for row in own],
            color=f"@{mark.key}",
            symbol=mark.symbol,
            size=10,
            hover=[_hover(row) for row in own],
        )
        for mark in marks_in(rows)
        if (own := [row for row in rows if mark_of(row).key == mark.key])
    ]
    spec = {
        "data": data,
        "layout": layout(
            {
                "range": [min(octaves) - 0.6, max(octaves) + 0.6],
                "tickmode": "array",
                "tickvals": octaves,
                "ticktext": _tick_texts(rungs),
                "tickangle": 0,
                "tickfont": {"size": 11},
                "title": {"text": "learning rate", "standoff": 8},
                "showgrid": False,
            },
            {"range": [-0.06, 1.06], "tickvals": [0, 0.5, 1], "title": {"text": "run score q"}},
            shapes=[
                *_bands(view, anchor),
                line_shape((0, 1), (STABLE_Q, STABLE_Q), "@ink", xref="paper"),
            ],
        ),
    }
    role = role_words(view, anchor)
    title = f"{role}: {anchor}" if role else anchor
    return Panel(title=title, about=_describe(view, anchor, shown), spec=spec, height=290)


def _tick_texts(rungs: Sequence[Rung]) -> list[str]:
    """Return a label per rung; of many, every second one has its rate."""
    every = 1 if len(rungs) <= _MAX_RATES else 2
    return [
        _times(rung.octave)
        + ("" if rung.octave % every else f"<br>{number(float(f'{rung.learning_rate:.2g}'))}")
        for rung in rungs
    ]


def _bands(view: View, anchor: str) -> list[Spec]:
    """Return an upright band at every rung that got all seeds."""
    own = [r["doublings"] for r in view.ladder(anchor) if r["config_id"] in view.verdict.confirmed]
    return [
        {
            "type": "rect", "layer": "below", "yref": "paper", "line": {"width": 0},
            "x0": at - 0.36, "x1": at + 0.36, "y0": 0, "y1": 1, "fillcolor": "@band",
        }
        for at in sorted(set(own))
    ]  # fmt: skip


def _describe(view: View, config_id: str, shown: Sequence[str]) -> str:
    """Name a ladder by the settings in which it differs from the others."""
    row = view.by_id[config_id]
    others = [view.by_id[other] for other in shown]
    names = [
        name
        for name in view.report.varying
        if name != "learning_rate" and row.get(name) is not None
        if len(shown) == 1 or len({other.get(name) for other in others}) > 1
    ]
    named = [f"{name} {setting_value(row.get(name))}" for name in names[:_MAX_SETTINGS]]
    if len(names) > _MAX_SETTINGS:
        named.append(f"and {len(names) - _MAX_SETTINGS} more")
    return ", ".join(named)


def _times(octave: int) -> str:
    if octave == 0:
        return "base"
    return f"\u00d7{2**octave}" if octave > 0 else f"\u00f7{2**-octave}"


def _spread(row: Row, rows: Sequence[Row]) -> float:
    """Place the seeds of a rung side by side."""
    width = max((r["seed_index"] for r in rows if r["doublings"] == row["doublings"]), default=0)
    return 0.0 if width == 0 else 0.44 * (row["seed_index"] / width - 0.5)


def _hover(row: Row) -> str:
    lines = (
        f"{row['trial_id']}, seed {row['seed_index'] + 1}",
        f"{mark_of(row).label}, q {row['q']:.2f}",
        f"learning rate {number(row['learning_rate'])}",
    )
    return "<br>".join(plot_text(line) for line in lines)


def first_broken(rungs: Sequence[Rung]) -> Rung | None:
    """Return the lowest rung above the base on which some seed did not hold."""
    return next((r for r in rungs if r.octave > 0 and r.state is RungState.BROKE), None)


def _finding(view: View, anchors: Sequence[str]) -> str:
    parts = []
    for anchor in anchors[:3]:
        name = role_words(view, anchor) or anchor
        parts.append(f"{name}: {_end_of(view.rungs(anchor))}")
    text = "; ".join(parts)
    return f"{text[:1].upper()}{text[1:]}."


def _end_of(rungs: Sequence[Rung]) -> str:
    """Say where a ladder breaks, and where a seed was lost that might have said more."""
    base = next((rung for rung in rungs if rung.octave == 0), None)
    if base is not None and base.state is RungState.BROKE:
        return "misses the bar at its own rate"
    broken = first_broken(rungs)
    lost = [r for r in rungs if r.octave >= 0 and r.state is RungState.LOST and r is not broken]
    at_lost = ", ".join(_times(rung.octave) for rung in lost)
    but_lost = f", and a seed was lost at {at_lost}" if lost else ""
    but_lost += _later_end(rungs)
    if broken is not None:
        at = f"{_times(broken.octave)} ({number(broken.learning_rate)})"
        return f"not every seed held at {at}{but_lost}"
    above = [rung for rung in rungs if rung.octave > 0]
    if not above:
        return f"no rate above it was tried{but_lost}"
    seeds = {len(rung.qs) - rung.num_lost for rung in above}
    each = "each" if len(seeds) == 1 else "or more"
    doublings = count(max(rung.octave for rung in above), "doubling")
    if not min(seeds):
        return f"nothing broke up to {doublings}{but_lost}"
    return f"held at every one of {doublings}, on {count(min(seeds), 'seed')} {each}{but_lost}"


def _later_end(rungs: Sequence[Rung]) -> str:
    """Say where a rate above fell on seeds that it had later, as a base, and no rung counts."""
    broke = [
        f"{_times(rung.octave)} ({rung.later.num_held} of {len(rung.later.qs)})"
        for rung in rungs
        if rung.octave > 0 and rung.later is not None and rung.later.state is RungState.BROKE
    ]
    return f", but not every later seed held at {', '.join(broke)}" if broke else ""


def _table(view: View, anchors: Sequence[str]) -> DataTable:
    return DataTable.of(
        ("candidate", "configuration", "learning rate", "rung", "seed", "end", "q"),
        [row for anchor in anchors for row in view.ladder(anchor)],
        lambda row: (
            row["candidate_id"] or "",
            row["config_id"],
            number(row["learning_rate"]),
            _times(row["doublings"]),
            str(row["seed_index"] + 1),
            mark_of(row).label,
            number(row["q"]),
        ),
    )
