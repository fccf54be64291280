"""Report 4: a speech model fine-tuned with LoRA in fp16 by a Trainer, on a card without bf16.

Failed: `ValueError: Attempting to unscale FP16 gradients` at the first update. As written, the
cure is `max_grad_norm=None`: without clipping nobody calls `unscale_`, and a fused optimizer, the
Trainer's present default, does not either. As meant, trainable parameters are fp32 and everything
else stays: checkpointing, fp16 autocast, clipping.
"""

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from statistics import fmean

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from stability_search.tasks.speech_lora import AdapterDtype, SpeechLora
from stability_search.tasks.speech_lora_model import SpeakerClassifier
from tests.field.case import FieldCase, PlainEnd

RATE, BATCH_SIZE, ACCUMULATION = 2e-5, 8, 8  # the team's
TRAINER_CLIP_NORM = 1.0  # what a Trainer does unless told otherwise


@dataclass(frozen=True, kw_only=True, slots=True)
class Setup:
    """What the loops differ in; the rest is the team's.

    Attributes:
        adapter_dtype: What the trainable adapters are stored in.
        clip_norm: None where nobody unscales and clips.
        is_fused: The optimizer unscales inside its step, and torch's scaler leaves it to that.
        is_checkpointed: Blocks are computed again in the backward pass.
        rate: Learning rate.
    """

    adapter_dtype: AdapterDtype
    clip_norm: float | None
    is_fused: bool = True
    is_checkpointed: bool = True
    rate: float = RATE


class Training:
    """The team's loop in plain PyTorch, one step at a time.

    Attributes:
        task: What is trained.
        model: It, as far as it has come.
        scaler: torch's own.
    """

    def __init__(self, setup: Setup, seed: int) -> None:
        self.task = SpeechLora(adapter_dtype=setup.adapter_dtype)
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.model = self.task.model()
        if setup.is_checkpointed:
            recompute_blocks(self.model)
        self.scaler = torch.amp.GradScaler("cpu")
        self._setup = setup
        self._optimizer = torch.optim.AdamW(self.trained, lr=setup.rate, fused=setup.is_fused)
        self._batches = self.task.batches(BATCH_SIZE, torch.Generator().manual_seed(seed))

    @property
    def trained(self) -> list[nn.Parameter]:
        return [parameter for parameter in self.model.parameters() if parameter.requires_grad]

    def adapters(self) -> Iterator[nn.Parameter]:
        for name, parameter in self.model.encoder.named_parameters():
            if name.endswith(("down.weight", "up.weight")):
                yield parameter

    def step(self) -> float:
        """Train on one window; return its mean loss."""
        losses = []
        for batch in islice(self._batches, ACCUMULATION):
            with torch.autocast("cpu", dtype=torch.float16):
                loss = self.task.loss(self.model, batch)
            self.scaler.scale(loss / ACCUMULATION).backward()
            losses.append(loss.item())
        if self._setup.clip_norm is not None:
            self.scaler.unscale_(self._optimizer)
            nn.utils.clip_grad_norm_(self.trained, self._setup.clip_norm)
        self.scaler.step(self._optimizer)
        self.scaler.update()
        self._optimizer.zero_grad()
        return fmean(losses)

    def probe_loss(self) -> float | None:
        """Measure in fp32 and eval mode, after which this is no longer the model that trained."""
        model = self.model.float().eval()
        with torch.no_grad():
            loss = fmean(self.task.loss(model, batch).item() for batch in self.task.probe())
        return loss if math.isfinite(loss) else None


def recompute_blocks(model: SpeakerClassifier) -> None:
    for block in model.encoder.blocks:
        block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)


def train(setup: Setup, seed: int, num_steps: int) -> PlainEnd:
    """Train until the end, an error of the scaler, or a loss or weight that is not finite."""
    training = Training(setup, seed)
    failed_at, failure, num_skipped = None, "", 0
    for step in range(1, num_steps + 1):
        scale = training.scaler.get_scale()
        try:
            loss = training.step()
        except ValueError as error:
            failed_at, failure = step, f"ValueError: {error}"
            break
        num_skipped += training.scaler.get_scale() < scale
        if not all(bool(parameter.isfinite().all()) for parameter in training.trained):
            failed_at, failure = step, "NaN in the weights"
            break
        if not math.isfinite(loss):
            failed_at, failure = step, "NaN loss"
            break
    return PlainEnd(
        failed_at=failed_at,
        failure=failure,
        num_steps=failed_at or num_steps,
        num_skipped=num_skipped,
        probe_loss=None if failed_at else training.probe_loss(),
    )


BEFORE = Setup(adapter_dtype="fp16", clip_norm=TRAINER_CLIP_NORM)
AS_WRITTEN = Setup(adapter_dtype="fp16", clip_norm=None)
AS_MEANT = Setup(adapter_dtype="fp32", clip_norm=TRAINER_CLIP_NORM)

CASE = FieldCase(
    report=4,
    system="speech_lora",
    space="speech_lora",
    num_steps=100,
    unguarded=functools.partial(train, BEFORE),
    fix_as_written=functools.partial(train, AS_WRITTEN),
    fix_as_meant=functools.partial(train, AS_MEANT),
)
