"""Faults to plant in a training, to see what the engine makes of them.

    faults = plant(NanBatch(step=3), BrokenModule(module="encoder.0", step=range(10, 100, 10)))
    record = engine.step(*faults.before_step(engine.num_steps + 1, engine, window, loss_fn))

Each fault acts from within: on the batch, on a parameter, or while the loss of one micro-batch is
computed. The engine is not told, and nothing stays behind after the step.
"""

import copy
import math
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, TypeAlias

import torch
from torch import Tensor, nn

from stability_search.engine import GuardedEngine, batches
from stability_search.errors import UsageError
from stability_search.testing.names import require_module, require_name, require_parameter

Steps: TypeAlias = int | Collection[int]
_Loss: TypeAlias = Tensor | Mapping[str, Tensor]

EVERY_STEP = range(1, 2**62)


@dataclass(frozen=True, kw_only=True, slots=True)
class NanBatch:
    """A micro-batch holds NaN: the engine should call the step `data`.

    Attributes:
        step: Attempted step, from 1, or several, such as `range(5, 100, 10)`.
        micro_batch: Its position in the window, from 0.
        value: NaN or an infinity; what the whole tensor is filled with, in a copy.
        field: Path of the tensor as a step's reason spells it, such as `batch['frames']`; empty
            for the first one of floating point.
    """

    step: Steps
    micro_batch: int = 0
    value: float = math.nan
    field: str = ""

    def __post_init__(self) -> None:
        """Refuse what could never act; ValueError."""
        _require_place(self, self.step, self.micro_batch)
        _require_nonfinite(self, self.value)

    def begin(self, _model: nn.Module, window: list[Any]) -> None:
        """Put a poisoned copy of the micro-batch in its place."""
        window[self.micro_batch] = _with_one_changed(
            window[self.micro_batch],
            lambda tensor: torch.full_like(tensor, self.value),
            owner="NanBatch",
            field=self.field,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class NanParameter:
    """A parameter is NaN from a step on: training should end with `nonfinite_parameters`.

    Attributes:
        parameter: Its name in `model.named_parameters()`; one value of it is broken.
        step: Attempted step, from 1, or several; it happens before the forward pass.
        value: NaN or an infinity.
    """

    parameter: str
    step: Steps
    value: float = math.nan

    def __post_init__(self) -> None:
        """Refuse what could never act; ValueError."""
        _require_place(self, self.step)
        _require_nonfinite(self, self.value)

    def begin(self, model: nn.Module, _window: list[Any]) -> None:
        """Break the parameter."""
        parameter = require_parameter("NanParameter", model, self.parameter)
        with torch.no_grad():
            parameter[(0,) * parameter.ndim] = self.value


@dataclass(frozen=True, kw_only=True, slots=True)
class BrokenLoss:
    """The loss is infinite or NaN, and so is its gradient: the step should be `bad`.

    Attributes:
        step: Attempted step, from 1, or several.
        micro_batch: Position of the micro-batch in the window, from 0.
        value: NaN or an infinity, added to the loss, or to the first of its named terms.
        is_transient: True if it happens only the first time the micro-batch is seen, as a flipped
            bit would; False if again whenever the engine repeats it.
        breaks_reference: True if the initial model in fp32 fails on the micro-batch too, as it
            does on a target that no model can reach: then the step should be `data`.
    """

    step: Steps
    micro_batch: int = 0
    value: float = math.inf
    is_transient: bool = False
    breaks_reference: bool = False

    def __post_init__(self) -> None:
        """Refuse what could never act; ValueError."""
        _require_place(self, self.step, self.micro_batch)
        _require_nonfinite(self, self.value)

    def compute(self, _engine: GuardedEngine, loss: Callable[[], _Loss]) -> _Loss:
        """Compute the loss and break it."""
        return _with_first_term(
            loss(), lambda term: _with_broken_gradient(term + self.value, self.value)
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class GradientOverflow:
    """The gradient overflows though the loss is finite.

    The engine should call the step `calibration` while it looks for a loss scale, otherwise `bad`,
    and halve the scale.

    Attributes:
        step: Attempted step, from 1, or several; default all of them.
        above_scale: Acts only at a loss scale above this one, >= 0; 0 acts at any. Without loss
            scaling the scale is 1.
        module: Name of the module whose backward pass overflows; empty for that of the loss.
        micro_batch: Position of the micro-batch in the window, from 0.
        is_transient: True if it happens only the first time the micro-batch is seen.
    """

    step: Steps = EVERY_STEP
    above_scale: float = 0.0
    module: str = ""
    micro_batch: int = 0
    is_transient: bool = False

    def __post_init__(self) -> None:
        """Refuse what could never act; ValueError."""
        _require_place(self, self.step, self.micro_batch)
        if not 0 <= self.above_scale < math.inf:
            raise ValueError(
                "GradientOverflow: above_scale must be a finite number >= 0, but got "
                f"{self.above_scale!r}."
            )

    def compute(self, engine: GuardedEngine, loss: Callable[[], _Loss]) -> _Loss:
        """Compute the loss so that its gradient overflows."""
        scale = 1.0 if engine.scale is None else engine.scale
        if scale <= self.above_scale:
            return loss()

        def overflowing(tensor: Tensor) -> Tensor:
            return _with_broken_gradient(tensor, math.inf)

        if not self.module:
            return _with_first_term(loss(), overflowing)
        return _with_output_changed("GradientOverflow", engine, self.module, overflowing, loss)


@dataclass(frozen=True, kw_only=True, slots=True)
class BrokenModule:
    """A module emits Inf or NaN: the step should be `bad` and name that module.

    Attributes:
        module: Its name in `model.named_modules()`.
        step: Attempted step, from 1, or several.
        micro_batch: Position of the micro-batch in the window, from 0.
        value: NaN or an infinity, added to the first tensor that the module returns. A tanh or a
            softmax behind it may turn an infinity into a number again, and the step is `ok` then.
        is_transient: True if it happens only the first time the micro-batch is seen; then no
            module can be named.
    """

    module: str
    step: Steps
    micro_batch: int = 0
    value: float = math.inf
    is_transient: bool = False

    def __post_init__(self) -> None:
        """Refuse what could never act; ValueError."""
        _require_place(self, self.step, self.micro_batch)
        _require_nonfinite(self, self.value)

    def compute(self, engine: GuardedEngine, loss: Callable[[], _Loss]) -> _Loss:
        """Compute the loss with a hook on the module, which is taken away again."""
        return _with_output_changed(
            "BrokenModule", engine, self.module, lambda tensor: tensor + self.value, loss
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class OutOfMemory:
    """Memory runs out in a forward pass: it passes through the engine as torch's own error.

    Attributes:
        step: Attempted step, from 1, or several.
        micro_batch: Position of the micro-batch in the window, from 0.
    """

    is_transient: ClassVar[bool] = False  # nothing is repeated after it
    step: Steps
    micro_batch: int = 0

    def __post_init__(self) -> None:
        """Refuse what could never act; ValueError."""
        _require_place(self, self.step, self.micro_batch)

    def compute(self, _engine: GuardedEngine, _loss: Callable[[], _Loss]) -> _Loss:
        """Raise instead of computing."""
        raise torch.OutOfMemoryError("out of memory (planted)")


@dataclass(frozen=True, kw_only=True, slots=True)
class Sleep:
    """A forward pass takes long, once a step.

    Attributes:
        step: Attempted step, from 1, or several.
        seconds: How long, > 0.
        micro_batch: Position of the micro-batch in the window, from 0.
        sleep: Called with `seconds`; another one lets a test turn its own clock instead.
    """

    is_transient: ClassVar[bool] = True
    step: Steps
    seconds: float
    micro_batch: int = 0
    sleep: Callable[[float], object] = time.sleep

    def __post_init__(self) -> None:
        """Refuse what could never act; ValueError."""
        _require_place(self, self.step, self.micro_batch)
        if not 0 < self.seconds < math.inf:
            raise ValueError(
                f"Sleep: seconds must be a finite number > 0, but got {self.seconds!r}."
            )

    def compute(self, _engine: GuardedEngine, loss: Callable[[], _Loss]) -> _Loss:
        """Sleep, then compute the loss."""
        self.sleep(self.seconds)
        return loss()


@dataclass(frozen=True, kw_only=True, slots=True)
class Raises:
    """The task raises: a `FloatingPointError` is a `bad` step, most others pass through.

    Attributes:
        step: Attempted step, from 1, or several.
        error: What is raised, after the forward pass.
        micro_batch: Position of the micro-batch in the window, from 0.
        is_transient: True if it happens only the first time the micro-batch is seen.
    """

    step: Steps
    error: Exception
    micro_batch: int = 0
    is_transient: bool = False

    def __post_init__(self) -> None:
        """Refuse what could never act; ValueError."""
        _require_place(self, self.step, self.micro_batch)

    def compute(self, _engine: GuardedEngine, loss: Callable[[], _Loss]) -> _Loss:
        """Compute the loss, then raise."""
        loss()
        raise self.error.with_traceback(None)


def acts_at(step: Steps, attempted: int) -> bool:
    """Return True if a fault of `step` acts at the attempted step."""
    return attempted == step if isinstance(step, int) else attempted in step


def first_step(step: Steps) -> int:
    """Return the first step that a fault acts at."""
    if isinstance(step, int):
        return step
    return min(step[0], step[-1]) if isinstance(step, range) else min(step)


def _require_place(fault: object, step: Steps, micro_batch: int = 0) -> None:
    name = type(fault).__name__
    if not isinstance(step, int) and not step:
        raise ValueError(f"{name}: step must hold at least one step, but got {step!r}.")
    if first_step(step) < 1:
        raise ValueError(f"{name}: step must be >= 1, but got {step!r}.")
    if micro_batch < 0:
        raise ValueError(f"{name}: micro_batch must be >= 0, but got {micro_batch!r}.")


def _require_nonfinite(fault: object, value: float) -> None:
    if math.isfinite(value):
        name = type(fault).__name__
        raise ValueError(f"{name}: value must be NaN or an infinity, but got {value!r}.")


def _with_first_term(loss: _Loss, change: Callable[[Tensor], Tensor]) -> _Loss:
    if isinstance(loss, Tensor):
        return change(loss)
    first = next(iter(loss))
    return {**loss, first: change(loss[first])}


class _BrokenGradient(torch.autograd.Function):
    """Copy a tensor, and multiply its gradient by a number on the way back.

    An operator, not a hook: a trace can see in which module the gradient breaks. It keeps no
    tensor, so that checkpointing, which counts those, can recompute the pass without it.
    """

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, value: float) -> Tensor:  # noqa: ANN401 - torch's own
        ctx.value = value
        return tensor.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:  # noqa: ANN401 - as above
        return gradients[0] * ctx.value, None


def _with_broken_gradient(tensor: Tensor, value: float) -> Tensor:
    broken: Tensor = _BrokenGradient.apply(tensor, value)  # type: ignore[no-untyped-call]
    return broken


def _with_output_changed(
    owner: str,
    engine: GuardedEngine,
    name: str,
    change: Callable[[Tensor], Tensor],
    loss: Callable[[], _Loss],
) -> _Loss:
    calls: list[str] = []

    def act(_module: nn.Module, _args: object, output: object) -> object:
        calls.append(name)
        return _with_one_changed(output, change, owner=owner, field="")

    # In front of every other hook: those are to see what the module now emits.
    hook = require_module(owner, engine.model, name).register_forward_hook(act, prepend=True)
    try:
        result = loss()
    finally:
        hook.remove()
    if not calls:
        raise UsageError(
            f"{owner}: module must be called in a forward pass, but `{name}` is not.",
            hint="Name the module around it, or one inside it.",
        )
    return result


def _with_one_changed(
    nest: Any,  # noqa: ANN401 - a batch is the task's own, an output the module's
    change: Callable[[Tensor], Tensor],
    *,
    owner: str,
    field: str,
) -> Any:  # noqa: ANN401 - as above
    """Copy a nest with one of its tensors changed and all others as they are."""
    found = dict(batches.tensors(nest))
    floating = {path: tensor for path, tensor in found.items() if tensor.is_floating_point()}
    if not floating:
        raise UsageError(f"{owner}: a tensor of floating point must be there, but there is none.")
    if field:
        require_name(f"{owner}: field", "a tensor of floating point", field, list(floating))
    target = floating[field] if field else next(iter(floating.values()))
    memo = {id(tensor): tensor for tensor in found.values()}
    memo[id(target)] = change(target)
    return copy.deepcopy(nest, memo)
