"""Guards that have nothing to do change nothing: plain PyTorch, bit for bit."""

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - torch's own convention
from torch import nn

from stability_search.engine import GuardedEngine
from stability_search.records.step import StepLabel
from stability_search.settings.engine import EngineSettings
from stability_search.tasks.teacher import Teacher
from tests.engine.plain import loss_fn, net, same, train, train_plain, windows

pytestmark = pytest.mark.fault  # whole trainings

STEPS = 200
PRECISIONS = pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
# Switched on, and never acting.
SILENT = {"clip_norm": 1e6, "bad_microbatch": "drop", "max_bad_steps": 1}


def both(
    data: Sequence[list[Any]] | None = None,
    build: Callable[[], nn.Module] = net,
    loss: Any = loss_fn,
    silent: dict[str, Any] | None = None,
    **settings: Any,
) -> tuple[Any, Any, Any, Any, Any]:
    """Train in plain PyTorch and guarded, and hold the two together, losses too.

    Args:
        data: Windows of micro-batches.
        build: Makes the same model twice.
        loss: Loss of a micro-batch.
        silent: Settings of the guarded engine alone.
        settings: Settings of both.
    """
    chosen = EngineSettings(
        **{"learning_rate": 0.01, "num_planned_steps": STEPS, "fp16_on_cpu": "native", **settings}
    )
    data = windows(STEPS) if data is None else data
    plain, guarded = build(), build()
    torch.manual_seed(7)
    losses, optimizer, scaler = train_plain(plain, chosen, data, loss)
    after_plain = torch.get_rng_state()
    torch.manual_seed(7)
    with GuardedEngine(guarded, dataclasses.replace(chosen, **(silent or {}))) as engine:
        records = train(engine, data, loss)
        assert torch.equal(torch.get_rng_state(), after_plain)
        assert same(list(plain.parameters()), list(guarded.parameters()))
        if all(record.is_applied for record in records):
            assert same(plain.state_dict(), guarded.state_dict())
        assert same(
            list(optimizer.state_dict()["state"].values()),
            list(engine.optimizer.state_dict()["state"].values()),
        )
        assert [record.loss for record in records] == losses
    return losses, records, scaler, engine, guarded


@PRECISIONS
def test_it_trains_as_plain_pytorch_does(precision: str) -> None:
    _, records, _, _, _ = both(precision=precision, init_scale=1024.0)
    assert [record.label for record in records] == [StepLabel.OK] * STEPS


@PRECISIONS
def test_clipping_too(precision: str) -> None:
    _, records, _, _, _ = both(windows(60), precision=precision, clip_norm=0.5, init_scale=1024.0)
    assert {record.label for record in records} == {StepLabel.OK}
    assert any(record.clipped for record in records)


@PRECISIONS
def test_guards_that_are_silent_change_nothing_either(precision: str) -> None:
    data = windows(100)
    _, records, _, _, _ = both(data, silent=SILENT, precision=precision, init_scale=1024.0)
    assert {record.label for record in records} == {StepLabel.OK}


def test_a_guard_that_acts_once_is_seen() -> None:
    """The twin: one clipped step of 60, and nothing is equal any more."""
    data = windows(60)
    highest = max(record.grad_norm for record in both(data)[1])
    with pytest.raises(AssertionError, match="same"):
        both(data, silent={"clip_norm": highest * 0.999})


@pytest.mark.parametrize("clip_norm", [None, 0.5])
def test_the_search_for_the_loss_scale_is_gradscalers(clip_norm: float | None) -> None:
    _, records, scaler, engine, _ = both(
        windows(60), precision="fp16", init_scale=2.0**30, growth_interval=15, clip_norm=clip_norm
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
        windows(60), optimizer="sgd", momentum=momentum, precision=precision, init_scale=1024.0
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


@PRECISIONS
def test_accumulation_too(precision: str) -> None:
    data = windows(50, accumulation=3)
    _, records, _, _, _ = both(data, precision=precision, clip_norm=1.0, init_scale=1024.0)
    assert {record.label for record in records} == {StepLabel.OK}


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


# -- whole models ----------------------------------------------------------------------------


class Translator(nn.Module):
    """A small transformer as torch builds it: fused attention, dropout, no buffers."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.1, batch_first=True)
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.words = nn.Embedding(11, 16)

    def forward(self, words: torch.Tensor) -> torch.Tensor:
        return F.linear(self.layers(self.words(words)), self.words.weight)


def translate(model: nn.Module, words: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(model(words).float().flatten(0, 1), words.flip(1).flatten())


def sentences() -> list[list[torch.Tensor]]:
    generator = torch.Generator().manual_seed(2)
    return [[torch.randint(11, (4, 8), generator=generator)] for _ in range(STEPS)]


SILENT_ATTENTION = {**SILENT, "attention_clamp": 1e4}


@pytest.mark.fault
@pytest.mark.parametrize(
    "silent",
    [{}, SILENT_ATTENTION, {"gradient_checkpointing": True}],
    ids=["off", "silent", "checkpointed"],
)
@PRECISIONS
def test_a_transformer_trains_as_in_plain_pytorch(precision: str, silent: dict[str, Any]) -> None:
    _, records, _, _, _ = both(
        sentences(),
        Translator,
        translate,
        silent,
        precision=precision,
        learning_rate=1e-3,
        init_scale=1024.0,
    )
    assert [record.label for record in records] == [StepLabel.OK] * STEPS
    assert records[-1].loss < records[0].loss


@pytest.mark.fault
@pytest.mark.parametrize("silent", [{}, SILENT_ATTENTION], ids=["off", "silent"])
@PRECISIONS
def test_the_teacher_trains_as_in_plain_pytorch(precision: str, silent: dict[str, Any]) -> None:
    task = Teacher(hidden=8, heads=2, blocks=1)
    stream = task.batches(2, torch.Generator().manual_seed(0))

    def build() -> nn.Module:
        torch.manual_seed(0)
        return task.model()

    _, records, _, _, _ = both(
        [[batch] for batch in itertools.islice(stream, STEPS)],
        build,
        task.loss,
        silent,
        precision=precision,
        learning_rate=1e-3,
        init_scale=1024.0,
    )
    assert [record.label for record in records] == [StepLabel.OK] * STEPS
