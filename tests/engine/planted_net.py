"""A model and a loss in which every fault that `slow_engine` knows can be planted."""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own convention
from torch import nn

from tests.engine import slow_engine as slow
from tests.engine.plain import BreakGradient
from tests.engine.slow_engine import Planted

SIZE, WIDTH, DROPOUT = 4, 8, 0.25


class Gate(nn.Module):
    """Pass on, or emit what is not finite."""

    def __init__(self) -> None:
        super().__init__()
        self.emits = 0.0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.emits if self.emits else x


class Net(nn.Module):
    """Dropout, statistics and buffers: everything that a step could disturb."""

    def __init__(self, *, is_reference: bool = False, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.is_reference = is_reference
        self.first = nn.Linear(3, WIDTH)
        self.norm = nn.BatchNorm1d(WIDTH)
        self.dropout = nn.Dropout(DROPOUT)
        self.gate = Gate()
        self.last = nn.Linear(WIDTH, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden: torch.Tensor = self.gate(self.dropout(torch.relu(self.norm(self.first(x)))))
        return self.last(hidden)  # type: ignore[no-any-return]


class Limited(torch.autograd.Function):
    """Overflow backwards where the weight of the loss lies above a limit, as fp16 does."""

    @staticmethod
    def forward(ctx: Any, loss: torch.Tensor, limit: float) -> torch.Tensor:
        ctx.limit = limit
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return torch.where(gradient > ctx.limit, math.inf, gradient), None


class Raising(torch.autograd.Function):
    """Raise in the backward pass."""

    @staticmethod
    def forward(ctx: Any, loss: torch.Tensor) -> torch.Tensor:  # noqa: ARG004 - torch's signature
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:  # noqa: ARG004 - as above
        raise FloatingPointError("planted")


class Enlarged(torch.autograd.Function):
    """Send a gradient back whose square overflows."""

    @staticmethod
    def forward(ctx: Any, loss: torch.Tensor) -> torch.Tensor:  # noqa: ARG004 - torch's signature
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:  # noqa: ARG004 - as above
        return gradient * 1e30


_AFTER_FORWARD: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    slow.INF_LOSS: lambda loss: loss * math.inf,
    slow.RAISES_BACKWARD: Raising.apply,
    slow.INF_GRADIENT: BreakGradient.apply,
    slow.HUGE_GRADIENT: Enlarged.apply,
}


def make_batch(planted: Planted, seed: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(SIZE, 3, generator=generator)
    batch = {"x": x, "y": 0.1 * x.sum(1, keepdim=True), "note": torch.zeros(2), "planted": planted}
    if planted.fault == slow.NAN_BATCH:
        x[seed % SIZE, 0] = math.nan
    if planted.fault == slow.NAN_UNUSED:
        batch["note"][0] = math.nan
    return batch


def loss_fn(model: Net, batch: dict[str, Any]) -> dict[str, torch.Tensor]:
    planted = batch["planted"]
    is_inf_module = planted.fault == slow.INF_MODULE and not model.is_reference
    is_nan_module = planted.fault == slow.RAISES_AFTER_NAN
    model.gate.emits = math.inf if is_inf_module else math.nan if is_nan_module else 0.0
    out = model(batch["x"]).float()
    if planted.fault == slow.RAISES:
        raise FloatingPointError("planted")
    if is_nan_module:
        raise ValueError("the task does not know what to do with NaN")
    loss = F.mse_loss(out, batch["y"])
    loss = _AFTER_FORWARD.get(planted.fault, lambda value: value)(loss)
    return {"error": Limited.apply(loss, planted.limit), "nothing": torch.zeros(())}
