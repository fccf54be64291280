"""How a trial ended, and its row in the ledger."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Self

from stability_search.records.values import Json, Record


class Stage(StrEnum):
    """The part of a study a trial belongs to."""

    PILOT = "pilot"
    SEARCH = "search"
    CONFIRM = "confirm"


class Outcome(StrEnum):
    """How a trial ended."""

    COMPLETED = "completed"
    PRUNED = "pruned"
    DIVERGED = "diverged"
    SCALE_COLLAPSE = "scale_collapse"
    NONFINITE_PARAMETERS = "nonfinite_parameters"
    OUT_OF_MEMORY = "out_of_memory"
    TIMED_OUT = "timed_out"
    USER_ERROR = "user_error"
    INFRASTRUCTURE = "infrastructure"

    @property
    def is_unstable(self) -> bool:
        """True where the configuration itself was stopped for instability."""
        return self in _UNSTABLE

    @property
    def is_result(self) -> bool:
        """True where the end says something about the configuration."""
        return self not in {Outcome.USER_ERROR, Outcome.INFRASTRUCTURE}


_UNSTABLE = frozenset(
    {
        Outcome.PRUNED,
        Outcome.DIVERGED,
        Outcome.SCALE_COLLAPSE,
        Outcome.NONFINITE_PARAMETERS,
    }
)


@dataclass(frozen=True, kw_only=True, slots=True)
class ControlEnd(Record):
    """What became of a killed trial that was let run on, to see whether killing it was right.

    All numbers are of the whole run, the steps up to the kill included. Nothing is told, scored
    or chosen by them: they only judge the kill rule.

    Attributes:
        outcome: How the run ended, as if it had not been killed.
        reason: Why, as a short phrase; empty for `completed`.
        num_steps: Attempted steps.
        num_judged_steps: `ok` and `bad` steps.
        num_bad_steps: `bad` steps.
        judged_losses: Training loss of every judged step in order; None where non-finite.
        probe_steps: Attempted steps after which the probe was read, 0 first.
        probe_losses: Mean probe loss at each of them; None where non-finite.
        are_parameters_finite: False if a parameter ended NaN or infinite.
    """

    outcome: Outcome
    reason: str = ""
    num_steps: int
    num_judged_steps: int = 0
    num_bad_steps: int = 0
    judged_losses: tuple[float | None, ...] = ()
    probe_steps: tuple[int, ...] = ()
    probe_losses: tuple[float | None, ...] = ()
    are_parameters_finite: bool = True

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """Build the end again from what `to_json` returned."""
        known = cls._known(data)
        tuples = {name: tuple(value) for name, value in known.items() if isinstance(value, list)}
        return cls(**{**known, **tuples, "outcome": Outcome(data["outcome"])})


@dataclass(frozen=True, kw_only=True, slots=True)
class TrialSummary(Record):
    """How one trial ended, as an outcome plus finite numbers.

    Attributes:
        outcome: How the trial ended.
        reason: Why, as a short phrase; empty for `completed`.
        num_planned_steps: The trial's horizon T.
        num_steps: Attempted steps.
        num_judged_steps: `ok` and `bad` steps, N in the score.
        num_bad_steps: `bad` steps, b in the score.
        num_calibration_steps: Overflows of a benign loss-scale search.
        num_data_steps: Steps whose batch was at fault.
        judged_losses: Training loss of every judged step in order; None where non-finite.
        judged_steps: Attempted step of each of these losses, so that a longer trial can be scored
            at a shorter horizon; empty if not kept.
        bad_steps: Attempted step of every `bad` step; empty if there was none or not kept.
        probe_steps: Attempted steps after which the probe was read, 0 first.
        probe_losses: Mean probe loss at each of them; None where non-finite. Shorter than
            `probe_steps` where the trial ended early.
        probe_batch_losses: The same, one row a reading and one column a probe batch.
        metrics_first: The task's metrics at the first probe.
        metrics_last: The same at the last probe that was read.
        baseline: The task's `baseline()`; None where it has none or it was not asked for.
        blind_loss: Lowest probe loss of a model that ignores its input; None if not measured.
        blind_batch_losses: Its loss per probe batch; empty if not measured.
        has_measured_blind_run: True if the blind run was made, whatever it gave.
        has_probe_loss: True if the task has a `probe_loss`; None if that is not known.
        are_parameters_finite: False if a parameter ended NaN or infinite.
        first_bad_step: First `bad` step; None if there was none.
        first_nonfinite_module: See `StepRecord`, of the first bad step.
        first_nonfinite_phase: See `StepRecord`, of the first bad step.
        last_finite_max: See `StepRecord`, of the first bad step.
        is_first_bad_transient: True if the fault of the first bad step did not show again on the
            same inputs; None if there was none or nobody looked.
        evidence: E_t after the last judged step.
        final_scale: Loss scale at the end; None without loss scaling.
        grad_norm_median: Median finite gradient norm before clipping; None if there was none.
        grad_norm_max: Largest finite gradient norm before clipping; None if there was none.
        clip_frac: Share of applied updates that were clipped; None without clipping.
        attention_max: Largest attention logit seen; None if not seen.
        clamp_frac: Mean share of attention outputs outside the clamp; None if off.
        cap_frac: Mean share of attention logits beyond the cap; None if off.
        update_ratio: Median RMS of an update over RMS of its weights; None if not measured.
        zero_grad_frac: Mean share of exact zeros in weight gradients; None if not measured.
        grad_rms_over_eps: Median over steps of the smallest RMS of a weight matrix's gradient
            over Adam's `eps`; None if not measured.
        overflow_rate: Gradient overflows per step after the loss scale was found; None without
            loss scaling or before it was.
        alarms: How often each alarm rose, by its name; see `alarms`.
        warnings: What a reader of the result must know, one sentence each.
        error_type: Exception type of a `user_error` or `infrastructure` end; empty otherwise.
        error_place: `file:line` that raised it; empty otherwise.
        error_text: The traceback as text; empty otherwise.
        peak_memory_mib: Largest resident memory (CPU) or allocated memory (CUDA) seen, MiB.
        train_s: Seconds spent in training steps, those after a kill included.
        wall_s: Seconds from the trial's start to its end, likewise.
        device: `cpu`, or the name of the GPU.
        fp16_kind: How fp16 was computed: `emulated` or `native` on a CPU, `cuda` on a GPU; None
            in another precision.
        control: What the trial did after its kill, where `prune.control` let it run on; None
            otherwise. Every other field but the two times is as of the kill.
    """

    outcome: Outcome
    reason: str = ""
    num_planned_steps: int
    num_steps: int = 0
    num_judged_steps: int = 0
    num_bad_steps: int = 0
    num_calibration_steps: int = 0
    num_data_steps: int = 0
    judged_losses: tuple[float | None, ...] = ()
    judged_steps: tuple[int, ...] = ()
    bad_steps: tuple[int, ...] = ()
    probe_steps: tuple[int, ...] = ()
    probe_losses: tuple[float | None, ...] = ()
    probe_batch_losses: tuple[tuple[float | None, ...], ...] = ()
    metrics_first: Mapping[str, float | None] = field(default_factory=dict)
    metrics_last: Mapping[str, float | None] = field(default_factory=dict)
    baseline: float | None = None
    blind_loss: float | None = None
    blind_batch_losses: tuple[float | None, ...] = ()
    has_measured_blind_run: bool = False
    has_probe_loss: bool | None = None
    are_parameters_finite: bool = True
    first_bad_step: int | None = None
    first_nonfinite_module: str | None = None
    first_nonfinite_phase: str | None = None
    last_finite_max: float | None = None
    is_first_bad_transient: bool | None = None
    evidence: float = 1.0
    final_scale: float | None = None
    grad_norm_median: float | None = None
    grad_norm_max: float | None = None
    clip_frac: float | None = None
    attention_max: float | None = None
    clamp_frac: float | None = None
    cap_frac: float | None = None
    update_ratio: float | None = None
    zero_grad_frac: float | None = None
    grad_rms_over_eps: float | None = None
    overflow_rate: float | None = None
    alarms: Mapping[str, int] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    error_type: str = ""
    error_place: str = ""
    error_text: str = ""
    peak_memory_mib: float = 0.0
    train_s: float = 0.0
    wall_s: float = 0.0
    device: str = "cpu"
    fp16_kind: str | None = None
    control: ControlEnd | None = None

    @property
    def num_executed_steps(self) -> int:
        """Attempted steps, those after a kill included: what a step budget counts."""
        return (self.control or self).num_steps

    def without_the_kill(self) -> Self:
        """Return what would be scored, had the trial not been killed; ValueError if it was not."""
        if self.control is None:
            raise ValueError("control: a trial that was let run on must be given, but got None.")
        whole = {spec.name: getattr(self.control, spec.name) for spec in _CONTROL_FIELDS}
        return dataclasses.replace(
            self, **whole, control=None, judged_steps=(), bad_steps=(), probe_batch_losses=()
        )

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """Build the summary again from what `to_json` returned."""
        tuples = {
            key: tuple(data[key])
            for key in (
                "judged_losses",
                "judged_steps",
                "bad_steps",
                "probe_steps",
                "probe_losses",
                "blind_batch_losses",
                "warnings",
            )
        }
        rows = tuple(tuple(row) for row in data["probe_batch_losses"])
        control = data.get("control")  # earlier versions wrote none
        return cls(
            **{
                **cls._known(data),
                **tuples,
                "probe_batch_losses": rows,
                "outcome": Outcome(data["outcome"]),
                "control": None if control is None else ControlEnd.from_json(control),
            }
        )


_CONTROL_FIELDS = dataclasses.fields(ControlEnd)


@dataclass(frozen=True, kw_only=True, slots=True)
class TrialRow(Record):
    """One finished trial as the ledger keeps it.

    Attributes:
        trial_id: Made from stage, index, seed and rung; unique together with `attempt`.
        stage: `pilot`, `search` or `confirm`.
        index: Position among the trials of its stage, in the order they were proposed, from 0.
        config_id: Hash of the active settings, the learning rate included.
        candidate_id: The `config_id` whose ladder it belongs to; None outside confirm.
        octave: Octave of the learning rate from that candidate's, negative below; None outside.
        seed: Seed of the trial.
        seed_index: Position of that seed among the stage's seeds, from 0.
        settings: Every named setting; None where it is inactive or off.
        e0: E_0 the trial was given; None in the pilot or where there was none.
        delta: Delta the trial was given; None in the pilot or where there was none.
        summary: How it ended.
        told_value: Value told to the sampler; None outside search or where told as FAIL.
        told_constraint: Constraint told with it (feasible when <= 0); None likewise.
        told_e_star: E* under which `told_value` was computed; None likewise.
        attempt: 1, or more after an `infrastructure` end.
        started_at: UTC, ISO 8601.
        node: Host that ran it.
        fingerprint: Short hash of what can change its numbers there: versions, CPU, GPU, the
            task's files; empty where that is not known.
    """

    trial_id: str
    stage: Stage
    index: int
    config_id: str
    candidate_id: str | None = None
    octave: int | None = None
    seed: int
    seed_index: int = 0
    settings: Mapping[str, Json]
    e0: float | None = None
    delta: float | None = None
    summary: TrialSummary
    told_value: float | None = None
    told_constraint: float | None = None
    told_e_star: float | None = None
    attempt: int = 1
    started_at: str = ""
    node: str = ""
    fingerprint: str = ""

    @property
    def is_control(self) -> bool:
        """True if the trial was killed but let run on."""
        return self.summary.control is not None

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """Build the row again from what `to_json` returned."""
        return cls(
            **{
                **cls._known(data),
                "stage": Stage(data["stage"]),
                "summary": TrialSummary.from_json(data["summary"]),
            }
        )
