"""What a trial has shown so far, and the summary it becomes."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from stability_search.alarms.alarm import Alarm
from stability_search.alarms.overflows import OverflowCount
from stability_search.records.step import StepLabel, StepRecord
from stability_search.records.trial import ControlEnd, Outcome, TrialSummary
from stability_search.records.values import finite_or_none
from stability_search.settings.trial import TrialConfig


@dataclass(kw_only=True, slots=True)
class Tally:
    """What a trial has shown so far."""

    num_steps: int = 0
    labels: dict[StepLabel, int] = field(default_factory=lambda: dict.fromkeys(StepLabel, 0))
    judged_losses: list[float | None] = field(default_factory=list)
    judged_steps: list[int] = field(default_factory=list)
    bad_steps: list[int] = field(default_factory=list)
    first_bad: StepRecord | None = None
    grad_norms: list[float] = field(default_factory=list)
    num_applied: int = 0
    num_clipped: int = 0
    attention_maxima: list[float] = field(default_factory=list)
    clamp_fracs: list[float] = field(default_factory=list)
    cap_fracs: list[float] = field(default_factory=list)
    update_ratios: list[float] = field(default_factory=list)
    zero_grad_fracs: list[float] = field(default_factory=list)
    grad_rms_over_eps: list[float] = field(default_factory=list)
    final_scale: float | None = None
    overflows: OverflowCount = field(default_factory=OverflowCount)
    alarms: dict[str, int] = field(default_factory=dict)
    probe_steps: list[int] = field(default_factory=list)
    probe_batch_losses: list[tuple[float | None, ...]] = field(default_factory=list)
    metrics_first: Mapping[str, float | None] = field(default_factory=dict)
    metrics_last: Mapping[str, float | None] = field(default_factory=dict)
    baseline: float | None = None
    blind_loss: float | None = None
    blind_batch_losses: tuple[float | None, ...] = ()
    has_measured_blind_run: bool = False
    has_probe_loss: bool | None = None
    are_parameters_finite: bool = True
    evidence: float = 1.0
    warnings: list[str] = field(default_factory=list)
    train_s: float = 0.0
    peak_memory_mib: float = 0.0

    def add(self, record: StepRecord) -> None:
        """Take in one judged step."""
        self.num_steps = record.step
        self.labels[record.label] += 1
        if record.label.is_judged:
            self.judged_losses.append(record.loss)
            self.judged_steps.append(record.step)
        if record.label is StepLabel.BAD:
            self.bad_steps.append(record.step)
            self.first_bad = self.first_bad or record
        self.num_applied += record.is_applied
        self.num_clipped += record.clipped
        self.final_scale = record.scale
        for kept, value in (
            (self.grad_norms, record.grad_norm),
            (self.attention_maxima, record.attention_max),
            (self.clamp_fracs, record.clamp_frac),
            (self.cap_fracs, record.cap_frac),
            (self.update_ratios, record.update_ratio),
            (self.zero_grad_fracs, record.zero_grad_frac),
            (self.grad_rms_over_eps, record.grad_rms_over_eps),
        ):
            if value is not None:
                kept.append(value)
        self.overflows.add(record)

    def count(self, alarms: Sequence[Alarm]) -> None:
        """Count the alarms of one step, by name."""
        for alarm in alarms:
            self.alarms[alarm.name] = self.alarms.get(alarm.name, 0) + 1

    def note(self, notes: Sequence[str]) -> None:
        """Keep what a reader of the result must know, each sentence once."""
        self.warnings += [note for note in notes if note not in self.warnings]


def summarise(  # noqa: PLR0913 - the parts of a summary
    tally: Tally,
    config: TrialConfig,
    *,
    outcome: Outcome,
    reason: str,
    error: tuple[str, str, str],
    wall_s: float,
    device: str,
) -> TrialSummary:
    """Fold a tally into the summary of a trial that has ended.

    Args:
        tally: What the trial has shown.
        config: The configuration it ran.
        outcome: How it ended.
        reason: Why, as a short phrase.
        error: Type, place and text of an exception; empty texts without one.
        wall_s: Seconds from the trial's start to its end.
        device: `cpu`, or the name of the GPU.
    """
    labels, first_bad = tally.labels, tally.first_bad
    clip_frac = None
    if config.engine.clip_norm is not None and tally.num_applied:
        clip_frac = tally.num_clipped / tally.num_applied
    return TrialSummary(
        outcome=outcome,
        reason=reason,
        num_planned_steps=config.num_planned_steps,
        num_steps=tally.num_steps,
        num_judged_steps=len(tally.judged_losses),
        num_bad_steps=labels[StepLabel.BAD],
        num_calibration_steps=labels[StepLabel.CALIBRATION],
        num_data_steps=labels[StepLabel.DATA],
        judged_losses=tuple(tally.judged_losses),
        judged_steps=tuple(tally.judged_steps),
        bad_steps=tuple(tally.bad_steps),
        probe_steps=tuple(tally.probe_steps),
        probe_losses=tuple(mean_or_none(row) for row in tally.probe_batch_losses),
        probe_batch_losses=tuple(tally.probe_batch_losses),
        metrics_first=tally.metrics_first,
        metrics_last=tally.metrics_last,
        baseline=tally.baseline,
        blind_loss=tally.blind_loss,
        blind_batch_losses=tally.blind_batch_losses,
        has_measured_blind_run=tally.has_measured_blind_run,
        has_probe_loss=tally.has_probe_loss,
        are_parameters_finite=tally.are_parameters_finite,
        first_bad_step=None if first_bad is None else first_bad.step,
        first_nonfinite_module=None if first_bad is None else first_bad.first_nonfinite_module,
        first_nonfinite_phase=None if first_bad is None else first_bad.first_nonfinite_phase,
        last_finite_max=None if first_bad is None else first_bad.last_finite_max,
        is_first_bad_transient=None if first_bad is None else first_bad.is_transient,
        evidence=tally.evidence,
        final_scale=tally.final_scale,
        grad_norm_median=statistics.median(tally.grad_norms) if tally.grad_norms else None,
        grad_norm_max=max(tally.grad_norms, default=None),
        clip_frac=clip_frac,
        attention_max=max(tally.attention_maxima, default=None),
        clamp_frac=statistics.fmean(tally.clamp_fracs) if tally.clamp_fracs else None,
        cap_frac=statistics.fmean(tally.cap_fracs) if tally.cap_fracs else None,
        update_ratio=statistics.median(tally.update_ratios) if tally.update_ratios else None,
        zero_grad_frac=statistics.fmean(tally.zero_grad_fracs) if tally.zero_grad_fracs else None,
        grad_rms_over_eps=(
            statistics.median(tally.grad_rms_over_eps) if tally.grad_rms_over_eps else None
        ),
        overflow_rate=tally.overflows.rate,
        alarms=dict(tally.alarms),
        warnings=tuple(tally.warnings),
        error_type=error[0],
        error_place=error[1],
        error_text=error[2],
        peak_memory_mib=tally.peak_memory_mib,
        train_s=tally.train_s,
        wall_s=wall_s,
        device=device,
        fp16_kind=_fp16_kind(config),
    )


def control_end(tally: Tally, *, outcome: Outcome, reason: str) -> ControlEnd:
    """Fold the tally of a trial that was let run on into what is stored of its whole run.

    Args:
        tally: What the trial has shown, before and after its kill.
        outcome: How it ended.
        reason: Why, as a short phrase.
    """
    return ControlEnd(
        outcome=outcome,
        reason=reason,
        num_steps=tally.num_steps,
        num_judged_steps=len(tally.judged_losses),
        num_bad_steps=tally.labels[StepLabel.BAD],
        judged_losses=tuple(tally.judged_losses),
        probe_steps=tuple(tally.probe_steps),
        probe_losses=tuple(mean_or_none(row) for row in tally.probe_batch_losses),
        are_parameters_finite=outcome is not Outcome.NONFINITE_PARAMETERS,
    )


def _fp16_kind(config: TrialConfig) -> str | None:
    if config.engine.precision != "fp16":
        return None
    return config.engine.fp16_on_cpu if config.device == "cpu" else "cuda"


def mean_or_none(values: Sequence[float | None]) -> float | None:
    """Return the mean; None if there is no value or one of them is not finite."""
    finite = [value for value in values if value is not None]
    if not values or len(finite) < len(values):
        return None
    return finite_or_none(sum(finite) / len(finite))
