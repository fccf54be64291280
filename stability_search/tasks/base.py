"""The `Task` protocol: what a class offers so that a trial can train it.

Four methods are required. Each optional one has a protocol of its own, so that its presence is
asked with `isinstance`. A task knows nothing of optimizers, precision or guards and keeps nothing
of a trial: one task object serves many trials one after the other.
"""

from collections.abc import Iterator, Sequence
from typing import Any, Protocol, TypeAlias, runtime_checkable

import torch
from torch import Tensor, nn

# Any nest of tuples, lists, dicts, dataclasses and objects with `.to`.
Batch: TypeAlias = Any
Loss: TypeAlias = Tensor | dict[str, Tensor]

REQUIRED_METHODS = ("model", "batches", "probe", "loss")


@runtime_checkable
class Task(Protocol):
    """What every task has."""

    def model(self) -> nn.Module:
        """Build the untrained model.

        Called once per trial, after the global random state was seeded.
        """

    def batches(self, batch_size: int, generator: torch.Generator) -> Iterator[Batch]:
        """Yield training batches without end.

        Args:
            batch_size: Samples of one micro-batch, >= 1.
            generator: Decides every random choice; the global random state is left alone.
        """

    def probe(self) -> Sequence[Batch]:
        """Return the held-out batches, the same ones at every call and in every process."""

    def loss(self, model: nn.Module, batch: Batch) -> Loss:
        """Compute the mean loss of a batch.

        Args:
            model: In train or eval mode and on its device already.
            batch: One of `batches` or `probe`, on the same device.

        Returns:
            A scalar, or named scalars whose sum is the loss. It may be NaN or infinite: that is
            what the engine judges. The engine sets autocast.
        """


@runtime_checkable
class HasProbeLoss(Protocol):
    """For a task whose settings change `loss`, as by switching a term off."""

    def probe_loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Compute what the probe measures: the same scalar whatever the settings are."""


@runtime_checkable
class HasMetrics(Protocol):
    """For a task with more to measure than its loss."""

    def metrics(self, model: nn.Module, batch: Batch) -> dict[str, float]:
        """Measure one probe batch; the trial takes the mean over all of them."""


@runtime_checkable
class HasBaseline(Protocol):
    """For a task that knows how far one gets without looking at the input."""

    def baseline(self) -> float:
        """Return the probe loss of the best prediction that ignores its input."""


@runtime_checkable
class HasParameterGroups(Protocol):
    """For a task that trains parts of its model differently."""

    def parameter_groups(self, model: nn.Module) -> list[dict[str, Any]]:
        """Return parameter groups as a PyTorch optimizer takes them."""


@runtime_checkable
class HasInitGainParameters(Protocol):
    """For a task that knows which initial weights decide its stability."""

    def init_gain_parameters(self, model: nn.Module) -> list[str]:
        """Name the parameters that the setting `init_gain` multiplies."""


@runtime_checkable
class HasAblations(Protocol):
    """For a task that can be built without the part that is under suspicion."""

    def ablations(self) -> dict[str, dict[str, Any]]:
        """Return constructor arguments to change, by what the change takes away.

        Returns:
            Under `attention_bypassed` the model without attention, under `smaller_model` a
            narrower or shallower one. What the task cannot do, or does already, is left out.
        """


@runtime_checkable
class HasBatchCheck(Protocol):
    """For a task that knows when the targets of a batch do not fit its input."""

    def check_batch(self, batch: Batch) -> Sequence[str]:
        """Return a sentence for each sample of a batch that cannot be learned from.

        Args:
            batch: One of `batches` or `probe`, on the CPU.
        """
