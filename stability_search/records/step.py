"""What one attempt at an optimizer step was."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Self

from stability_search.records.values import Record

PROOF_STEPS = 20  # `ok` steps since the last rise after which a loss scale counts as known to work


class StepLabel(StrEnum):
    """What one attempt at an optimizer step was."""

    OK = "ok"
    CALIBRATION = "calibration"  # a benign loss-scale search
    BAD = "bad"
    DATA = "data"  # the batch's fault

    @property
    def is_judged(self) -> bool:
        """True for the labels that the kill rule and the score hear of."""
        return self in {StepLabel.OK, StepLabel.BAD}


@dataclass(frozen=True, kw_only=True, slots=True)
class StepRecord(Record):
    """One attempt at an optimizer step.

    Attributes:
        step: Attempted step, from 1.
        label: What the step was; see `stability_search/README.md`.
        reason: Why, as a short phrase; empty for `ok`.
        loss: Mean loss over all micro-batches before the update; None if any was non-finite.
        is_loss_finite: False if the loss of any micro-batch was NaN or infinite.
        grad_norm: L2 norm of the unscaled gradients before clipping; None if non-finite or if no
            backward pass ran.
        is_grad_finite: False if a backward pass gave NaN or Inf.
        clipped: True if clipping made the gradient smaller.
        is_applied: True if the optimizer changed the parameters.
        learning_rate: The rate this step used, after warm-up and schedule.
        scale: The loss scale the step ran with; None without loss scaling.
        attention_max: Largest absolute attention logit before cap and mask, of the first attention
            of each micro-batch; for fused attention without a cap, which shows no logits, a bound
            on it: largest norm of a query times that of a key times the factor. None if not seen.
        clamp_frac: Share of attention outputs outside the clamp, before it acted; None if off.
        cap_frac: Share of attention logits beyond the cap, before it acted; None if off.
        batch_index: Index in the trial's stream of the first offending micro-batch; None if none.
        first_nonfinite_module: Module that first turned finite values non-finite; None if none.
        first_nonfinite_phase: `forward`, `loss`, `backward` or `update`; None if none.
        last_finite_max: Largest absolute value that went into that module or loss, or came back
            to it as a gradient, while all was finite; None if there is no such place.
        is_transient: True if the fault did not show again on the same inputs, weights and random
            state; None where nobody looked.
        update_ratio: RMS of the update over RMS of the weights, of one weight matrix, in every
            fourth step the next; None in other steps, or if nothing was applied.
        zero_grad_frac: Share of exact zeros in the gradient of the same matrix; None likewise.
        grad_rms_over_eps: Smallest RMS of a weight matrix's gradient after clipping, over Adam's
            `eps`; None likewise, and with sgd.
        loss_terms: Named terms of the loss, mean over the micro-batches; empty if unnamed.
        evidence: E_t of the kill rule after this step; None before it was judged.
        step_s: Wall-clock seconds the step took.
    """

    step: int
    label: StepLabel
    reason: str = ""
    loss: float | None
    is_loss_finite: bool
    grad_norm: float | None
    is_grad_finite: bool
    clipped: bool
    is_applied: bool
    learning_rate: float
    scale: float | None
    attention_max: float | None = None
    clamp_frac: float | None = None
    cap_frac: float | None = None
    batch_index: int | None = None
    first_nonfinite_module: str | None = None
    first_nonfinite_phase: str | None = None
    last_finite_max: float | None = None
    is_transient: bool | None = None
    update_ratio: float | None = None
    zero_grad_frac: float | None = None
    grad_rms_over_eps: float | None = None
    loss_terms: Mapping[str, float | None] = field(default_factory=dict)
    evidence: float | None = None
    step_s: float = 0.0

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """Build the record again from what `to_json` returned."""
        return cls(**{**cls._known(data), "label": StepLabel(data["label"])})
