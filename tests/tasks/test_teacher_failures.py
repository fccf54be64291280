"""The teacher's failures in plain PyTorch, without any guard of ours."""

import math

import pytest
import torch
from torch import nn

from stability_search.tasks.teacher import Teacher
from stability_search.tasks.teacher_model import Variant

LOUD = 1000.0  # brings the attention logits beyond 65504, the largest number of fp16


@pytest.mark.parametrize(
    ("variant", "dtype", "is_finite"),
    [
        ("original", None, True),
        ("original", torch.bfloat16, True),
        ("original", torch.float16, False),
        ("stable", torch.float16, True),
    ],
)
def test_materialised_attention_overflows_in_fp16_alone_and_pre_norm_cures_it(
    variant: Variant, dtype: torch.dtype | None, *, is_finite: bool
) -> None:
    torch.manual_seed(0)
    task = Teacher(variant=variant, input_scale=LOUD)
    batch = next(task.batches(2, torch.Generator().manual_seed(0)))
    with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
        loss = task.loss(task.model(), batch)
    assert math.isfinite(loss.item()) is is_finite


def skip_without_update(*, bad_norm: float, calls_update: bool) -> list[str]:
    """Train four steps as the team did; the second one's gradient norm is not finite.

    Returns:
        What each step did: `stepped`, or `skipped` on an infinite norm.
    """
    torch.manual_seed(0)
    task = Teacher(hidden=8, heads=2, blocks=1)
    model = task.model()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    batches = task.batches(2, torch.Generator().manual_seed(0))
    done = []
    for step in range(4):
        scaler.scale(task.loss(model, next(batches))).backward()
        if step == 1:
            nn.init.constant_(_gradient(model), bad_norm)
        scaler.unscale_(optimizer)
        norm = nn.utils.get_total_norm([_gradient(model)])
        if math.isinf(norm.item()):  # the team's test: it misses NaN
            done.append("skipped")
            if calls_update:
                scaler.update()
                optimizer.zero_grad()
            continue
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        done.append("stepped")
    return done


def _gradient(model: nn.Module) -> torch.Tensor:
    gradient = model.get_parameter("classifier.2.weight").grad
    assert gradient is not None
    return gradient


def test_a_batch_skipped_after_unscale_crashes_the_scaler_at_the_next_one() -> None:
    with pytest.raises(RuntimeError, match=r"unscale_\(\) has already been called"):
        skip_without_update(bad_norm=math.inf, calls_update=False)


def test_the_teams_cure_survives_an_infinite_norm() -> None:
    done = skip_without_update(bad_norm=math.inf, calls_update=True)
    assert done == ["stepped", "skipped", "stepped", "stepped"]


def test_the_teams_cure_does_not_count_a_nan_norm() -> None:
    done = skip_without_update(bad_norm=math.nan, calls_update=True)
    assert done == ["stepped"] * 4  # the scaler skipped the second in silence
