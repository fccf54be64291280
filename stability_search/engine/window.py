"""One window of micro-batches: attempted, rolled back where it broke, attempted again."""

import contextlib
import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Any, Self

import torch
from torch import nn

from stability_search.engine import batches, precision
from stability_search.engine.clamps import AttentionGuard
from stability_search.engine.clipping import gradient_fault, rescale_gradients, tensor_norms
from stability_search.engine.finiteness import StateWatch, StatisticsWatch, state_fault
from stability_search.engine.losses import (
    NUMERICAL_ERRORS,
    LossFn,
    is_out_of_memory,
    total_loss,
)
from stability_search.engine.observer import Observer
from stability_search.engine.rollback import Rollback
from stability_search.engine.signals import STATISTICS, Reading, Signals
from stability_search.engine.trace import Origin, trace_backward, trace_forward
from stability_search.engine.updates import STEPS_PER_LOOK, EpsWatch, UpdateWatch
from stability_search.errors import UsageError
from stability_search.settings.engine import EngineSettings


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Attempt:
    """One attempt at the window, or at what was left of it.

    Attributes:
        reading: Its numbers.
        raised_backward: Micro-batches whose backward pass raised, by position.
        state_fault: What of parameters and optimizer state is not finite; empty if nothing is.
        broken_module: The module it belongs to; None if nothing is or it belongs to none.
        grad_fault: What is wrong with the gradients; empty if nothing is or none was made.
        grad_rms_over_eps: Smallest RMS of a weight matrix's gradient, with the loss scale and
            before clipping, over Adam's `eps`; None without `eps` or if nothing was applied.
        is_applied: True if the optimizer changed the parameters.
    """

    reading: Reading
    raised_backward: frozenset[int]
    state_fault: str
    broken_module: str | None
    grad_fault: str
    grad_rms_over_eps: float | None
    is_applied: bool

    @property
    def is_fine(self) -> bool:
        """True if nothing of it was non-finite."""
        return not self.state_fault and not self.grad_fault and not self.reading.faults


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class WindowResult:
    """What became of a window.

    Attributes:
        num_micro_batches: How many the window has.
        first: The attempt with every micro-batch.
        last: The attempt that counted; `first` itself where nothing broke.
        faults: What was non-finite in a forward pass or a loss, by position in the window.
        origin: Where the first of them began; empty without faults, or if it did not show again.
    """

    num_micro_batches: int
    first: Attempt
    last: Attempt
    faults: Mapping[int, str]
    origin: Origin = dataclasses.field(default_factory=Origin)


class Window:
    """Take windows on one model; see `step.py` for the whole step.

    Args:
        model: The model.
        settings: How a step is taken.
        optimizer: Its optimizer; only its parameters are judged, clipped and updated.
        attention: The guard of its attention, acting while a window is taken.
        scale: The loss scale; None without loss scaling.
        device: Where model and batches are.
        observer: Looks at the model.
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
        observer: Observer,
    ) -> None:
        self._model = model
        self._settings = settings
        self._optimizer = optimizer
        self._parameters = [p for g in optimizer.param_groups for p in g["params"]]
        self._attention = attention
        self._scale = scale
        self._device = device
        self._rollback = Rollback(model, device)
        self._watch = _OutputWatch(model, observer, device)
        self._kept: Mapping[str, list[torch.Tensor]] = {
            "output": self._watch.maxima,
            "attention output": attention.output_maxima,
            "attention_max": attention.logit_maxima,
            "clamp_frac": attention.clamp_fracs,
            "cap_frac": attention.cap_fracs,
        }
        self._updates = UpdateWatch(self._parameters)
        self._eps = EpsWatch(optimizer)
        self._statistics = StatisticsWatch(model)
        self._state = StateWatch(self._parameters, optimizer)
        self._has_checked_gradients = False

    def rollback(self) -> Rollback:
        """Return one of its own kind, for what must leave no trace beside a step."""
        return Rollback(self._model, self._device, base=self._rollback)

    def close(self) -> None:
        """Take the hook on the model away."""
        self._watch.close()

    def take(self, window: Mapping[int, Any], loss_fn: LossFn, *, turn: int) -> WindowResult:
        """Attempt the window, again without the micro-batches whose forward pass broke.

        Args:
            window: Micro-batches by position, at least one.
            loss_fn: See `GuardedEngine.step`.
            turn: Number of the step; decides what is looked at only now and then.

        Returns:
            What became of it. Where nothing was applied, buffers, parameters and optimizer state
            are as before the window, to the bit.
        """
        try:
            return self._take(window, loss_fn, turn)
        except BaseException:
            # Nothing of this step remains, so that training can go on after Ctrl-C, say.
            self._forget_gradients()
            self._rollback.restore_buffers()
            self._rollback.restore_random_state()
            raise

    def _take(self, window: Mapping[int, Any], loss_fn: LossFn, turn: int) -> WindowResult:
        self._rollback.mark()
        faults: dict[int, str] = {}
        origin = Origin()
        first = last = self._attempt(window, loss_fn, turn)
        while last.reading.faults:
            if not faults:  # with the weights that broke, before anything else is tried
                self._forget_gradients()
                origin = self._trace_first_fault(last, window, loss_fn)
            faults |= last.reading.faults
            self._rollback.restore_buffers()
            left = {k: v for k, v in window.items() if k not in faults}
            if self._settings.bad_microbatch == "drop" or not left:
                break
            self._rollback.restore_random_state()
            last = self._attempt(left, loss_fn, turn)
        if not last.is_applied:
            self._rollback.restore_buffers()
        return WindowResult(
            num_micro_batches=len(window), first=first, last=last, faults=faults, origin=origin
        )

    def _trace_first_fault(
        self, attempt: Attempt, window: Mapping[int, Any], loss_fn: LossFn
    ) -> Origin:
        position = min(attempt.reading.faults)
        if position in attempt.raised_backward:
            return self.trace_backward({position: window[position]}, loss_fn, len(window))[1]
        return self.trace(position, window[position], loss_fn)

    def trace(self, position: int, batch: Any, loss_fn: LossFn) -> Origin:  # noqa: ANN401 - the task's own
        """Repeat the forward pass of a micro-batch under hooks, and leave no trace of it."""

        def run() -> torch.Tensor:
            with precision.autocast(self._settings.precision, self._device):
                return total_loss(loss_fn(self._model, batch))[0]

        with self._as_at_the_start_of(position):
            return trace_forward(self._model, run)

    def trace_backward(
        self, window: Mapping[int, Any], loss_fn: LossFn, num_micro_batches: int
    ) -> tuple[int, Origin]:
        """Repeat micro-batches forwards and backwards until one breaks; leave no trace of it.

        Args:
            window: Micro-batches of the present window, by position.
            loss_fn: See `GuardedEngine.step`.
            num_micro_batches: Those of the whole window, whose mean is the step's loss.

        Returns:
            Position of the one that broke, and where; where none did, the first and no origin.
        """
        self._forget_gradients()  # they are broken, and the repeat needs the memory
        for position, batch in window.items():

            def run(batch: Any = batch) -> torch.Tensor:  # noqa: ANN401 - as above
                with precision.autocast(self._settings.precision, self._device):
                    loss = total_loss(loss_fn(self._model, batch))[0] / num_micro_batches
                return loss if self._scale is None else loss * self._scale.value

            with self._as_at_the_start_of(position):
                origin = trace_backward(self._model, run, self._parameters)
            if origin.phase is not None or not origin.is_known:
                return position, origin
        return min(window), Origin()

    @contextlib.contextmanager
    def _as_at_the_start_of(self, position: int) -> Iterator[None]:
        after = self.rollback()
        after.mark()
        self._rollback.restore_buffers()
        self._rollback.restore_random_state(position)
        try:
            # A compiled model shows its modules only where it runs uncompiled.
            with torch.compiler.set_stance("force_eager"):
                yield
        finally:
            after.restore_buffers()
            after.restore_random_state()

    # -- one attempt -------------------------------------------------------------------------

    def _attempt(self, window: Mapping[int, Any], loss_fn: LossFn, turn: int) -> Attempt:
        signals = Signals()
        raised_backward: set[int] = set()
        self._forget_gradients()
        for position, batch in window.items():
            self._rollback.mark_micro_batch(position, is_first=position == min(window))
            loss = self._forward(position, batch, loss_fn, signals)
            if loss is None:
                continue
            share = loss / len(window) if len(window) > 1 else loss
            if not self._backward(position, window, share, loss_fn, signals):
                raised_backward.add(position)
        with torch.no_grad():
            statistics = self._statistics.judged()
            if statistics is not None and window:
                signals.add(STATISTICS, max(window), [statistics])
            return self._finish(signals, frozenset(raised_backward), turn)

    def _forget_gradients(self) -> None:
        for parameter in self._parameters:  # zero_grad, without its record for a profiler
            parameter.grad = None

    def _finish(self, signals: Signals, raised_backward: frozenset[int], turn: int) -> Attempt:
        """Clip, update, and bring everything to the host."""
        gradients = [g for p in self._parameters if (g := p.grad) is not None]
        if not self._has_checked_gradients:
            self._check_gradients(gradients)
        can_update = bool(gradients) and not signals.has_exception
        if can_update:
            is_looked_at = turn % STEPS_PER_LOOK == 0
            if is_looked_at:
                self._updates.before_update(turn // STEPS_PER_LOOK)
            norms = self._update(gradients, signals)
            if is_looked_at:
                self._updates.after_update(signals)
                signals.add_grad_norms(norms)
        reading = signals.read(self._state.norm(turn))
        is_applied = can_update and not reading.faults and reading.is_grad_finite
        fault, broken_module = "", None
        if not math.isfinite(reading.state_norm):
            fault, broken_module = state_fault(self._model, self._optimizer)
        return Attempt(
            reading=reading,
            raised_backward=raised_backward,
            state_fault=fault,
            broken_module=broken_module,
            grad_fault="" if reading.is_grad_finite else gradient_fault(gradients),
            grad_rms_over_eps=self._smallest_ratio(reading) if is_applied else None,
            is_applied=is_applied,
        )

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
        except UsageError:
            raise
        except Exception as error:
            if is_out_of_memory(error) or self.trace(position, batch, loss_fn).phase != "forward":
                raise
            signals.add_exception(position, error)
            return None
        signals.add("loss", position, [loss.detach()])
        signals.add_terms(position, terms)
        for kind, kept in self._kept.items():
            if kept:
                signals.add(kind, position, kept)
        return loss

    def _backward(
        self,
        position: int,
        window: Mapping[int, Any],
        loss: torch.Tensor,
        loss_fn: LossFn,
        signals: Signals,
    ) -> bool:
        try:
            (loss if self._scale is None else loss * self._scale.value).backward()  # type: ignore[no-untyped-call]
        except NUMERICAL_ERRORS as error:
            signals.add_exception(position, error)
            return False
        except Exception as error:
            if is_out_of_memory(error):
                raise
            origin = self.trace_backward({position: window[position]}, loss_fn, len(window))[1]
            if origin.phase is None or not origin.is_known:
                raise
            signals.add_exception(position, error)
            return False
        return True

    def _update(self, gradients: list[torch.Tensor], signals: Signals) -> torch.Tensor:
        """Clip and update where nothing is broken; return the norm of each gradient."""
        inverse_scale = 1.0 if self._scale is None else 1.0 / self._scale.value
        norms = tensor_norms(gradients)
        scaled_norm = torch.linalg.vector_norm(norms)
        norm = scaled_norm if self._scale is None else scaled_norm * inverse_scale
        found_nonfinite = signals.found_nonfinite(scaled_norm, norm)
        rescale_gradients(
            gradients, norm, inverse_scale=inverse_scale, clip_norm=self._settings.clip_norm
        )
        if not self._optimizer.defaults["fused"]:
            if not bool(found_nonfinite):
                self._optimizer.step()
            return norms
        # The protocol by which torch.amp.GradScaler lets a fused optimizer skip itself.
        self._optimizer.grad_scale = None  # type: ignore[attr-defined]
        self._optimizer.found_inf = found_nonfinite  # type: ignore[attr-defined]
        try:
            self._optimizer.step()
        finally:
            del self._optimizer.grad_scale, self._optimizer.found_inf  # type: ignore[attr-defined]
        return norms

    def _smallest_ratio(self, reading: Reading) -> float | None:
        return self._eps.smallest(reading.grad_norms) if reading.grad_norms else None

    def _check_gradients(self, gradients: list[torch.Tensor]) -> None:
        if any(gradient.layout != torch.strided for gradient in gradients):
            raise UsageError(
                "model: gradients must be dense, but one is sparse.",
                hint="Leave sparse=True out of the embedding.",
            )
        self._has_checked_gradients = bool(gradients)


class _OutputWatch:
    """Keep the largest values of what a model returns, while it is asked to."""

    def __init__(self, model: nn.Module, observer: Observer, device: torch.device) -> None:
        self._model = model
        self._device = device
        self._observer = observer
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

    def _watch(self, module: nn.Module, _args: object, output: object) -> None:
        if self._is_watching and module is self._model:  # a copy has this hook too
            nothing: list[torch.Tensor] = []
            found = self._observer.look("model's output", lambda: _largest(output), nothing)
            self.maxima += self._observer.on_device("model's output", found, self._device)


def _largest(output: object) -> list[torch.Tensor]:
    if isinstance(output, torch.Tensor) and output.is_floating_point() and output.numel():
        return [output.detach().amax().float()]  # as below, in the usual case
    return [
        tensor.detach().amax().float()
        for _, tensor in batches.tensors(output)
        if tensor.is_floating_point() and tensor.numel()
    ]
