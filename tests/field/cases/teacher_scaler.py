"""Report 1: a loop that skips a batch after `unscale_` and goes on, on the teacher in fp16.

Nothing is planted. At torch's own first scale, 65536, the very first gradient overflows: that is
how a loss scale is found. The loop called `unscale_`, saw an infinite norm, and went on to the
next batch, where `unscale_` raised. Two clips of a hundred are too short for their labels, which
makes the CTC loss infinite and the gradient's norm NaN.
"""

import math
from collections.abc import Callable, Iterator

import torch
from torch import nn

from stability_search.tasks.clips import ClipBatch
from stability_search.tasks.teacher import Teacher
from tests.field.case import FieldCase, PlainEnd
from tests.field.cases.plain_training import LoopStep, PlainTraining, play

RATE, CLIP_NORM = 1e-5, 0.5  # the team's
INIT_SCALE = 65536.0  # torch's own
TASK_ARGS = {"short_frac": 0.02}


def train_as_the_team(
    training: PlainTraining,
    *,
    is_cured: bool,
    is_bad: Callable[[float], bool] = math.isinf,
    init_scale: float = INIT_SCALE,
) -> Iterator[LoopStep]:
    """Skip by the gradient's norm; cured, a skip also updates the scaler and drops gradients."""
    model = training.model
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, fused=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=init_scale)
    for batch in training.stream():
        loss = training.loss(batch)
        scale = scaler.get_scale()
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        norm = nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
        is_skipped = is_bad(norm.item())
        if is_skipped and is_cured:
            scaler.update()
            optimizer.zero_grad()
        elif not is_skipped:
            nn.utils.clip_grad_norm_(model.parameters(), CLIP_NORM)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        yield LoopStep(loss=loss.item(), is_skipped=is_skipped, scale=scale)


def train_on_checked_losses(
    training: PlainTraining,
    *,
    accumulation: int = 1,
    always_updates: bool = False,
    spoil: Callable[[int, ClipBatch], ClipBatch] = lambda _, batch: batch,
) -> Iterator[LoopStep]:
    """Skip by the loss before anything is unscaled, and by the norm after it; both by finiteness.

    Args:
        training: What is trained.
        accumulation: Batches of one step, >= 1.
        always_updates: True calls `update` even where every batch of a step was skipped.
        spoil: Gives the batch of an index that is trained on instead.
    """
    model = training.model
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, fused=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=INIT_SCALE)
    num_used = 0
    for index, batch in enumerate(training.stream()):
        loss = training.loss(spoil(index, batch))
        scale = scaler.get_scale()
        if math.isfinite(loss.item()):
            scaler.scale(loss / accumulation).backward()
            num_used += 1
        if (index + 1) % accumulation:
            continue
        is_skipped = not num_used
        if num_used:
            scaler.unscale_(optimizer)
            norm = nn.utils.clip_grad_norm_(model.parameters(), CLIP_NORM)
            is_skipped = not math.isfinite(norm.item())
            scaler.step(optimizer)  # does nothing where the norm was not finite
        if num_used or always_updates:
            scaler.update()
        optimizer.zero_grad()
        num_used = 0
        yield LoopStep(loss=loss.item(), is_skipped=is_skipped, scale=scale)


def _training(seed: int) -> PlainTraining:
    return PlainTraining(Teacher(**TASK_ARGS), seed)


def unguarded(seed: int, num_steps: int) -> PlainEnd:
    """Skip after `unscale_`, as it failed."""
    training = _training(seed)
    return play(training, train_as_the_team(training, is_cured=False), num_steps)


def fix_as_written(seed: int, num_steps: int) -> PlainEnd:
    """Update the scaler on a skip; the norm is tested with `math.isinf`."""
    training = _training(seed)
    return play(training, train_as_the_team(training, is_cured=True), num_steps)


def fix_as_meant(seed: int, num_steps: int) -> PlainEnd:
    """Skip whatever is not finite, and update only what was unscaled."""
    training = _training(seed)
    return play(training, train_on_checked_losses(training), num_steps)


CASE = FieldCase(
    report=1,
    system="teacher",
    space="teacher_scaler",
    num_steps=100,
    unguarded=unguarded,
    fix_as_written=fix_as_written,
    fix_as_meant=fix_as_meant,
)
