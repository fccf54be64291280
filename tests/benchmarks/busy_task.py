"""A task whose trial of 100 steps takes about a second of one core, and never goes wrong."""

import time
from collections.abc import Iterator

import torch
from torch import nn

STEP_S = 0.01


class Busy:
    """Regress a line, and keep the core busy until a step has taken its time."""

    def model(self) -> nn.Module:
        return nn.Linear(4, 1)

    def batches(
        self, batch_size: int, generator: torch.Generator
    ) -> Iterator[tuple[torch.Tensor, float]]:
        while True:
            yield torch.randn(batch_size, 4, generator=generator), time.perf_counter() + STEP_S

    def probe(self) -> list[tuple[torch.Tensor, float]]:
        generator = torch.Generator().manual_seed(0)
        return [(torch.randn(8, 4, generator=generator), 0.0) for _ in range(4)]

    def loss(self, model: nn.Module, batch: tuple[torch.Tensor, float]) -> torch.Tensor:
        inputs, until = batch
        while time.perf_counter() < until:
            inputs.square().sum()
        return (model(inputs).squeeze(1) - inputs.sum(1)).square().mean()

    def baseline(self) -> float:
        return 4.0
