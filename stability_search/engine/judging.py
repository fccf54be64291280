"""What a step was: its label, why, and where it broke."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from stability_search.engine import guards
from stability_search.engine.clipping import NONFINITE_GRADIENT
from stability_search.engine.losses import LossFn
from stability_search.engine.reference import DataJudge
from stability_search.engine.trace import Origin
from stability_search.engine.window import Window, WindowResult
from stability_search.records.step import StepLabel


@dataclass(frozen=True, kw_only=True, slots=True)
class Judgement:
    """What a step was.

    Attributes:
        label: Its label.
        reason: Why; empty for `ok`.
        position: The micro-batch at fault, by its position in the window; None if none is.
        origin: Where it broke.
        is_transient: True if it did not break again; None if nobody looked or could tell.
    """

    label: StepLabel
    reason: str
    position: int | None = None
    origin: Origin = field(default_factory=Origin)
    is_transient: bool | None = None


FINE = Judgement(label=StepLabel.OK, reason="")


class StepJudge:
    """Judge one window after the other; a calm one costs nothing.

    Args:
        model: The model that is trained.
        window: Repeats a window to see where it breaks.
        data: Tells bad data.
        proof: Knows which loss scale has worked.
    """

    def __init__(
        self, model: nn.Module, window: Window, data: DataJudge, proof: guards.ScaleProof
    ) -> None:
        self._model = model
        self._window = window
        self._data = data
        self._proof = proof

    def judge(
        self,
        micro_batches: Sequence[Any],
        loss_fn: LossFn,
        result: WindowResult,
        *,
        scale: float | None,
    ) -> Judgement:
        """Say what a window was.

        Args:
            micro_batches: The window.
            loss_fn: As in `GuardedEngine.step`.
            result: What became of it.
            scale: The loss scale that it ran with; None without loss scaling.
        """
        last, faults = result.last, result.faults
        if last.is_fine and not faults:
            return FINE
        facts = guards.StepFacts(
            state_fault=last.state_fault,
            batch_fault="",
            forward_fault=faults[min(faults)] if faults else "",
            grad_fault="" if faults else last.grad_fault,
            scale=scale,
            proven_scale=self._proof.proven_scale,
        )
        position, batch_fault = self._data.fault(micro_batches, loss_fn)
        label, reason = guards.label_step(dataclasses.replace(facts, batch_fault=batch_fault))
        cause = Judgement(label=label, reason=reason)
        if label is not StepLabel.CALIBRATION:
            cause = self._cause(cause, micro_batches, loss_fn, result)
        if label is StepLabel.DATA:
            return dataclasses.replace(cause, position=position)
        return cause

    def _cause(
        self,
        found: Judgement,
        micro_batches: Sequence[Any],
        loss_fn: LossFn,
        result: WindowResult,
    ) -> Judgement:
        """Add where a step broke, on the same inputs, weights and random state."""
        if result.last.state_fault:
            origin = Origin(module=result.last.broken_module, phase="update")
            return dataclasses.replace(found, origin=origin)
        if result.faults:
            first = min(result.faults)
            is_transient = self._is_transient(result.origin, first)
            return dataclasses.replace(
                found, position=first, origin=result.origin, is_transient=is_transient
            )
        position, origin = self._window.trace_backward(
            dict(enumerate(micro_batches)), loss_fn, len(micro_batches)
        )
        if origin.phase is not None or not origin.is_known:
            is_transient = False if origin.is_known else None
            return dataclasses.replace(
                found, position=position, origin=origin, is_transient=is_transient
            )
        # Finite gradients whose squares overflow show no place.
        is_nonfinite = result.last.grad_fault == NONFINITE_GRADIENT
        return dataclasses.replace(
            found, origin=Origin(phase="backward"), is_transient=True if is_nonfinite else None
        )

    def _is_transient(self, origin: Origin, position: int) -> bool | None:
        if origin.phase is None and position > 0 and any(True for _ in self._model.buffers()):
            return None  # it was repeated with the buffers of the window's start, not its own
        return origin.phase is None if origin.is_known else None
