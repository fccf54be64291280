"""One window: rolled back where it broke, and taken again without what broke it."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from stability_search.engine import GuardedEngine
from stability_search.records.step import StepLabel
from stability_search.settings.engine import EngineSettings
from tests.engine.plain import BreakGradient, loss_fn, net, same, state_of, train, windows

OK, CALIBRATION, BAD, DATA = StepLabel
X = torch.ones(2, 3)


def settings(**more: Any) -> EngineSettings:
    return EngineSettings(**{"learning_rate": 0.01, **more})


def mean(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return model(x).float().square().mean()


# -- rollback --------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", ["adamw", "adam", "sgd"])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("fault", ["input", "loss", "gradient"])
def test_a_skipped_step_leaves_everything_as_it_was(
    fault: str, precision: str, optimizer: str
) -> None:
    chosen = settings(
        precision=precision,
        optimizer=optimizer,
        momentum=0.9 if optimizer == "sgd" else 0.0,
        init_scale=256.0,
        warmup_steps=50,
        clip_norm=1.0,
    )
    data = windows(6)

    def broken(model: nn.Module, batch: Any) -> torch.Tensor:
        x, y = batch
        loss = loss_fn(model, (x * math.inf if fault == "input" else x, y))
        return BreakGradient.apply(loss) if fault == "gradient" else loss * math.inf

    with GuardedEngine(net(), chosen) as engine:
        train(engine, data[:3])
        before = state_of(engine)
        record = engine.step(data[3], broken)
        assert not record.is_applied
        assert same(state_of(engine), before)
        after = engine.step(data[4], loss_fn)
    assert (record.learning_rate, after.learning_rate) == (0.01 * 4 / 50, 0.01 * 4 / 50)
    assert (after.label, after.step) == (OK, 5)


def test_without_rollback_the_statistics_would_be_lost() -> None:
    """The twin: one forward pass of an infinite batch breaks BatchNorm for good."""
    model = net()
    model(torch.full((8, 6), math.inf))
    assert not torch.isfinite(model[1].running_mean).all()


def poisoned(window: list[Any], *positions: int) -> list[Any]:
    return [
        (x * math.nan, y) if position in positions else (x, y)
        for position, (x, y) in enumerate(window)
    ]


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("positions", [(0,), (2,), (1, 3)])
def test_a_window_without_its_poisoned_micro_batch_is_training_on_the_rest(
    positions: tuple[int, ...], precision: str
) -> None:
    data = windows(4, accumulation=4)
    chosen = settings(precision=precision, clip_norm=1.0, init_scale=256.0)
    left = [batch for position, batch in enumerate(data[2]) if position not in positions]
    states = []
    for third in (poisoned(data[2], *positions), left):
        with GuardedEngine(net(), chosen) as engine:
            torch.manual_seed(3)
            records = train(engine, [*data[:2], third, data[3]])
            states.append(state_of(engine))
        if third is not left:
            survived = records[2]
    assert same(*states)
    assert (survived.label, survived.is_applied) == (DATA, True)
    assert (survived.loss, survived.is_loss_finite) == (None, False)
    assert survived.grad_norm is not None
    assert survived.batch_index == 8 + positions[0]


def test_what_is_survived_is_still_bad() -> None:
    data = windows(1, accumulation=3)

    def loss(model: nn.Module, batch: Any) -> torch.Tensor:
        factor = math.inf if batch is data[0][1] else 1.0
        return loss_fn(model, batch) * factor

    with GuardedEngine(net(), settings()) as engine:
        record = engine.step(data[0], loss)
    assert (record.label, record.is_applied) == (BAD, True)
    assert (record.batch_index, record.reason) == (1, "loss is Inf")
    assert (record.first_nonfinite_module, record.first_nonfinite_phase) == (None, "loss")


def test_drop_gives_up_the_window() -> None:
    data = windows(3, accumulation=4)
    with GuardedEngine(net(), settings(bad_microbatch="drop")) as engine:
        train(engine, data[:1])
        before = state_of(engine)
        record = engine.step(poisoned(data[1], 2), loss_fn)
        assert same(state_of(engine), before)
    assert (record.label, record.is_applied, record.batch_index) == (DATA, False, 6)


def test_a_window_of_nothing_but_poison_changes_nothing() -> None:
    data = windows(2, accumulation=2)
    with GuardedEngine(net(), settings()) as engine:
        train(engine, data[:1])
        before = state_of(engine)
        record = engine.step(poisoned(data[1], 0, 1), loss_fn)
        assert same(state_of(engine), before)
    assert (record.label, record.is_applied, record.grad_norm) == (DATA, False, None)


def test_an_overflow_of_what_is_left_still_lowers_the_scale() -> None:
    data = windows(1, accumulation=3)

    def loss(model: nn.Module, batch: Any) -> torch.Tensor:
        return BreakGradient.apply(loss_fn(model, batch))

    with GuardedEngine(net(), settings(precision="fp16", init_scale=256.0)) as engine:
        record = engine.step(poisoned(data[0], 0), loss)
        assert engine.scale == 128.0
    assert (record.label, record.is_applied) == (DATA, False)


# -- exceptions ------------------------------------------------------------------------------


class RaisesOnBroken(nn.Module):
    """A model of one layer that overflows on cue, and a task that refuses what it gives."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 1)
        self.factor = 1.0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x * self.factor) * self.factor


def refusing(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    y = model(x).float()
    if not torch.isfinite(y).all():
        raise ValueError("output is not finite\nsecond line")
    return y.square().mean()


@pytest.mark.parametrize("num_micro_batches", [1, 3])
def test_what_is_raised_after_a_module_broke_is_bad(num_micro_batches: int) -> None:
    model = RaisesOnBroken()
    with GuardedEngine(model, settings(precision="fp16", init_scale=256.0)) as engine:
        assert engine.step([X] * num_micro_batches, refusing).label is OK
        model.factor = 1e6
        record = engine.step([X] * num_micro_batches, refusing)
        assert engine.scale == 256.0
        model.factor = 1.0
        assert engine.step([X], refusing).label is OK
    assert (record.label, record.reason) == (BAD, "ValueError: output is not finite")
    assert (record.first_nonfinite_module, record.first_nonfinite_phase) == ("layer", "forward")
    assert (record.loss, record.is_loss_finite, record.is_applied) == (None, False, False)
    assert record.batch_index == num_micro_batches


def test_the_same_exception_from_finite_modules_is_the_users() -> None:
    def refuses_always(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
        model(x)
        raise ValueError("never satisfied")

    with GuardedEngine(nn.Linear(3, 1), settings()) as engine:
        with pytest.raises(ValueError, match="never satisfied"):
            engine.step([X], refuses_always)
        assert engine.step([X], mean).label is OK


def numerical(kind: str) -> Callable[[nn.Module, torch.Tensor], torch.Tensor]:
    def loss(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
        if kind == "FloatingPointError":
            raise FloatingPointError("underflow")
        return torch.linalg.inv(model(x).T @ model(x) * 0).sum()

    return loss


@pytest.mark.parametrize("kind", ["FloatingPointError", "LinAlgError"])
def test_numerical_exceptions_are_bad(kind: str) -> None:
    with GuardedEngine(nn.Linear(3, 2), settings()) as engine:
        record = engine.step([X], numerical(kind))
        assert engine.step([X], mean).label is OK
    assert (record.label, record.is_applied) == (BAD, False)
    assert record.reason.startswith(kind)


def test_a_numerical_exception_of_the_backward_pass_is_bad() -> None:
    class Fails(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:  # noqa: ARG004 - torch's signature
            return x.clone()

        @staticmethod
        def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:  # noqa: ARG004 - as above
            raise FloatingPointError("singular")

    with GuardedEngine(nn.Linear(3, 2), settings(precision="fp16")) as engine:
        record = engine.step([X], lambda m, x: Fails.apply(mean(m, x)))
        assert engine.scale == 65536.0
    assert (record.label, record.reason) == (BAD, "FloatingPointError: singular")
    assert record.is_loss_finite
    assert record.loss is not None
    assert (record.first_nonfinite_phase, record.is_transient) == ("backward", False)


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, MemoryError, KeyError])
def test_everything_else_propagates(error: type[BaseException]) -> None:
    model = RaisesOnBroken()

    def loss(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
        module(x)
        raise error("stop")

    model.factor = 1e38 if error is MemoryError else 1.0  # out of memory, whatever else broke
    with GuardedEngine(model, settings()) as engine, pytest.raises(error, match="stop"):
        engine.step([X], loss)


# -- loss terms and traces -------------------------------------------------------


def test_terms_are_recorded_and_the_first_broken_one_is_named() -> None:
    def loss(model: nn.Module, x: torch.Tensor) -> dict[str, torch.Tensor]:
        y = model(x).float()
        return {
            "box": y.square().mean(),
            "cls": (y * x.min()).exp().mean(),
            "cpe": y.sum() / x.min(),
        }

    torch.manual_seed(0)
    with GuardedEngine(nn.Linear(3, 1), settings()) as engine:
        fine = engine.step([X, X * 2], loss)
        broken = engine.step([X * 0], loss)
    assert list(fine.loss_terms) == ["box", "cls", "cpe"]
    assert fine.loss == pytest.approx(sum(fine.loss_terms.values()), rel=1e-5)
    assert broken.label is BAD
    assert broken.reason.startswith("loss term cpe is")
    assert broken.loss_terms["box"] is not None
    assert broken.loss_terms["cls"] == 1.0
    assert broken.loss_terms["cpe"] is None


def test_a_broken_output_names_the_term_it_broke_first() -> None:
    def loss(model: nn.Module, x: torch.Tensor) -> dict[str, torch.Tensor]:
        y = model(x)
        return {"safe": torch.zeros(()), "box": y.mean(), "cls": y.sum()}

    model = RaisesOnBroken()
    model.factor = 1e38
    with GuardedEngine(model, settings()) as engine:
        record = engine.step([X], loss)
    assert record.reason.startswith("model output is ")
    assert ", loss term box is " in record.reason
    assert record.first_nonfinite_phase == "forward"


def test_the_second_of_two_dropouts_is_traced_with_its_own_random_numbers() -> None:
    """Which micro-batch breaks depends on the random numbers: the trace must draw them again."""

    class Unlucky(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 1)
            self.lottery = nn.Dropout(0.5)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            drawn = self.lottery(torch.full((1,), 3.0e38))  # 0, or twice that: Inf
            return self.layer(x) + drawn.clamp(max=1.0) * drawn.sign() * 0

    found = []
    with GuardedEngine(Unlucky(), settings(bad_microbatch="drop")) as engine:
        torch.manual_seed(0)
        for _ in range(20):
            record = engine.step([X, X], mean)
            if record.label is BAD:
                found.append((record.batch_index % 2, record.first_nonfinite_module))
    assert found == []  # clamped away: nothing the engine judges is broken

    class Lost(Unlucky):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layer(x) + self.lottery(torch.full((1,), 3.0e38))

    with GuardedEngine(Lost(), settings(bad_microbatch="drop")) as engine:
        torch.manual_seed(0)
        for _ in range(20):
            record = engine.step([X, X], lambda m, x: m(x).mean() * 1e-38)
            if record.label is BAD:
                found.append((record.batch_index % 2, record.first_nonfinite_module))
    assert {position for position, _ in found} == {0, 1}
    assert {module for _, module in found} == {"lottery"}
