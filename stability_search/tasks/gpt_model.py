"""A small decoder-only token model: pre-norm blocks of causal attention and a wide layer.

The residual stream is fp32 whatever the autocast does, since embeddings are, and so are the norms
that read it, the activation and the logits: the CPU and CUDA agree about them. What is added to
the stream is not, and overflows first in fp16.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

_EXPANSION = 4
_EMBEDDING_STD = 0.5
# On torch's own initial weights: what the wide layer writes is the largest, as in large models.
_ATTENTION_GAIN = 0.5
_WIDE_GAIN = 1.5


@dataclass(frozen=True, kw_only=True, slots=True)
class GptShape:
    """What decides the network's form.

    Attributes:
        width: Size of the residual stream, a multiple of `heads`.
        layers: Blocks, >= 1.
        heads: Attention heads; 0 for blocks without attention.
        context: Tokens that are seen at once, >= 2.
        vocabulary: Rows of the token table and of the output, >= 2.
        residual_scale: Factor on everything that is written into the residual stream, > 0.
    """

    width: int
    layers: int
    heads: int
    context: int
    vocabulary: int
    residual_scale: float


class GptNetwork(nn.Module):
    """Turns tokens into logits of the next one, at every place."""

    causal_mask: Tensor

    def __init__(self, shape: GptShape) -> None:
        super().__init__()
        self.tokens = nn.Embedding(shape.vocabulary, shape.width)
        self.places = nn.Embedding(shape.context, shape.width)
        self.blocks = nn.ModuleList(GptBlock(shape) for _ in range(shape.layers))
        self.norm = nn.LayerNorm(shape.width)
        self.output = nn.Linear(shape.width, shape.vocabulary)
        is_later = torch.ones(shape.context, shape.context, dtype=torch.bool).triu(1)
        self.register_buffer("causal_mask", is_later, persistent=False)
        nn.init.normal_(self.tokens.weight, std=_EMBEDDING_STD)
        nn.init.normal_(self.places.weight, std=_EMBEDDING_STD / 2)
        nn.init.normal_(self.output.weight, std=0.02)
        nn.init.zeros_(self.output.bias)
        with torch.no_grad():
            for block in self.blocks:
                assert isinstance(block, GptBlock)  # noqa: S101
                block.narrow.weight.mul_(_WIDE_GAIN)
                if block.attention is not None:
                    block.attention.out_proj.weight.mul_(_ATTENTION_GAIN)
            for name in residual_writers(self):
                self.get_parameter(name).mul_(shape.residual_scale)

    def forward(self, tokens: Tensor) -> Tensor:
        """Compute logits.

        Args:
            tokens: (batch, places) int64, at most `context` places, ids below `vocabulary`.

        Returns:
            (batch, places, vocabulary) float32; place i has seen the tokens up to i.
        """
        num_places = tokens.shape[1]
        stream = self.tokens(tokens) + self.places.weight[:num_places]
        for block in self.blocks:
            stream = block(stream, self.causal_mask[:num_places, :num_places])
        logits: Tensor = self.output(self.norm(stream))
        return logits.float()


class GptBlock(nn.Module):
    """Causal attention and a wide layer, each normalised before and added to the stream."""

    def __init__(self, shape: GptShape) -> None:
        super().__init__()
        wide = _EXPANSION * shape.width
        self.attention_norm: nn.LayerNorm | None = None
        self.attention: nn.MultiheadAttention | None = None
        if shape.heads:
            self.attention_norm = nn.LayerNorm(shape.width)
            self.attention = nn.MultiheadAttention(
                shape.width, shape.heads, bias=False, batch_first=True
            )
        self.wide_norm = nn.LayerNorm(shape.width)
        self.widen = nn.Linear(shape.width, wide)
        self.narrow = nn.Linear(wide, shape.width, bias=False)

    def forward(self, stream: Tensor, mask: Tensor) -> Tensor:
        """Map (batch, places, width) to the same shape; the mask is True where not to look."""
        if self.attention is not None and self.attention_norm is not None:
            seen = self.attention_norm(stream)
            attended, _ = self.attention(
                seen, seen, seen, attn_mask=mask, is_causal=True, need_weights=False
            )
            stream = stream + attended
        wide = F.gelu(self.widen(self.wide_norm(stream)).float())
        return stream + self.narrow(wide)  # type: ignore[no-any-return]


def residual_writers(model: nn.Module) -> list[str]:
    """Name the weights whose output is added to the residual stream, the embeddings first.

    A factor on all of them leaves the function as it is in exact arithmetic: the stream is only
    read through norms.
    """
    ends = ("tokens.weight", "places.weight", "attention.out_proj.weight", "narrow.weight")
    return [name for name, _ in model.named_parameters() if name.endswith(ends)]
