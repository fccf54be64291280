"""Report 3: a detector trained in fp16 with accumulation 4, unscaled at every micro-batch.

Failed: `RuntimeError: unscale_() has already been called` at the second micro-batch. The cure
unscales, checks, clips and steps at the window's end, and keeps the clamps of `cpe`. As written,
those clamps stand, and take the gradient from pairs that are alike. As meant, the exponentials are
computed in fp32, where there is nothing to clamp.
"""

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import islice
from statistics import fmean

import torch
from torch import Tensor, nn

from stability_search.tasks.detector import Detector
from stability_search.tasks.scenes import SceneBatch
from tests.field.case import FieldCase, PlainEnd

ACCUMULATION, BATCH_SIZE = 4, 4  # the first is the team's
CLAMPS = {"class_clamp": True, "box_clamp": "all", "cpe_clamp": "all"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Setup:
    """What the loops differ in; the rest is the team's.

    Attributes:
        rate: Learning rate.
        clip_norm: Largest norm of the gradient.
        task_args: Which terms are on and clamped.
        unscales_each: True unscales at every micro-batch, for a check; False at the window's end.
        catches: True catches the scaler's error, updates, drops the gradients, and goes on.
        init_scale: First loss scale; torch's own.
    """

    rate: float
    clip_norm: float
    task_args: Mapping[str, object]
    unscales_each: bool = False
    catches: bool = False
    init_scale: float = 65536.0


@dataclass(kw_only=True, slots=True)
class Course:
    """What happened to the micro-batches, by index from 0.

    Attributes:
        failed: Those at which the scaler raised and the loop went on.
        stepped: Those at which the optimizer was called.
    """

    failed: list[int] = field(default_factory=list)
    stepped: list[int] = field(default_factory=list)


class Training:
    """The team's loop in plain PyTorch, one micro-batch at a time.

    Attributes:
        task: What is trained.
        model: It, as far as it has come.
        scaler: torch's own.
        course: What happened so far.
    """

    def __init__(self, setup: Setup, seed: int) -> None:
        self.task = Detector(**setup.task_args)  # type: ignore[arg-type]
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.model: nn.Module = self.task.model()
        self.scaler = torch.amp.GradScaler("cpu", init_scale=setup.init_scale)
        self.course = Course()
        self._setup = setup
        self._optimizer = torch.optim.AdamW(self.model.parameters(), lr=setup.rate, fused=True)
        self._batches = self.task.batches(BATCH_SIZE, torch.Generator().manual_seed(seed))
        self._index = -1

    def window(self) -> float:
        """Train on one window; return its mean loss."""
        return fmean(self.micro_batch(batch) for batch in islice(self._batches, ACCUMULATION))

    def micro_batch(self, batch: SceneBatch) -> float:
        """Add one micro-batch to its window, and step at the last one; return its loss."""
        self._index += 1
        is_last = (self._index + 1) % ACCUMULATION == 0
        with torch.autocast("cpu", dtype=torch.float16):
            loss = total(self.task.loss(self.model, batch))
        self.scaler.scale(loss / ACCUMULATION).backward()
        try:
            self._finish(is_last=is_last)
        except RuntimeError:
            if not self._setup.catches:
                raise
            self.course.failed.append(self._index)
            self.scaler.update()
            self._optimizer.zero_grad()
        return loss.item()

    def _finish(self, *, is_last: bool) -> None:
        if self._setup.unscales_each or is_last:
            self.scaler.unscale_(self._optimizer)
        if is_last:
            # What is not finite, `step` skips: it looked when it unscaled.
            nn.utils.clip_grad_norm_(self.model.parameters(), self._setup.clip_norm)
            self.scaler.step(self._optimizer)
            self.scaler.update()
            self._optimizer.zero_grad()
            self.course.stepped.append(self._index)

    def weights(self) -> Tensor:
        return nn.utils.parameters_to_vector(self.model.parameters()).detach()

    def probe_loss(self) -> float | None:
        """Measure in fp32 and eval mode, after which this model trains no more."""
        self.model.eval()
        with torch.no_grad():
            losses = [self.task.probe_loss(self.model, b).item() for b in self.task.probe()]
        return fmean(losses) if math.isfinite(fmean(losses)) else None


def total(terms: Mapping[str, Tensor]) -> Tensor:
    return torch.stack([term.float() for term in terms.values()]).sum()


def train(setup: Setup, seed: int, num_steps: int) -> PlainEnd:
    """Train until the end, an error of the scaler, or a loss or weight that is not finite."""
    training = Training(setup, seed)
    failed_at, failure, num_skipped = None, "", 0
    before = training.weights()
    for step in range(1, num_steps + 1):
        try:
            loss = training.window()
        except RuntimeError as error:
            failed_at, failure = step, f"RuntimeError: {str(error).splitlines()[0]}"
            break
        after = training.weights()
        num_skipped += torch.equal(before, after)
        before = after
        if not (math.isfinite(loss) and bool(after.isfinite().all())):
            failed_at, failure = step, "NaN loss" if math.isnan(loss) else "NaN in the weights"
            break
    return PlainEnd(
        failed_at=failed_at,
        failure=failure,
        num_steps=failed_at or num_steps,
        num_skipped=num_skipped,
        probe_loss=training.probe_loss(),
    )


BEFORE = Setup(
    rate=1e-5, clip_norm=1.0, task_args={"use_distribution_focal": True}, unscales_each=True
)
AS_WRITTEN = Setup(rate=1e-4, clip_norm=10.0, task_args=CLAMPS)
AS_MEANT = Setup(rate=1e-4, clip_norm=10.0, task_args={"cpe_precision": "fp32"})

CASE = FieldCase(
    report=3,
    system="detector",
    space="detector",
    num_steps=60,
    unguarded=functools.partial(train, BEFORE),
    fix_as_written=functools.partial(train, AS_WRITTEN),
    fix_as_meant=functools.partial(train, AS_MEANT),
)
