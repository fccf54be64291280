"""Guards that have nothing to do change nothing: plain PyTorch, bit for bit."""

from typing import Any

import pytest
import torch

from stability_search.engine import GuardedEngine
from stability_search.records import StepLabel
from stability_search.settings import EngineSettings
from tests.engine.plain import loss_fn, net, same, train, train_plain, windows

STEPS = 60


def both(data: Any = None, **settings: Any) -> tuple[Any, Any, Any, Any, Any]:
    chosen = EngineSettings(
        **{"learning_rate": 0.01, "num_planned_steps": STEPS, "fp16_on_cpu": "native", **settings}
    )
    data = windows(STEPS) if data is None else data
    plain, guarded = net(), net()
    torch.manual_seed(7)
    losses, optimizer, scaler = train_plain(plain, chosen, data)
    after_plain = torch.get_rng_state()
    torch.manual_seed(7)
    with GuardedEngine(guarded, chosen) as engine:
        records = train(engine, data)
        assert torch.equal(torch.get_rng_state(), after_plain)
        assert same(list(plain.parameters()), list(guarded.parameters()))
        if all(record.is_applied for record in records):
            assert same(plain.state_dict(), guarded.state_dict())
        assert same(
            list(optimizer.state_dict()["state"].values()),
            list(engine.optimizer.state_dict()["state"].values()),
        )
    return losses, records, scaler, engine, guarded


@pytest.mark.parametrize("clip_norm", [None, 0.5])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_it_trains_as_plain_pytorch_does(precision: str, clip_norm: float | None) -> None:
    losses, records, _, _, _ = both(precision=precision, clip_norm=clip_norm, init_scale=1024.0)

    assert {record.label for record in records} == {StepLabel.OK}
    assert [record.loss for record in records] == pytest.approx(losses, rel=1e-6)
    if clip_norm is not None:
        assert any(record.clipped for record in records)


@pytest.mark.parametrize("clip_norm", [None, 0.5])
def test_the_search_for_the_loss_scale_is_gradscalers(clip_norm: float | None) -> None:
    _, records, scaler, engine, _ = both(
        precision="fp16", init_scale=2.0**30, growth_interval=15, clip_norm=clip_norm
    )

    labels = [record.label for record in records]
    num_calibrated = labels.index(StepLabel.OK)
    assert num_calibrated >= 5
    assert set(labels[:num_calibrated]) == {StepLabel.CALIBRATION}
    assert set(labels) == {StepLabel.CALIBRATION, StepLabel.OK}
    assert engine.scale == scaler.get_scale()


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_sgd_too(precision: str, momentum: float) -> None:
    _, records, _, _, _ = both(
        optimizer="sgd", momentum=momentum, precision=precision, init_scale=1024.0
    )
    assert records[-1].label is StepLabel.OK


def test_sgd_whose_first_steps_are_skipped_starts_as_if_they_had_not_been() -> None:
    """Torch makes a momentum on the first step, of arbitrary memory if that one is skipped."""
    data = windows(1) * 30
    settings = {"learning_rate": 0.001, "optimizer": "sgd", "momentum": 0.9, "precision": "fp16"}
    late, early = net(dropout=0.0), net(dropout=0.0)

    with GuardedEngine(late, EngineSettings(init_scale=2.0**30, **settings)) as engine:
        skipped = [record for record in train(engine, data) if not record.is_applied]
        scale = engine.scale
    assert [record.step for record in skipped] == [*range(1, len(skipped) + 1)]
    assert len(skipped) >= 3
    with GuardedEngine(early, EngineSettings(init_scale=scale, **settings)) as engine:
        train(engine, data[len(skipped) :])

    assert same(late.state_dict(), early.state_dict())


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_accumulation_too(precision: str) -> None:
    data = windows(50, accumulation=3)
    losses, records, _, _, _ = both(data, precision=precision, clip_norm=1.0, init_scale=1024.0)
    assert [record.loss for record in records] == pytest.approx(losses, rel=1e-6)


def test_a_number_that_is_off_by_one_bit_would_be_seen() -> None:
    """The twin: the comparison above is one that can fail."""
    first, second = net(), net()
    with torch.no_grad():
        weight = second[0].weight
        weight[0, 0] = torch.nextafter(weight[0, 0], torch.tensor(10.0))
    assert not same(first.state_dict(), second.state_dict())


def test_accumulated_micro_batches_equal_one_big_batch() -> None:
    small = windows(20, accumulation=4, size=4)
    big = [[tuple(torch.cat(parts) for parts in zip(*window, strict=True))] for window in small]
    first, second = (torch.nn.Linear(6, 1) for _ in range(2))
    second.load_state_dict(first.state_dict())
    settings = EngineSettings(learning_rate=0.05, clip_norm=0.7)

    with GuardedEngine(first, settings) as engine:
        accumulated = train(engine, small, loss_fn)
    with GuardedEngine(second, settings) as engine:
        whole = train(engine, big, loss_fn)

    for one, other in zip(accumulated, whole, strict=True):
        assert one.loss == pytest.approx(other.loss, rel=1e-5)
        assert one.grad_norm == pytest.approx(other.grad_norm, rel=1e-4)
    assert torch.allclose(first.weight, second.weight, atol=1e-5)
