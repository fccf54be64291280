"""A task that trains in a blink and misbehaves on request; used by file, as a user's would be."""

import math
import os
import signal
import time
from collections.abc import Iterator

import torch
from torch import nn

Batch = tuple[torch.Tensor, torch.Tensor]


class Tiny:
    """Regress a fixed linear map; `behaviour` says what goes wrong, and when it begins.

    `fine`, `raise`, `raise_nan` (an exception caused by a NaN), `kill` (the process dies),
    `hang`, `stop` (SIGSTOP), `nan_batch` (every 10th), `diverge` (a loss that only grows),
    `needs_weights` (no loss where the weights are zero), `out_of_memory`, `dirty` (leaves
    another backend flag behind), `end` (batches run out).
    """

    def __init__(self, behaviour: str = "fine", width: int = 16, at_step: int = 5) -> None:
        print("a word of the task's")
        self.behaviour = behaviour
        self.width = width
        self.at_step = at_step
        generator = torch.Generator().manual_seed(0)
        self.weights = torch.randn(8, 1, generator=generator)
        inputs = torch.randn(128, 8, generator=generator)
        self.held_out = [(inputs[i::8], inputs[i::8] @ self.weights) for i in range(8)]
        self.num_fetched = 0

    def model(self) -> nn.Module:
        self.num_fetched = 0
        return nn.Sequential(
            nn.Linear(8, self.width),
            nn.BatchNorm1d(self.width),
            nn.Tanh(),
            nn.Linear(self.width, 1),
        )

    def batches(self, batch_size: int, generator: torch.Generator) -> Iterator[Batch]:
        while True:
            inputs = torch.randn(batch_size, 8, generator=generator)
            targets = inputs @ self.weights
            self.num_fetched += 1
            if self.num_fetched % 10 == 0 and self.behaviour == "nan_batch":
                inputs[0, 0] = math.nan
            if self.num_fetched == self.at_step:
                if self.behaviour == "end":
                    return
                self._misbehave()
            yield inputs, targets

    def probe(self) -> list[Batch]:
        return self.held_out

    def loss(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        inputs, targets = batch
        output = model(inputs).float()
        if self.behaviour == "raise_nan" and not bool(torch.isfinite(output).all()):
            raise ValueError("the output is not finite")
        if self.behaviour == "needs_weights" and not bool(output.std()):
            raise ArithmeticError("every output is the same")
        loss = (output - targets).square().mean()
        if self.behaviour == "diverge" and model.training:
            return loss + 1e3 * self.num_fetched
        return loss

    def metrics(self, model: nn.Module, batch: Batch) -> dict[str, float]:
        return {"error": float((model(batch[0]) - batch[1]).abs().mean())}

    def _misbehave(self) -> None:
        if self.behaviour == "raise":
            raise KeyError("a bug of the user's")
        if self.behaviour == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if self.behaviour == "hang":
            time.sleep(600)
        if self.behaviour == "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        if self.behaviour == "out_of_memory":
            raise torch.OutOfMemoryError("CUDA out of memory (planted)")
        if self.behaviour == "dirty":
            torch.set_default_dtype(torch.float64)
            torch.set_default_dtype(torch.float32)
            torch.backends.cudnn.benchmark = not torch.backends.cudnn.benchmark
