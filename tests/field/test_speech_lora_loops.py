"""Adapters stored in fp16 cannot be unscaled by torch's scaler, checkpointed or not.

Plain PyTorch throughout: which loops crash, what the one that does not crash trains, and that
fp32 adapters are the cure, with checkpointing and clipping left as they were.
"""

from dataclasses import replace

import pytest
import torch
from torch import nn

from tests.engine.plain import same
from tests.field.cases.speech_lora import (
    AS_MEANT,
    AS_WRITTEN,
    CASE,
    RATE,
    Setup,
    Training,
    train,
)

pytestmark = pytest.mark.fault  # whole trainings

SEEDS = range(5)
LEARNS = 1e-2  # a rate at which fp32 adapters learn the task in 40 steps

OPTIMIZERS = pytest.mark.parametrize(
    ("is_fused", "clip_norm", "raises"),
    [(False, None, True), (False, 1.0, True), (True, 1.0, True), (True, None, False)],
    ids=["plain", "plain and clipped", "fused and clipped", "fused"],
)
CHECKPOINTING = pytest.mark.parametrize("is_checkpointed", [True, False], ids=["ckpt", "kept"])


@CHECKPOINTING
@OPTIMIZERS
def test_three_of_four_loops_crash_with_and_without_checkpointing(
    *, is_fused: bool, clip_norm: float | None, raises: bool, is_checkpointed: bool
) -> None:
    setup = Setup(
        adapter_dtype="fp16",
        is_fused=is_fused,
        clip_norm=clip_norm,
        is_checkpointed=is_checkpointed,
    )
    end = train(setup, seed=0, num_steps=1)
    if raises:
        assert end.failed_at == 1
        assert end.failure == "ValueError: Attempting to unscale FP16 gradients."
    else:
        assert end.failed_at is None


@CHECKPOINTING
@OPTIMIZERS
def test_no_loop_crashes_with_fp32_adapters(
    *, is_fused: bool, clip_norm: float | None, raises: bool, is_checkpointed: bool
) -> None:
    """The twin: what is stored in fp16 is the cause."""
    del raises
    setup = Setup(
        adapter_dtype="fp32",
        is_fused=is_fused,
        clip_norm=clip_norm,
        is_checkpointed=is_checkpointed,
    )
    assert train(setup, seed=0, num_steps=1).failed_at is None


def test_checkpointing_changes_no_bit_of_a_training() -> None:
    kept, recomputed = (
        Training(replace(AS_MEANT, is_checkpointed=is_checkpointed), seed=0)
        for is_checkpointed in (False, True)
    )
    assert [kept.step() for _ in range(3)] == [recomputed.step() for _ in range(3)]
    assert same(kept.model.state_dict(), recomputed.model.state_dict())


@pytest.mark.parametrize("seed", SEEDS)
def test_every_seed_crashes_at_the_first_update_until_the_adapters_are_fp32(seed: int) -> None:
    assert CASE.unguarded(seed, 3).failed_at == 1
    assert CASE.fix_as_written(seed, 3).failed_at is None
    assert CASE.fix_as_meant(seed, 3).failed_at is None


def changes(setup: Setup, seed: int, num_steps: int) -> torch.Tensor:
    """Return how far each entry of the adapters has moved, in learning rates."""
    training = Training(setup, seed)
    before = [parameter.detach().clone().float() for parameter in training.adapters()]
    for _ in range(num_steps):
        training.step()
    after = [parameter.detach().float() for parameter in training.adapters()]
    moved = [(new - old).abs().flatten() for new, old in zip(after, before, strict=True)]
    return torch.cat(moved) / setup.rate


@pytest.mark.parametrize("seed", SEEDS)
def test_the_cure_as_written_trains_pure_fp16_at_rates_nobody_chose(seed: int) -> None:
    """Adam moves an entry by about one rate a step.

    In fp16 its second moment of a gradient below 5e-3 is 0, so that only the present gradient
    divides: an entry whose gradient is small for once jumps. An entry above 0.06 in size does
    not move at all: 2e-5 is less than half a bit there.
    """
    steps = 2
    in_fp16 = changes(AS_WRITTEN, seed, steps)
    assert in_fp16.max() > 500 * steps
    assert (in_fp16 == 0).float().mean() > 0.3

    in_fp32 = changes(AS_MEANT, seed, steps)  # the twin
    assert in_fp32.max() < 1.1 * steps
    assert (in_fp32 == 0).float().mean() < 0.001


@pytest.mark.parametrize(
    ("dtype", "low", "high"), [(torch.float16, 0.9, 1.0), (torch.float32, 1e-5, 2e-5)]
)
def test_why_one_small_gradient_after_another_moves_an_fp16_weight_by_one(
    dtype: torch.dtype, low: float, high: float
) -> None:
    weight = nn.Parameter(torch.zeros(1, dtype=dtype))
    optimizer = torch.optim.AdamW([weight], lr=RATE, fused=True)
    for gradient in (1e-3, 0.0):
        before = weight.detach().clone()
        weight.grad = torch.full_like(weight, gradient)
        optimizer.step()
    assert low < (weight - before).abs().item() < high


@pytest.mark.parametrize("seed", SEEDS)
def test_at_a_rate_that_learns_the_cure_as_written_ends_in_nan(seed: int) -> None:
    setup = replace(AS_WRITTEN, rate=LEARNS, is_checkpointed=False)
    end = train(setup, seed, 40)
    assert end.failed_at is not None
    assert "NaN" in end.failure


def test_at_the_same_rate_the_cure_as_meant_learns() -> None:
    """The twin: the rate is not to blame."""
    end = train(replace(AS_MEANT, rate=LEARNS, is_checkpointed=False), 0, 40)
    assert end.probe_loss is not None
    assert end.probe_loss < 0.3
