"""Replaced forward passes, and how they come back."""

import copy
import functools

import torch
from torch import nn

from stability_search.engine.overrides import ForwardOverrides


def doubled(forward: object, x: torch.Tensor) -> torch.Tensor:
    return 2 * forward(x)  # type: ignore[operator]


def test_the_last_replaced_comes_back_first() -> None:
    module = nn.Identity()
    overrides = ForwardOverrides()
    overrides.replace(module, lambda forward: functools.partial(doubled, forward))
    overrides.replace(module, lambda forward: functools.partial(doubled, forward))
    assert module(torch.ones(1)).item() == 4.0
    assert module.state_dict() == {}

    overrides.undo()
    overrides.undo()  # nothing is left to undo

    assert module(torch.ones(1)).item() == 1.0
    assert "forward" not in module.__dict__


def test_a_forward_that_somebody_else_had_replaced_stays_theirs() -> None:
    module = nn.Identity()
    module.forward = lambda x: x + 5  # type: ignore[method-assign]
    overrides = ForwardOverrides()
    overrides.replace(module, lambda forward: functools.partial(doubled, forward))
    assert module(torch.ones(1)).item() == 12.0
    overrides.undo()
    assert module(torch.ones(1)).item() == 6.0


def test_a_copied_module_computes_with_its_own_weights() -> None:
    module = nn.Linear(1, 1, bias=False)
    overrides = ForwardOverrides()
    overrides.replace(module, lambda forward: functools.partial(doubled, forward))
    copied = copy.deepcopy(module)
    with torch.no_grad():
        module.weight.fill_(1.0)
        copied.weight.fill_(100.0)
    assert copied(torch.ones(1, 1)).item() == 200.0
