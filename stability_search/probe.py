"""Reading the probe: how good a model is on held-out batches, in fp32 and eval mode."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from stability_search.engine import GuardedEngine
from stability_search.records.values import finite_or_none
from stability_search.tally import mean_or_none
from stability_search.tasks.base import HasMetrics, HasProbeLoss, Task


def probe_loss(task: Task, model: nn.Module, batch: Any) -> torch.Tensor:  # noqa: ANN401
    """Compute what the probe measures of one batch: a scalar, the named terms of a loss summed."""
    loss = (
        task.probe_loss(model, batch)
        if isinstance(task, HasProbeLoss)
        else task.loss(model, batch)
    )
    return loss if isinstance(loss, torch.Tensor) else sum_terms(loss)


def read_probe(
    engine: GuardedEngine, task: Task, batches: Sequence[Any]
) -> tuple[float | None, ...]:
    """Return the probe loss of each batch, None where it is not finite; leaves no trace."""
    return tuple(engine.evaluate(batches, lambda model, batch: probe_loss(task, model, batch)))


def read_metrics(
    engine: GuardedEngine, task: Task, batches: Sequence[Any]
) -> dict[str, float | None]:
    """Return the task's metrics, a mean over the batches; empty for a task without any."""
    if not isinstance(task, HasMetrics):
        return {}
    rows: list[Mapping[str, float]] = []
    engine.measure(lambda model: rows.extend(task.metrics(model, batch) for batch in batches))
    return {
        name: mean_or_none([finite_or_none(row.get(name)) for row in rows])
        for name in (rows[0] if rows else {})
    }


def sum_terms(terms: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Add the named terms of a loss."""
    return torch.stack([term.reshape(()).float() for term in terms.values()]).sum()
