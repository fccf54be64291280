"""An alarm: what it says and what it advises."""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

ENDING = frozenset({"bad_steps", "skipped_frac"})
"""Alarms at which a long run may end its epoch or itself."""
_CRITICAL = ENDING | {"attention_max_diverging"}

_SMALLER_RATE = (
    "Go on from the last good checkpoint with a tenth of the learning rate; it is not changed "
    "for you."
)
_BOUND_LOGITS = "attention_logit_cap bounds them, QK-norm or a lower learning_rate cures them."
_ADVICE: Mapping[str, str] = {
    "attention_max": f"Watch them: {_BOUND_LOGITS}",
    "attention_max_degraded": f"Training is usually worse from here on: {_BOUND_LOGITS}",
    "attention_max_diverging": f"Training usually diverges from here on: {_BOUND_LOGITS}",
    "clip_frac": "Clipping acts as a hidden cut of the learning rate: lower learning_rate or "
    "raise clip_norm.",
    "overflow_rate": "The loss scale keeps overflowing: lower max_scale or raise "
    "growth_interval; if that does not help, use bf16.",
    "clamp_frac": "The clamp masks growth and does not cure it: attention_logit_cap or a lower "
    "learning_rate does.",
    "cap_frac": "Training depends on the cap: lower learning_rate.",
    "zero_grad_frac": "Small gradients vanish in low precision: raise init_scale, or use bf16.",
    "update_ratio": "Updates are large for their weights: lower learning_rate or warm up longer.",
    "grad_rms_over_eps": "eps shrinks the update: lower eps, or raise clip_norm.",
    "grad_norm": "Clip it (clip_norm), or lower learning_rate if it stays there.",
    "grad_norm_late": "It should have fallen by now: lower learning_rate.",
    "grad_norm_jump": "Look at the batch of this step.",
    "grad_norm_advise": _SMALLER_RATE,
    "bad_steps_advise": _SMALLER_RATE,
    "stale_epochs": _SMALLER_RATE,
    "bad_steps": "Go on from the last good checkpoint with a tenth of the learning rate, or "
    "without mixed precision.",
    "skipped_frac": "Too many steps are lost to NaN or Inf: look at the data, then leave mixed "
    "precision or lower the learning rate.",
}
ALARM_NAMES: tuple[str, ...] = tuple(_ADVICE)
"""Every alarm, named like its threshold in `AlarmSettings`."""


class AlarmLevel(StrEnum):
    """How bad it is."""

    WARNING = "WARNING"
    CRITICAL = "CRITICAL"


@dataclass(frozen=True, kw_only=True, slots=True)
class Alarm:
    """An indicator beyond its threshold.

    Attributes:
        name: The threshold it passed, a field of `AlarmSettings`.
        level: `CRITICAL` where training is being lost, else `WARNING`.
        step: Attempted step at which it rose.
        epoch: Epoch of that step, from 1.
        value: What was measured, finite.
        threshold: What it was compared with.
        message: One line for the log, the level first: step, epoch, value, threshold, advice.
        advice: What to do, the last part of the message.
    """

    name: str
    level: AlarmLevel
    step: int
    epoch: int
    value: float
    threshold: float
    message: str
    advice: str

    def __str__(self) -> str:
        """Return the line for the log."""
        return self.message


def worded(  # noqa: PLR0913 - the parts of an alarm
    name: str, fact: str, *, step: int, epoch: int, value: float, threshold: float
) -> Alarm:
    """Return an alarm with its line for the log.

    Args:
        name: The threshold that was passed.
        fact: What was measured and what it was compared with, in words.
        step: Attempted step at which it rose.
        epoch: Epoch of that step, from 1.
        value: What was measured, finite.
        threshold: What it was compared with.
    """
    level = AlarmLevel.CRITICAL if name in _CRITICAL else AlarmLevel.WARNING
    advice = _ADVICE[name]
    return Alarm(
        name=name,
        level=level,
        step=step,
        epoch=epoch,
        value=float(value),
        threshold=float(threshold),
        message=f"{level} step {step} epoch {epoch}: {fact} (alarms.{name}). {advice}",
        advice=advice,
    )
