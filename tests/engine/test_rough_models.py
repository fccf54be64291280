"""Models and moments that are rough on an engine: odd buffers, copies, interruptions, devices."""

import copy
import sys
import threading
from typing import Any

import pytest
import torch
from torch import nn

from stability_search.engine import GuardedEngine, rollback
from stability_search.engine.rollback import Rollback
from stability_search.errors import UsageError
from stability_search.records.step import StepLabel
from stability_search.records.trial import Outcome
from stability_search.settings.engine import EngineSettings
from tests.engine.plain import BreakGradient, loss_fn, net, same, state_of, train, windows

X = torch.ones(2, 3)


def settings(**more: Any) -> EngineSettings:
    return EngineSettings(**{"learning_rate": 0.01, **more})


def mean(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return model(x).float().square().mean()


def nan(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return mean(model, x) * torch.nan


# -- buffers ---------------------------------------------------------------------------------


class Buffered(nn.Module):
    """Adds a buffer that `change` may write to when it runs."""

    def __init__(self, buffer: torch.Tensor, change: Any = None) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 4)
        self.register_buffer("table", buffer)
        self.change = change

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.change:
            self.change(self.table)
        return self.linear(x) + self.table.flatten()[:4].float()


def test_a_buffer_that_nobody_can_write_into_is_left_alone() -> None:
    model = Buffered(torch.ones(1).expand(4))
    with GuardedEngine(model, settings()) as engine:
        assert engine.evaluate([X], mean)[0] is not None
        assert engine.step([X], nan).label is StepLabel.BAD
        assert engine.step([X], mean).label is StepLabel.OK


@pytest.mark.parametrize("large", [1, 2**20])
def test_a_buffer_changed_in_a_bad_step_is_put_back_whatever_its_size(
    large: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rollback, "_LARGE", large)
    model = Buffered(torch.zeros(8), lambda table: table.add_(1))
    with GuardedEngine(model, settings()) as engine:
        seen = []
        for loss in (mean, nan, nan, mean, mean, nan):
            engine.step([X], loss)
            seen.append(model.table[0].item())
        engine.evaluate([X], mean)
    assert seen == [1.0, 1.0, 1.0, 2.0, 3.0, 3.0]
    assert model.table[0].item() == 3.0


def test_a_large_buffer_is_copied_once_and_again_only_when_it_was_written_to(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(rollback, "_LARGE", 4)
    model = Buffered(torch.zeros(8))
    kept = Rollback(model, torch.device("cpu"))

    def copied() -> torch.Tensor:
        kept.mark()
        (one,) = kept._kept.values()  # noqa: SLF001 - whether it was copied
        return one.copy

    first = copied()
    assert copied() is first
    model.table.add_(1)
    second = copied()
    assert second is not first
    assert torch.equal(second, model.table)
    other = Rollback(model, torch.device("cpu"), base=kept)
    other.mark()
    assert next(iter(other._kept.values())).copy is second  # noqa: SLF001 - as above


def test_the_statistics_of_a_norm_are_copied_always(monkeypatch: pytest.MonkeyPatch) -> None:
    """They change without a new version."""
    monkeypatch.setattr(rollback, "_LARGE", 4)
    model = net(dropout=0.0)
    data = windows(3)
    with GuardedEngine(model, settings()) as engine:
        train(engine, data[:2])
        before = copy.deepcopy(model.state_dict())
        engine.step(data[2], lambda m, b: loss_fn(m, b) * torch.nan)
    assert same(model.state_dict(), before)


def test_the_memory_of_large_copies_is_said() -> None:
    with GuardedEngine(Buffered(torch.zeros(2**19)), settings()) as engine:
        (note,) = engine.notes
        assert note.startswith("large buffers are kept a second time in main memory, 2 MiB more")
    with GuardedEngine(Buffered(torch.zeros(2**17)), settings()) as engine:
        assert engine.notes == ()


def test_a_buffer_registered_by_the_first_forward_pass_is_put_back_too() -> None:
    class Late(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(3, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.linear(x)
            if not hasattr(self, "seen"):
                self.register_buffer("seen", torch.zeros(()))
            self.seen += y.detach().sum()
            return y

    model = Late()
    with GuardedEngine(model, settings()) as engine:
        engine.step([X], mean)
        before = model.seen.item()
        engine.step([X * torch.inf], mean)
    assert model.seen.item() == before


@pytest.mark.parametrize("num_micro_batches", [1, 3])
def test_statistics_that_a_finite_loss_leaves_infinite_are_put_back(
    num_micro_batches: int,
) -> None:
    """The variance of large values overflows, and would stay infinite for ever."""
    data = windows(3, accumulation=num_micro_batches)
    x, y = data[1][0]
    data[1][0] = (x * 1e21, y)
    model = net(dropout=0.0)
    with GuardedEngine(model, settings()) as engine:
        labels = [record.label for record in train(engine, data)]
        records = engine.evaluate([data[2][0]], loss_fn)
    assert labels == [StepLabel.OK, StepLabel.BAD, StepLabel.OK]
    assert torch.isfinite(model[1].running_var).all()
    assert records[0] is not None


def test_without_a_look_at_statistics_they_would_be_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stability_search.engine.window.StatisticsWatch.judged", lambda _: None)
    data = windows(1)
    x, y = data[0][0]
    model = net(dropout=0.0)
    with GuardedEngine(model, settings()) as engine:
        assert engine.step([(x * 1e21, y)], loss_fn).label is StepLabel.OK
    assert not torch.isfinite(model[1].running_var).all()


# -- copies, devices, interruptions ----------------------------------------------------------


def test_a_copy_of_the_model_is_not_watched() -> None:
    """A teacher or an average may give Inf that nobody trains on."""

    class MayBreak(nn.Linear):
        factor = 1.0

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) * self.factor

    with GuardedEngine(MayBreak(3, 4), settings()) as engine:
        average = copy.deepcopy(engine.model)
        average.factor = torch.inf

        def loss(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
            average(x)
            return mean(model, x)

        assert engine.step([X], loss).label is StepLabel.OK
        engine.model.factor = torch.inf  # the twin: the model itself is
        assert engine.step([X], lambda m, x: m(x).nan_to_num().sum()).label is StepLabel.BAD


def test_a_part_of_the_output_on_another_device_is_noted() -> None:
    class Two(nn.Linear):
        def forward(self, x: torch.Tensor) -> Any:
            return {"y": super().forward(x), "lengths": torch.ones(2, device="meta")}

    with GuardedEngine(Two(3, 4), settings()) as engine:
        record = engine.step([X], lambda m, x: m(x)["y"].square().mean())
        assert record.label is StepLabel.OK
        (note,) = engine.notes
    assert note == "The model's output is not fully observed (a part of it is not on cpu)."


@pytest.mark.parametrize("error", [KeyboardInterrupt, KeyError])
def test_after_an_interrupted_step_training_goes_on_as_if_it_had_not_been(
    error: type[BaseException],
) -> None:
    data = windows(6, accumulation=2)

    def interrupted(model: nn.Module, batch: Any) -> torch.Tensor:
        loss = loss_fn(model, batch)
        if batch is data[3][1]:
            raise error
        return loss

    whole, broken = net(dropout=0.0), net(dropout=0.0)
    with GuardedEngine(whole, settings()) as engine:
        expected = [record.loss for record in train(engine, data)]
    with GuardedEngine(broken, settings()) as engine:
        train(engine, data[:3])
        before = state_of(engine)
        with pytest.raises(error):
            engine.step(data[3], interrupted)
        assert same(state_of(engine), before)
        assert all(parameter.grad is None for parameter in broken.parameters())
        records = train(engine, data[3:])
    assert [record.step for record in records] == [4, 5, 6]
    assert [record.loss for record in records] == expected[3:]
    assert same(broken.state_dict(), whole.state_dict())


# -- exceptions of the backward pass ---------------------------------------------------------


class Refuses(torch.autograd.Function):
    """Raise where a gradient is not finite, as a careful task may."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:  # noqa: ARG004 - torch's signature
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:  # noqa: ARG004 - as above
        if not torch.isfinite(gradient).all():
            raise ValueError("a gradient of mine is not finite")
        return gradient


class Refusing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return Refuses.apply(self.linear(x))


def test_what_the_task_raises_backwards_because_of_a_nan_is_a_bad_step() -> None:
    with GuardedEngine(Refusing(), settings()) as engine:
        record = engine.step([X], lambda m, x: BreakGradient.apply(mean(m, x)))
        assert engine.step([X], mean).label is StepLabel.OK
    assert (record.label, record.is_applied) == (StepLabel.BAD, False)
    assert record.reason == "ValueError: a gradient of mine is not finite"


def test_anomaly_detection_is_no_users_error() -> None:
    with (
        GuardedEngine(nn.Linear(3, 4), settings()) as engine,
        torch.autograd.set_detect_anomaly(True),
        pytest.warns(UserWarning, match="Error detected in"),
    ):
        record = engine.step([X], lambda m, x: (m(x) * 0).sqrt().mul(0).sum())
    assert record.label is StepLabel.BAD
    assert record.reason.startswith("RuntimeError: Function 'SqrtBackward0' returned nan values")


def test_what_the_task_raises_backwards_for_another_reason_propagates() -> None:
    class Fails(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:  # noqa: ARG004 - torch's signature
            return x.clone()

        @staticmethod
        def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:  # noqa: ARG004 - as above
            raise KeyError("frames")

    with (
        GuardedEngine(nn.Linear(3, 4), settings()) as engine,
        pytest.raises(KeyError, match="frames"),
    ):
        engine.step([X], lambda m, x: Fails.apply(mean(m, x)))


def test_a_repeat_without_memory_says_nothing_about_the_place() -> None:
    num_calls = 0

    def loss(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
        nonlocal num_calls
        num_calls += 1
        if num_calls == 2:
            raise torch.OutOfMemoryError("no memory for a repeat")
        return BreakGradient.apply(mean(model, x))

    with GuardedEngine(nn.Linear(3, 4), settings()) as engine:
        record = engine.step([X], loss)
    assert (record.label, num_calls) == (StepLabel.BAD, 2)
    assert (record.first_nonfinite_module, record.is_transient) == (None, None)


# -- settings --------------------------------------------------------------------------------


def test_a_refused_construction_leaves_the_model_as_it_was() -> None:
    model = nn.Linear(3, 4)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(UsageError, match="attention_clamp"):
        GuardedEngine(model, settings(init_gain=0.5, attention_clamp=5.0))
    other = [{"params": list(nn.Linear(1, 1).parameters())}]
    with pytest.raises(UsageError, match="every parameter must be one of the model"):
        GuardedEngine(model, settings(init_gain=0.5), parameter_groups=other)
    assert same(model.state_dict(), before)


def test_the_engine_itself_ends_at_max_bad_steps_and_remembers_them() -> None:
    with GuardedEngine(nn.Linear(3, 4), settings(max_bad_steps=3)) as engine:
        for loss in (nan, mean, nan):
            engine.step([X], loss)
        state = copy.deepcopy(engine.state_dict())
        assert engine.ended is None
    with GuardedEngine(nn.Linear(3, 4), settings(max_bad_steps=3)) as engine:
        engine.load_state_dict(state)
        engine.step([X], nan)
        assert engine.ended == (Outcome.PRUNED, "max_bad_steps")


@pytest.mark.parametrize("eps", [0.0, 5e-324])
def test_an_eps_of_nothing_gives_no_number_that_is_not_finite(eps: float) -> None:
    model = nn.Linear(3, 4)
    groups = [{"params": list(model.parameters()), "eps": eps}]
    with GuardedEngine(model, settings(), parameter_groups=groups) as engine:
        records = [engine.step([X], mean) for _ in range(4)]
    assert records[3].grad_rms_over_eps is None
    assert records[3].zero_grad_frac is not None


# -- saved states ----------------------------------------------------------------------------


def test_a_buffer_that_the_model_leaves_out_of_its_state_is_saved_too() -> None:
    class Decaying(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(3, 4)
            self.register_buffer("level", torch.zeros(()), persistent=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.level = self.level * 0.9 + 1
            return self.linear(x) * self.level

    torch.manual_seed(0)
    first, second = Decaying(), Decaying()
    with GuardedEngine(first, settings()) as engine:
        for _ in range(5):
            engine.step([X], mean)
        state = copy.deepcopy(engine.state_dict())
        expected = engine.step([X], mean).loss
    with GuardedEngine(second, settings()) as engine:
        engine.load_state_dict(state)
        assert engine.step([X], mean).loss == expected
    assert "level" not in second.state_dict()


@pytest.mark.parametrize(
    ("more", "rule"),
    [
        ({"optimizer": "sgd"}, "same optimizer, but optimizer was adamw there and is sgd here"),
        ({"precision": "bf16"}, "same precision, but precision was fp32 there and is bf16"),
        ({"norm": "group"}, "same norm, but norm was keep there and is group here"),
    ],
)
def test_a_state_of_other_settings_is_refused_before_anything_is_loaded(
    more: dict[str, Any], rule: str
) -> None:
    with GuardedEngine(net(1), settings()) as engine:
        train(engine, windows(2))
        state = engine.state_dict()
    model = net(2)
    with GuardedEngine(model, settings(**more)) as engine:
        before = copy.deepcopy(model.state_dict())
        with pytest.raises(ValueError, match=rule):
            engine.load_state_dict(state)
        assert same(model.state_dict(), before)


def test_a_state_of_another_model_is_refused_before_anything_is_loaded() -> None:
    with GuardedEngine(nn.Linear(3, 4), settings()) as engine:
        state = engine.state_dict()
    other = nn.Sequential(nn.Linear(3, 4))
    with (
        GuardedEngine(other, settings()) as engine,
        pytest.raises(ValueError, match=r"0.bias has shape None there and \(4,\) here"),
    ):
        engine.load_state_dict(state)
    with (
        GuardedEngine(other, settings()) as engine,
        pytest.raises(ValueError, match=r"what GuardedEngine\.state_dict returned"),
    ):
        engine.load_state_dict({"model": {}})


def test_what_the_user_changed_on_the_way_is_not_replaced_by_the_state() -> None:
    with GuardedEngine(net(), settings(weight_decay=0.5, precision="fp16")) as engine:
        train(engine, windows(2))
        state = engine.state_dict()
    changed = settings(weight_decay=0.0, beta1=0.5, precision="fp16", init_scale=8, max_scale=8)
    with GuardedEngine(net(), changed) as engine:
        engine.load_state_dict(state)
        group = engine.optimizer.param_groups[0]
        assert (group["weight_decay"], group["betas"][0]) == (0.0, 0.5)
        assert engine.scale == 8.0


# -- schedules -------------------------------------------------------------------------------


@pytest.mark.parametrize("more", [{}, {"num_planned_steps": 10, "warmup_steps": 10}])
def test_a_schedule_without_steps_to_run_over_is_refused(more: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="num_planned_steps > warmup_steps must hold for cosine"):
        GuardedEngine(nn.Linear(3, 4), settings(schedule="cosine", **more))


def test_a_rate_of_zero_after_the_plan_is_said_once() -> None:
    chosen = settings(schedule="linear", num_planned_steps=2)
    with GuardedEngine(nn.Linear(3, 4), chosen) as engine:
        rates = [engine.step([X], mean).learning_rate for _ in range(4)]
        assert rates == [0.01, 0.005, 0.0, 0.0]
        (note,) = engine.notes
    assert note.startswith("The schedule has reached a rate of 0 after num_planned_steps=2")


def test_engines_of_two_threads_take_turns_and_leave_torch_as_it_was() -> None:
    before = torch.nn.functional.softmax, torch.nn.functional.scaled_dot_product_attention
    found: dict[str, list[Any]] = {}

    def work(name: str, cap: float | None) -> None:
        torch.manual_seed(0)
        layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        x = torch.randn(4, 5, 8, generator=torch.Generator().manual_seed(1))
        with GuardedEngine(layer, settings(attention_logit_cap=cap)) as engine:
            found[name] = [engine.step([x], mean).cap_frac for _ in range(15)]

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        caps = {"capped": 2.0, "free": None}
        threads = [threading.Thread(target=work, args=item) for item in caps.items()]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert found["free"] == [None] * 15
    assert None not in found["capped"]
    after = torch.nn.functional.softmax, torch.nn.functional.scaled_dot_product_attention
    assert after == before
