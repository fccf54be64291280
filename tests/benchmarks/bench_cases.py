"""What the benchmarks of a step train, and the plain PyTorch step they compare with."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own convention
from torch import nn

from stability_search.tasks.teacher import Teacher

WIDTH, LENGTH, BATCH, VOCABULARY = 128, 32, 16, 64
LEARNING_RATE = 1e-4
CLIP_NORM = 1.0
LOSS_SCALE = 1024.0
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

Batch: TypeAlias = Any  # each case has its own
Window = Sequence[Batch]
Step = Callable[[Window], None]


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """A model with its loss and its windows of micro-batches.

    Attributes:
        name: How the figures call it.
        budget: Largest median of guarded over plain seconds of a step.
        accumulation: Micro-batches of a window.
        build: Builds the same initial model each time.
        loss_fn: Loss of a micro-batch.
        windows: Draws the same windows each time, without end.
    """

    name: str
    budget: float
    accumulation: int
    build: Callable[[], nn.Module]
    loss_fn: Callable[[nn.Module, Batch], torch.Tensor]
    windows: Callable[[], Iterator[Window]]


class Language(nn.Module):
    """Two transformer layers between an embedding and a projection."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        layer = nn.TransformerEncoderLayer(
            WIDTH, 4, 4 * WIDTH, dropout=0.1, batch_first=True, norm_first=True
        )
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.head(self.layers(self.embedding(tokens)))


def loss_fn(model: nn.Module, batch: Batch) -> torch.Tensor:
    tokens, targets = batch
    return F.cross_entropy(model(tokens).float().flatten(0, 1), targets.flatten())


def build() -> Language:
    torch.manual_seed(0)
    return Language()


def transformer() -> Case:
    def windows() -> Iterator[Window]:
        generator = torch.Generator().manual_seed(1)
        while True:
            tokens = torch.randint(VOCABULARY, (BATCH, LENGTH + 1), generator=generator)
            yield [(tokens[:, :-1], tokens[:, 1:])]

    return Case(
        name="transformer",
        budget=1.05,
        accumulation=1,
        build=build,
        loss_fn=loss_fn,
        windows=windows,
    )


def teacher() -> Case:
    """Return the teacher of search_spaces/teacher.yaml, on clean data: nothing may break here."""
    task = Teacher(variant="original", size="small")
    accumulation, batch_size = 2, 2

    def build_teacher() -> nn.Module:
        torch.manual_seed(0)
        return task.model()

    def windows() -> Iterator[Window]:
        batches = task.batches(batch_size, torch.Generator().manual_seed(1))
        while True:
            yield [next(batches) for _ in range(accumulation)]

    return Case(
        name="teacher",
        budget=1.03,
        accumulation=accumulation,
        build=build_teacher,
        loss_fn=task.loss,
        windows=windows,
    )


CASES = {"teacher": teacher, "transformer": transformer}


def fused_adamw(model: nn.Module) -> torch.optim.AdamW:
    return torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, fused=True)


def seed_dropout(number: int) -> None:
    """Let the steps of this number drop the same values.

    `torch.manual_seed` would format a stack trace for CUDA each time, and empty the caches.
    """
    torch.default_generator.manual_seed(number)


def plain_step(case: Case, precision: str) -> Step:
    """Build a model and return its step in plain PyTorch, which reads its loss once."""
    model = case.build()
    optimizer = fused_adamw(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=LOSS_SCALE, enabled=precision == "fp16")
    dtype, is_low = DTYPES[precision], precision != "fp32"

    def step(window: Window) -> None:
        optimizer.zero_grad()
        losses = []
        for batch in window:
            with torch.autocast("cpu", dtype=dtype if is_low else torch.bfloat16, enabled=is_low):
                loss = case.loss_fn(model, batch)
            scaler.scale(loss / len(window) if len(window) > 1 else loss).backward()
            losses.append(loss.detach())
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP_NORM)
        scaler.step(optimizer)
        scaler.update()
        (torch.stack(losses).mean() if len(losses) > 1 else losses[0]).item()

    return step
