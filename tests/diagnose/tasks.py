"""Small tasks with one planted cause each, as a user would write them."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own convention
from torch import Tensor, nn

from stability_search import cap_logits
from tests.scenarios.tasks import Regression

WIDTH, LENGTH = 16, 8
NUM_INPUTS = 8
Pair = tuple[Tensor, Tensor]


class NaiveAttention(nn.Module):
    """Attention whose softmax was written by hand, without subtracting the maximum."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(2))

    def forward(self, query: Tensor, keys: Tensor) -> Tensor:
        """Map (batch, WIDTH) and (batch, LENGTH, WIDTH) to weights (batch, LENGTH)."""
        logits = torch.einsum("bw,blw->bl", self.query(query), self.key(keys))
        exponentials = cap_logits(logits).float().exp()  # Inf above 88
        return exponentials / exponentials.sum(1, keepdim=True)


class Uniform(nn.Module):
    """No attention: every token counts alike."""

    def forward(self, query: Tensor, keys: Tensor) -> Tensor:  # noqa: ARG002
        """Map to equal weights (batch, LENGTH)."""
        return keys.new_full(keys.shape[:2], 1 / keys.shape[1])


class Lookup(nn.Module):
    """Reads a value off the token whose key is asked for, and shifts it."""

    def __init__(self, *, has_attention: bool) -> None:
        super().__init__()
        self.attention = NaiveAttention() if has_attention else Uniform()
        self.head = nn.Linear(1 + WIDTH, 1)

    def forward(self, query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Map to a prediction (batch,)."""
        weights = self.attention(query, keys)
        read = (weights * values).sum(1, keepdim=True)
        return self.head(torch.cat([read, query], 1))[:, 0]  # type: ignore[no-any-return]


class Recall:
    """Name the value that stands beside the key that is asked for.

    The sharper the attention, the better; so its logits grow until a hand-written softmax breaks,
    in any precision.

    Args:
        has_attention: False takes attention out.
    """

    def __init__(self, *, has_attention: bool = True) -> None:
        self._has_attention = has_attention
        drawn = self.batches(32, torch.Generator().manual_seed(99))
        self._probe = [next(drawn) for _ in range(8)]

    def model(self) -> nn.Module:
        return Lookup(has_attention=self._has_attention)

    def batches(self, batch_size: int, generator: torch.Generator) -> Iterator[tuple[Tensor, ...]]:
        while True:
            keys = torch.randn(batch_size, LENGTH, WIDTH, generator=generator).sign()
            values = torch.randn(batch_size, LENGTH, generator=generator)
            asked = torch.randint(LENGTH, (batch_size,), generator=generator)
            rows = torch.arange(batch_size)
            query = keys[rows, asked]
            # The first feature of the query shifts the answer: something to learn without looking.
            yield query, keys, values, values[rows, asked] + query[:, 0]

    def probe(self) -> Sequence[tuple[Tensor, ...]]:
        return self._probe

    def loss(self, model: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
        query, keys, values, target = batch
        return F.mse_loss(model(query, keys, values).float(), target)

    def baseline(self) -> float:
        return 2.0  # the variance of a value and of a sign

    def ablations(self) -> dict[str, dict[str, Any]]:
        return {"attention_bypassed": {"has_attention": False}} if self._has_attention else {}


class Sines(Regression):
    """`Regression` that knows how far one gets without looking.

    Args:
        spoilt_every: Every so many batches are a thousand times too large; 0 for none.
        spoilt_size: How many times.
    """

    def __init__(self, *, spoilt_every: int = 0, spoilt_size: float = 1e4) -> None:
        self._spoilt_every = 0
        self._spoilt_size = spoilt_size
        super().__init__()
        self._spoilt_every = spoilt_every

    def batches(self, batch_size: int, generator: torch.Generator) -> Iterator[Pair]:
        for index, (inputs, targets) in enumerate(super().batches(batch_size, generator), start=1):
            is_spoilt = self._spoilt_every and index % self._spoilt_every == 0
            yield (inputs * self._spoilt_size if is_spoilt else inputs), targets

    def baseline(self) -> float:
        return float(torch.cat([targets for _, targets in self.probe()]).var())


class Buggy(Sines):
    """Has a loss that fails in every training step."""

    def loss(self, model: nn.Module, batch: Pair) -> Tensor:
        if model.training:
            raise KeyError("a bug of the user's")
        return super().loss(model, batch)


class Crowd:
    """Regress the size of a number through BatchNorm, whose batch may be a crowd or a pair.

    With two samples its output is plus or minus one, whatever went in: all sizes are lost.

    Args:
        hidden: Width of the network, a multiple of 8.
    """

    def __init__(self, *, hidden: int = 64) -> None:
        self._hidden = hidden
        drawn = self.batches(32, torch.Generator().manual_seed(99))
        self._probe = [next(drawn) for _ in range(8)]

    def model(self) -> nn.Module:
        return nn.Sequential(
            nn.Linear(NUM_INPUTS, self._hidden),
            nn.BatchNorm1d(self._hidden),
            nn.ReLU(),
            nn.Linear(self._hidden, self._hidden),
            nn.BatchNorm1d(self._hidden),
            nn.ReLU(),
            nn.Linear(self._hidden, 1),
        )

    def batches(self, batch_size: int, generator: torch.Generator) -> Iterator[Pair]:
        while True:
            inputs = torch.randn(batch_size, NUM_INPUTS, generator=generator)
            yield inputs, 2 * inputs[:, :1].abs()

    def probe(self) -> Sequence[Pair]:
        return self._probe

    def loss(self, model: nn.Module, batch: Pair) -> Tensor:
        return F.mse_loss(model(batch[0]).float(), batch[1])

    def baseline(self) -> float:
        return float(torch.cat([targets for _, targets in self._probe]).var())
