"""Part 12, trial drawer: what happened in this one?"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from stability_search.inert import plain
from stability_search.records.step import StepLabel, StepRecord
from stability_search.report.context import Row, View
from stability_search.report.curve_data import Column, binary_axis, columns_of, log_axis
from stability_search.report.curves import Curve
from stability_search.report.figures import Mark, Spec, layout, line_shape, mark_of
from stability_search.report.parts import appendix
from stability_search.report.wording import count, number

_SHOWN_LABELS = (StepLabel.BAD, StepLabel.DATA)
_WHY = {
    "headline": "the configuration of the verdict",
    "best": "one of the best",
    "near the cliff": "failed near the cliff",
}
_TITLES = {
    "loss": "Loss",
    "norm": "Gradient norm before clipping",
    "scale": "Loss scale",
    "attention": "Largest attention logit before cap and clamp",
    "evidence": "Evidence of the kill rule",
}
_LOG_FROM = 20.0  # ratio of losses above which their axis is logarithmic
_REPEAT = """\
python - <<'END'
from pathlib import Path
from stability_search.search.run_directory import facts_of_environment, open_run, space_of
from stability_search.settings.trial import TrialConstants
from stability_search.step_files import read_row
from stability_search.trial import run_trial

run = open_run(Path({run}).expanduser())
row = read_row(run.step_file({trial}, {attempt}))
space = space_of(run, facts_of_environment(run))
steps = row.summary.num_planned_steps
config = space.trial_config(row.settings, seed=row.seed, steps=steps, device={device})
constants = TrialConstants(e0=row.e0, delta=row.delta, probe_steps=row.summary.probe_steps)
for progress in run_trial(config, constants=constants):
    record = progress.record
    print(record.step, record.label, record.loss, record.reason)
END"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """One trial whose steps the page holds.

    Attributes:
        key: Name of the trial and its attempt, as the data names them.
        trial_id: The trial.
        mark: How it ended.
        why: Why its steps are here.
        bad: Its bad steps, counted.
        q: Its run score.
    """

    key: str
    trial_id: str
    mark: Mark
    why: str
    bad: str
    q: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Drawer:
    """What the drawer of a trial is filled from.

    Attributes:
        entries: Trials whose steps the page holds.
        absent: Why there are none; empty where there are.
        data: Everything the page's script needs, strict JSON.
    """

    entries: tuple[Entry, ...]
    absent: str
    data: dict[str, Any]


def build(view: View) -> Drawer:
    """Collect what the drawer shows of every trial whose steps the page holds."""
    words = _Words(view)
    trials = {
        key_of(curve.row): _trial(view, i, curve, words)
        for i, curve in enumerate(view.curves.shown)
    }
    data = {
        "columns": list(appendix.columns_of(view)),
        "run": _run(view),
        "device": "cpu" if view.report.device == "cpu" else "cuda",
        "repeat": _REPEAT,
        "panels": [_panel(view, *panel) for panel in _TITLES.items()],
        "trials": trials,
        "words": words.found,
    }
    return Drawer(
        entries=tuple(_entry(curve) for curve in view.curves.shown),
        absent="" if trials else _absent(view),
        data=data,
    )


def key_of(row: Row) -> str:
    """Return what the page calls one attempt of a trial."""
    return f"{plain(row['trial_id'])}#{row['attempt']}"


class _Words:
    """Every different text once: a reason repeats from step to step."""

    def __init__(self, view: View) -> None:
        self._view = view
        self._places: dict[str, int] = {}

    @property
    def found(self) -> list[str]:
        return list(self._places)

    def place(self, text: str | None) -> int:
        """Return where a text stands in `found`."""
        shown = plain(self._view.private(text or ""))
        return self._places.setdefault(shown, len(self._places))


def _trial(view: View, i: int, curve: Curve, words: _Words) -> dict[str, Any]:
    return {
        "curve": i,
        "color": mark_of(curve.row).key,
        "facts": [cell.text for cell in appendix.cells_of(view, curve.row)],
        "axes": _axes(columns_of(curve)),
        "num_steps": curve.num_steps,
        "steps": [_step(step, words) for step in curve.steps if step.label in _SHOWN_LABELS],
    }


def _step(step: StepRecord, words: _Words) -> list[Any]:
    """Return one bad step as the page's script reads it."""
    return [
        step.step,
        words.place(step.label),
        words.place(step.reason),
        words.place(step.first_nonfinite_module),
        words.place(step.first_nonfinite_phase),
        words.place("" if step.last_finite_max is None else number(step.last_finite_max)),
        step.batch_index,
        words.place("" if step.evidence is None else number(step.evidence)),
    ]


def _run(view: View) -> str:
    return plain(view.private(view.report.run_directory)).rstrip("/")


def _axes(columns: dict[str, Column]) -> dict[str, Spec]:
    """Return the upright axis of every curve of a trial."""
    axes: dict[str, Spec] = {}
    for name in _TITLES:
        values = [value for value in columns.get(name, ()) if value is not None]
        positive = [value for value in values if value > 0]
        if not positive or (name == "loss" and not _is_wide(values)):
            axes[name] = {"type": "linear", "nticks": 5}
        elif name == "scale":
            axes[name] = binary_axis(positive)
        else:
            axes[name] = log_axis(positive, "")
        axes[name].pop("title", None)
    return axes


def _is_wide(values: Sequence[float]) -> bool:
    return min(values) > 0 and max(values) / min(values) > _LOG_FROM


def _panel(view: View, name: str, title: str) -> dict[str, Any]:
    kill = 1 / view.study.kill_rule.false_kill
    shapes: list[Spec] = [
        {"type": "rect", "xref": "paper", "yref": "paper", "layer": "below", "x0": 0, "x1": 1,
         "y0": 0.9, "y1": 1, "fillcolor": "@rail", "line": {"width": 0}},
    ]  # fmt: skip
    if name == "evidence":
        shapes.append(line_shape((0, 1), (kill, kill), "@ink", xref="paper"))
        title = f"{title}; dotted, where it kills ({number(kill)})"
    rail = {"domain": [0.9, 1], "range": [-1, 1], "visible": False, "fixedrange": True}
    spec = layout(
        {"rangemode": "tozero"}, {"domain": [0, 0.87]}, yaxis2=rail, shapes=shapes, height=170
    )
    spec["margin"] = {"l": 48, "r": 8, "t": 4, "b": 24}
    return {"name": name, "title": title, "layout": spec}


def _entry(curve: Curve) -> Entry:
    row = curve.row
    return Entry(
        key=key_of(row),
        trial_id=plain(row["trial_id"]),
        mark=mark_of(row),
        why=_WHY[curve.why],
        bad=f"{row['num_bad_steps'] or 0:,} of {count(row['num_judged_steps'] or 0, 'step')}",
        q="" if row["q"] is None else f"{row['q']:.2f}",
    )


def _absent(view: View) -> str:
    if not view.results:
        return "No trial has ended with a result yet."
    if view.curves.num_lost:
        return f"The steps of {count(view.curves.num_lost, 'trial')} could not be read."
    return "The steps of this run are not at hand; every trial can be opened all the same."
