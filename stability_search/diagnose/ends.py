"""How one trial of the ladder ended: whether it failed, at which step, and what it learned.

A trial is watched step by step. It has failed once a forward pass, a loss or an unscaled gradient
is NaN or Inf, or once a rule of `stability_search/README.md` ends it. Overflows of the scaled
gradient are the normal business of fp16, and only too many of them are a failure.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from stability_search.diagnose.task_code import place_in_text
from stability_search.records.step import StepLabel, StepRecord
from stability_search.records.trial import Outcome, TrialSummary
from stability_search.records.values import finite_or_none
from stability_search.scoring.run import probe_levels
from stability_search.settings.trial import TrialConfig, TrialConstants
from stability_search.trial import Faults, Progress, run_trial
from stability_search.yardstick import probe_steps

MOST_OVERFLOWS = 0.02  # of the judged steps: twice that halves factor A of the score twice
REFERENCE_FAULT = "the initial fp32 model"  # so begins the reason where only that was asked
MAX_DATA_BATCHES = 8  # indices of bad batches that are kept

_OUTCOMES = {
    Outcome.DIVERGED: "diverged: the loss stayed far above where it began",
    Outcome.SCALE_COLLAPSE: "the loss scale collapsed below 1",
    Outcome.NONFINITE_PARAMETERS: "parameters became NaN or Inf",
    Outcome.OUT_OF_MEMORY: "out of memory",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class TrialEnd:
    """What one trial of the ladder showed.

    Attributes:
        seed: Seed of the trial.
        num_planned_steps: Its horizon.
        num_steps: Attempted steps; fewer than planned where it was stopped, or cut short because
            its first failure was all there was to learn.
        outcome: How it ended; None where it was cut short.
        failure: What broke, as a short phrase; empty if it did not fail.
        failed_at: Attempted step of it; None if it did not fail.
        module: Where NaN or Inf was first seen in the failing step; None if it is not known.
        phase: `forward`, `loss`, `backward` or `update` of that step; None likewise.
        last_finite_max: Largest value that went in there while all was finite; None likewise.
        num_bad_steps: Steps labelled `bad`.
        num_data_steps: Steps whose batch was at fault.
        data_batches: Index of the first such micro-batches.
        data_reason: What was wrong with the first of them; empty if there was none.
        num_reference_steps: Those of them whose batches are finite: they count as at fault only
            because the untrained model in fp32 fails on them, too.
        reference_place: Module (`` for the model itself) and phase in which the first of these
            was first seen to be NaN or Inf; None if that is not known.
        first_probe: Probe loss of the untrained model; None if not finite or not read.
        last_level: Probe loss at the end, the median of the last three readings; None if it is
            not finite or the trial did not get there.
        attention_max: Largest attention logit seen; None if none was.
        has_timed_out: True where the wall-clock limit ended it.
        error: What the task raised; empty if it did not.
        error_type: Exception type of it; empty likewise.
        error_place: `file:line` that raised it, of the task where one is; empty likewise.
        wall_s: Seconds it took.
    """

    seed: int
    num_planned_steps: int
    num_steps: int
    outcome: Outcome | None = None
    failure: str = ""
    failed_at: int | None = None
    module: str | None = None
    phase: str | None = None
    last_finite_max: float | None = None
    num_bad_steps: int = 0
    num_data_steps: int = 0
    data_batches: tuple[int, ...] = ()
    data_reason: str = ""
    num_reference_steps: int = 0
    reference_place: tuple[str | None, str | None] | None = None
    first_probe: float | None = None
    last_level: float | None = None
    attention_max: float | None = None
    has_timed_out: bool = False
    error: str = ""
    error_type: str = ""
    error_place: str = ""
    wall_s: float = 0.0

    @property
    def has_failed(self) -> bool:
        """True if something broke."""
        return bool(self.failure)

    @property
    def is_probe_broken(self) -> bool:
        """True if training held to the end, and the probe is NaN or Inf all the same."""
        is_held = not (self.has_failed or self.error or self.has_timed_out)
        return is_held and self.last_level is None

    def is_stuck(self, no_progress: float | None) -> bool:
        """Say whether nothing broke, and nothing was learned either.

        Args:
            no_progress: Probe loss that counts as no progress; None if that is not known.
        """
        if self.has_failed or self.error or self.has_timed_out or no_progress is None:
            return False
        return self.last_level is None or self.last_level >= no_progress


def watch_trial(
    config: TrialConfig,
    *,
    delta: float | None,
    check: Callable[[], None],
    cuts_short: bool = False,
    faults: Faults | None = None,
) -> TrialEnd:
    """Run one trial and say how it ended.

    Args:
        config: What is trained.
        delta: Yardstick of the loss stop; None turns it off.
        check: Called between steps; may raise to stop everything.
        cuts_short: True ends the trial at its first failure.
        faults: What is done to its windows.
    """
    constants = TrialConstants(delta=delta, probe_steps=probe_steps(config.num_planned_steps))
    watch = _Watch()
    trial = run_trial(config, constants=constants, faults=faults)
    summary: TrialSummary | None = None
    while True:
        check()
        try:
            progress = next(trial)
        except StopIteration as end:
            summary = end.value
            break
        watch.see(progress)
        if cuts_short and watch.grave is not None:
            trial.close()
            break
    return watch.end(config, summary)


@dataclass(frozen=True, kw_only=True, slots=True)
class Start:
    """What the first step of a configuration shows.

    Attributes:
        delta: abs(l_0), which stands for Delta where no pilot ran; None if it is not known or 0.
        refusal: Why model or device cannot honour the configuration; empty if they can.
        error: What the task raised instead; empty if it did not.
        wall_s: Seconds from building the task to the end of the step.
    """

    delta: float | None
    refusal: str
    error: str
    wall_s: float


def first_step(config: TrialConfig) -> Start:
    """Read the probe and take one step, to learn l_0 and whether every setting can act."""
    engine = replace(config.engine, num_planned_steps=1, schedule="constant", warmup_steps=0)
    one = replace(config, engine=engine, num_planned_steps=1)
    summary = _run(run_trial(one, constants=TrialConstants(probe_steps=(0,))))
    readings = (*summary.probe_losses, *summary.judged_losses)
    finite = [reading for reading in readings if reading is not None]
    size = abs(max(finite)) if finite else 0.0
    is_error = summary.outcome is Outcome.USER_ERROR
    text = _without_type(summary.reason, summary.error_type) if is_error else ""
    is_refusal = summary.error_type == "UsageError"
    return Start(
        delta=size if size > 0 else None,
        refusal=text if is_refusal else "",
        error="" if is_refusal else summary.reason if is_error else "",
        wall_s=summary.wall_s,
    )


class _Watch:
    """What the steps of a trial showed so far."""

    def __init__(self) -> None:
        self.grave: StepRecord | None = None
        self._records = 0
        self._num_judged = 0
        self._overflows: list[StepRecord] = []
        self._num_bad = 0
        self._data: list[StepRecord] = []
        self._attention_max: float | None = None
        self._seconds = 0.0

    def see(self, progress: Progress) -> None:
        record = progress.record
        self._records = record.step
        self._num_judged += record.label.is_judged
        self._seconds += record.step_s
        if record.attention_max is not None:
            self._attention_max = max(self._attention_max or 0.0, record.attention_max)
        if record.label is StepLabel.DATA:
            self._data.append(record)
        if record.label is not StepLabel.BAD:
            return
        self._num_bad += 1
        if is_overflow(record):
            self._overflows.append(record)
        elif self.grave is None:
            self.grave = record

    def end(self, config: TrialConfig, summary: TrialSummary | None) -> TrialEnd:
        broken, failure = self._failure(summary)
        batches = [r.batch_index for r in self._data if r.batch_index is not None]
        reference = [r for r in self._data if r.reason.startswith(REFERENCE_FAULT)]
        found = TrialEnd(
            seed=config.seed,
            num_planned_steps=config.num_planned_steps,
            num_steps=self._records,
            failure=failure,
            failed_at=None if not failure else broken.step if broken else self._records,
            module=broken.first_nonfinite_module if broken else None,
            phase=broken.first_nonfinite_phase if broken else None,
            last_finite_max=broken.last_finite_max if broken else None,
            num_bad_steps=self._num_bad,
            num_data_steps=len(self._data),
            data_batches=tuple(batches[:MAX_DATA_BATCHES]),
            data_reason=self._data[0].reason if self._data else "",
            num_reference_steps=len(reference),
            reference_place=_place(reference[0]) if reference else None,
            attention_max=self._attention_max,
            wall_s=self._seconds,
        )
        return found if summary is None else _with_summary(found, summary)

    def _failure(self, summary: TrialSummary | None) -> tuple[StepRecord | None, str]:
        """Return the step that shows what broke, and what did; neither if nothing did."""
        if self.grave is not None:
            return self.grave, _first_words(self.grave.reason)
        first = self._overflows[0] if self._overflows else None
        if summary is not None and summary.outcome in _OUTCOMES:
            return first, _OUTCOMES[summary.outcome]
        num_overflows = len(self._overflows)
        is_killed = summary is not None and summary.outcome is Outcome.PRUNED
        if is_killed or num_overflows > max(1.0, MOST_OVERFLOWS * self._num_judged):
            of = f"{num_overflows} of {self._num_judged} steps"
            return first, f"gradient overflow in {of}, at loss scales known to work"
        return None, ""


def _place(record: StepRecord) -> tuple[str | None, str | None] | None:
    if record.first_nonfinite_phase is None:
        return None
    return record.first_nonfinite_module, record.first_nonfinite_phase


def is_overflow(record: StepRecord) -> bool:
    """Say whether a bad step is one that lowering the loss scale answers."""
    return record.scale is not None and record.is_loss_finite and not record.is_grad_finite


def _with_summary(end: TrialEnd, summary: TrialSummary) -> TrialEnd:
    is_error = summary.outcome in {Outcome.USER_ERROR, Outcome.INFRASTRUCTURE}
    level = probe_levels(summary.probe_losses[:11])[-1]
    return replace(
        end,
        outcome=summary.outcome,
        num_steps=summary.num_steps,
        first_probe=summary.probe_losses[0] if summary.probe_losses else None,
        last_level=finite_or_none(level),
        has_timed_out=summary.outcome is Outcome.TIMED_OUT,
        error=summary.reason if is_error else "",
        error_type=summary.error_type,
        error_place=place_in_text(summary.error_text) or summary.error_place,
        wall_s=summary.wall_s,
    )


def _run(trial: Iterator[Progress]) -> TrialSummary:
    while True:
        try:
            next(trial)
        except StopIteration as end:
            summary: TrialSummary = end.value
            return summary


def _without_type(reason: str, error_type: str) -> str:
    return reason.removeprefix(f"{error_type}: ")


def _first_words(reason: str) -> str:
    return reason or "a step was not finite"


def no_progress_loss(*candidates: float | None) -> float | None:
    """Return the smallest finite of the probe losses that count as no progress; None without."""
    finite = [c for c in candidates if c is not None and math.isfinite(c)]
    return min(finite) if finite else None
