"""Measuring leaves no trace."""

import math
from typing import Any

import pytest
import torch
from torch import nn

from stability_search.engine import GuardedEngine
from stability_search.settings.engine import EngineSettings
from tests.engine.plain import loss_fn, net, same, train, windows


def settings(**more: Any) -> EngineSettings:
    return EngineSettings(**{"learning_rate": 0.01, **more})


class Nosy(nn.Sequential):
    """A net that changes a buffer and draws random numbers whatever its mode."""

    def __init__(self) -> None:
        super().__init__(net())
        self.register_buffer("calls", torch.zeros(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls = self.calls + 1
        return super().forward(x) + 0 * torch.rand(1)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_it_is_fp32_in_eval_mode_and_leaves_no_trace(precision: str) -> None:
    model = Nosy()
    model[0][3].eval()  # one module's mode differs from the others'
    probe = [window[0] for window in windows(3, seed=9)]
    seen = []

    def loss(module: nn.Module, batch: Any) -> torch.Tensor:
        seen.append((module.training, torch.is_grad_enabled(), module(batch[0]).dtype))
        return loss_fn(module, batch)

    with GuardedEngine(model, settings(precision=precision)) as engine:
        train(engine, windows(3))
        modes = [module.training for module in model.modules()]
        before = {name: value.clone() for name, value in model.state_dict().items()}
        random_state = torch.get_rng_state()

        first = engine.evaluate(probe, loss)
        with torch.autocast("cpu", dtype=torch.bfloat16):  # of the caller's own
            again = engine.evaluate(probe, loss)

        assert torch.equal(torch.get_rng_state(), random_state)
        assert same(dict(model.state_dict()), before)
        assert [module.training for module in model.modules()] == modes
        assert first == again
        assert set(seen) == {(False, False, torch.float32)}
        with torch.no_grad():
            model.eval()
            by_hand = [loss_fn(model, batch).item() for batch in probe]
    assert first == pytest.approx(by_hand, rel=1e-6)


def test_training_goes_on_as_if_nobody_had_looked() -> None:
    found = []
    for looks in (False, True):
        torch.manual_seed(2)
        with GuardedEngine(net(), settings()) as engine:
            for window in windows(5):
                engine.step(window, loss_fn)
                if looks:
                    engine.evaluate(window, loss_fn)
            found.append(engine.model.state_dict())
    assert same(dict(found[0]), dict(found[1]))


def test_a_loss_that_is_not_finite_is_none() -> None:
    def loss(model: nn.Module, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"fit": model(x).mean(), "rest": x.sum()}

    probe = [torch.ones(1, 2), torch.full((1, 2), math.nan), torch.full((1, 2), math.inf)]
    with GuardedEngine(nn.Linear(2, 1), settings()) as engine:
        values = engine.evaluate(probe, loss)
    assert values[0] is not None
    assert values[1:] == (None, None)


def test_so_is_one_that_cannot_be_computed_for_numerical_reasons() -> None:
    def raising(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
        y = model(x)
        if x.min() < 0:
            return torch.linalg.inv(y.T @ y * 0).sum()
        if not torch.isfinite(y).all():
            raise ValueError("not finite")
        return y.mean()

    probe = [torch.ones(1, 2), torch.full((1, 2), math.inf), -torch.ones(1, 2)]
    with GuardedEngine(nn.Linear(2, 2), settings()) as engine:
        values = engine.evaluate(probe, raising)
        assert values[0] is not None
        assert values[1:] == (None, None)
        with pytest.raises(IndexError, match="too many indices"):
            engine.evaluate(probe, lambda model, batch: model(batch)[0, 0, 0])


def test_modes_and_random_state_come_back_after_an_exception() -> None:
    def refuse(_model: nn.Module) -> None:
        torch.rand(3)
        raise KeyError("metrics")

    with GuardedEngine(net(), settings()) as engine:
        state = torch.get_rng_state()
        with pytest.raises(KeyError, match="metrics"):
            engine.measure(refuse)
        assert torch.equal(torch.get_rng_state(), state)
        assert all(module.training for module in engine.model.modules())
        assert torch.is_grad_enabled()


def half_frozen() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 1))
    model[0].half().requires_grad_(requires_grad=False)
    model[0].register_buffer("shift", torch.ones(8, dtype=torch.bfloat16))
    return model


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_frozen_half_precision_weights_are_measured_in_fp32_and_given_back(precision: str) -> None:
    model = half_frozen()
    probe = windows(1)[0]
    with GuardedEngine(model, settings(precision=precision)) as engine:
        stored = (model[0].weight, model[0].bias, model[0].shift)
        where = [tensor.data_ptr() for tensor in stored]
        seen = []
        engine.measure(lambda m: seen.extend(t.dtype for t in (m[0].weight, m[0].shift)))
        (ours,) = engine.evaluate(probe, loss_fn)
        with pytest.raises(KeyError, match="metrics"):
            engine.measure(lambda _: {}["metrics"])
        assert engine.step(probe, loss_fn).is_loss_finite
    assert seen == [torch.float32, torch.float32]
    assert [t.dtype for t in stored] == [torch.float16, torch.float16, torch.bfloat16]
    assert (model[0].weight, model[0].bias, model[0].shift) == stored
    assert [tensor.data_ptr() for tensor in stored] == where
    wide = half_frozen().float()
    assert ours == pytest.approx(loss_fn(wide, probe[0]).item(), rel=1e-6)
    with pytest.raises(RuntimeError, match="same dtype"):  # the twin: nobody widens them here
        loss_fn(half_frozen(), probe[0])
