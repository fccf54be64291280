"""A task and a guarded engine, put together from one seed: how every training here begins."""

import contextlib
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import nn

from stability_search.engine import GuardedEngine
from stability_search.engine.batches import move
from stability_search.seeding import derive_seed
from stability_search.settings.engine import EngineSettings
from stability_search.tasks.base import HasInitGainParameters, HasParameterGroups, Task


def initial_model(task: Task, *, seed: int, device: torch.device) -> nn.Module:
    """Build a task's untrained model, in train mode; sets the global random states."""
    _seed_everything(derive_seed(seed, "model"))
    return task.model().to(device).train()


def build_engine(
    task: Task, settings: EngineSettings, *, seed: int, device: torch.device
) -> GuardedEngine:
    """Put a task's untrained model under guard, with itself as the reference.

    Args:
        task: What is trained.
        settings: How its steps are taken.
        seed: The seed of the whole training, >= 0.
        device: Where the model goes.

    Returns:
        The engine, to be closed by the caller. The global random states are set.

    Raises:
        UsageError: Model or device cannot honour a setting.
    """

    def reference() -> nn.Module:
        with other_random_states_kept():
            return initial_model(task, seed=seed, device=device)

    model = initial_model(task, seed=seed, device=device)
    return GuardedEngine(
        model,
        settings,
        reference=reference,
        parameter_groups=(
            task.parameter_groups(model) if isinstance(task, HasParameterGroups) else None
        ),
        init_gain_names=(
            task.init_gain_parameters(model) if isinstance(task, HasInitGainParameters) else None
        ),
    )


def training_stream(
    task: Task, *, batch_size: int, seed: int, device: torch.device
) -> Iterator[Any]:
    """Seed the training itself and return its micro-batches, on their device.

    Args:
        task: What is trained.
        batch_size: Samples of a micro-batch, >= 1.
        seed: The seed of the whole training, >= 0.
        device: Where the micro-batches go.

    Returns:
        An endless iterator; RuntimeError if the task's is not. The global random states are set.
    """
    _seed_everything(derive_seed(seed, "training"))
    generator = torch.Generator().manual_seed(derive_seed(seed, "batches"))
    return _moved(iter(task.batches(batch_size, generator)), device)


def _moved(stream: Iterator[Any], device: torch.device) -> Iterator[Any]:
    for batch in stream:
        yield move(batch, device)
    raise RuntimeError(
        "batches: the iterator must be endless, but it ended. Loop with `while True`."
    )


@contextlib.contextmanager
def other_random_states_kept() -> Iterator[None]:
    """Keep Python's and numpy's random state; torch's is the caller's to keep."""
    python_state, numpy_state = random.getstate(), np.random.get_state()  # noqa: NPY002
    try:
        yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)  # noqa: NPY002 - the task's own, given back


def _seed_everything(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002 - a task may use the global generator
    torch.manual_seed(seed)
