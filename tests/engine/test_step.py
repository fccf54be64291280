"""One step, and many: labels, rollback, the loss scale, and how an engine ends."""

import math
from typing import Any

import pytest
import torch
from torch import nn

from stability_search.engine import GuardedEngine
from stability_search.errors import UsageError
from stability_search.records.step import StepLabel, StepRecord
from stability_search.records.trial import Outcome
from stability_search.settings.engine import EngineSettings
from tests.engine.plain import BreakGradient, net, same, state_of, train, windows

OK, CALIBRATION, BAD, DATA = StepLabel
X = torch.ones(2, 3)


def settings(**more: Any) -> EngineSettings:
    return EngineSettings(**{"learning_rate": 0.01, **more})


def mean(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return model(x).float().square().mean()


class Scripted:
    """A loss whose value or gradient breaks on cue; the step is that of the last batch."""

    def __init__(self, engine: GuardedEngine, faults: dict[int, str]) -> None:
        self.engine = engine
        self.faults = faults
        self.step = 0

    def take(self, num_steps: int, *, batch: Any = X) -> list[StepRecord]:
        records = []
        for _ in range(num_steps):
            self.step += 1
            records.append(self.engine.step([batch], self.loss))
        return records

    def loss(self, model: nn.Module, x: torch.Tensor) -> torch.Tensor:
        loss = mean(model, x)
        fault = self.faults.get(self.step)
        if fault == "loss":
            return loss * math.nan
        if fault == "gradient":
            return BreakGradient.apply(loss)
        return loss


def scripted(faults: dict[int, str], **more: Any) -> Scripted:
    torch.manual_seed(0)
    return Scripted(GuardedEngine(nn.Linear(3, 1), settings(**more)), faults)


# -- labels ----------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_step_is_recorded(precision: str) -> None:
    model = nn.Linear(3, 1, bias=False)
    with torch.no_grad():
        model.weight.fill_(0.5)
    chosen = settings(precision=precision, clip_norm=1.0, warmup_steps=4, init_scale=256.0)
    with GuardedEngine(model, chosen) as engine:
        first = engine.step([X], mean)
        second = engine.step([X], mean)
    assert (first.step, first.label, first.reason) == (1, OK, "")
    assert first.loss == pytest.approx(2.25)
    assert first.grad_norm == pytest.approx(3.0 * math.sqrt(3), rel=1e-3)
    assert (first.is_loss_finite, first.is_grad_finite, first.is_applied) == (True, True, True)
    assert (first.clipped, first.learning_rate, second.learning_rate) == (True, 0.0025, 0.005)
    assert first.scale == (256.0 if precision == "fp16" else None)
    assert (first.batch_index, first.first_nonfinite_module, first.first_nonfinite_phase) == (
        *(None, None, None),
    )
    assert (first.attention_max, first.clamp_frac, first.cap_frac) == (None, None, None)
    assert second.loss < first.loss
    assert first.step_s > 0


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_without_a_loss_scale_a_broken_gradient_is_bad(precision: str) -> None:
    trial = scripted({2: "gradient"}, precision=precision)
    with trial.engine:
        records = trial.take(3)
    assert [record.label for record in records] == [OK, BAD, OK]
    assert records[1].reason == "gradient is NaN or Inf"
    assert records[1].is_loss_finite
    assert not records[1].is_grad_finite
    assert (records[1].grad_norm, records[1].is_applied) == (None, False)
    assert records[1].first_nonfinite_phase == "loss"


def test_a_finite_gradient_whose_square_is_not_is_skipped() -> None:
    """It would make Adam's second moment infinite and the parameter stop for ever."""
    model = nn.Linear(1, 1, bias=False)
    with torch.no_grad():
        model.weight.fill_(1.0)
    with GuardedEngine(model, settings()) as engine:
        record = engine.step([torch.ones(1, 1)], lambda m, x: m(x).sum() * 1.5e19)
        again = engine.step([torch.ones(1, 1)], lambda m, x: m(x).sum())
    assert (record.label, record.is_applied, record.grad_norm) == (
        BAD,
        False,
        pytest.approx(1.5e19),
    )
    assert record.reason == "gradient norm is 9.2e+18 or more, and its square overflows"
    assert (record.first_nonfinite_phase, record.is_transient) == ("backward", None)
    assert (again.label, model.weight.item()) == (OK, pytest.approx(1.0 - 0.01 * 1.01))


def test_finite_gradients_of_a_scaled_loss_overflow_by_their_square_too() -> None:
    """Device and host must agree on it: 2^64 * 1 is finite, and its square is not."""
    model = nn.Linear(1, 1, bias=False)
    chosen = settings(precision="fp16", init_scale=2.0**64)
    before = model.weight.item()
    with GuardedEngine(model, chosen) as engine:
        record = engine.step([torch.ones(1)], lambda m, x: (m.weight.float() * x).sum())
        assert (record.label, record.is_applied) == (CALIBRATION, False)
        assert (engine.scale, model.weight.item()) == (2.0**63, before)
        record = engine.step([torch.ones(1)], lambda m, x: (m.weight.float() * x).sum())
        assert record.is_applied == (model.weight.item() != before)


@pytest.mark.parametrize("init_scale", [2.0**24, 2.0**32, 2.0**40])
def test_calibration_is_never_bad(init_scale: float) -> None:
    model = net(dropout=0.0)
    with GuardedEngine(model, settings(precision="fp16", init_scale=init_scale)) as engine:
        records = train(engine, windows(60))
    labels = [record.label for record in records]
    assert labels.count(CALIBRATION) == math.log2(init_scale / engine.scale)
    assert labels.count(CALIBRATION) >= 2
    assert set(labels) == {CALIBRATION, OK}
    assert engine.ended is None


def test_counting_every_overflow_would_call_calibration_bad(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The twin: with every scale taken as known to work the same run is full of bad steps."""
    with GuardedEngine(net(dropout=0.0), settings(precision="fp16", init_scale=2.0**40)) as engine:
        monkeypatch.setattr(engine._proof, "proven_scale", math.inf)  # noqa: SLF001 - on purpose
        monkeypatch.setattr(engine._proof, "overflow_was_bad", lambda _: None)  # noqa: SLF001
        labels = [record.label for record in train(engine, windows(10))]
    assert labels[:3] == [BAD, BAD, BAD]


def test_eleven_broken_forward_passes_leave_the_scale_where_it_is() -> None:
    trial = scripted(dict.fromkeys(range(1, 12), "loss"), precision="fp16", init_scale=1024.0)
    with trial.engine:
        records = trial.take(13)
        assert trial.engine.scale == 1024.0
    assert [record.label for record in records] == [BAD] * 11 + [OK] * 2
    assert {record.scale for record in records} == {1024.0}
    assert trial.engine.ended is None


def test_gradscaler_would_have_collapsed_on_the_same_steps() -> None:
    """The twin: the same eleven through torch's scaler end below 1."""
    model = nn.Linear(3, 1)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for _ in range(11):
        optimizer.zero_grad()
        scaler.scale(mean(model, X) * math.nan).backward()
        scaler.step(optimizer)
        scaler.update()
    assert scaler.get_scale() == 0.5


def test_a_fault_at_every_fifteenth_step_is_bad_twelve_times_of_thirteen() -> None:
    faults = dict.fromkeys(range(15, 201, 15), "gradient")
    trial = scripted(faults, precision="fp16", init_scale=2.0**13)
    with trial.engine:
        records = trial.take(200)
        assert (trial.engine.scale, trial.engine.ended) == (1.0, None)
    labels = {record.step: record.label for record in records}
    assert [labels[step] for step in faults] == [CALIBRATION] + [BAD] * 12
    assert all(labels[step] is OK for step in labels.keys() - faults.keys())


def test_a_withdrawn_proof_makes_the_next_growth_a_calibration() -> None:
    faults = {26: "gradient", 37: "gradient"}
    trial = scripted(faults, precision="fp16", init_scale=1024.0, growth_interval=10)
    with trial.engine:
        records = trial.take(40)
    scales = [record.scale for record in records]
    assert (scales[25], scales[26], scales[36], scales[37]) == (4096.0, 2048.0, 4096.0, 2048.0)
    # With so small an interval nothing is ever proven, so neither fault is bad.
    assert [records[k - 1].label for k in faults] == [CALIBRATION, CALIBRATION]


def test_what_is_known_of_a_scale_is_withdrawn_and_proven_again() -> None:
    faults = dict.fromkeys((30, 46, 71, 72), "gradient")
    trial = scripted(faults, precision="fp16", init_scale=512.0, growth_interval=24)
    with trial.engine:
        records = trial.take(72)
    found = {k: (records[k - 1].scale, records[k - 1].label) for k in faults}
    # 512 was proven in 24 steps, and 1024 not in the five since it was reached.
    assert found[30] == (1024.0, CALIBRATION)
    # Back at 512 it takes a bad overflow to doubt it.
    assert found[46] == (512.0, BAD)
    # 24 calm steps at 256 later it is tried anew, so that its overflow is calibration again,
    assert found[71] == (512.0, CALIBRATION)
    # and 256, which has carried those, is known to work.
    assert found[72] == (256.0, BAD)


def test_the_scale_grows_as_planned() -> None:
    trial = scripted(
        {}, precision="fp16", init_scale=1024.0, growth_interval=100, max_scale=4096.0
    )
    with trial.engine:
        scales = [record.scale for record in trial.take(401)]
    assert [scales[k] for k in (99, 100, 199, 200, 400)] == [
        1024.0,
        2048.0,
        2048.0,
        4096.0,
        4096.0,
    ]


# -- how it ends -----------------------------------------------------------------------------


def test_a_scale_below_one_ends_it() -> None:
    trial = scripted(dict.fromkeys(range(1, 9), "gradient"), precision="fp16", init_scale=4.0)
    with trial.engine:
        records = trial.take(2)
        assert (trial.engine.scale, trial.engine.ended) == (1.0, None)
        records += trial.take(1)
        assert trial.engine.scale == 0.5
        assert trial.engine.ended == (
            Outcome.SCALE_COLLAPSE,
            "the loss scale fell to 0.5, below 1",
        )
        with pytest.raises(ValueError, match=r"must not have ended, but it did: scale_collapse"):
            trial.take(1)
    assert [record.label for record in records] == [CALIBRATION, CALIBRATION, BAD]
    assert records[-1].reason == "gradient is NaN or Inf at loss scale 1"


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_broken_parameter_ends_it(value: float) -> None:
    model = nn.Sequential(nn.Linear(3, 1), nn.Linear(1, 1))
    model.register_parameter("unused", nn.Parameter(torch.zeros(2)))
    with GuardedEngine(model, settings()) as engine:
        assert engine.step([X], mean).label is OK
        with torch.no_grad():
            model.unused[1] = value
        record = engine.step([X], mean)
        assert (record.label, record.reason) == (BAD, "parameter unused became NaN or Inf")
        assert record.is_loss_finite
        assert engine.ended == (Outcome.NONFINITE_PARAMETERS, "parameter unused became NaN or Inf")


def test_an_update_that_breaks_a_parameter_ends_it_at_once() -> None:
    model = nn.Linear(1, 1, bias=False)
    with torch.no_grad():
        model.weight.fill_(3.4e38)
    chosen = settings(learning_rate=1e38, optimizer="sgd")
    with GuardedEngine(model, chosen) as engine:
        record = engine.step([torch.ones(1, 1)], lambda m, x: -(m(x) * 1e-20).sum() * 1e20)
        assert (record.label, record.is_applied) == (BAD, True)
        assert engine.ended is not None
        assert engine.ended[0] is Outcome.NONFINITE_PARAMETERS


def test_a_broken_second_moment_ends_it() -> None:
    with GuardedEngine(nn.Linear(3, 1), settings()) as engine:
        engine.step([X], mean)
        weight = engine.optimizer.param_groups[0]["params"][0]
        engine.optimizer.state[weight]["exp_avg_sq"].fill_(math.inf)
        records = []
        while engine.ended is None:
            records.append(engine.step([X], mean))
    assert len(records) <= 16
    assert records[-1].label is BAD
    assert records[-1].reason == "optimizer state of weight became NaN or Inf"
    assert engine.ended[0] is Outcome.NONFINITE_PARAMETERS


def test_huge_but_finite_parameters_go_on() -> None:
    model = nn.Linear(1, 1, bias=False)
    with torch.no_grad():
        model.weight.fill_(1e30)
    with GuardedEngine(model, settings()) as engine:
        assert engine.step([torch.ones(1, 1)], lambda m, x: m(x).mean() * 1e-20).label is OK
        assert engine.ended is None


# -- misuse and models -----------------------------------------------------------------------


def test_misuse_is_refused() -> None:
    engine = GuardedEngine(nn.Linear(3, 1), settings())
    with pytest.raises(ValueError, match="at least one must be given, but got none"):
        engine.step([], mean)
    with pytest.raises(ValueError, match=r"0-d tensor or a dict of them, but got shape \(2, 1\)"):
        engine.step([X], lambda m, x: m(x))
    engine.close()
    for use in (lambda: engine.step([X], mean), lambda: engine.evaluate([X], mean)):
        with pytest.raises(ValueError, match="it must be open, but it was closed"):
            use()
    with pytest.raises(UsageError, match="must have a parameter to train, but has none"):
        GuardedEngine(nn.ReLU(), settings())


def test_the_optimizer_can_be_used_after_close_though_the_last_step_was_skipped() -> None:
    model = nn.Linear(3, 1)
    with GuardedEngine(model, settings()) as engine:
        engine.step([X], lambda m, x: mean(m, x) * math.nan)
    before = model.weight.clone()
    mean(model, X).backward()
    engine.optimizer.step()
    assert not torch.equal(model.weight, before)


def test_parameters_outside_the_groups_are_left_alone() -> None:
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 1))
    before = model[0].weight.clone()
    groups = [{"params": model[1].parameters(), "weight_decay": 0.0}]
    with GuardedEngine(model, settings(), parameter_groups=groups) as engine:
        record = engine.step([X], mean)
        norm = torch.nn.utils.get_total_norm([p.grad for p in model[1].parameters()]).item()
    assert torch.equal(model[0].weight, before)
    assert record.grad_norm == pytest.approx(norm)


def test_half_precision_parameters_train_as_fp32_master_weights() -> None:
    """In pure fp16 Adam's eps of 1e-8 is zero and the parameters are NaN at the first step."""
    torch.manual_seed(0)
    pure = nn.Linear(3, 1).half()
    optimizer = torch.optim.AdamW(pure.parameters())
    (pure(X.half()) * 0).sum().backward()
    optimizer.step()
    assert not torch.isfinite(pure.weight).all()

    model = nn.Linear(3, 1).half()
    with GuardedEngine(model, settings(precision="fp16", clip_norm=1.0)) as engine:
        assert len(engine.notes) == 1
        records = [engine.step([X], lambda m, x: mean(m, x) * 0) for _ in range(3)]
    assert [record.label for record in records] == [OK] * 3
    assert model.weight.dtype == torch.float32


def test_checkpointing_with_fp16_and_a_cap_gives_the_same_losses() -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.1, batch_first=True)
    data = [[torch.randn(4, 5, 8)] for _ in range(10)]
    found = []
    for is_checkpointed in (False, True):
        torch.manual_seed(1)
        model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        chosen = settings(
            precision="fp16",
            attention_logit_cap=2.0,
            attention_clamp=1.0,
            clip_norm=1.0,
            init_scale=1024.0,
            gradient_checkpointing=is_checkpointed,
        )
        with GuardedEngine(model, chosen) as engine:
            torch.manual_seed(2)
            records = train(engine, data, lambda m, x: (m(x).float() - 1).square().mean())
            found.append(([(r.loss, r.grad_norm, r.cap_frac) for r in records], state_of(engine)))
    assert found[0][0] == found[1][0]
    assert same(found[0][1], found[1][1])
    assert all(frac is not None for *_, frac in found[0][0])
