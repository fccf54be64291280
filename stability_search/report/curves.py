"""The trials whose steps the page holds: which, and thinned so that every bad step is kept."""

from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import inf, log2
from typing import Any

from stability_search.errors import UsageError
from stability_search.records.step import StepLabel, StepRecord
from stability_search.records.trial import Outcome

Row = Mapping[str, Any]
ReadSteps = Callable[[str], Sequence[StepRecord]]

MAX_CURVES = 40
"""Trials whose steps the page holds."""

MAX_POINTS = 300
"""Steps of a curve; bad ones, and those whose batch was at fault, are kept on top of these."""

_HEADLINE = 8  # seeds of the configuration the verdict is about
_BEST = 12
_KEPT = (StepLabel.BAD, StepLabel.DATA)


@dataclass(frozen=True, kw_only=True, slots=True)
class Curve:
    """The steps of one trial, as the page shows them.

    Attributes:
        row: The trial.
        why: Why it is shown: `headline`, `best` or `near the cliff`.
        steps: Evenly chosen steps and every bad one, in order.
        bad_rates: Share of the judged steps so far that were bad, at each of these; None before
            the first judged step.
        num_steps: Steps on file.
    """

    row: Row
    why: str
    steps: tuple[StepRecord, ...]
    bad_rates: tuple[float | None, ...]
    num_steps: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Curves:
    """The curves of a study.

    Attributes:
        shown: At most `MAX_CURVES`, the headline's seeds first.
        lost: Trials whose steps could not be read.
    """

    shown: tuple[Curve, ...] = ()
    lost: tuple[Row, ...] = ()

    @property
    def num_lost(self) -> int:
        """How many trials are missing for that."""
        return len(self.lost)


def read_curves(
    rows: Sequence[Row], headline_id: str | None, read_steps: ReadSteps | None
) -> Curves:
    """Choose the trials whose steps the page shows, and read these.

    Args:
        rows: Trials that are results.
        headline_id: The configuration the verdict is about.
        read_steps: Reads the steps of a trial by its id; None where there are none.

    Returns:
        The headline's seeds, the best others, and failures near the cliff. A file that is missing
        or damaged is counted, never an error: the page stands without it.
    """
    if read_steps is None:
        return Curves()
    shown: list[Curve] = []
    lost: list[Row] = []
    for row, why in choose(rows, headline_id):
        try:
            steps = read_steps(row["trial_id"])
        except (UsageError, KeyError):
            lost.append(row)
            continue
        if steps:
            shown.append(_curve(row, why, steps))
    return Curves(shown=tuple(shown), lost=tuple(lost))


def _curve(row: Row, why: str, steps: Sequence[StepRecord]) -> Curve:
    rates, num_judged, num_bad = {}, 0, 0
    for step in steps:
        num_judged += step.label.is_judged
        num_bad += step.label is StepLabel.BAD
        rates[step.step] = num_bad / num_judged if num_judged else None
    kept = thinned(steps)
    return Curve(
        row=row,
        why=why,
        steps=kept,
        bad_rates=tuple(rates[step.step] for step in kept),
        num_steps=len(steps),
    )


def choose(rows: Sequence[Row], headline_id: str | None) -> list[tuple[Row, str]]:
    """Return the trials worth a curve, each with the reason.

    A failure is near the cliff if its learning rate is within few doublings of a stable trial of
    the same precision. Every precision has its share of the best and of the failures.
    """
    headline = [r for r in rows if r["config_id"] == headline_id and r["stage"] == "confirm"]
    known = {row["trial_id"] for row in headline}
    others = [row for row in rows if row["trial_id"] not in known]
    best = sorted(
        (row for row in others if row["is_stable"]),
        key=lambda row: (-(row["q"] or 0.0), row["trial_id"]),
    )
    failed = sorted((row for row in others if not row["is_stable"]), key=_nearness(rows))
    chosen = [(row, "headline") for row in headline[:_HEADLINE]]
    room = MAX_CURVES - len(chosen)
    num_best = max(_BEST, room - len(failed))
    chosen += [(row, "best") for row in _by_turns(best)[:num_best]]
    room = MAX_CURVES - len(chosen)
    return chosen + [(row, "near the cliff") for row in _by_turns(failed)[:room]]


def _by_turns(rows: Sequence[Row]) -> list[Row]:
    """Return the first of each precision, then the second of each, and so on."""
    seen: Counter[Any] = Counter()
    turns = []
    for row in rows:
        turns.append(seen[row.get("precision")])
        seen[row.get("precision")] += 1
    return [row for _, row in sorted(zip(turns, rows, strict=True), key=lambda pair: pair[0])]


def _nearness(rows: Sequence[Row]) -> Callable[[Row], tuple[Any, ...]]:
    """Return what orders failures: doublings to the nearest stable rate of their precision."""
    stable: dict[Any, list[float]] = {}
    for row in rows:
        if row["is_stable"] and row.get("learning_rate"):
            stable.setdefault(row.get("precision"), []).append(log2(row["learning_rate"]))
    for rates in stable.values():
        rates.sort()

    def key(row: Row) -> tuple[Any, ...]:
        is_completed = row["outcome"] == Outcome.COMPLETED
        rate, near = row.get("learning_rate"), stable.get(row.get("precision"), [])
        if not rate:
            return (is_completed, inf, inf, row["trial_id"])
        at = bisect_left(near, log2(rate))
        beside = near[max(0, at - 1) : at + 1]
        gap = min((abs(log2(rate) - one) for one in beside), default=inf)
        return (is_completed, gap, rate, row["trial_id"])

    return key


def thinned(steps: Sequence[StepRecord]) -> tuple[StepRecord, ...]:
    """Return at most `MAX_POINTS` evenly chosen steps, the first and the last among them.

    Steps that were `bad`, or whose batch was at fault, are all kept, on top of these.
    """
    last = len(steps) - 1
    if last < MAX_POINTS:
        return tuple(steps)
    even = {round(k * last / (MAX_POINTS - 1)) for k in range(MAX_POINTS)}
    return tuple(step for i, step in enumerate(steps) if i in even or step.label in _KEPT)
