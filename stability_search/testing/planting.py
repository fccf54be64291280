"""Faults at their places: what stands between a window and the engine's step."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

from torch import nn

from stability_search.engine import GuardedEngine
from stability_search.engine.losses import LossFn
from stability_search.errors import UsageError
from stability_search.testing.faults import (
    BrokenLoss,
    BrokenModule,
    GradientOverflow,
    NanBatch,
    NanParameter,
    OutOfMemory,
    Raises,
    Sleep,
    acts_at,
)
from stability_search.testing.names import require_module, require_parameter

_LossFault: TypeAlias = BrokenLoss | GradientOverflow | BrokenModule | OutOfMemory | Sleep | Raises
Fault: TypeAlias = NanBatch | NanParameter | _LossFault


@dataclass(frozen=True, slots=True)
class PlantedFaults:
    """Several faults as one, for `run_trial(faults=...)` or a loop of one's own; see `plant`.

    Attributes:
        faults: In the order they act in.
    """

    faults: tuple[Fault, ...]

    def before_step(
        self, step: int, engine: GuardedEngine, window: list[Any], loss_fn: LossFn
    ) -> tuple[list[Any], LossFn]:
        """Return the window and the loss function of a step, with its faults in them.

        Args:
            step: The attempted step, from 1: `engine.num_steps + 1`.
            engine: The engine that will take it.
            window: Its micro-batches; left as they are.
            loss_fn: As in `GuardedEngine.step`.

        Returns:
            What to hand to `engine.step`; both unchanged where no fault is due.

        Raises:
            UsageError: The model has no module or parameter of a name that a fault gives, in this
                step or any other, or the window or the batch lacks what a fault of this step acts
                on.
        """
        for fault in self.faults:
            _require_names(fault, engine.model)
        due = [fault for fault in self.faults if acts_at(fault.step, step)]
        window = list(window)
        for fault in due:
            _require_position(fault, len(window))
            if isinstance(fault, NanBatch | NanParameter):
                fault.begin(engine.model, window)
        in_loss = [fault for fault in due if not isinstance(fault, NanBatch | NanParameter)]
        return window, _faulty(loss_fn, in_loss, engine, window) if in_loss else loss_fn


def plant(*faults: Fault) -> PlantedFaults:
    """Combine faults, at least one, so that a training can be run with them.

    Args:
        faults: In the order they act in where several meet in one micro-batch.

    Returns:
        For `run_trial(faults=...)`, or for a loop of your own:
        `engine.step(*planted.before_step(engine.num_steps + 1, engine, window, loss_fn))`.

    Raises:
        ValueError: There is no fault.

    Example:
        >>> import torch
        >>> from stability_search import EngineSettings, GuardedEngine
        >>> faults = plant(NanBatch(step=2))
        >>> def loss_fn(model, batch):
        ...     return model(batch).square().mean()
        >>> with GuardedEngine(nn.Linear(3, 1), EngineSettings(learning_rate=0.01)) as engine:
        ...     for step in (1, 2, 3):
        ...         window = [torch.ones(4, 3)]
        ...         record = engine.step(*faults.before_step(step, engine, window, loss_fn))
        ...         print(record.label, record.batch_index)
        ok None
        data 1
        ok None
    """
    if not faults:
        raise ValueError("plant: at least one fault must be given, but got none.")
    return PlantedFaults(faults)


def _faulty(
    loss_fn: LossFn, faults: Sequence[_LossFault], engine: GuardedEngine, window: Sequence[Any]
) -> LossFn:
    """Return a loss function in which the faults act; a step has one of its own."""
    seen: set[int | None] = set()

    def compute(model: nn.Module, batch: Any) -> Any:  # noqa: ANN401 - the task's own
        position = next((k for k, each in enumerate(window) if each is batch), None)
        here = [fault for fault in faults if fault.micro_batch == position]
        if model is engine.model:
            acting = [fault for fault in here if position not in seen or not fault.is_transient]
            seen.add(position)
        else:  # the engine asks the initial model whether the batch is at fault
            acting = [f for f in here if isinstance(f, BrokenLoss) and f.breaks_reference]
        loss = partial(loss_fn, model, batch)
        for fault in acting:
            loss = partial(fault.compute, engine, loss)
        return loss()

    return compute


def _require_names(fault: Fault, model: nn.Module) -> None:
    if isinstance(fault, NanParameter):
        require_parameter("NanParameter", model, fault.parameter)
    elif isinstance(fault, BrokenModule | GradientOverflow) and fault.module:
        require_module(type(fault).__name__, model, fault.module)


def _require_position(fault: Fault, num_micro_batches: int) -> None:
    if isinstance(fault, NanParameter) or fault.micro_batch < num_micro_batches:
        return
    raise UsageError(
        f"{type(fault).__name__}: micro_batch must be a position in the window of "
        f"{num_micro_batches}, but got {fault.micro_batch}.",
        hint="Positions count from 0.",
    )
