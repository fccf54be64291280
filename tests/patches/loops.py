"""Training loops as people write them; nothing of ours is in them."""

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own convention
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from tests.engine.plain import net

BATCH_SIZE = 8
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
NAN, INF = math.nan, math.inf


def loader(
    num_batches: int, *, poisoned: int | None = None, value: float = NAN, drop: int = 0
) -> DataLoader:
    """Return batches of a task that can be learned; one of them may hold a NaN.

    The last `drop` of them are left out.
    """
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(num_batches * BATCH_SIZE, 6, generator=generator)
    y = x.sin().sum(1, keepdim=True)
    if poisoned is not None:
        x[poisoned * BATCH_SIZE, 0] = value
    size = (num_batches - drop) * BATCH_SIZE
    return DataLoader(TensorDataset(x[:size], y[:size]), batch_size=BATCH_SIZE)


def train(
    batches: DataLoader,
    *,
    precision: str = "fp32",
    epochs: int = 1,
    clip_norm: float | None = None,
    fused: bool = False,
) -> tuple[nn.Module, torch.optim.Optimizer, torch.amp.GradScaler]:
    """Train as torch's documentation does."""
    model = net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=fused)
    scaler = torch.amp.GradScaler("cpu", enabled=precision == "fp16")
    dtype = DTYPES.get(precision)
    for _ in range(epochs):
        for x, y in batches:
            optimizer.zero_grad()
            with torch.autocast("cpu", dtype=dtype or torch.bfloat16, enabled=dtype is not None):
                loss = F.mse_loss(model(x).float(), y)
            scaler.scale(loss).backward()
            if clip_norm is not None:
                scaler.unscale_(optimizer)
                nn.utils.clip_grad_norm_(model.parameters(), clip_norm)
            scaler.step(optimizer)
            scaler.update()
    return model, optimizer, scaler


def values(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """Return everything training changes: parameters, buffers, optimizer state."""
    found = {f"model {name}": value for name, value in model.state_dict().items()}
    for index, state in optimizer.state_dict()["state"].items():
        found |= {f"state {index} {name}": value for name, value in state.items()}
    return {name: value.detach().clone() for name, value in found.items()}


def are_equal(a: Mapping[str, torch.Tensor], b: Mapping[str, torch.Tensor]) -> bool:
    """Return True if both are the same to the bit; NaN equals NaN."""
    return a.keys() == b.keys() and all(
        torch.equal(torch.nan_to_num(a[name], 1e9), torch.nan_to_num(b[name], 1e9)) for name in a
    )


def is_finite(model: nn.Module) -> bool:
    return all(bool(torch.isfinite(value).all()) for value in model.state_dict().values())


class Scripted:
    """One weight with an optimizer and a scaler: a loss of `factor * weight`, by micro-batch."""

    def __init__(
        self, *, optimizer: type[torch.optim.Optimizer] = torch.optim.SGD, **scaler: float
    ) -> None:
        self.weight = nn.Parameter(torch.ones(2))
        self.optimizer = optimizer([self.weight], lr=0.125)
        self.scaler = torch.amp.GradScaler("cpu", **scaler)

    def backward(self, factor: float = 1.0, *, offset: float = 0.0) -> None:
        """Go backward; an infinite factor makes the gradient infinite, an offset only the loss."""
        loss = (self.weight * factor).sum() + offset
        self.scaler.scale(_FiniteLoss.apply(loss) if offset == 0 else loss).backward()

    @property
    def value(self) -> float:
        return self.weight[0].item()


class _FiniteLoss(torch.autograd.Function):
    """Lets a loss be 1 whatever it is, so that only the gradient tells."""

    @staticmethod
    def forward(_context: object, loss: torch.Tensor) -> torch.Tensor:
        return torch.ones_like(loss)

    @staticmethod
    def backward(_context: object, gradient: torch.Tensor) -> torch.Tensor:
        return gradient
