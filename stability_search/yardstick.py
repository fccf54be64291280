"""What progress is measured with: E_0, E* and Delta of one horizon, from the trials' rows.

E_0 is the probe loss that counts as no progress, E* the lowest one reached by a sound run, Delta
their difference. Every value is a function of the set of rows, whatever their order, so that a
resumed study and a finished one agree. Explained in `stability_search/README.md`.
"""

import dataclasses
import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import stdev
from typing import Literal, TypeAlias

from stability_search.records.trial import Outcome, Stage, TrialRow, TrialSummary
from stability_search.scoring.run import (
    LEVEL_READINGS,
    NUM_READINGS,
    RunScore,
    calm_factor,
    probe_levels,
    score_run,
)
from stability_search.scoring.spikes import count_spikes

BaselineSource: TypeAlias = Literal["start", "baseline", "blind", ""]
_Measured: TypeAlias = tuple[float, Sequence[float | None]]  # a loss, and that per probe batch

MIN_PROBE_BATCHES = 4  # below it, the spread over probe batches says nothing
_TENTHS = NUM_READINGS - 1
_SOUND = 0.5  # A, and A*B*C, from which a trial may set E*
_REFIT_PARTS = 10  # a trial must beat the pilot by Delta_p over this to move E*
_BLIND_FRAC = 0.9  # of the start, below which the task needs a `baseline()`
_SIGNAL_FRAC = 1e-3  # of abs(E_0), below which Delta is no signal
_SIGNAL_SIGMAS = 3.0
_BLIND_RUN_MISSING = (
    "Neither `baseline()` nor the blind run was measured: progress is measured from the untrained "
    "model."
)
_NO_BLIND_RUN = (
    "The task has no `baseline()`, and a model that ignores its input gave no finite probe loss: "
    "progress is measured from the untrained model."
)
_ASK_FOR_BASELINE = (
    "Ignoring the input already gives a probe loss of {blind:.4g}, from {start:.4g} untrained: "
    "give the task a `baseline()`, the probe loss of the best constant prediction."
)
_FEW_BATCHES = (
    "The probe gave {count} batches to compare; with fewer than {least} its noise is not known "
    "and taken as 0."
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Yardstick:
    """The study constants of one horizon.

    Attributes:
        horizon: Planned steps T of the trials it measures.
        e0: E_0, the probe loss that counts as no progress; None if nothing finite gave one.
        e0_source: What gave E_0: the pilot's `start`, the task's `baseline`, or the `blind` run
            of a model that ignores its input; empty without an E_0.
        e_star: E*, the lowest level E_T of a sound run; None if there was no such run.
        delta: E_0 - E*; None unless finite and > 0.
        sigma: Standard error of that difference over the probe batches, >= 0; 0 where there are
            fewer than 4 of them.
        has_signal: True if Delta stands out from rounding and from the probe's noise. Judged at
            the end of a stage: without it nothing is ranked.
        warnings: What a reader must know, one sentence each.
    """

    horizon: int
    e0: float | None
    e0_source: BaselineSource
    e_star: float | None
    delta: float | None
    sigma: float
    has_signal: bool
    warnings: tuple[str, ...] = ()


def probe_steps(*horizons: int) -> tuple[int, ...]:
    """List the attempted steps after which the probe is read: ceil(k*T/10), k = 0..10.

    Args:
        horizons: One or more horizons T, each >= 0; the readings of all are joined.

    Example:
        >>> probe_steps(20, 25)
        (0, 2, 3, 4, 5, 6, 8, 10, 12, 13, 14, 15, 16, 18, 20, 23, 25)
    """
    return tuple(sorted({step for horizon in horizons for step in _tenths(horizon)}))


def _tenths(horizon: int) -> tuple[int, ...]:
    return tuple(-(-k * horizon // _TENTHS) for k in range(NUM_READINGS))


def readings(summary: TrialSummary, horizon: int) -> tuple[float | None, ...]:
    """Pick the 11 probe readings of a horizon out of a trial's.

    Args:
        summary: A trial whose probe was read at the tenths of `horizon`, and perhaps elsewhere.
        horizon: Steps T, at most the trial's own planned steps.

    Returns:
        Mean probe loss at ceil(k*T/10), k = 0..10; None where it was non-finite or not read.
    """
    positions = _reading_positions(summary, horizon)
    return tuple(None if p is None else summary.probe_losses[p] for p in positions)


def _reading_positions(summary: TrialSummary, horizon: int) -> tuple[int | None, ...]:
    # Without strict: a trial that ended early has fewer losses than planned readings.
    taken = zip(summary.probe_steps, summary.probe_losses, strict=False)
    position = {step: index for index, (step, _) in enumerate(taken)}
    return tuple(position.get(step) for step in _tenths(horizon))


def is_finite_run(summary: TrialSummary) -> bool:
    """Say whether a trial completed and every probe reading it planned was finite."""
    return (
        summary.outcome is Outcome.COMPLETED
        and 0 < len(summary.probe_steps) == len(summary.probe_losses)
        and all(loss is not None for loss in summary.probe_losses)
    )


def score_completed(
    summary: TrialSummary, *, horizon: int, e0: float | None, delta: float | None
) -> RunScore:
    """Score a completed trial at a horizon, which for a pilot trial may be shorter than its own.

    Args:
        summary: A completed trial that planned at least `horizon` steps.
        horizon: Steps T after which it is scored. Readings, judged steps and bad steps are those
            of the first T attempted steps, as far as the summary keeps their numbers; without
            `judged_steps` the first T judged losses stand in, without `bad_steps` all count.
        e0: E_0 of that horizon.
        delta: Delta of that horizon; None gives a score of 0.
    """
    num_bad, num_judged, losses = _judged_until(summary, horizon)
    return score_run(
        num_ok=num_judged - num_bad,
        num_bad=num_bad,
        num_spikes=count_spikes(losses, delta),
        probes=readings(summary, horizon),
        e0=e0,
        delta=delta,
        are_parameters_finite=summary.are_parameters_finite,
    )


def _judged_until(summary: TrialSummary, horizon: int) -> tuple[int, int, Sequence[float | None]]:
    """Return the numbers of bad and judged steps up to a horizon, and the judged losses."""
    losses = summary.judged_losses
    if horizon >= summary.num_planned_steps:
        return summary.num_bad_steps, summary.num_judged_steps, losses
    if summary.judged_steps:
        kept = zip(summary.judged_steps, losses, strict=True)
        losses = tuple(loss for step, loss in kept if step <= horizon)
    else:
        losses = losses[:horizon]
    if len(summary.bad_steps) == summary.num_bad_steps:
        num_bad = sum(step <= horizon for step in summary.bad_steps)
        return num_bad, len(losses), losses
    # Where the bad steps were is not known: all count, rather than none.
    return min(summary.num_bad_steps, len(losses)), len(losses), losses


@dataclass(frozen=True, slots=True)
class _Reached:
    """A finite run and its level E_T; sorts by level, then by what never depends on order."""

    level: float
    row: TrialRow

    @property
    def key(self) -> tuple[float, str, int]:
        return (self.level, self.row.trial_id, self.row.attempt)


@dataclass(frozen=True, slots=True)
class _Origin:
    """E_0, what gave it, and its loss per probe batch; no batches for a bare number."""

    e0: float | None
    source: BaselineSource
    batch_losses: Sequence[float | None]
    warnings: tuple[str, ...]


def yardstick(rows: Iterable[TrialRow], horizon: int) -> Yardstick:
    """Fit the constants of a horizon to every trial of it so far.

    E* is the pilot's lowest level E_p, unless a sound trial of that horizon lies below it by
    more than a tenth of the pilot's own progress, or the pilot has none.

    Args:
        rows: Rows of any stage; trials of other horizons, pilot aside, are left out.
        horizon: Steps T.

    Returns:
        The same yardstick for the same set of rows, in whatever order.
    """
    pilot, others = [], []
    for row in rows:
        if _is_pilot_of(row, horizon):
            pilot.append(row)
        elif _is_later_of(row, horizon):
            others.append(row)
    start = _fit_pilot(pilot, horizon)
    contenders = sorted(_reached(others, horizon), key=lambda run: run.key)
    # From the lowest: the first that qualifies is E*.
    best = next((run for run in contenders if start.is_beaten_by(run)), start.best)
    return _yardstick(start, best)


class GrowingYardstick:
    """The same constants while trials come in, at a cost that does not grow with their number.

    After any rows in any order `now` equals `yardstick` of them: a trial is sound, or not, by
    the pilot alone, so that a new one need only be compared with the best so far. A pilot trial
    fits all again.

    Args:
        horizon: Steps T.
    """

    def __init__(self, horizon: int) -> None:
        self._horizon = horizon
        self._pilot: list[TrialRow] = []
        self._reached: list[_Reached] = []
        self._start = _fit_pilot((), horizon)
        self._best: _Reached | None = None
        self._now = _yardstick(self._start, None)

    @property
    def now(self) -> Yardstick:
        """The yardstick of all rows so far."""
        return self._now

    def add(self, row: TrialRow) -> None:
        """Take in one more row of any stage; those of other horizons change nothing."""
        if _is_pilot_of(row, self._horizon):
            self._pilot.append(row)
            self._start = _fit_pilot(self._pilot, self._horizon)
            self._best = self._start.best
            for run in self._reached:
                self._compare(run)
        elif _is_later_of(row, self._horizon) and (runs := _reached([row], self._horizon)):
            self._reached += runs
            if not self._compare(runs[0]):
                return
        else:
            return
        self._now = _yardstick(self._start, self._best)

    def _compare(self, run: _Reached) -> bool:
        is_lower = self._best is None or run.key < self._best.key
        is_best = is_lower and self._start.is_beaten_by(run)
        if is_best:
            self._best = run
        return is_best


@dataclass(frozen=True, kw_only=True, slots=True)
class _Start:
    """What the pilot alone decides: E_0, and what a later trial must do to set E*."""

    horizon: int
    origin: _Origin
    best: _Reached | None
    delta: float | None
    limit: float

    def is_beaten_by(self, run: _Reached) -> bool:
        """Say whether a finite run lies low enough and was calm enough to set E*."""
        return run.level < self.limit and _is_sound(
            run.row.summary, self.horizon, self.origin.e0, self.delta
        )


def _is_pilot_of(row: TrialRow, horizon: int) -> bool:
    return row.stage is Stage.PILOT and row.summary.num_planned_steps >= horizon


def _is_later_of(row: TrialRow, horizon: int) -> bool:
    return row.stage is not Stage.PILOT and row.summary.num_planned_steps == horizon


def _fit_pilot(pilot: Sequence[TrialRow], horizon: int) -> _Start:
    """Fit E_0, E_p and Delta_p.

    The pilot's own other runs never lie below its best, so only later trials can.
    """
    origin = _origin(pilot)
    best = min(_reached(pilot, horizon), key=lambda run: run.key, default=None)
    delta = None if best is None or origin.e0 is None else origin.e0 - best.level
    limit = math.inf if best is None else best.level - max(0.0, delta or 0.0) / _REFIT_PARTS
    return _Start(horizon=horizon, origin=origin, best=best, delta=delta, limit=limit)


def _yardstick(start: _Start, best: _Reached | None) -> Yardstick:
    origin = start.origin
    delta = None
    if origin.e0 is not None and best is not None:
        difference = origin.e0 - best.level
        delta = difference if math.isfinite(difference) and difference > 0 else None
    sigma, warnings = 0.0, origin.warnings
    if best is not None:
        sigma, sigma_warnings = _sigma(origin, best.row.summary, start.horizon)
        warnings += sigma_warnings
    return Yardstick(
        horizon=start.horizon,
        e0=origin.e0,
        e0_source=origin.source,
        e_star=None if best is None else best.level,
        delta=delta,
        sigma=sigma,
        has_signal=origin.e0 is not None
        and delta is not None
        and delta > max(_SIGNAL_FRAC * abs(origin.e0), _SIGNAL_SIGMAS * sigma),
        warnings=warnings,
    )


def pilot_yardstick(rows: Iterable[TrialRow], horizon: int) -> Yardstick:
    """Fit the constants of a horizon to the pilot alone.

    Args:
        rows: Rows of any stage; only the pilot's count.
        horizon: Steps T, at most the pilot's own.
    """
    return yardstick((row for row in rows if row.stage is Stage.PILOT), horizon)


def refused(yardstick: Yardstick) -> Yardstick:
    """Return the yardstick under which every score is 0, for a study found without signal."""
    return dataclasses.replace(yardstick, delta=None, has_signal=False)


def _reached(rows: Iterable[TrialRow], horizon: int) -> list[_Reached]:
    runs = []
    for row in rows:
        if is_finite_run(row.summary):
            level = probe_levels(readings(row.summary, horizon))[-1]
            if math.isfinite(level):
                runs.append(_Reached(level, row))
    return runs


def _is_sound(
    summary: TrialSummary, horizon: int, e0: float | None, pilot_delta: float | None
) -> bool:
    """Say whether a finite run was calm enough to set E*."""
    if pilot_delta is not None and pilot_delta > 0:
        score = score_completed(summary, horizon=horizon, e0=e0, delta=pilot_delta)
        return score.calm >= _SOUND and score.calm * score.smooth * score.kept >= _SOUND
    num_bad, num_judged, _ = _judged_until(summary, horizon)
    return calm_factor(num_bad, num_judged) >= _SOUND


def _origin(pilot: Sequence[TrialRow]) -> _Origin:
    """Find E_0: the smallest finite of start, baseline and, without a baseline, the blind run."""
    summaries = [row.summary for row in sorted(pilot, key=lambda r: (r.trial_id, r.attempt))]
    candidates: list[tuple[float, BaselineSource, Sequence[float | None]]] = []
    sources: tuple[tuple[BaselineSource, Sequence[_Measured]], ...] = (
        ("start", _starts(summaries)),
        ("baseline", [(s.baseline, ()) for s in summaries if s.baseline is not None]),
        ("blind", _blind_runs(summaries)),
    )
    for source, found in sources:
        if found:
            loss, batch_losses = min(found, key=lambda one: one[0])
            candidates.append((loss, source, batch_losses))
    losses = {source: loss for loss, source, _ in candidates}
    has_tried = any(summary.has_measured_blind_run for summary in summaries)
    warnings = _origin_warnings(losses, has_tried_blind=has_tried) if summaries else ()
    if not candidates:
        return _Origin(None, "", (), warnings)
    e0, source, batch_losses = min(candidates, key=lambda one: one[0])  # of equals the first
    return _Origin(e0, source, batch_losses, warnings)


def _starts(summaries: Sequence[TrialSummary]) -> list[_Measured]:
    found = []
    for summary in summaries:
        position = _reading_positions(summary, 0)[0]
        loss = None if position is None else summary.probe_losses[position]
        if position is not None and loss is not None:
            found.append((loss, _batch_losses(summary, position)))
    return found


def _blind_runs(summaries: Sequence[TrialSummary]) -> list[_Measured]:
    if any(summary.baseline is not None for summary in summaries):
        return []  # the task knows its best constant prediction: no blind run counts
    return [(s.blind_loss, s.blind_batch_losses) for s in summaries if s.blind_loss is not None]


def _batch_losses(summary: TrialSummary, position: int) -> Sequence[float | None]:
    rows = summary.probe_batch_losses
    return rows[position] if position < len(rows) else ()


def _origin_warnings(
    losses: Mapping[BaselineSource, float], *, has_tried_blind: bool
) -> tuple[str, ...]:
    blind, start = losses.get("blind"), losses.get("start")
    if "baseline" in losses:
        return ()
    if blind is None:
        return (_NO_BLIND_RUN if has_tried_blind else _BLIND_RUN_MISSING,)
    if start is not None and blind < _BLIND_FRAC * start:
        return (_ASK_FOR_BASELINE.format(blind=blind, start=start),)
    return ()


def _sigma(origin: _Origin, summary: TrialSummary, horizon: int) -> tuple[float, tuple[str, ...]]:
    """Return the standard error, over the probe batches, of E_0 - E*; and what to warn of."""
    last = _reading_positions(summary, horizon)[-LEVEL_READINGS:]
    read = sorted((summary.probe_losses[p], p) for p in last if p is not None)
    batches = _batch_losses(summary, read[len(read) // 2][1])  # the reading that is the median
    if origin.source != "baseline":  # paired: the same batches were read at E_0
        differences = [
            e0 - e_star
            for e0, e_star in zip(origin.batch_losses, batches, strict=False)
            if e0 is not None and e_star is not None
        ]
    else:
        differences = [loss for loss in batches if loss is not None]
    if len(differences) < MIN_PROBE_BATCHES:
        return 0.0, (_FEW_BATCHES.format(count=len(differences), least=MIN_PROBE_BATCHES),)
    largest = max(map(abs, differences))
    if largest == 0:
        return 0.0, ()
    spread = stdev(d / largest for d in differences) if math.isfinite(largest) else math.inf
    return min(largest * spread / math.sqrt(len(differences)), sys.float_info.max), ()
