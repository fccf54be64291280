"""One window of micro-batches: attempted, rolled back where it broke, attempted again."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Self

import torch
from torch import nn

from stability_search.engine import batches, precision
from stability_search.engine.clamps import AttentionGuard
from stability_search.engine.clipping import rescale_gradients, total_norm
from stability_search.engine.losses import (
    NUMERICAL_ERRORS,
    LossFn,
    is_out_of_memory,
    total_loss,
)
from stability_search.engine.prepare import state_fault, state_norm
from stability_search.engine.rollback import Rollback
from stability_search.engine.signals import Reading, Signals
from stability_search.engine.trace import Origin, trace_forward
from stability_search.errors import UsageError
from stability_search.settings import EngineSettings


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Attempt:
    """One attempt at the window, or at what was left of it.

    Attributes:
        reading: Its numbers.
        state_fault: What of parameters and optimizer state is not finite; empty if nothing is.
        is_applied: True if the optimizer changed the parameters.
    """

    reading: Reading
    state_fault: str
    is_applied: bool


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class WindowResult:
    """What became of a window.

    Attributes:
        first: The attempt with every micro-batch.
        last: The attempt that counted; `first` itself where nothing broke.
        faults: What was non-finite in a forward pass or a loss, by position in the window.
    """

    first: Attempt
    last: Attempt
    faults: Mapping[int, str]


class Window:
    """Take windows on one model; see `step.py` for the whole step.

    Args:
        model: The model.
        settings: How a step is taken.
        optimizer: Its optimizer; only its parameters are judged, clipped and updated.
        attention: The guard of its attention, acting while a window is taken.
        scale: The loss scale; None without loss scaling.
        device: Where model and batches are.
    """

    def __init__(  # noqa: PLR0913 - the parts of a step
        self,
        *,
        model: nn.Module,
        settings: EngineSettings,
        optimizer: torch.optim.Optimizer,
        attention: AttentionGuard,
        scale: precision.LossScale | None,
        device: torch.device,
    ) -> None:
        self._model = model
        self._settings = settings
        self._optimizer = optimizer
        self._parameters = [p for g in optimizer.param_groups for p in g["params"]]
        self._attention = attention
        self._scale = scale
        self._device = device
        self._rollback = Rollback(model, device)
        self._watch = _OutputWatch(model)
        self._must_see_cap = settings.attention_logit_cap is not None
        self._num_attempts = 0

    def close(self) -> None:
        """Take the hook on the model away."""
        self._watch.close()

    def take(self, window: Mapping[int, Any], loss_fn: LossFn) -> WindowResult:
        """Attempt the window, again without the micro-batches whose forward pass broke.

        Args:
            window: Micro-batches by position, at least one.
            loss_fn: See `GuardedEngine.step`.

        Returns:
            What became of it. Where nothing was applied, buffers, parameters and optimizer state
            are as before the window, to the bit.
        """
        self._rollback.mark()
        faults: dict[int, str] = {}
        first = last = self._attempt(window, loss_fn)
        while last.reading.faults:
            faults |= last.reading.faults
            self._rollback.restore_buffers()
            left = {k: v for k, v in window.items() if k not in faults}
            if self._settings.bad_microbatch == "drop" or not left:
                break
            self._rollback.restore_random_state()
            last = self._attempt(left, loss_fn)
        if not last.is_applied:
            self._rollback.restore_buffers()
        return WindowResult(first=first, last=last, faults=faults)

    def trace(self, position: int, batch: Any, loss_fn: LossFn) -> Origin:  # noqa: ANN401 - the task's own
        """Repeat a micro-batch of the present window under hooks, and leave no trace of it."""
        after = Rollback(self._model, self._device)
        after.mark()
        self._rollback.restore_buffers()
        self._rollback.restore_random_state(position)

        def run() -> torch.Tensor:
            with precision.autocast(self._settings.precision, self._device):
                return total_loss(loss_fn(self._model, batch))[0]

        try:
            return trace_forward(self._model, run)
        finally:
            after.restore_buffers()
            after.restore_random_state()

    # -- one attempt -------------------------------------------------------------------------

    def _attempt(self, window: Mapping[int, Any], loss_fn: LossFn) -> Attempt:
        signals = Signals()
        self._optimizer.zero_grad(set_to_none=True)
        for position, batch in window.items():
            self._rollback.mark_micro_batch(position)
            loss = self._forward(position, batch, loss_fn, signals)
            if loss is not None:
                self._backward(position, loss / len(window), signals)
        gradients = [p.grad for p in self._parameters if p.grad is not None]
        can_update = bool(gradients) and not signals.has_exception
        if can_update:
            self._update(gradients, signals)
        self._num_attempts += 1
        norm = state_norm(self._parameters, self._optimizer, self._num_attempts)
        reading = signals.read(norm)
        fault = ""
        if not math.isfinite(reading.state_norm):
            fault = state_fault(self._parameters, self._optimizer)
        is_applied = can_update and not reading.faults and reading.is_grad_finite
        return Attempt(reading=reading, state_fault=fault, is_applied=is_applied)

    def _forward(
        self,
        position: int,
        batch: Any,  # noqa: ANN401 - the task's own
        loss_fn: LossFn,
        signals: Signals,
    ) -> torch.Tensor | None:
        try:
            with (
                self._attention.recording(),
                self._watch.watching(),
                precision.autocast(self._settings.precision, self._device),
            ):
                loss, terms = total_loss(loss_fn(self._model, batch))
        except NUMERICAL_ERRORS as error:
            signals.add_exception(position, error)
            return None
        except Exception as error:
            if is_out_of_memory(error) or self.trace(position, batch, loss_fn).phase != "forward":
                raise
            signals.add_exception(position, error)
            return None
        signals.add("loss", position, [loss])
        signals.add_terms(position, terms)
        signals.add("output", position, self._watch.maxima)
        signals.add("attention output", position, self._attention.output_maxima)
        signals.add("attention_max", position, self._attention.logit_maxima)
        signals.add("clamp_frac", position, self._attention.clamp_fracs)
        signals.add("cap_frac", position, self._attention.cap_fracs)
        return loss

    def _backward(self, position: int, loss: torch.Tensor, signals: Signals) -> None:
        if self._must_see_cap:
            self._check_cap_acted()
        try:
            (loss if self._scale is None else loss * self._scale.value).backward()  # type: ignore[no-untyped-call]
        except NUMERICAL_ERRORS as error:
            signals.add_exception(position, error)

    def _update(self, gradients: list[torch.Tensor], signals: Signals) -> None:
        inverse_scale = 1.0 if self._scale is None else 1.0 / self._scale.value
        scaled_norm = total_norm(gradients)
        norm = scaled_norm if self._scale is None else scaled_norm * inverse_scale
        found_nonfinite = signals.found_nonfinite(scaled_norm, norm)
        rescale_gradients(
            gradients, norm, inverse_scale=inverse_scale, clip_norm=self._settings.clip_norm
        )
        if not self._optimizer.defaults["fused"]:
            if not bool(found_nonfinite):
                self._optimizer.step()
            return
        # The protocol by which torch.amp.GradScaler lets a fused optimizer skip itself.
        self._optimizer.grad_scale = None  # type: ignore[attr-defined]
        self._optimizer.found_inf = found_nonfinite  # type: ignore[attr-defined]
        try:
            self._optimizer.step()
        finally:
            del self._optimizer.grad_scale, self._optimizer.found_inf  # type: ignore[attr-defined]

    def _check_cap_acted(self) -> None:
        if self._attention.num_capped_calls == 0:
            raise UsageError(
                "attention_logit_cap: no attention of the model went through "
                "nn.MultiheadAttention, scaled_dot_product_attention or cap_logits.",
                hint="Call stability_search.cap_logits on its logits, or leave the cap out.",
            )
        self._must_see_cap = False


class _OutputWatch:
    """Keep the largest values of what a model returns, while it is asked to."""

    def __init__(self, model: nn.Module) -> None:
        self.maxima: list[torch.Tensor] = []
        self._is_watching = False
        self._hook = model.register_forward_hook(self._watch)

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """Stay one where the model is copied: a copy is not watched."""
        return self

    def watching(self) -> Self:
        """Watch within this context, from nothing."""
        return self

    def __enter__(self) -> Self:
        self.maxima.clear()
        self._is_watching = True
        return self

    def __exit__(self, *_: object) -> None:
        self._is_watching = False

    def close(self) -> None:
        """Take the hook away."""
        self._hook.remove()

    def _watch(self, _module: nn.Module, _args: object, output: object) -> None:
        if self._is_watching:
            self.maxima.extend(
                tensor.detach().amax().float()
                for _, tensor in batches.tensors(output)
                if tensor.is_floating_point() and tensor.numel()
            )
