"""The watch over a running training.

see(record):
    judge the step: gradient norm, attention logits, overflows, bad and skipped steps
    at an epoch's end judge what only many steps show: shares, and whether the loss still falls
    say what a long run must do where too many steps of an epoch were lost
"""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from stability_search.alarms.alarm import ENDING, Alarm, worded
from stability_search.alarms.epochs import NUM_EPOCHS, Epoch, EpochSummary, Mean
from stability_search.alarms.overflows import RECENT_STEPS, OverflowCount
from stability_search.records.step import StepLabel, StepRecord
from stability_search.records.values import finite_or_none
from stability_search.settings.alarms import AlarmSettings, OnAlarm

MIN_VALUES = 20  # fewer say nothing about a share: shorter epochs are joined

# What rises together, worst first: within an epoch nothing milder follows on something worse.
_NORM_LADDER = ("grad_norm_advise", "grad_norm", "grad_norm_late")
_ATTENTION_LADDER = ("attention_max_diverging", "attention_max_degraded", "attention_max")
_BAD_LADDER = ("bad_steps", "bad_steps_advise")

# What is judged over many steps; a mean, or for the last two what most steps show.
_SHARES: Mapping[str, str] = {
    "clip_frac": "share of updates clipped (gradient clipping)",
    "clamp_frac": "share of attention outputs beyond the clamp",
    "cap_frac": "share of attention logits beyond the cap",
    "zero_grad_frac": "share of zero gradients, over that of fp32,",
    "update_ratio": "RMS of the update over RMS of the weights, in a typical step,",
    "grad_rms_over_eps": "smallest gradient RMS over eps, in a typical step,",
}


@dataclass(kw_only=True, slots=True)
class _State:
    """What a resumed run goes on with."""

    step: int = 0
    epoch: Epoch = field(default_factory=Epoch)
    recent: dict[str, list[float]] = field(default_factory=lambda: {name: [] for name in _SHARES})
    last_norm: float | None = None
    lowest_loss: float | None = None
    num_stale: int = 0
    num_stale_steps: int = 0
    overflows: OverflowCount = field(default_factory=OverflowCount)


class AlarmWatch:
    """Look at every step of a training and say what is worth a warning.

    Each alarm rises at most once an epoch, of what rises together only the worst. Shares are
    judged at an epoch's end over its last 200 values; epochs of fewer than 20 are joined.

    Args:
        settings: The thresholds, and what to do in a long run.
        num_planned_steps: Planned optimizer steps, >= 1; a 50th of them is an epoch unless
            `settings.epoch_steps` says otherwise.
        fp32_zero_grad_frac: Share of zero gradients of the same training in fp32, in [0, 1];
            None where it is not known, and `zero_grad_frac` then never rises.

    Raises:
        ValueError: `num_planned_steps` or `fp32_zero_grad_frac` is outside its range.

    Source:
        Thresholds and their origin, search_spaces/README.md.

    Example:
        >>> watch = AlarmWatch(AlarmSettings(grad_norm=5.0), num_planned_steps=100)
        >>> record = StepRecord(step=1, label=StepLabel.OK, loss=2.0, is_loss_finite=True,
        ...                     grad_norm=8.0, is_grad_finite=True, clipped=False,
        ...                     is_applied=True, learning_rate=0.1, scale=None)
        >>> for alarm in watch.see(record):
        ...     print(alarm)  # doctest: +ELLIPSIS
        WARNING step 1 epoch 1: gradient norm (grad_norm) 8 is above 5 (alarms.grad_norm). Clip...
    """

    def __init__(
        self,
        settings: AlarmSettings,
        *,
        num_planned_steps: int,
        fp32_zero_grad_frac: float | None = None,
    ) -> None:
        if num_planned_steps < 1:
            raise ValueError(
                f"num_planned_steps: value >= 1 must hold, but got {num_planned_steps}."
            )
        if fp32_zero_grad_frac is not None and not 0 <= fp32_zero_grad_frac <= 1:
            raise ValueError(
                f"fp32_zero_grad_frac: 0 <= value <= 1 must hold, but got {fp32_zero_grad_frac}."
            )
        self.settings = settings
        self.epoch_steps = settings.epoch_steps or max(1, num_planned_steps // NUM_EPOCHS)
        self.must_end: OnAlarm | None = None
        self.finished_epoch: EpochSummary | None = None
        self._fp32_zero_grad_frac = fp32_zero_grad_frac
        self._state = _State()

    def see(self, record: StepRecord) -> tuple[Alarm, ...]:
        """Judge one step, in order; afterwards `must_end` and `finished_epoch` are of this step.

        Args:
            record: What the engine returned; a None in it raises no alarm.

        Returns:
            What rose, each with a line for the log; empty for a calm step.
        """
        self.must_end = self.finished_epoch = None
        state, epoch = self._state, self._state.epoch
        state.step = record.step
        self._count(record)
        found = [
            *self._norm_alarms(finite_or_none(record.grad_norm)),
            *self._attention_alarms(record),
            *self._overflow_alarms(record),
            *self._lost_step_alarms(),
        ]
        acts = self.settings.on_alarm != OnAlarm.WARN
        if acts and any(alarm.name in ENDING for alarm in found):
            self.must_end = OnAlarm(self.settings.on_alarm)
        if self.must_end or epoch.num_steps >= self.epoch_steps:
            found += self.end_epoch()
        return tuple(found)

    def end_epoch(self) -> tuple[Alarm, ...]:
        """End the present epoch here, for a loop whose epochs end with its data.

        Returns:
            What its last steps show together; empty for a calm epoch, or one without a step.
        """
        state, epoch = self._state, self._state.epoch
        if not epoch.num_steps:
            return ()
        found = [*self._share_alarms(), *self._stale_alarms(epoch)]
        self.finished_epoch = EpochSummary(
            epoch=epoch.number,
            num_steps=epoch.num_steps,
            loss=epoch.loss.value,
            grad_norm=epoch.grad_norm.value,
            num_skipped=epoch.num_skipped,
        )
        state.epoch = Epoch(number=epoch.number + 1)
        return tuple(found)

    def state_dict(self) -> dict[str, Any]:
        """Return every counter as plain finite numbers, for `load_state_dict`."""
        return asdict(self._state)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on in the epoch, and with the counters, that `state_dict` returned."""
        parts = dict(state["epoch"])
        parts |= {name: Mean(**parts[name]) for name in ("loss", "grad_norm")}
        epoch = Epoch(**{**parts, "risen": list(parts["risen"])})
        recent = {name: list(values) for name, values in state["recent"].items()}
        counted = dict(state["overflows"])
        overflows = OverflowCount(**{**counted, "recent": list(counted["recent"])})
        self._state = _State(**{**state, "epoch": epoch, "recent": recent, "overflows": overflows})
        self.must_end = self.finished_epoch = None

    # -- counting ----------------------------------------------------------------------------

    def _count(self, record: StepRecord) -> None:
        epoch = self._state.epoch
        epoch.num_steps += 1
        epoch.num_bad += record.label is StepLabel.BAD
        epoch.num_skipped += not record.is_applied and record.label is not StepLabel.CALIBRATION
        epoch.loss.add(record.loss)
        epoch.grad_norm.add(record.grad_norm)
        for name, values in self._state.recent.items():
            if name == "clip_frac":
                value = float(record.clipped) if record.is_applied else None
            else:
                value = finite_or_none(getattr(record, name))
            if value is not None:
                values.append(value)
                del values[:-RECENT_STEPS]

    # -- judging -----------------------------------------------------------------------------

    def _norm_alarms(self, norm: float | None) -> list[Alarm]:
        if norm is None:
            return []
        last, self._state.last_norm = self._state.last_norm, norm
        is_late = self._state.epoch.number > self.settings.late_epoch
        rungs = _NORM_LADDER if is_late else _NORM_LADDER[:-1]
        found = self._climb(rungs, norm, "gradient norm (grad_norm)")
        jump = self.settings.grad_norm_jump
        if last is not None and last > 0 and norm > jump * last:  # nothing is a jump from 0
            found += self._rise(
                "grad_norm_jump",
                f"gradient norm (grad_norm) {norm:.4g} is more than {jump:.4g} times the "
                f"{last:.4g} of the step before",
                value=norm,
                threshold=jump * last,
            )
        return found

    def _attention_alarms(self, record: StepRecord) -> list[Alarm]:
        logit = finite_or_none(record.attention_max)
        if logit is None:
            return []
        capped = "" if record.cap_frac is None else " before the cap"
        return self._climb(_ATTENTION_LADDER, logit, f"largest attention logit{capped}")

    def _lost_step_alarms(self) -> list[Alarm]:
        epoch = self._state.epoch
        what = "number of bad steps (NaN or Inf) of this epoch"
        found = self._climb(_BAD_LADDER, epoch.num_bad, what)
        share, limit = epoch.num_skipped / self.epoch_steps, self.settings.skipped_frac
        if share > limit and epoch.num_skipped > 1:  # one step is no epoch that was lost
            what = f"share of this epoch's {self.epoch_steps} steps that were skipped"
            found += self._rise_above("skipped_frac", what, value=share)
        return found

    def _overflow_alarms(self, record: StepRecord) -> list[Alarm]:
        overflows = self._state.overflows
        if not overflows.add(record):
            return []
        rate = len(overflows.recent) / RECENT_STEPS  # of a full 200: one overflow is no rate
        if not rate > self.settings.overflow_rate:
            return []
        what = f"rate of gradient overflows (Inf) over the last {RECENT_STEPS} steps"
        return self._rise_above("overflow_rate", what, value=rate)

    def _share_alarms(self) -> list[Alarm]:
        found: list[Alarm] = []
        for name, values in self._state.recent.items():
            if len(values) < MIN_VALUES:
                continue
            found += self._judge_share(name, values)
            values.clear()
        return found

    def _judge_share(self, name: str, values: Sequence[float]) -> list[Alarm]:
        what, limit = _SHARES[name], getattr(self.settings, name)
        if name == "grad_rms_over_eps":
            typical = statistics.median_high(values)
            if not typical < limit:
                return []
            fact = f"{what} {typical:.4g} is below {limit:.4g}"
            return self._rise(name, fact, value=typical, threshold=limit)
        if name == "update_ratio":
            value = statistics.median_low(values)
        else:
            mean = Mean()
            for one in values:
                mean.add(one)
            value = mean.mean
        if name == "zero_grad_frac":
            if self._fp32_zero_grad_frac is None:
                return []
            value -= self._fp32_zero_grad_frac
        return self._rise_above(name, what, value=value) if value > limit else []

    def _stale_alarms(self, epoch: Epoch) -> list[Alarm]:
        """Count epochs without a new lowest loss; one without any finite loss is one of them."""
        state, loss, limit = self._state, epoch.loss.value, self.settings.stale_epochs
        if loss is not None and (state.lowest_loss is None or loss < state.lowest_loss):
            state.lowest_loss = loss
            state.num_stale = state.num_stale_steps = 0
            return []
        state.num_stale += 1
        state.num_stale_steps += epoch.num_steps
        if state.num_stale < limit or state.num_stale_steps < MIN_VALUES:
            return []
        value = state.num_stale
        state.num_stale = state.num_stale_steps = 0  # said again after as many epochs more
        fact = f"no new lowest mean loss for {value} epochs"
        return self._rise("stale_epochs", fact, value=value, threshold=limit)

    # -- rising ------------------------------------------------------------------------------

    def _climb(self, rungs: Sequence[str], value: float, what: str) -> list[Alarm]:
        """Let the worst rung that the value passes rise, unless it or a worse one has risen."""
        risen = self._state.epoch.risen
        for name in rungs:
            if name in risen:
                return []
            if value > getattr(self.settings, name):
                return self._rise_above(name, what, value=value)
        return []

    def _rise_above(self, name: str, what: str, *, value: float) -> list[Alarm]:
        limit = getattr(self.settings, name)
        fact = f"{what} {value:.4g} is above {limit:.4g}"
        return self._rise(name, fact, value=value, threshold=limit)

    def _rise(self, name: str, fact: str, *, value: float, threshold: float) -> list[Alarm]:
        """Return the alarm, or nothing where it has risen in this epoch."""
        epoch = self._state.epoch
        if name in epoch.risen:
            return []
        epoch.risen.append(name)
        step, number = self._state.step, epoch.number
        return [worded(name, fact, step=step, epoch=number, value=value, threshold=threshold)]
