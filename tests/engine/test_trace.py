"""Where a non-finite value first appeared."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import nn

from stability_search.engine.trace import Origin, trace_forward


class Breaks(nn.Module):
    """Turn what comes in into something else, by a function of the value."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.value = value

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.value


def trace(
    model: nn.Module, x: torch.Tensor, after: Callable[[torch.Tensor], torch.Tensor]
) -> Origin:
    return trace_forward(model, lambda: after(model(x)))


def model(*values: float) -> nn.Sequential:
    return nn.Sequential(*(Breaks(value) for value in values))


def test_the_first_module_that_broke_finite_values_is_named() -> None:
    found = trace(model(0.0, math.inf, math.nan), torch.ones(2), torch.sum)
    assert found == Origin(module="1", phase="forward")


def test_the_innermost_module_is_named_not_what_holds_it() -> None:
    nested = nn.Sequential(nn.Identity(), nn.Sequential(nn.Identity(), Breaks(math.nan)))
    assert trace(nested, torch.ones(2), torch.sum).module == "1.1"


def test_a_module_that_only_passes_on_is_not_named() -> None:
    found = trace(model(0.0, 0.0), torch.tensor([math.nan]), torch.sum)
    assert found == Origin(module=None, phase="forward")


def test_some_minus_infinity_is_no_offence() -> None:
    """A causal mask is full of it, and a module may make one."""
    mask = torch.tensor([0.0, -math.inf])
    assert trace(Breaks(mask), torch.ones(2), lambda y: y.exp().sum()) == Origin()  # type: ignore[arg-type]
    nothing_but = trace(model(-math.inf), torch.ones(2), lambda y: y.exp().sum())
    assert nothing_but == Origin(module="0", phase="forward")


def test_minus_infinity_out_of_weights_is_an_overflow() -> None:
    layer = nn.Linear(1, 2, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[1.0], [-3e38]]))
    net = nn.Sequential(nn.Identity(), layer)
    found = trace(net, torch.full((1, 1), 2.0), lambda y: y.exp().sum())
    assert found == Origin(module="1", phase="forward")
    passed_on = trace(layer, torch.full((1, 1), -math.inf), lambda y: y[0, 0].exp())
    assert passed_on == Origin(module=None, phase="forward")


def test_a_loss_that_breaks_finite_outputs_is_its_own_phase() -> None:
    found = trace(model(0.0), torch.zeros(2), lambda y: y.log().sum() * math.nan)
    assert found == Origin(module=None, phase="loss")


def test_what_the_loss_raises_is_swallowed() -> None:
    def refuse(_y: torch.Tensor) -> torch.Tensor:
        raise ValueError("not finite")

    assert trace(model(math.nan), torch.ones(1), refuse) == Origin(module="0", phase="forward")
    assert trace(model(0.0), torch.ones(1), refuse) == Origin(module=None, phase="loss")


def test_an_exit_is_not_swallowed_and_the_hooks_go() -> None:
    def leave(_y: torch.Tensor) -> torch.Tensor:
        raise KeyboardInterrupt

    watched = model(0.0)
    with pytest.raises(KeyboardInterrupt):
        trace(watched, torch.ones(1), leave)
    assert not any(module._forward_hooks for module in watched.modules())  # noqa: SLF001


def test_the_model_itself_may_be_the_culprit() -> None:
    found = trace_forward(layer := Breaks(math.nan), lambda: layer(torch.ones(1)).sum())
    assert found == Origin(module="Breaks", phase="forward")
