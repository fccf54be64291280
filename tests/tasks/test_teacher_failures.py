"""The teacher's failures in plain PyTorch, without any guard of ours."""

import math

import pytest
import torch

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
