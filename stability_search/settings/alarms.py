"""Beyond which value an indicator is worth a warning, and what a long run does then."""

import dataclasses
from dataclasses import dataclass
from enum import StrEnum

from stability_search.settings.rules import is_positive, require


class OnAlarm(StrEnum):
    """What a long run does when an alarm rises; a trial always only warns."""

    WARN = "warn"
    END_EPOCH = "end_epoch"
    END_RUN = "end_run"


ALARM_SHARES: frozenset[str] = frozenset(
    {"clip_frac", "overflow_rate", "clamp_frac", "cap_frac", "zero_grad_frac", "skipped_frac"}
)
"""Thresholds of `AlarmSettings` that are shares, at most 1; a share of 1 is never exceeded."""


@dataclass(frozen=True, kw_only=True, slots=True)
class AlarmSettings:
    """Beyond which value an indicator is worth a warning; every number is > 0.

    An alarm is named like its threshold. Norms do not carry over between models: after a calm
    run, set those of `grad_norm` to what was rare in it.

    Attributes:
        epoch_steps: Optimizer steps called an epoch; null takes a 50th of the run, at least 1.
            Set it to the steps of one pass over your data.
        on_alarm: What `bad_steps` and `skipped_frac` do in a long run: `warn`, `end_epoch` or
            `end_run`. A trial always only warns.
        attention_max: Absolute attention logit before cap and mask that is to be watched. Raise
            it for a model that is known to train calmly above it.
        attention_max_degraded: The same from which training is usually worse.
        attention_max_diverging: The same from which training usually diverges.
        clip_frac: Share of updates that were clipped; above a half, clipping is a hidden cut of
            the learning rate. 1 turns the alarm off where that is wanted.
        overflow_rate: Gradient overflows per step, of 200 steps after the loss scale was found;
            0.005 is one of them. Raise it with a short `growth_interval`, which probes more often.
        clamp_frac: Share of attention outputs beyond the clamp; above it the clamp masks growth
            and does not cure it.
        cap_frac: Share of attention logits beyond the cap; above it training depends on the cap.
        zero_grad_frac: Share of zero gradients above that of fp32, so 0.2 is 20 points; only
            judged where the share in fp32 is known. Raise it for sparse gradients.
        update_ratio: RMS of an update over RMS of its weights, in most steps; 1e-3 is typical.
            Raise it for weights that start near 0, such as adapters.
        grad_rms_over_eps: Smallest RMS of a weight matrix's gradient over Adam's `eps`, in most
            steps; the alarm rises *below* it, where `eps` shrinks the update.
        grad_norm: Gradient norm before clipping that is worth a warning at any time.
        grad_norm_late: The same after epoch `late_epoch`, when norms should have fallen.
        late_epoch: Epochs that `grad_norm_late` leaves out at the start.
        grad_norm_jump: Gradient norm as a multiple of that of the step before. Raise it for
            batches of very different length.
        grad_norm_advise: Gradient norm at which a tenth of the learning rate is advised.
        bad_steps_advise: `bad` steps (NaN or Inf) in an epoch beyond which the same is advised.
        stale_epochs: Epochs, of at least 20 steps together, without a new lowest mean loss after
            which the same is advised. Raise it where an epoch is short or its loss noisy.
        bad_steps: `bad` steps in an epoch beyond which `on_alarm` acts.
        skipped_frac: Share of an epoch's steps that changed no parameter, two at least and the
            search for a loss scale left out, beyond which `on_alarm` acts.
    """

    epoch_steps: int | None = None
    on_alarm: OnAlarm = OnAlarm.WARN
    attention_max: float = 100.0
    attention_max_degraded: float = 1e3
    attention_max_diverging: float = 1e4
    clip_frac: float = 0.5
    overflow_rate: float = 0.005
    clamp_frac: float = 0.01
    cap_frac: float = 0.01
    zero_grad_frac: float = 0.2
    update_ratio: float = 0.01
    grad_rms_over_eps: float = 10.0
    grad_norm: float = 50.0
    grad_norm_late: float = 20.0
    late_epoch: int = 5
    grad_norm_jump: float = 10.0
    grad_norm_advise: float = 100.0
    bad_steps_advise: int = 1
    stale_epochs: int = 3
    bad_steps: int = 10
    skipped_frac: float = 0.5

    def __post_init__(self) -> None:
        """Refuse thresholds outside their range; NaN is outside of every range.

        Raises:
            ValueError: Names the threshold, the rule and the value received.
        """
        words = tuple(str(member) for member in OnAlarm)
        require(
            f"one of {', '.join(words)}", "on_alarm", self.on_alarm, holds=self.on_alarm in words
        )
        for spec in dataclasses.fields(self):
            name, value = spec.name, getattr(self, spec.name)
            if name == "on_alarm" or (value is None and spec.default is None):
                continue
            is_number = isinstance(value, int | float) and not isinstance(value, bool)
            if name in ALARM_SHARES:
                require("0 < value <= 1", name, value, holds=is_number and 0 < value <= 1)
            elif name == "epoch_steps" or isinstance(spec.default, int):
                holds = is_number and isinstance(value, int) and value >= 1
                require("an integer >= 1", name, value, holds=holds)
            else:
                holds = is_number and is_positive(value)
                require("a finite number > 0", name, value, holds=holds)
