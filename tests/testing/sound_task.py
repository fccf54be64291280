"""Tasks that keep every rule, for tests to break one at a time."""

from collections import OrderedDict
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn


class Sound:
    """A line through points: sound in every respect, the ten-line task of the user's guide."""

    def model(self) -> nn.Module:
        return nn.Linear(3, 1)

    def batches(self, batch_size: int, generator: torch.Generator) -> Iterator[dict[str, Tensor]]:
        while True:
            inputs = torch.randn(batch_size, 3, generator=generator)
            yield {"inputs": inputs, "targets": inputs.sum(dim=1, keepdim=True)}

    def probe(self) -> Sequence[dict[str, Tensor]]:
        batches = Sound.batches(self, 8, torch.Generator().manual_seed(1))
        return [next(batches) for _ in range(4)]

    def loss(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor | dict[str, Tensor]:
        return nn.functional.mse_loss(model(batch["inputs"]), batch["targets"])

    def baseline(self) -> float:
        targets = torch.stack([batch["targets"] for batch in self.probe()])
        return targets.var(correction=0).item()


class Deep(Sound):
    """The same line, found by a model whose parts have names."""

    def model(self) -> nn.Module:
        parts = {"encoder": nn.Linear(3, 8), "act": nn.Tanh(), "head": nn.Linear(8, 1)}
        return nn.Sequential(OrderedDict(parts))
