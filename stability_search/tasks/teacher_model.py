"""The teacher's network: projected streams, Inception blocks over time, fusion, log-probabilities.

`original` fuses as the failing script did; `stable` is its cure. Norms and the final softmax are
computed in fp32 whatever the autocast does, so that the CPU and CUDA agree about them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

Variant = Literal["original", "stable"]
Fusion = Literal["attention", "weighted_sum"]
BlockKind = Literal["inception", "inverted"]

TIME_STRIDE = 4  # frames pooled into one before the blocks: a cheap step, and CTC learns sooner
OUTPUT_CLAMP = 10.0  # of the stable variant, on the attention output
PROJECTION_GAIN = 0.5  # Xavier gain of the stable variant's projections
NUM_BRANCHES = 4
_EXPANSION = 4


@dataclass(frozen=True, kw_only=True, slots=True)
class TeacherShape:
    """What decides the network's form.

    Attributes:
        variant: How fusion is done, `original` or `stable`.
        hidden: Width of every stream, a multiple of 4 and of `heads`.
        heads: Attention heads; unused by `weighted_sum`.
        blocks: Blocks over time.
        dropout: Share of block outputs set to 0 in training, in [0, 1).
        attention_dropout: Share of attention weights set to 0 in training, in [0, 1).
        fusion: How streams become one, `attention` or `weighted_sum`.
        block_kind: `inception`, or `inverted` as in MobileNet.
    """

    variant: Variant
    hidden: int
    heads: int
    blocks: int
    dropout: float
    attention_dropout: float
    fusion: Fusion
    block_kind: BlockKind


def pooled_length(frames: int) -> int:
    """Return how many output frames a clip of so many frames gives."""
    return -(-frames // TIME_STRIDE)


class TeacherNetwork(nn.Module):
    """Turns frames into log-probabilities of labels, one distribution per pooled frame."""

    def __init__(
        self, shape: TeacherShape, *, stream_sizes: Sequence[int], num_classes: int
    ) -> None:
        super().__init__()
        self.stream_sizes = tuple(stream_sizes)
        self.projections = nn.ModuleList(nn.Linear(size, shape.hidden) for size in stream_sizes)
        if shape.variant == "stable":
            for projection in self.projections:
                assert isinstance(projection, nn.Linear)  # noqa: S101
                nn.init.xavier_uniform_(projection.weight, gain=PROJECTION_GAIN)
                nn.init.zeros_(projection.bias)
        block = InceptionBlock if shape.block_kind == "inception" else InvertedBlock
        self.blocks = nn.ModuleList(
            block(shape.hidden, shape.dropout) for _ in range(shape.blocks)
        )
        self.fusion: nn.Module = (
            AttentionFusion(shape)
            if shape.fusion == "attention"
            else WeightedSumFusion(len(stream_sizes))
        )
        self.classifier = nn.Sequential(
            nn.Linear(shape.hidden, shape.hidden),
            nn.ReLU(),
            nn.Linear(shape.hidden, num_classes + 1),
        )

    def forward(self, frames: Tensor, padding: Tensor) -> Tensor:
        """Compute log-probabilities.

        Args:
            frames: (batch, frames, channels) of all streams side by side.
            padding: (batch, frames) bool, True where a clip has ended.

        Returns:
            (pooled frames, batch, classes + 1) float32, the blank first, as CTC wants them.
        """
        streams = torch.split(frames, list(self.stream_sizes), dim=2)
        projected = [
            projection(stream)
            for projection, stream in zip(self.projections, streams, strict=True)
        ]
        # The blocks are shared: streams stand side by side in the batch.
        features = torch.cat(projected).transpose(1, 2)
        features = F.avg_pool1d(features, TIME_STRIDE, ceil_mode=True)
        for block in self.blocks:
            features = block(features)
        by_stream = features.transpose(1, 2).reshape(
            len(streams), len(frames), -1, features.shape[1]
        )
        fused = self.fusion(by_stream, padding[:, ::TIME_STRIDE])
        logits = self.classifier(fused).float()
        return F.log_softmax(logits, dim=-1).transpose(0, 1)


class InceptionBlock(nn.Module):
    """Parallel kernels 1, 3 and 5 and a pooled branch, BatchNorm, shortcut."""

    def __init__(self, hidden: int, dropout: float) -> None:
        super().__init__()
        width = hidden // NUM_BRANCHES
        self.branches = nn.ModuleList(
            nn.Conv1d(hidden, width, kernel, padding=kernel // 2, bias=False)
            for kernel in (1, 3, 5)
        )
        self.pooled = nn.Conv1d(hidden, width, 1, bias=False)
        self.norm = nn.BatchNorm1d(hidden)
        self.dropout = nn.Dropout(dropout)

    def forward(self, features: Tensor) -> Tensor:
        """Map (batch, hidden, frames) to the same shape."""
        pooled = F.max_pool1d(features, 3, stride=1, padding=1)
        outputs = [*(branch(features) for branch in self.branches), self.pooled(pooled)]
        update = F.relu(self.norm(torch.cat(outputs, dim=1).float()))
        return features + self.dropout(update)  # type: ignore[no-any-return]


class InvertedBlock(nn.Module):
    """MobileNet's inverted bottleneck: widen, filter each channel over time, narrow, shortcut."""

    def __init__(self, hidden: int, dropout: float) -> None:
        super().__init__()
        wide = hidden * _EXPANSION
        self.widen = nn.Conv1d(hidden, wide, 1, bias=False)
        self.filter = nn.Conv1d(wide, wide, 5, padding=2, groups=wide, bias=False)
        self.norm = nn.BatchNorm1d(wide)
        self.narrow = nn.Conv1d(wide, hidden, 1)
        self.dropout = nn.Dropout(dropout)

    def forward(self, features: Tensor) -> Tensor:
        """Map (batch, hidden, frames) to the same shape."""
        filtered = F.relu(self.norm(self.filter(self.widen(features)).float()))
        return features + self.dropout(self.narrow(filtered))  # type: ignore[no-any-return]


class AttentionFusion(nn.Module):
    """Every stream at every frame attends to all others; the mean over streams goes on.

    `original`: the weights are materialised and the norm stands after the sum.
    `stable`: the norm stands before attention, the output is clamped, and the shortcut carries
    the input that was not normalised.
    """

    def __init__(self, shape: TeacherShape) -> None:
        super().__init__()
        self.variant = shape.variant
        self.attention = nn.MultiheadAttention(
            shape.hidden, shape.heads, dropout=shape.attention_dropout, batch_first=True
        )
        self.norm = nn.LayerNorm(shape.hidden)

    def forward(self, features: Tensor, padding: Tensor) -> Tensor:
        """Map (streams, batch, frames, hidden) and (batch, frames) to (batch, frames, hidden)."""
        num_streams, _, num_frames, _ = features.shape
        tokens = features.transpose(0, 1).flatten(1, 2)
        mask = padding.repeat(1, num_streams)
        if self.variant == "original":
            fused = self.norm((tokens + self._attend(tokens, mask, need_weights=True)).float())
        else:
            attended = self._attend(self.norm(tokens.float()), mask, need_weights=False)
            fused = tokens + attended.clamp(-OUTPUT_CLAMP, OUTPUT_CLAMP)
        by_stream: Tensor = fused.reshape(len(tokens), num_streams, num_frames, -1)
        return by_stream.mean(dim=1)

    def _attend(self, tokens: Tensor, mask: Tensor, *, need_weights: bool) -> Tensor:
        attended, _ = self.attention(
            tokens, tokens, tokens, key_padding_mask=mask, need_weights=need_weights
        )
        return attended  # type: ignore[no-any-return]


class WeightedSumFusion(nn.Module):
    """One learned weight a stream, no attention."""

    def __init__(self, num_streams: int) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.zeros(num_streams))

    def forward(self, features: Tensor, padding: Tensor) -> Tensor:  # noqa: ARG002
        """Map (streams, batch, frames, hidden) to (batch, frames, hidden)."""
        weights = self.logits.float().softmax(dim=0)
        return torch.einsum("s,sbth->bth", weights, features.float())
