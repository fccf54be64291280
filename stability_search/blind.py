"""The blind run: how well a model does that ignores its input.

It tells apart learning from merely forgetting a bad initialisation: a model that starts at a
loss of 34 and falls to 1.8 may have learned nothing but the average answer.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from stability_search.records.values import finite_or_none

LEARNING_RATES = (0.3, 0.03, 0.003)
STEPS_PER_RATE = 100

ProbeLoss = Callable[[nn.Module, Any], torch.Tensor]


@dataclass(frozen=True, kw_only=True, slots=True)
class BlindRun:
    """The best loss without looking at the input.

    Attributes:
        loss: Lowest finite mean probe loss; None if none was finite.
        batch_losses: Its loss per probe batch; empty likewise.
    """

    loss: float | None
    batch_losses: tuple[float | None, ...]


def run_blind(model: nn.Module, probe: Sequence[Any], probe_loss: ProbeLoss) -> BlindRun:
    """Train what is left of a model once every weight matrix is zero.

    Every parameter of two or more dimensions is set to zero and frozen; the others are trained
    on the probe batches, in fp32 and eval mode, with Adam at three rates of 100 steps each. The
    untrained zeroed model counts too.

    Args:
        model: A fresh model, on its device; it is changed.
        probe: Held-out batches, on the same device.
        probe_loss: Loss of one batch, 0-d.

    Returns:
        The lowest loss seen.
    """
    model.eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.zero_()
                parameter.requires_grad = False
    free = [p for p in model.parameters() if p.requires_grad]
    start = [p.detach().clone() for p in free]
    best = BlindRun(loss=None, batch_losses=())
    for learning_rate in LEARNING_RATES:
        with torch.no_grad():
            for parameter, value in zip(free, start, strict=True):
                parameter.copy_(value)
        best = _lower(best, _descend(model, free, probe, probe_loss, learning_rate))
    return best


def _descend(
    model: nn.Module,
    free: Sequence[nn.Parameter],
    probe: Sequence[Any],
    probe_loss: ProbeLoss,
    learning_rate: float,
) -> BlindRun:
    best = BlindRun(loss=None, batch_losses=())
    optimizer = torch.optim.Adam(free, lr=learning_rate) if free else None
    for _ in range(STEPS_PER_RATE + 1):
        if optimizer is not None:
            optimizer.zero_grad()
        reading = _read(model, probe, probe_loss)
        best = _lower(best, reading)
        if optimizer is None or reading.loss is None or all(p.grad is None for p in free):
            break
        optimizer.step()
    return best


def _read(model: nn.Module, probe: Sequence[Any], probe_loss: ProbeLoss) -> BlindRun:
    """Measure every batch and add up its gradients, one graph at a time."""
    losses = []
    for batch in probe:
        try:
            loss = probe_loss(model, batch).reshape(()).float()
        except (MemoryError, torch.OutOfMemoryError):
            raise
        except Exception:  # noqa: BLE001 - a loss that zeroed weights break has no finite value
            return BlindRun(loss=None, batch_losses=())
        if loss.requires_grad:
            (loss / len(probe)).backward()  # type: ignore[no-untyped-call]
        losses.append(loss.detach())
    values: list[float] = torch.stack(losses).tolist()
    return BlindRun(
        loss=finite_or_none(sum(values) / len(values)),
        batch_losses=tuple(finite_or_none(value) for value in values),
    )


def _lower(first: BlindRun, second: BlindRun) -> BlindRun:
    def key(run: BlindRun) -> float:
        return math.inf if run.loss is None else run.loss

    return second if key(second) < key(first) else first
