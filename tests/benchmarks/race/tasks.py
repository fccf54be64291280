"""The race's own task: a network that lives until a rare, large sample comes along."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

NUM_INPUTS, WIDTH = 8, 32
PROBE_SIZE = 64
NOISE = 0.5  # of the targets: the lowest loss is its square

Pair = tuple[Tensor, Tensor]


class HeavyTails:
    """Regress a smooth function of inputs some of which are far larger than the rest.

    Every sample has a size of its own, drawn from a Pareto distribution, as prices, file sizes or
    sensor peaks have. The gradient grows with the size, so the largest learning rate that a batch
    can bear falls with the largest sample met so far. A short run that met no large one is best
    at a rate that a longer run, or another seed, does not survive; a clipped gradient does. The
    probe holds ordinary samples only. Targets carry noise, so that no loss comes near 0, where
    ratios of losses mean little.

    Args:
        tail: Exponent of the sizes, > 1. Lower it for larger and more frequent giants.
    """

    def __init__(self, *, tail: float = 3.0) -> None:
        self._tail = tail
        generator = torch.Generator().manual_seed(0)
        self._directions = torch.randn(NUM_INPUTS, 4, generator=generator) / NUM_INPUTS**0.5
        clean = torch.Generator().manual_seed(99)
        inputs = [torch.randn(PROBE_SIZE, NUM_INPUTS, generator=clean) for _ in range(8)]
        self._probe = [(each, self._targets(each, clean)) for each in inputs]

    def model(self) -> nn.Module:
        return nn.Sequential(
            nn.Linear(NUM_INPUTS, WIDTH),
            nn.ReLU(),
            nn.Linear(WIDTH, WIDTH),
            nn.ReLU(),
            nn.Linear(WIDTH, WIDTH),
            nn.ReLU(),
            nn.Linear(WIDTH, 1),
        )

    def batches(self, batch_size: int, generator: torch.Generator) -> Iterator[Pair]:
        while True:
            inputs = torch.randn(batch_size, NUM_INPUTS, generator=generator)
            sizes = torch.rand(batch_size, 1, generator=generator).clamp_min(1e-6)
            inputs = inputs * sizes ** (-1 / self._tail)
            yield inputs, self._targets(inputs, generator)

    def _targets(self, inputs: Tensor, generator: torch.Generator) -> Tensor:
        noise = NOISE * torch.randn(len(inputs), 1, generator=generator)
        return torch.tanh(inputs @ self._directions).sum(1, keepdim=True) + noise

    def probe(self) -> Sequence[Pair]:
        return self._probe

    def loss(self, model: nn.Module, batch: Pair) -> Tensor:
        inputs, targets = batch
        error: Tensor = model(inputs).float() - targets
        return error.square().mean()
