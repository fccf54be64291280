"""A slow engine in plain Python: what each step must be, by the rules alone.

It knows nothing of torch. It is told what was planted in a window and answers what the engine
must make of it: label, update, schedule, loss scale and what is known about the scale.
"""

import copy
import math
from dataclasses import dataclass, field
from typing import Self

from stability_search.settings.engine import EngineSettings

CLEAN = "clean"
NAN_BATCH = "NaN in the batch"
NAN_UNUSED = "NaN in a field that the loss does not use"
INF_LOSS = "infinite loss"
RAISES = "FloatingPointError in the loss"
RAISES_AFTER_NAN = "ValueError of the task after a module gave NaN"
INF_MODULE = "a module of the trained model emits infinity"
RAISES_BACKWARD = "FloatingPointError in the backward pass"
INF_GRADIENT = "infinite gradient"
HUGE_GRADIENT = "finite gradient whose square overflows"

FAULTS = (
    CLEAN,
    NAN_BATCH,
    NAN_UNUSED,
    INF_LOSS,
    RAISES,
    RAISES_AFTER_NAN,
    INF_MODULE,
    RAISES_BACKWARD,
    INF_GRADIENT,
    HUGE_GRADIENT,
)
# The micro-batch cannot be used; the loss scale cannot be the cause.
_UNUSABLE = {
    NAN_BATCH,
    INF_LOSS,
    RAISES,
    RAISES_AFTER_NAN,
    INF_MODULE,
    RAISES_BACKWARD,
}
_HOLDS_NAN = {NAN_BATCH, NAN_UNUSED}
# These travel with the batch, so they break the forward pass of the initial fp32 model as well.
_BREAKS_REFERENCE = {NAN_BATCH, INF_LOSS, RAISES, RAISES_AFTER_NAN}
_BREAKS_GRADIENT = {INF_GRADIENT, HUGE_GRADIENT}
_PROOF_STEPS = 20


@dataclass(frozen=True, kw_only=True, slots=True)
class Planted:
    """What is planted in one micro-batch.

    Attributes:
        fault: One of `FAULTS`.
        limit: The gradient overflows where loss scale / micro-batches lies above it.
    """

    fault: str = CLEAN
    limit: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Expected:
    """What the engine must say and do about one step."""

    label: str
    is_applied: bool
    step: int
    learning_rate: float
    scale: float | None
    batch_index: int | None
    num_forward: int  # forward passes that drew random numbers and were not taken back


@dataclass(kw_only=True)
class SlowEngine:
    """Follow the rules step by step, with a list where a formula would be shorter."""

    settings: EngineSettings
    has_reference: bool
    scale: float | None = None
    proven_scale: float = 0.0
    num_ok_since_rise: int = 0
    num_calm_steps: int = 0
    num_steps: int = 0
    num_applied: int = 0
    num_micro_batches: int = 0
    is_poisoned: bool = False
    ended: str | None = None
    labels: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.settings.precision == "fp16":
            self.scale = self.settings.init_scale

    def copied(self) -> Self:
        return copy.deepcopy(self)

    def step(self, window: list[Planted]) -> Expected:
        """Take the step, and say what it must have been."""
        scale, learning_rate, start = self.scale, self.learning_rate(), self.num_micro_batches
        self.num_steps += 1
        self.num_micro_batches += len(window)
        unusable = [k for k, b in enumerate(window) if b.fault in _UNUSABLE or self.is_poisoned]
        used = [b for k, b in enumerate(window) if k not in unusable]
        if unusable and self.settings.bad_microbatch == "drop":
            used = []
        is_overflow = bool(used) and self._overflows(used)
        label, place = self._label(window, unusable, is_overflow=is_overflow)
        is_applied = bool(used) and not is_overflow
        self._move_scale(label, is_applied=is_applied, is_overflow=is_overflow)
        if is_applied:
            self.num_applied += 1
        if self.is_poisoned:
            self.ended = "nonfinite_parameters"
        self.labels.append(label)
        return Expected(
            label=label,
            is_applied=is_applied,
            step=self.num_steps,
            learning_rate=learning_rate,
            scale=scale,
            # A broken parameter is no batch's fault.
            batch_index=None if place is None or self.is_poisoned else start + place,
            num_forward=len(used) or len(window),
        )

    def learning_rate(self) -> float:
        chosen = self.settings
        peak, k, warmup = chosen.learning_rate, self.num_applied, chosen.warmup_steps
        if k < warmup:
            return peak * (k + 1) / warmup
        done = min(1.0, (k - warmup) / max(1, chosen.num_planned_steps - warmup))
        if chosen.schedule == "linear":
            return peak * (1 - done)
        if chosen.schedule == "cosine":
            return peak * (1 + math.cos(math.pi * done)) / 2
        return peak

    def _overflows(self, used: list[Planted]) -> bool:
        weight = (1.0 if self.scale is None else self.scale) / len(used)
        return any(b.fault in _BREAKS_GRADIENT or weight > b.limit for b in used)

    def _label(
        self, window: list[Planted], unusable: list[int], *, is_overflow: bool
    ) -> tuple[str, int | None]:
        """Return the first rule that matches, and the micro-batch it names."""
        if not unusable and not is_overflow:
            return "ok", None
        at_fault = [k for k, b in enumerate(window) if b.fault in _HOLDS_NAN]
        if not at_fault and self.has_reference:
            at_fault = [k for k, b in enumerate(window) if b.fault in _BREAKS_REFERENCE]
        place = (at_fault or unusable or [None])[0]
        if self.is_poisoned:
            return "bad", place
        if at_fault:
            return "data", place
        if unusable:
            return "bad", place
        if self.scale is not None and self.scale > self.proven_scale and self.scale > 1:
            return "calibration", None
        return "bad", next((k for k, b in enumerate(window) if self._shows(b, len(window))), None)

    def _shows(self, planted: Planted, num_used: int) -> bool:
        """Say whether the micro-batch alone gives a gradient that is not finite."""
        if planted.fault == HUGE_GRADIENT:  # finite, but for fp16
            return self.scale is not None
        weight = (1.0 if self.scale is None else self.scale) / num_used
        return planted.fault == INF_GRADIENT or weight > planted.limit

    def _move_scale(self, label: str, *, is_applied: bool, is_overflow: bool) -> None:
        if self.scale is None:
            return
        if is_overflow:
            if label == "bad":
                self.proven_scale = min(self.proven_scale, self.scale / 2)
            self.scale /= 2
            self.num_calm_steps = 0
            if self.scale < 1:
                self.ended = "scale_collapse"
        elif is_applied:
            if label == "ok":
                self.num_ok_since_rise += 1
                if self.num_ok_since_rise >= _PROOF_STEPS:
                    self.proven_scale = max(self.proven_scale, self.scale)
            self.num_calm_steps += 1
            if self.num_calm_steps == self.settings.growth_interval:
                self.num_calm_steps = 0
                self._grow(self.scale)

    def _grow(self, scale: float) -> None:
        limit = math.inf if self.settings.max_scale is None else self.settings.max_scale
        if scale * 2 <= limit:
            self.scale = scale * 2
            self.num_ok_since_rise = 0
