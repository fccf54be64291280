"""The same training written in plain PyTorch, and the small models both are run on."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own convention
from torch import nn

from stability_search.engine import GuardedEngine
from stability_search.settings.engine import EngineSettings

Batch = tuple[torch.Tensor, torch.Tensor]
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def net(seed: int = 0, *, dropout: float = 0.1) -> nn.Sequential:
    """Build a net with everything that a step could disturb: dropout, statistics, buffers."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(dropout), nn.Linear(16, 1)
    )


def windows(
    count: int, *, accumulation: int = 1, size: int = 8, seed: int = 1
) -> list[list[Batch]]:
    """Make `count` windows of micro-batches of a task that can be learned."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for _ in range(count):
        window = []
        for _ in range(accumulation):
            x = torch.randn(size, 6, generator=generator)
            window.append((x, x.sin().sum(1, keepdim=True)))
        made.append(window)
    return made


def loss_fn(model: nn.Module, batch: Batch) -> torch.Tensor:
    x, y = batch
    return F.mse_loss(model(x).float(), y)


def train(engine: GuardedEngine, data: Sequence[list[Any]], loss: Any = loss_fn) -> list[Any]:
    return [engine.step(window, loss) for window in data]


def train_plain(
    model: nn.Module,
    settings: EngineSettings,
    data: Sequence[list[Any]],
    loss: Callable[[nn.Module, Any], torch.Tensor] = loss_fn,
) -> tuple[list[float], torch.optim.Optimizer, Any]:
    """Train as torch's documentation does: autocast, GradScaler, clip, step, update."""
    if settings.optimizer == "sgd":
        optimizer: torch.optim.Optimizer = torch.optim.SGD(
            model.parameters(), settings.learning_rate, momentum=settings.momentum, fused=True
        )
    else:
        optimizer = torch.optim.AdamW(model.parameters(), settings.learning_rate, fused=True)
    scaler = torch.amp.GradScaler(
        "cpu",
        init_scale=settings.init_scale,
        growth_interval=settings.growth_interval,
        enabled=settings.precision == "fp16",
    )
    losses = []
    for window in data:
        optimizer.zero_grad()
        values = []
        for batch in window:
            with torch.autocast(
                "cpu",
                dtype=DTYPES.get(settings.precision, torch.bfloat16),
                enabled=settings.precision != "fp32",
            ):
                value = loss(model, batch)
            scaler.scale(value / len(window)).backward()
            values.append(value.item())
        if settings.clip_norm is not None:
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(model.parameters(), settings.clip_norm)
        scaler.step(optimizer)
        scaler.update()
        losses.append(sum(values) / len(values))
    return losses, optimizer, scaler


def same(first: Any, second: Any) -> bool:
    """Compare two nests of tensors and plain values, tensors to the bit."""
    if isinstance(first, torch.Tensor):
        return isinstance(second, torch.Tensor) and torch.equal(first, second)
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(same(first[k], second[k]) for k in first)
    if isinstance(first, (list, tuple)):
        return len(first) == len(second) and all(map(same, first, second))
    return bool(first == second)


class BreakGradient(torch.autograd.Function):
    """Pass a loss on, and send infinity back."""

    @staticmethod
    def forward(ctx: Any, loss: torch.Tensor) -> torch.Tensor:  # noqa: ARG004 - torch's signature
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:  # noqa: ARG004 - as above
        return gradient * math.inf


def state_of(engine: GuardedEngine) -> Any:
    """Copy what a skipped step must leave as it was."""
    state = engine.state_dict()
    kept = {
        "model": state["model"],
        "optimizer": state["optimizer"]["state"],
        "num_applied": state["num_applied"],
    }
    return torch.utils._pytree.tree_map(  # noqa: SLF001 - a copy of a nest of tensors
        lambda leaf: leaf.clone() if isinstance(leaf, torch.Tensor) else leaf, kept
    )
