"""Modules that break forwards or backwards on demand, and how a trace of them ends."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from stability_search.engine.trace import Origin, trace_backward, trace_forward

Run = Callable[[torch.Tensor], torch.Tensor]

NOT_KNOWN = Origin(phase="backward", is_known=False)


class Breaks(nn.Module):
    """Turn what comes in into something else, by a function of the value."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.value = value

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.value


class Through(torch.autograd.Function):
    """Pass values on and multiply their gradient."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, factor: float) -> torch.Tensor:
        ctx.factor = factor
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        return grads[0] * ctx.factor, None


class Times(nn.Module):
    """Pass values on and multiply their gradient."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return Through.apply(x, self.factor)


class Wired(nn.Module):
    """Compute whatever it is told with its members."""

    def __init__(self, compute: Callable[..., Any], **members: nn.Module) -> None:
        super().__init__()
        self.compute = compute
        for name, member in members.items():
            self.add_module(name, member)

    def forward(self, *args: Any) -> Any:
        return self.compute(self, *args)


def trace(model: nn.Module, x: torch.Tensor, after: Run = torch.sum) -> Origin:
    return trace_forward(model, lambda: after(model(x)))


def back(model: nn.Module, x: torch.Tensor, after: Run = torch.sum) -> Origin:
    return trace_backward(model, lambda: after(model(x)), list(model.parameters()))


def model(*values: float) -> nn.Sequential:
    return nn.Sequential(*(Breaks(value) for value in values))


def ones(width: int) -> nn.Linear:
    """Make a linear layer whose weights are one and whose biases are zero."""
    layer = nn.Linear(width, width)
    with torch.no_grad():
        layer.weight.fill_(1.0)
        layer.bias.zero_()
    return layer


def forward_at(module: str | None, largest: float | None) -> Origin:
    return Origin(module=module, phase="forward", last_finite_max=largest)


def backward_at(module: str | None, largest: float | None) -> Origin:
    return Origin(module=module, phase="backward", last_finite_max=largest)


def num_hooks(watched: nn.Module) -> int:
    return sum(
        len(module._forward_hooks) + len(module._forward_pre_hooks)  # noqa: SLF001
        for module in watched.modules()
    )


def fail(error: type[Exception]) -> Callable[..., torch.Tensor]:
    def raise_it(*_: Any) -> torch.Tensor:
        raise error("planted")

    return raise_it


class Refuses(torch.autograd.Function):
    """Raise in the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, error: type[Exception]) -> torch.Tensor:
        ctx.error = error
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *_: torch.Tensor) -> tuple[torch.Tensor, None]:
        raise ctx.error("planted")
