"""A bad step says where it began, and whether it breaks again on the same inputs."""

from typing import Any

import pytest
import torch
from torch import nn

from stability_search.engine import GuardedEngine
from stability_search.records.step import StepLabel, StepRecord
from stability_search.settings.engine import EngineSettings
from tests.engine.plain import BreakGradient

HUGE = 1e20


class Times(nn.Module):
    """Multiplies by a weight; breaks its value or its gradient at the calls it is told."""

    def __init__(self, *, value_at: frozenset[int] = frozenset(), gradient_at: Any = ()) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))
        self.value_at, self.gradient_at = value_at, gradient_at
        self.num_calls = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.num_calls += 1
        y = self.weight * x
        if self.num_calls in self.value_at:
            y = y * torch.inf
        return BreakGradient.apply(y) if self.num_calls in self.gradient_at else y


def loss(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return model(x).sum()


def step(model: nn.Module, *window: float, **settings: Any) -> StepRecord:
    chosen = EngineSettings(**{"learning_rate": 0.1, "optimizer": "sgd", **settings})
    with GuardedEngine(model, chosen) as engine:
        return engine.step([torch.full((2,), x) for x in window], loss)


def place(record: StepRecord) -> tuple[Any, ...]:
    return (
        record.first_nonfinite_module,
        record.first_nonfinite_phase,
        record.last_finite_max,
        record.is_transient,
    )


ALWAYS = frozenset(range(100))


def test_a_fault_that_shows_again_is_persistent_and_has_a_place() -> None:
    record = step(nn.Sequential(Times(), Times(value_at=ALWAYS), Times()), 3.0)
    assert place(record) == ("1", "forward", 3.0, False)


def test_a_fault_of_one_moment_is_transient_and_has_none() -> None:
    record = step(nn.Sequential(Times(), Times(value_at=frozenset({1})), Times()), 3.0)
    assert (record.label, record.reason) == (StepLabel.BAD, "model output is Inf")
    assert place(record) == (None, None, None, True)


def test_a_gradient_that_breaks_again_is_persistent_and_has_a_place() -> None:
    model = nn.Sequential(Times(), Times(gradient_at=ALWAYS), Times())
    with torch.no_grad():
        model[2].weight.fill_(4.0)
    record = step(model, 3.0)
    assert place(record) == ("1", "backward", 4.0, False)
    assert record.batch_index == 0


def test_a_gradient_that_broke_once_is_transient() -> None:
    record = step(nn.Sequential(Times(), Times(gradient_at={1}), Times()), 3.0)
    assert record.label is StepLabel.BAD
    assert place(record) == (None, "backward", None, True)


def test_the_micro_batch_whose_gradient_broke_is_named() -> None:
    model = nn.Sequential(Times(), Times(gradient_at={2, 5}), Times())
    # The window calls it twice; the repeat calls it for the first micro-batch (3), then again.
    model[1].gradient_at = {2, 4}
    assert step(model, 3.0, 5.0).batch_index == 1


def test_the_place_is_looked_for_with_the_weights_that_broke() -> None:
    """What is left of the window moves the weights so far that the fault would be gone."""
    model = nn.Sequential(Times())
    with torch.no_grad():
        model[0].weight.fill_(1e19)
    record = step(model, HUGE, 1.0, learning_rate=4.9e18)
    assert record.is_applied
    assert model[0].weight.item() * HUGE < torch.finfo(torch.float32).max
    assert place(record) == ("0", "forward", pytest.approx(HUGE), False)


def test_a_broken_update_names_the_parameters_module() -> None:
    model = nn.Sequential(Times(), Times())
    with torch.no_grad():
        model[1].weight.fill_(-1e10)
    record = step(model, 1.0, learning_rate=3e38)  # 0.weight moves by 6e48
    assert (record.reason, record.is_applied) == ("parameter 0.weight became NaN or Inf", True)
    assert (record.first_nonfinite_module, record.first_nonfinite_phase, record.is_transient) == (
        "0",
        "update",
        None,
    )


def test_a_benign_search_for_the_loss_scale_is_not_looked_into() -> None:
    model = nn.Sequential(Times(gradient_at={1}))
    record = step(model, 1.0, precision="fp16")
    assert record.label is StepLabel.CALIBRATION
    assert model[0].num_calls == 1
    assert place(record) == (None, None, None, None)
