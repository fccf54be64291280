"""Models as other people write them, tiny: with a batch, a loss, and where attention is."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own convention
from torch import nn

from stability_search import cap_logits


@dataclass(frozen=True, kw_only=True, slots=True)
class Foreign:
    """A model of somebody else's.

    Attributes:
        name: What it is called in a table.
        make: Builds it, the same each time.
        batch: What it is trained on.
        loss: Its loss.
        attention: A glob pattern of its attention modules.
        inner: Name of a layer in its attention, or of any layer where it has none.
        outer: Name of a layer elsewhere.
    """

    name: str
    make: Callable[[], nn.Module]
    batch: Any
    loss: Callable[[nn.Module, Any], torch.Tensor]
    attention: str
    inner: str
    outer: str

    def build(self) -> nn.Module:
        torch.manual_seed(0)
        return self.make().train()


# -- vision, as torchvision writes it --------------------------------------------------------


class BasicBlock(nn.Module):
    """Two convolutions and a residual; the last gamma starts at zero."""

    def __init__(self, width_in: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width_in, width, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width, momentum=0.3)
        self.downsample = (
            nn.Sequential(nn.Conv2d(width_in, width, 1, stride, bias=False), nn.BatchNorm2d(width))
            if stride != 1 or width_in != width
            else None
        )
        nn.init.zeros_(self.bn2.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        identity = x if self.downsample is None else self.downsample(x)
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += identity
        return self.relu(out)


class ResNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(8)
        self.relu = nn.ReLU(inplace=True)
        self.layer1 = nn.Sequential(BasicBlock(8, 8, 1), BasicBlock(8, 8, 1))
        self.layer2 = nn.Sequential(BasicBlock(8, 12, 2))
        self.fc = nn.Linear(12, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.relu(self.bn1(self.conv1(x)))
        return self.fc(self.layer2(self.layer1(x)).mean((2, 3)))


class ConvNormActivation(nn.Sequential):
    def __init__(self, width_in: int, width: int, *, groups: int = 1) -> None:
        super().__init__(
            nn.Conv2d(width_in, width, 3, padding=1, groups=groups, bias=False),
            nn.BatchNorm2d(width),
            nn.Hardswish(inplace=True),
        )


class InvertedResidual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Sequential(
            ConvNormActivation(width, width, groups=width),
            nn.Conv2d(width, width, 1, bias=False),
            nn.BatchNorm2d(width),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.conv(x)


class MobileNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(ConvNormActivation(3, 8), InvertedResidual(8))
        self.classifier = nn.Sequential(
            nn.Linear(8, 8), nn.Hardswish(inplace=True), nn.Linear(8, 4)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.classifier(self.features(x).mean((2, 3)))


# -- attention of one's own ------------------------------------------------------------------


class Attention(nn.Module):
    """Two heads; `kind` says how the weights are made."""

    def __init__(self, kind: str, width: int = 8) -> None:
        super().__init__()
        self.kind = kind
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (
            part.unflatten(-1, (2, -1)).transpose(1, 2) for part in self.qkv(x).chunk(3, -1)
        )
        if self.kind == "fused":
            mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        else:
            logits = (q @ k.transpose(-2, -1)) * q.size(-1) ** -0.5
            if self.kind == "opted in":
                logits = cap_logits(logits)
            hidden = torch.ones(x.size(1), x.size(1), dtype=torch.bool).triu(1)
            weights = logits.masked_fill(hidden, float("-inf")).softmax(-1)
            mixed = F.dropout(weights, 0.0).to(v.dtype) @ v
        return self.proj(mixed.transpose(1, 2).flatten(2))


class Layer(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.attention = Attention(kind)
        self.mlp = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attention(self.norm(x))
        return x + self.mlp(x)


class Decoder(nn.Module):
    def __init__(self, *kinds: str) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.layers = nn.ModuleList(Layer(kind) for kind in kinds)
        self.head = nn.Linear(8, 11)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


class Seq2Seq(nn.Module):
    """nn.Transformer with causal and padding masks."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.core = nn.Transformer(8, 2, 2, 1, 16, dropout=0.0, batch_first=True)
        self.head = nn.Linear(8, 11)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x, is_padding = self.embed(ids), ids == 0
        mask = torch.ones(ids.size(1), ids.size(1), dtype=torch.bool).triu(1)
        out = self.core(
            x,
            x,
            tgt_mask=mask,
            tgt_is_causal=True,
            src_key_padding_mask=is_padding,
            tgt_key_padding_mask=is_padding,
            memory_key_padding_mask=is_padding,
        )
        return self.head(out)


# -- Hugging Face ----------------------------------------------------------------------------


def llama(attention: str = "sdpa", **more: Any) -> nn.Module:
    """Build a Llama with grouped-query attention."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=32,
        attn_implementation=attention,
        use_cache=False,  # what transformers says it does while it checkpoints
        **more,
    )
    return LlamaForCausalLM(config)


def gpt2(attention: str = "sdpa") -> nn.Module:
    """Build a GPT-2, whose embedding and head are one weight."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=32,
        n_embd=16,
        n_layer=2,
        n_head=2,
        n_positions=32,
        attn_implementation=attention,
        attn_pdrop=0.0,
        embd_pdrop=0.0,
        resid_pdrop=0.0,
        use_cache=False,
        bos_token_id=1,
        eos_token_id=2,
    )
    return GPT2LMHeadModel(config)


# -- the collection --------------------------------------------------------------------------


def _classify(model: nn.Module, batch: Any) -> torch.Tensor:
    x, y = batch
    return F.cross_entropy(model(x).float(), y)


def _next_token(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(model(ids)[:, :-1].float().flatten(0, 1), ids[:, 1:].flatten())


def _own_loss(model: nn.Module, batch: Any) -> torch.Tensor:
    return model(**batch).loss


def _images() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(6, 3, 6, 6, generator=generator), torch.tensor([0, 1, 2, 3, 0, 1])


def _ids(vocabulary: int) -> torch.Tensor:
    ids = torch.randint(1, vocabulary, (3, 6), generator=torch.Generator().manual_seed(1))
    ids[0, 4:] = 0
    return ids


def language_batch() -> dict[str, torch.Tensor]:
    ids = _ids(32)
    return {"input_ids": ids, "attention_mask": (ids != 0).long(), "labels": ids}


def _image_model(make: Callable[[], nn.Module], *, inner: str, outer: str) -> Foreign:
    return Foreign(
        name=make.__name__.lower(),
        make=make,
        batch=_images(),
        loss=_classify,
        attention="*.attention",
        inner=inner,
        outer=outer,
    )


def _decoder(name: str, kind: str) -> Foreign:
    return Foreign(
        name=name,
        make=lambda: Decoder(kind, kind),
        batch=_ids(11),
        loss=_next_token,
        attention="*.attention",
        inner="layers.0.attention.qkv",
        outer="layers.0.mlp.0",
    )


def _llama(name: str, attention: str) -> Foreign:
    return Foreign(
        name=name,
        make=lambda: llama(attention),
        batch=language_batch(),
        loss=_own_loss,
        attention="*.self_attn",
        inner="model.layers.0.self_attn.q_proj",
        outer="model.layers.0.mlp.up_proj",
    )


def _gpt2(name: str, attention: str) -> Foreign:
    return Foreign(
        name=name,
        make=lambda: gpt2(attention),
        batch=language_batch(),
        loss=_own_loss,
        attention="*.attn",
        inner="transformer.h.0.attn.c_attn",
        outer="transformer.h.0.mlp.c_fc",
    )


_COLLECTION = (
    _image_model(ResNet, inner="layer1.0.conv1", outer="fc"),
    _image_model(MobileNet, inner="features.0.0", outer="classifier.0"),
    Foreign(
        name="transformer",
        make=Seq2Seq,
        batch=_ids(11),
        loss=_next_token,
        attention="*_attn",
        inner="core.encoder.layers.0.self_attn",
        outer="core.encoder.layers.0.linear1",
    ),
    _decoder("fused", "fused"),
    _decoder("by_hand", "by hand"),
    _decoder("opted_in", "opted in"),
    _llama("llama_hf", "sdpa"),
    _llama("llama_eager_hf", "eager"),
    _gpt2("gpt2_hf", "sdpa"),
    _gpt2("gpt2_eager_hf", "eager"),
)
# Those whose names end in _hf need transformers.
MODELS = {foreign.name: foreign for foreign in _COLLECTION}
