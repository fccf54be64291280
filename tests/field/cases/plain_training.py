"""A teacher and its batches for loops in plain PyTorch, and the judge of how such a loop ended."""

import math
import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count, islice

import torch
from torch import Tensor, nn

from stability_search.tasks.clips import ClipBatch
from stability_search.tasks.teacher import Teacher
from tests.field.case import PlainEnd

BATCH_SIZE = 2  # the team's
LAST_STEPS = 20  # at the end of a training; half of them without a finite loss is a failure


@dataclass(frozen=True, kw_only=True, slots=True)
class LoopStep:
    """What a loop says of one attempt at a step.

    Attributes:
        loss: The loss it computed, or NaN where it looked at the input alone.
        is_skipped: True where the loop itself skipped it, and counted that.
        scale: Loss scale of this step.
        norm: Gradient norm that clipping looked at; NaN where it looked at none.
    """

    loss: float
    is_skipped: bool
    scale: float
    norm: float = math.nan


class PlainTraining:
    """An untrained teacher and its batches, the same for every loop of a seed.

    Args:
        task: Where they come from.
        seed: Decides weights, dropout and batches, >= 0.

    Attributes:
        step: Index, from 0, of the batch handed out last.
    """

    def __init__(self, task: Teacher, seed: int) -> None:
        torch.manual_seed(seed)
        self.task = task
        self.model: nn.Module = task.model()
        self.step = -1
        self._batches = task.batches(BATCH_SIZE, torch.Generator().manual_seed(seed))

    def stream(self) -> Iterator[ClipBatch]:
        for self.step in count():
            yield next(self._batches)

    def loss(self, batch: ClipBatch) -> Tensor:
        """Compute the loss in fp16, by the CPU's own kernels."""
        with torch.autocast("cpu", dtype=torch.float16):
            return self.task.loss(self.model, batch)

    def probe_loss(self) -> float | None:
        """Measure in fp32 and eval mode; None if it is not finite."""
        self.model.eval()
        with torch.no_grad():
            losses = [self.task.loss(self.model, batch).item() for batch in self.task.probe()]
        mean = statistics.mean(losses)
        return mean if math.isfinite(mean) else None


def play(training: PlainTraining, loop: Iterator[LoopStep], num_steps: int) -> PlainEnd:
    """Run a loop and say how it ended.

    It has failed where it raised or a parameter became non-finite; and from its first non-finite
    loss on where at least half of the last losses were non-finite too, or where such a loss left
    a running statistic NaN, which no later step takes back and every validation meets.
    """
    losses: list[float] = []
    num_skipped = 0
    error = ""
    before = _parameters(training.model)
    try:
        for step in islice(loop, num_steps):
            losses.append(step.loss)
            after = _parameters(training.model)
            num_skipped += torch.equal(before, after)
            before = after
            if not after.isfinite().all():
                error = "NaN in the parameters"
                break
    except (RuntimeError, AssertionError) as caught:
        losses.append(math.nan)
        error = f"{type(caught).__name__}: {str(caught).splitlines()[0]}"
    failed_at, failure = (len(losses), error) if error else _lost_for_good(training.model, losses)
    return PlainEnd(
        failed_at=failed_at,
        failure=failure,
        num_steps=len(losses),
        num_skipped=num_skipped,
        probe_loss=training.probe_loss(),
    )


def _lost_for_good(model: nn.Module, losses: list[float]) -> tuple[int | None, str]:
    bad = [index for index, loss in enumerate(losses, start=1) if not math.isfinite(loss)]
    broken = [name for name, value in model.named_buffers() if not value.isfinite().all()]
    num_last = sum(index > len(losses) - LAST_STEPS for index in bad)
    if not bad or not (broken or num_last >= LAST_STEPS / 2):
        return None, ""
    failure = f"NaN loss in {len(bad)} of {len(losses)} steps"
    return bad[0], f"{failure}, NaN in {broken[0]}" if broken else failure


def _parameters(model: nn.Module) -> Tensor:
    return nn.utils.parameters_to_vector(model.parameters()).detach()
