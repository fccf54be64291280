"""Part 13, appendix: can I check it?"""

from dataclasses import dataclass
from typing import Any

from stability_search.inert import plain
from stability_search.report.context import Row, View
from stability_search.report.figures import DataTable
from stability_search.report.wording import number

MAX_LISTED = 1000
"""Trials in the table of the page; the others stand in the files of the run."""

_FACTS = (
    "trial_id", "stage", "config_id", "outcome", "reason", "q", "calm", "smooth", "kept",
    "progress", "num_steps", "num_bad_steps", "num_calibration_steps", "num_data_steps",
    "first_nonfinite_module", "probe_last", "wall_s", "node", "attempt", "seed", "warnings",
)  # fmt: skip
# One word a paragraph, "word: meaning"; indented lines go on.
_GLOSSARY_TEXT = """\
configuration: One value for every setting, the learning rate included.
trial: One short training run of one configuration with one seed.
step: One attempt at an optimizer step. Its label is ok, calibration (a benign search for
    the loss scale), bad, or data (the batch's fault). Only ok and bad steps are judged.
outcome: How a trial ended. pruned: killed for bad steps by the kill rule; diverged: its loss
    stayed far above where it began; the others say what they mean.
horizon: The planned steps of a trial. What is stable over 400 steps may break later.
run score q: How well and how calmly one trial trained: q = A * B * C * P, in [0, 1].
A, calm: Halved by every 2 % of bad steps.
B, smooth: Halved by every 1 % of steps in a lasting loss spike.
C, kept: 1 less the share of the gain that was lost again by the end.
P, progress: How far the probe loss came from E_0 towards E*; full at 90 % of the way.
Q: A lower bound on the mean of q over the seeds. Seeds are few, so it stays below 1.
margin: How many doublings of the learning rate every seed survives.
score S: 100 * Q * (1/2 + M/2), where M is the mean run score over the rungs above. Its
    ceiling depends on the number of seeds: 77.3 with five.
the bar: Every seed completed with q of at least 1/2, and the margin asked for.
E_0: The probe loss that counts as no progress: of the start, or of a model that ignores its
    input.
E*: The best probe loss that a sound trial of this horizon reached.
Delta: E_0 less E*: the yardstick of progress.
probe: A fixed held-out set, read in fp32 at every tenth of the horizon.
"""
GLOSSARY: tuple[tuple[str, str], ...] = tuple(
    (word, meaning)
    for word, _, meaning in (
        line.partition(": ") for line in _GLOSSARY_TEXT.replace("\n    ", " ").splitlines()
    )
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Cell:
    """One cell of the sortable table.

    Attributes:
        text: What is shown.
        key: What it sorts by: a number as text, or the text itself.
    """

    text: str
    key: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Appendix:
    """Everything the appendix shows."""

    space_text: str
    facts: tuple[tuple[str, str], ...]
    yardsticks: DataTable
    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    num_left_out: int
    glossary: tuple[tuple[str, str], ...]


def build(view: View) -> Appendix:
    """Collect what lets a reader check the page."""
    shown = _listed(view)
    return Appendix(
        space_text=view.private(view.report.space_text),
        facts=_facts(view),
        yardsticks=_yardsticks(view),
        columns=columns_of(view),
        rows=tuple(cells_of(view, row) for row in shown),
        num_left_out=len(view.trials) - len(shown),
        glossary=GLOSSARY,
    )


def columns_of(view: View) -> tuple[str, ...]:
    """Return the columns of the table of trials."""
    return (*_FACTS[:5], *map(plain, view.report.varying), *_FACTS[5:])


def cells_of(view: View, row: Row) -> tuple[Cell, ...]:
    """Return a trial as a row of that table."""
    return (
        *(_cell(row[name]) for name in _FACTS[:5]),
        *(_cell(row.get(name), is_setting=True) for name in view.report.varying),
        *(_cell(row[name]) for name in _FACTS[5:]),
    )


def _listed(view: View) -> list[Row]:
    """Return the trials of the table; where there are too many, those of confirm stay."""
    if len(view.trials) <= MAX_LISTED:
        return list(view.trials)
    first = [*view.in_stage("confirm"), *view.in_stage("pilot"), *view.in_stage("search")]
    kept = {id(row) for row in first[:MAX_LISTED]}
    return [row for row in view.trials if id(row) in kept]


def _facts(view: View) -> tuple[tuple[str, str], ...]:
    report = view.report
    environment = {name: _flat(view, value) for name, value in sorted(report.environment.items())}
    # What made the run stands in its environment; another command may draw the report again.
    own = {
        "task": report.task_name,
        "device": report.device,
        "command": environment.get("command") or report.command,
        "run directory": report.run_directory,
        "study seed": str(view.study.seed),
    }
    more = {name: value for name, value in environment.items() if name not in own}
    return tuple((plain(n), plain(view.private(v))) for n, v in {**own, **more}.items() if v)


def _flat(view: View, value: Any) -> str:  # noqa: ANN401 - any JSON value
    """Return a value as a line of text, without what is empty in it."""
    if isinstance(value, dict):
        named = [(name, _flat(view, inner)) for name, inner in sorted(value.items())]
        return ", ".join(f"{name} {text}" for name, text in named if text)
    if isinstance(value, list | tuple):
        return ", ".join(text for inner in value if (text := _flat(view, inner)))
    # A host of few letters is known only here, where it stands alone.
    return "" if value is None else view.private(str(value))


def _yardsticks(view: View) -> DataTable:
    rows = []
    for horizon, found in sorted(view.report.yardsticks.items()):
        source = f" ({found.e0_source})" if found.e0_source else ""
        rows.append(
            (
                f"{horizon:,} steps",
                f"{number(found.e0)}{source}",
                number(found.e_star),
                number(found.delta),
                number(found.sigma),
                "yes" if found.has_signal else "no",
            )
        )
    return DataTable(
        columns=("horizon", "E_0", "E*", "Delta", "sigma", "signal"), rows=tuple(rows)
    )


def _cell(value: Any, *, is_setting: bool = False) -> Cell:  # noqa: ANN401 - any JSON scalar
    if value is None:
        return Cell(text="null" if is_setting else "", key="")
    if isinstance(value, bool | str):
        return Cell(text=plain(str(value)), key=plain(str(value)))
    text = str(value) if isinstance(value, int) else number(value)
    return Cell(text=text, key=repr(value))
