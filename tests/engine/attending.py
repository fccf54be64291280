"""A model with one attention, in every way of attending, and engines around it."""

from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own convention
from torch import nn

from stability_search import cap_logits
from stability_search.engine.clamps import AttentionGuard
from stability_search.engine.observer import Observer
from stability_search.settings.engine import EngineSettings


def settings(**more: Any) -> EngineSettings:
    return EngineSettings(**{"learning_rate": 0.01, **more})


def guard(model: nn.Module | None = None, **more: Any) -> AttentionGuard:
    return AttentionGuard(
        nn.Linear(1, 1) if model is None else model, settings(**more), Observer()
    )


def mean_loss(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
    return model(batch).float().square().mean()


class Attends(nn.Module):
    """One attention over the input, materialised or fused, of a gain given."""

    def __init__(self, kind: str = "multihead", *, gain: float = 1.0, width: int = 4) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.kind = kind
        self.gain = gain
        self.attention = nn.MultiheadAttention(width, 1, batch_first=True)
        self.q, self.k = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.kind == "multihead":
            return self.attention(x * self.gain, x * self.gain, x)[0]
        q, k = self.gain * self.q(x), self.gain * self.k(x)
        if self.kind == "fused":
            return F.scaled_dot_product_attention(q, k, x)
        logits = q @ k.mT
        if self.kind == "own":
            logits = cap_logits(logits)
        return torch.softmax(logits, -1) @ x
