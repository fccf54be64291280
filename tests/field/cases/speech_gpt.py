"""Report 5: a token model fine-tuned in fp16, its loss NaN by step 50.

Nothing is planted. What the blocks add to the residual stream starts at two thirds of what fp16
can hold and grows by half while the model learns how often each token occurs; then it overflows,
and a norm makes NaN of Inf. Of the causes that leave step 0 sound and need some steps it is one
that a loss scaler, which acts after the loss, can neither cause nor cure.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

import torch
from torch import nn

from stability_search.tasks.speech_gpt import SpeechGpt
from tests.field.case import FieldCase, PlainEnd
from tests.field.cases.plain_training import LoopStep, play

TASK_ARGS = {"residual_scale": 30_000.0}
RATE, BATCH_SIZE = 1e-3, 4


@dataclass(frozen=True, kw_only=True, slots=True)
class ScalerUse:
    """A `torch.amp.GradScaler`, and what the loop around it does.

    Attributes:
        init_scale: First loss scale.
        growth_interval: Steps without overflow until it doubles.
        max_scale: It is not let above this; None for no such bound.
        clip_norm: Largest norm of the gradient; None turns clipping off.
        skips_loss: True where a loss that is not finite ends the step, and leaves the scale;
            False where the scaler finds out from the gradients and halves it.
    """

    init_scale: float
    growth_interval: int
    max_scale: float | None = None
    clip_norm: float | None = None
    skips_loss: bool = False


AS_IT_FAILED = ScalerUse(init_scale=65536.0, growth_interval=2000)  # torch's own values
AS_WRITTEN = ScalerUse(init_scale=1024.0, growth_interval=100, clip_norm=1.0)
AS_MEANT = ScalerUse(
    init_scale=1024.0, growth_interval=100, max_scale=2048.0, clip_norm=1.0, skips_loss=True
)


@cache
def task(residual_scale: float = TASK_ARGS["residual_scale"]) -> SpeechGpt:
    """Build the task once."""
    return SpeechGpt(residual_scale=residual_scale)


class TokenTraining:
    """An untrained token model and its batches, the same for every loop of a seed.

    Args:
        task: Where they come from.
        seed: Decides weights and batches, >= 0.
    """

    def __init__(self, task: SpeechGpt, seed: int) -> None:
        torch.manual_seed(seed)
        self.task = task
        self.model = task.model()
        self.batches = task.batches(BATCH_SIZE, torch.Generator().manual_seed(seed))

    def probe_loss(self) -> float | None:
        """Measure in fp32 and eval mode; None if it is not finite."""
        self.model.eval()
        with torch.no_grad():
            losses = [self.task.loss(self.model, batch) for batch in self.task.probe()]
        mean = torch.stack(losses).mean().item()
        return mean if math.isfinite(mean) else None


def train(training: TokenTraining, use: ScalerUse) -> Iterator[LoopStep]:
    """Train in fp16 with torch's scaler."""
    model = training.model
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, fused=True)
    scaler = torch.amp.GradScaler(
        "cpu", init_scale=use.init_scale, growth_interval=use.growth_interval
    )
    for batch in training.batches:
        with torch.autocast("cpu", dtype=torch.float16):
            loss = training.task.loss(model, batch)
        scale = scaler.get_scale()
        is_skipped = use.skips_loss and not math.isfinite(loss.item())
        if not is_skipped:
            scaler.scale(loss).backward()
            if use.clip_norm is not None:
                scaler.unscale_(optimizer)
                gradients = [p.grad for p in model.parameters() if p.grad is not None]
                norm = nn.utils.get_total_norm(gradients)
                if math.isfinite(norm.item()):  # their check: clipping by Inf writes NaN
                    nn.utils.clip_grads_with_norm_(model.parameters(), use.clip_norm, norm)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            if use.max_scale is not None and scaler.get_scale() > use.max_scale:
                scaler.update(use.max_scale)
        yield LoopStep(loss=loss.item(), is_skipped=is_skipped, scale=scale)


def play_with(use: ScalerUse, seed: int, num_steps: int) -> PlainEnd:
    """Train from a seed and say how it ended."""
    training = TokenTraining(task(), seed)
    return play(training, train(training, use), num_steps)


def unguarded(seed: int, num_steps: int) -> PlainEnd:
    """Train with torch's own scaler and no checks, as it failed."""
    return play_with(AS_IT_FAILED, seed, num_steps)


def fix_as_written(seed: int, num_steps: int) -> PlainEnd:
    """Train with the patched scaler: 1024, interval 100, bad steps skipped, clipping checked."""
    return play_with(AS_WRITTEN, seed, num_steps)


def fix_as_meant(seed: int, num_steps: int) -> PlainEnd:
    """Keep the scale in the range they advise; a NaN of the forward pass does not lower it."""
    return play_with(AS_MEANT, seed, num_steps)


CASE = FieldCase(
    report=5,
    system="speech_gpt",
    space="speech_gpt",
    num_steps=200,
    unguarded=unguarded,
    fix_as_written=fix_as_written,
    fix_as_meant=fix_as_meant,
)
