"""Parameters and optimizer state are found non-finite, and named."""

import math

import pytest
import torch
from torch import nn

from stability_search.engine.finiteness import StateWatch, state_fault


def trained(optimizer: str = "adamw") -> tuple[nn.Module, torch.optim.Optimizer]:
    model = nn.Sequential(nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False))
    for layer, value in zip(model, (3.0, 4.0), strict=True):
        nn.init.constant_(layer.weight, value)
        layer.weight.grad = torch.zeros_like(layer.weight)
    kind = torch.optim.AdamW if optimizer == "adamw" else torch.optim.SGD
    made = kind(model.parameters(), lr=0.0, **({} if kind is torch.optim.AdamW else MOMENTUM))
    made.step()
    return model, made


MOMENTUM = {"momentum": 0.9}


def norms(model: nn.Module, made: torch.optim.Optimizer, num_turns: int) -> list[float]:
    with torch.no_grad():
        watch = StateWatch(list(model.parameters()), made)
        return [watch.norm(turn).item() for turn in range(num_turns)]


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_finite_states_have_a_finite_norm(optimizer: str) -> None:
    model, made = trained(optimizer)
    assert norms(model, made, 5) == [5.0] * 5
    assert state_fault(model, made) == ("", None)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_broken_parameter_is_found_at_once_and_named(value: float) -> None:
    model, made = trained()
    model[1].weight.data.fill_(value)
    assert not any(map(math.isfinite, norms(model, made, 4)))
    assert state_fault(model, made) == ("parameter 1.weight became NaN or Inf", "1")


def test_a_broken_second_moment_is_found_though_it_moves_no_parameter() -> None:
    model, made = trained()
    made.state[model[0].weight]["exp_avg_sq"].fill_(math.inf)
    found = [math.isfinite(norm) for norm in norms(model, made, 32)]
    assert found == [False, *[True] * 15] * 2  # each is read at every sixteenth turn
    assert state_fault(model, made) == ("optimizer state of 0.weight became NaN or Inf", "0")


def test_a_broken_momentum_is_named_too() -> None:
    model, made = trained("sgd")
    made.state[model[1].weight]["momentum_buffer"].fill_(math.nan)
    assert state_fault(model, made) == ("optimizer state of 1.weight became NaN or Inf", "1")


def test_a_parameter_of_no_module_is_found_all_the_same() -> None:
    model, _ = trained()
    loose = nn.Parameter(torch.tensor([math.nan]))
    made = torch.optim.SGD([loose], lr=0.1)
    assert state_fault(model, made) == ("parameter outside the model became NaN or Inf", None)


def test_huge_parameters_are_finite_though_their_squares_are_not() -> None:
    model, made = trained()
    model[0].weight.data.fill_(3e38)
    assert norms(model, made, 1) == [math.inf]
    assert state_fault(model, made) == ("", None)


@pytest.mark.parametrize("broken", range(4))
def test_small_large_and_double_parameters_are_all_read(broken: int) -> None:
    sizes = [(3, torch.float32), (5000, torch.float32), (3, torch.float64), (5000, torch.float64)]
    parameters = [nn.Parameter(torch.ones(size, dtype=dtype)) for size, dtype in sizes]
    watch = StateWatch(parameters, torch.optim.SGD(parameters, lr=0.1))
    with torch.no_grad():
        assert watch.norm(0).item() == pytest.approx(math.sqrt(10006))
        parameters[broken][-1] = math.nan
        assert math.isnan(watch.norm(0).item())
