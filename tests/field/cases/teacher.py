"""Report 2: a deep fusion model whose loss goes NaN in fp16, and the team's cure of it.

Nothing is planted but bad data: features are not normalised (300 times too large) and one clip of
a hundred is broken. The logits of the attention then overflow in fp16 in most batches; the scaler
takes each NaN for its own fault and halves its scale until no gradient is left.
"""

import math
from collections.abc import Iterator

import torch
from torch import nn

from stability_search.tasks.teacher import Teacher
from stability_search.tasks.teacher_model import Variant
from tests.field.case import FieldCase, PlainEnd
from tests.field.cases.plain_training import LoopStep, PlainTraining, play

INIT_SCALE = 65536.0  # torch's own
TASK_ARGS = {"input_scale": 300.0, "nan_frac": 0.005, "short_frac": 0.005}
RATE_BEFORE, CLIP_BEFORE = 2e-4, 5.0
RATE_GIVEN, CLIP_AFTER = 5e-5, 1.0
DROPOUT_BEFORE, DROPOUT_AFTER = 0.1, 0.3
WARMUP_STEPS, WARMUP_FROM = 20, 0.01
EPOCH_STEPS, MAX_SKIPPED = 50, 10


def rate_that_runs(rate: float) -> float:
    """Replace one value in silence, as the script does: its `very low` option never runs."""
    return 1e-4 if rate == 5e-5 else rate


def train_without_checks(training: PlainTraining) -> Iterator[LoopStep]:
    """Train as before the cure: clip, then let the scaler unscale."""
    model = training.model
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE_BEFORE)
    scaler = torch.amp.GradScaler("cpu", init_scale=INIT_SCALE)
    for batch in training.stream():
        loss = training.loss(batch)
        scale = scaler.get_scale()
        scaler.scale(loss).backward()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP_BEFORE)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        yield LoopStep(loss=loss.item(), is_skipped=False, scale=scale)


def train_with_the_cure(
    training: PlainTraining, *, rate: float, unscales_first: bool, clip_norm: float = CLIP_AFTER
) -> Iterator[LoopStep]:
    """Validate, clip tighter, warm up.

    Args:
        training: The stable variant.
        rate: Learning rate after the warm-up.
        unscales_first: False clips the scaled gradient, as the script does.
        clip_norm: Largest norm of the gradient that is clipped.
    """
    model = training.model
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=rate, betas=(0.9, 0.999), eps=1e-8, weight_decay=1e-2
    )
    warmup = torch.optim.lr_scheduler.LinearLR(
        optimizer, start_factor=WARMUP_FROM, total_iters=WARMUP_STEPS
    )
    scaler = torch.amp.GradScaler("cpu", init_scale=INIT_SCALE)
    num_skipped = 0
    for index, batch in enumerate(training.stream()):
        num_skipped = 0 if index % EPOCH_STEPS == 0 else num_skipped
        scale = scaler.get_scale()
        if num_skipped > MAX_SKIPPED:  # the rest of the epoch is not trained on
            yield LoopStep(loss=math.nan, is_skipped=True, scale=scale)
            continue
        loss = training.loss(batch) if batch.frames.isfinite().all() else torch.tensor(math.nan)
        if not math.isfinite(loss.item()):  # a NaN of the model's output is one of the loss
            num_skipped += 1
            yield LoopStep(loss=loss.item(), is_skipped=True, scale=scale)
            continue
        scaler.scale(loss).backward()
        if unscales_first:
            scaler.unscale_(optimizer)
        norm = nn.utils.clip_grad_norm_(model.parameters(), clip_norm).item()
        scaler.step(optimizer)
        scaler.update()
        if scaler.get_scale() >= scale:  # else the scaler has skipped the step
            warmup.step()
        optimizer.zero_grad()
        yield LoopStep(loss=loss.item(), is_skipped=False, scale=scale, norm=norm)


def new_training(seed: int, variant: Variant) -> PlainTraining:
    """Return the teacher of the report, with the dropout that went with each variant."""
    dropout = DROPOUT_AFTER if variant == "stable" else DROPOUT_BEFORE
    return PlainTraining(Teacher(variant=variant, dropout=dropout, **TASK_ARGS), seed)


def unguarded(seed: int, num_steps: int) -> PlainEnd:
    """Train the original fusion without checks."""
    training = new_training(seed, "original")
    return play(training, train_without_checks(training), num_steps)


def fix_as_written(seed: int, num_steps: int) -> PlainEnd:
    """Ask for 5e-5, get 1e-4; clip before unscaling."""
    training = new_training(seed, "stable")
    loop = train_with_the_cure(training, rate=rate_that_runs(RATE_GIVEN), unscales_first=False)
    return play(training, loop, num_steps)


def fix_as_meant(seed: int, num_steps: int) -> PlainEnd:
    """Ask for 1e-4; unscale first."""
    training = new_training(seed, "stable")
    loop = train_with_the_cure(training, rate=1e-4, unscales_first=True)
    return play(training, loop, num_steps)


CASE = FieldCase(
    report=2,
    system="teacher",
    space="teacher",
    num_steps=100,
    unguarded=unguarded,
    fix_as_written=fix_as_written,
    fix_as_meant=fix_as_meant,
)
