"""`GradScaler`: safe values, a floor, a scale that only an overflow lowers, loops that survive.

Its methods are wrapped on the class, so scalers of every library and of earlier imports have
them too. What PyTorch decides it goes on deciding; added is

scale      gradients that were unscaled before their window's end are scaled again
unscale_   a second call on the same gradients does nothing instead of raising
step       the step is judged; one without gradients does nothing instead of raising
update     nothing to update does nothing instead of raising; a non-finite loss, which no loss
           scale can cause, leaves the scale as it is; the scale stays within its limits
"""

import functools
import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.amp import GradScaler

from stability_search.patches.messages import Level
from stability_search.patches.monitor import Monitor, Verdict
from stability_search.patches.replacing import Replacements
from stability_search.patches.safe_values import SafeValues, next_scale
from stability_search.patches.stepping import Stepping
from stability_search.patches.window import LossScaling, Reading
from stability_search.records.step import StepLabel, StepRecord

Optimizer = torch.optim.Optimizer

_FP16_GRADIENTS = (
    "Trainable parameters are stored in fp16: keep them in fp32 (`model.float()`, or only those "
    "of the adapter) and let autocast compute in fp16. Gradient checkpointing is not the cause."
)
_EARLY_UNSCALE = (
    "scaler.unscale_ was called before the last backward pass of its window: the gradients are "
    "scaled again, so that all of them count. Call unscale_ once, at the window's end."
)
_ABANDONED = (
    "scaler.unscale_ found NaN or Inf, and neither step nor update followed: those gradients are "
    "dropped, and the loss scale is updated. On a skip call scaler.update() and zero_grad()."
)
_SCALE_STAYS = (
    "a skip for a loss of NaN or Inf leaves the loss scale as it is: a script that knows a skip "
    "by a fall of scaler.get_scale() does not see it, and steps its learning-rate schedule."
)
_NOTHING = "without any gradient since the last update: nothing is done, where PyTorch raises"


@dataclass(kw_only=True, slots=True)
class _State:
    """One scaler between two calls of `update`.

    Attributes:
        unscaled: Optimizers whose gradients carry no loss scale any more, and took no step yet.
        verdicts: Steps that were judged.
    """

    unscaled: list[Optimizer] = field(default_factory=list)
    verdicts: list[tuple[Optimizer, Verdict]] = field(default_factory=list)


class Scaling:
    """Every scaler of the process.

    Args:
        monitor: Judges the steps.
    """

    def __init__(self, monitor: Monitor) -> None:
        self._monitor = monitor
        self._messages = monitor.messages
        self._observes = monitor.settings.observe
        self._values = SafeValues(monitor.settings, monitor.messages)
        self._states: weakref.WeakKeyDictionary[GradScaler, _State] = weakref.WeakKeyDictionary()
        self._scale = GradScaler.scale
        self._unscale = GradScaler.unscale_
        self._step = GradScaler.step
        self._update = GradScaler.update

    def scaling_of(self, optimizer: Optimizer) -> LossScaling | None:
        """Return the loss scaling of an optimizer whose step is no scaler's; None without."""
        window = self._monitor.window
        if window.scaler is None:
            return None
        scaling = self._scaling(window.scaler, optimizer)
        # In a mixed window only a scaler that knows the optimizer says that it is scaled.
        return None if window.is_mixed and scaling.is_scaled else scaling

    def scale_of(self, parameters: Sequence[torch.Tensor]) -> torch.Tensor | None:
        """Return the loss scale that gradients carry, 0-d; None if they carry none."""
        scaler = self._monitor.window.scaler
        first = next((p for p in parameters if p.grad is not None), None)
        if scaler is None or first is None or self._monitor.window.is_mixed:
            return None
        for optimizer in self._state(scaler).unscaled:
            if any(p is first for group in optimizer.param_groups for p in group["params"]):
                return None
        return _scale_tensor(scaler)

    def was_judged(self, optimizer: Optimizer, verdict: Verdict) -> None:
        """Note a step that the script took itself, after `unscale_` or without a scaler."""
        scaling = self.scaling_of(optimizer)
        if scaling is not None:
            self._state(scaling.scaler).verdicts.append((optimizer, verdict))

    def put_in(self, replacements: Replacements, stepping: Stepping) -> None:
        """Wrap the methods.

        Args:
            replacements: Where they go.
            stepping: Is told the verdict of a step, which the optimizer then takes or does not.
        """
        if not self._observes:
            replacements.put(GradScaler, "__init__", self._values.wrapped(GradScaler.__init__))
        for name, replacement in (
            ("scale", self._scaled),
            ("unscale_", self._unscaled),
            ("step", functools.partial(self._stepped, stepping)),
            ("update", self._updated),
        ):
            replacements.put(GradScaler, name, _method(getattr(GradScaler, name), replacement))

    # -- what the methods do -----------------------------------------------------------------

    def _scaled(self, scaler: GradScaler, outputs: Any) -> Any:  # noqa: ANN401 - as PyTorch's
        if not torch.compiler.is_compiling():
            with self._messages.survives("loss before its scaling"):
                self._before_scaling(scaler, outputs)
        scaled = self._scale(scaler, outputs)
        if not torch.compiler.is_compiling():
            for loss in _losses(scaled):
                self._monitor.window.add_scaled(loss)
        return scaled

    def _unscaled(self, scaler: GradScaler, optimizer: Optimizer) -> None:
        if self._needs_no_unscaling(scaler, optimizer):
            return
        try:
            self._unscale(scaler, optimizer)
        except ValueError as error:
            if "FP16 gradients" in str(error):
                error.add_note(_FP16_GRADIENTS)
            raise
        self._state(scaler).unscaled.append(optimizer)

    def _stepped(
        self,
        stepping: Stepping,
        scaler: GradScaler,
        optimizer: Optimizer,
        *args: Any,  # noqa: ANN401 - as PyTorch's
        **kwargs: Any,  # noqa: ANN401 - as above
    ) -> Any:  # noqa: ANN401 - as above
        verdict = self._judged(scaler, optimizer)
        if not self._observes and not _has_gradients(optimizer):
            self._messages.once("empty step", Level.WARNING, f"scaler.step {_NOTHING}")
            return None
        stepping.was_judged(optimizer, verdict)
        try:
            return self._step(scaler, optimizer, *args, **kwargs)
        finally:
            stepping.forget(optimizer)
            _drop(self._state(scaler).unscaled, optimizer)

    def _updated(self, scaler: GradScaler, new_scale: float | torch.Tensor | None = None) -> None:
        if new_scale is not None:
            self._update(scaler, new_scale)
            self._states.pop(scaler, None)
        elif self._observes or self._has_something(scaler):
            self._update_judged(scaler)
        else:
            self._messages.once("empty update", Level.WARNING, f"scaler.update {_NOTHING}")
            self._states.pop(scaler, None)

    # -- scale and unscale -------------------------------------------------------------------

    def _before_scaling(self, scaler: GradScaler, outputs: object) -> None:
        if not self._observes:
            self._open_again(scaler)
        for loss in _losses(outputs):
            self._monitor.window.add_loss(loss, scaler)

    def _open_again(self, scaler: GradScaler) -> None:
        """Make gradients that were unscaled too early part of the window again.

        Those that are finite are multiplied by the scale, so that what a further backward pass
        adds to them has the same one. Those that are not were given up by the script.
        """
        unscaled = list(self._state(scaler).unscaled)
        if not unscaled:
            return
        overflowed = [one for one in unscaled if _found_inf(scaler, one)]
        if overflowed:
            self._messages.once("abandoned", Level.WARNING, _ABANDONED)
            self._updated(scaler)  # each of them is judged there
            for parameter in (p for one in overflowed for p in _parameters(one)):
                parameter.grad = None
        for optimizer in unscaled:
            _states_of(scaler).pop(id(optimizer), None)
            scale, gradients = _scale_tensor(scaler), _gradients(optimizer)
            if gradients and scale is not None:
                self._messages.once("early unscale", Level.WARNING, _EARLY_UNSCALE)
                with torch.no_grad():
                    torch._foreach_mul_(gradients, scale)
        self._state(scaler).unscaled.clear()

    def _needs_no_unscaling(self, scaler: GradScaler, optimizer: Optimizer) -> bool:
        if self._observes:
            return False
        if _holds(self._state(scaler).unscaled, optimizer):
            text = "scaler.unscale_ was called again on the same gradients: once is enough"
            self._messages.once("again unscaled", Level.WARNING, text)
            return True
        if _scale_tensor(scaler) is None and not _has_gradients(optimizer):
            self._messages.once("empty unscale", Level.WARNING, f"scaler.unscale_ {_NOTHING}")
            return True
        return False

    # -- step and update ---------------------------------------------------------------------

    def _judged(self, scaler: GradScaler, optimizer: Optimizer) -> Verdict | None:
        verdict = None
        with self._messages.survives("check before a scaled step"):
            verdict = self._monitor.judge(optimizer, self._scaling(scaler, optimizer))
            if verdict is not None:
                self._state(scaler).verdicts.append((optimizer, verdict))
        return verdict

    def _update_judged(self, scaler: GradScaler) -> None:
        judged: list[tuple[Optimizer, Verdict]] = []
        with self._messages.survives("check before an update of the loss scale"):
            judged = [*self._state(scaler).verdicts, *self._judge_skipped(scaler)]
        self._states.pop(scaler, None)
        records = [verdict.record for _, verdict in judged]
        if not records or records[0].scale is None:
            self._update(scaler)
            return
        before = records[0].scale
        if not self._observes and _is_no_overflow(records):
            self._messages.once("scale stays", Level.WARNING, _SCALE_STAYS)
            # A number given to `update` is the new scale, and its count of good steps goes on.
            self._update(scaler, before)
            return
        self._update(scaler)
        with self._messages.survives("limits of the loss scale"):
            has_overflowed = not all(record.is_grad_finite for record in records)
            plan = next_scale(scaler, before, judged[0][1].num_good, has_overflowed=has_overflowed)
            after = plan if self._observes else self._values.within(plan)
            if after != plan:
                self._update(scaler, after)
            if after > before:
                self._monitor.scale_rose([optimizer for optimizer, _ in judged])
            self._values.say_change(records[-1].step, before, plan, after)

    def _has_something(self, scaler: GradScaler) -> bool:
        """Return True if PyTorch finds something to update the scale with."""
        if _scale_tensor(scaler) is None:
            return False
        return any(state["found_inf_per_device"] for state in _states_of(scaler).values())

    def _judge_skipped(self, scaler: GradScaler) -> list[tuple[Optimizer, Verdict]]:
        """Judge what the script skipped itself: an overflow after `unscale_`, and no step."""
        found = []
        taken = [optimizer for optimizer, _ in self._state(scaler).verdicts]
        for optimizer in self._state(scaler).unscaled:
            if _holds(taken, optimizer) or not _found_inf(scaler, optimizer):
                continue
            reading = self._monitor.window.read(optimizer, self._scaling(scaler, optimizer))
            if reading is None or reading.grad_norm is None or reading.grad_norm < float("inf"):
                # The gradients are gone already; that they were not finite is known.
                losses = self._monitor.window.losses()
                reading = Reading(grad_norm=float("inf"), scale=scaler.get_scale(), losses=losses)
            found.append((optimizer, self._monitor.judge_reading(optimizer, reading)))
        return found

    def _scaling(self, scaler: GradScaler, optimizer: Optimizer) -> LossScaling:
        is_unscaled = _holds(self._state(scaler).unscaled, optimizer)
        return LossScaling(scaler=scaler, is_scaled=not is_unscaled)

    def _state(self, scaler: GradScaler) -> _State:
        state = self._states.get(scaler)
        if state is None:
            state = self._states[scaler] = _State()
        return state


def _method(original: Callable[..., Any], replacement: Callable[..., Any]) -> Callable[..., Any]:
    """Return a method that leaves a scaler which is turned off to PyTorch."""

    @functools.wraps(original)
    def method(scaler: GradScaler, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401 - as PyTorch's
        return (replacement if scaler.is_enabled() else original)(scaler, *args, **kwargs)

    return method


def _is_no_overflow(records: Sequence[StepRecord]) -> bool:
    """Return True if only a forward pass or a batch was at fault, which no loss scale causes."""
    return any(
        record.label in (StepLabel.BAD, StepLabel.DATA) and not record.is_loss_finite
        for record in records
    )


def _losses(outputs: object) -> Iterable[torch.Tensor]:
    if isinstance(outputs, torch.Tensor):
        yield outputs
    elif isinstance(outputs, list | tuple):  # an iterator would be used up
        for one in outputs:
            yield from _losses(one)


def _parameters(optimizer: Optimizer) -> list[torch.Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def _gradients(optimizer: Optimizer) -> list[torch.Tensor]:
    return [p.grad for p in _parameters(optimizer) if p.grad is not None]


def _has_gradients(optimizer: Optimizer) -> bool:
    return any(p.grad is not None for g in optimizer.param_groups for p in g["params"])


def _holds(optimizers: Sequence[Optimizer], optimizer: Optimizer) -> bool:
    return any(one is optimizer for one in optimizers)


def _drop(optimizers: list[Optimizer], optimizer: Optimizer) -> None:
    optimizers[:] = [one for one in optimizers if one is not optimizer]


# What PyTorch offers no public name for, in one place.


def _scale_tensor(scaler: GradScaler) -> torch.Tensor | None:
    return scaler._scale  # noqa: SLF001 - `get_scale` waits for the device


def _states_of(scaler: GradScaler) -> dict[int, dict[str, Any]]:
    return scaler._per_optimizer_states  # noqa: SLF001 - see above


def _found_inf(scaler: GradScaler, optimizer: Optimizer) -> bool:
    found = _states_of(scaler)[id(optimizer)]["found_inf_per_device"].values()
    return any(flag.item() for flag in found)
