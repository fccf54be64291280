"""A small speech encoder, and a speaker classifier made of it by LoRA.

Norms, positions, pooling and the residual stream are in fp32 whatever the autocast does, so that
the CPU and CUDA agree about them.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from stability_search.tasks.lora import LoraLinear, StoredLinear

Mixing = Literal["attention", "mean"]

FRAMES_PER_TOKEN = 3  # frames stacked into one token: attention over a third as many
_EXPANSION = 2
_LONGEST_WAVE = 10_000.0


@dataclass(frozen=True, kw_only=True, slots=True)
class EncoderShape:
    """What decides an encoder's form.

    Attributes:
        width: Width of a token, a multiple of 2 and of `heads`.
        heads: Attention heads; unused by `mean`.
        layers: Blocks.
        mixing: How a token learns of the others: `attention`, or their plain `mean`.
    """

    width: int
    heads: int
    layers: int
    mixing: Mixing


class SpeechEncoder(nn.Module):
    """Turns frames into tokens: stacked, projected, through pre-norm blocks."""

    def __init__(self, shape: EncoderShape, *, num_channels: int) -> None:
        super().__init__()
        self.width = shape.width
        self.stem = StoredLinear(num_channels * FRAMES_PER_TOKEN, shape.width)
        self.blocks = nn.ModuleList(Block(shape) for _ in range(shape.layers))

    def forward(self, frames: Tensor, padding: Tensor) -> tuple[Tensor, Tensor]:
        """Encode utterances.

        Args:
            frames: (batch, frames, channels).
            padding: (batch, frames) bool, True where an utterance has ended.

        Returns:
            Tokens (batch, tokens, width) float32, and (batch, tokens) bool, True where a token
            is part of its utterance.
        """
        num_utterances, num_frames, num_channels = frames.shape
        whole = F.pad(frames, (0, 0, 0, -num_frames % FRAMES_PER_TOKEN))
        tokens = self.stem(whole.reshape(num_utterances, -1, FRAMES_PER_TOKEN * num_channels))
        tokens = tokens + _positions(tokens.shape[1], self.width, tokens.device)
        is_speech = ~padding[:, ::FRAMES_PER_TOKEN]
        for block in self.blocks:
            tokens = block(tokens, is_speech)
        return _normalised(tokens), is_speech


class Block(nn.Module):
    """Tokens learn of each other, then each goes through two layers alone; both with a shortcut.

    The norms have no weights: those of a frozen encoder could as well stand in the next layer.
    """

    def __init__(self, shape: EncoderShape) -> None:
        super().__init__()
        self.mixing: nn.Module = (
            AttentionMixing(shape) if shape.mixing == "attention" else MeanMixing(shape)
        )
        self.widen = StoredLinear(shape.width, _EXPANSION * shape.width)
        self.narrow = StoredLinear(_EXPANSION * shape.width, shape.width)

    def forward(self, tokens: Tensor, is_speech: Tensor) -> Tensor:
        """Map (batch, tokens, width) to the same shape."""
        tokens = tokens + self.mixing(_normalised(tokens), is_speech)
        return tokens + self.narrow(F.gelu(self.widen(_normalised(tokens))))  # type: ignore[no-any-return]


class AttentionMixing(nn.Module):
    """Multi-head attention over the tokens of an utterance."""

    def __init__(self, shape: EncoderShape) -> None:
        super().__init__()
        self.heads = shape.heads
        self.query = StoredLinear(shape.width, shape.width)
        self.key = StoredLinear(shape.width, shape.width)
        self.value = StoredLinear(shape.width, shape.width)
        self.output = StoredLinear(shape.width, shape.width)

    def forward(self, tokens: Tensor, is_speech: Tensor) -> Tensor:
        """Map (batch, tokens, width) to the same shape."""
        query, key, value = (
            layer(tokens).unflatten(2, (self.heads, -1)).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        mask = is_speech[:, None, None, :]
        attended = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        return self.output(attended.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


class MeanMixing(nn.Module):
    """Every token gets the mean of all: what is left of attention without its weights."""

    def __init__(self, shape: EncoderShape) -> None:
        super().__init__()
        self.value = StoredLinear(shape.width, shape.width)
        self.output = StoredLinear(shape.width, shape.width)

    def forward(self, tokens: Tensor, is_speech: Tensor) -> Tensor:
        """Map (batch, tokens, width) to (batch, 1, width)."""
        pooled = _pooled(self.value(tokens), is_speech).unsqueeze(1)
        return self.output(pooled)  # type: ignore[no-any-return]


class SpeakerClassifier(nn.Module):
    """A frozen encoder with LoRA on queries and values, and a head in fp32 that is trained.

    Args:
        encoder: Adapted and frozen in place.
        rank: Of every adapter, >= 1.
        alpha: Of every adapter, > 0.
        adapter_dtype: What the adapters are stored in.
        num_classes: Speakers.
    """

    ADAPTED = ("query", "value")  # as in the LoRA paper

    def __init__(
        self,
        encoder: SpeechEncoder,
        *,
        rank: int,
        alpha: float,
        adapter_dtype: torch.dtype,
        num_classes: int,
    ) -> None:
        super().__init__()
        self.encoder = encoder.requires_grad_(requires_grad=False)
        for module in list(encoder.modules()):
            for name in self.ADAPTED:
                base = getattr(module, name, None)
                if isinstance(base, nn.Linear):
                    adapted = LoraLinear(base, rank=rank, alpha=alpha, dtype=adapter_dtype)
                    setattr(module, name, adapted)
        self.head = nn.Linear(encoder.width, num_classes)

    def forward(self, frames: Tensor, padding: Tensor) -> Tensor:
        """Compute logits (batch, classes) float32; NaN for an utterance without a frame."""
        tokens, is_speech = self.encoder(frames, padding)
        logits: Tensor = self.head(_pooled(tokens, is_speech))
        return logits.float()


def _normalised(tokens: Tensor) -> Tensor:
    return F.layer_norm(tokens, tokens.shape[-1:])


def _pooled(tokens: Tensor, is_speech: Tensor) -> Tensor:
    """Take the mean (batch, width) over the tokens that are part of the utterance."""
    weights = is_speech.unsqueeze(2).float()
    return (tokens.float() * weights).sum(dim=1) / weights.sum(dim=1)


def _positions(num_tokens: int, width: int, device: torch.device) -> Tensor:
    """Return waves (tokens, width) of ever greater length, as in Vaswani et al. 2017."""
    place = torch.arange(num_tokens, device=device).unsqueeze(1)
    exponents = torch.arange(0, width, 2, device=device) / width
    angles = place / _LONGEST_WAVE**exponents
    return torch.cat([angles.sin(), angles.cos()], dim=1)
