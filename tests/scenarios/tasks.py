"""The small tasks that the fault scenarios train, one class each, as a user would write them.

All data is drawn from generators with fixed seeds; each class takes what its scenario varies.
"""

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own convention
from torch import Tensor, nn

from stability_search import cap_logits

VOCABULARY, WIDTH, HEADS, LENGTH = 32, 32, 4, 16
NUM_INPUTS = 8
NUM_CTC_CLASSES = 10  # the blank not counted

Pair = tuple[Tensor, Tensor]
Ctc = tuple[Tensor, Tensor, Tensor, Tensor]


class Attention(nn.Module):
    """Causal self-attention that computes its own logits and offers them to the cap."""

    def __init__(self, *, has_qk_norm: bool) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.out = nn.Linear(WIDTH, WIDTH)
        size = WIDTH // HEADS
        self.query_norm = nn.LayerNorm(size) if has_qk_norm else nn.Identity()
        self.key_norm = nn.LayerNorm(size) if has_qk_norm else nn.Identity()

    def forward(self, hidden: Tensor) -> Tensor:
        """Map (batch, tokens, WIDTH) to the same shape."""
        heads = self.qkv(hidden).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        query, key, value = heads.unbind(0)
        query, key = self.query_norm(query), self.key_norm(key)
        logits = cap_logits(query @ key.mT / query.size(-1) ** 0.5).float()
        later = torch.ones(logits.shape[-2:], dtype=torch.bool).triu(1)
        mixed = logits.masked_fill(later, -torch.inf).softmax(-1) @ value
        return self.out(mixed.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


class Block(nn.Module):
    """A transformer layer with its norms before attention and network."""

    def __init__(self, *, has_qk_norm: bool) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(2))
        self.attention = Attention(has_qk_norm=has_qk_norm)
        self.network = nn.Sequential(
            nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH)
        )

    def forward(self, hidden: Tensor) -> Tensor:
        """Map (batch, tokens, WIDTH) to the same shape."""
        hidden = hidden + self.attention(self.norms[0](hidden))
        return hidden + self.network(self.norms[1](hidden))  # type: ignore[no-any-return]


class Language(nn.Module):
    """Two layers of width 32 between an embedding and a projection."""

    def __init__(self, *, has_qk_norm: bool) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.position = nn.Embedding(LENGTH, WIDTH)
        self.blocks = nn.Sequential(*(Block(has_qk_norm=has_qk_norm) for _ in range(2)))
        for weight in self.blocks.parameters():
            if weight.dim() > 1:
                nn.init.normal_(weight, std=WIDTH**-0.5)
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, VOCABULARY)
        for weight in (self.embedding.weight, self.position.weight, self.head.weight):
            nn.init.normal_(weight, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        """Map tokens (batch, LENGTH) to logits (batch, LENGTH, VOCABULARY)."""
        hidden = self.blocks(self.embedding(tokens) + self.position.weight)
        return self.head(self.norm(hidden))  # type: ignore[no-any-return]


class Grammar:
    """Predict the next of 32 tokens, which depends on the last and on the fourth last.

    The fourth last can be reached by attention only, so a model whose attention has broken down
    learns little.

    Args:
        has_qk_norm: True normalises queries and keys of every head.
    """

    def __init__(self, *, has_qk_norm: bool = False) -> None:
        self._has_qk_norm = has_qk_norm
        generator = torch.Generator().manual_seed(0)
        last, fourth = torch.randn(2, VOCABULARY, VOCABULARY, generator=generator)
        self._odds = torch.softmax(2 * last[:, None] + 2 * fourth[None], -1)
        drawn = self.batches(32, torch.Generator().manual_seed(99))
        self._probe = [next(drawn) for _ in range(8)]

    def model(self) -> nn.Module:
        return Language(has_qk_norm=self._has_qk_norm)

    def batches(self, batch_size: int, generator: torch.Generator) -> Iterator[Tensor]:
        while True:
            tokens = list(torch.randint(VOCABULARY, (4, batch_size), generator=generator))
            while len(tokens) <= LENGTH:
                odds = self._odds[tokens[-1], tokens[-4]]
                tokens.append(torch.multinomial(odds, 1, generator=generator)[:, 0])
            yield torch.stack(tokens, 1)

    def probe(self) -> Sequence[Tensor]:
        return self._probe

    def loss(self, model: nn.Module, batch: Tensor) -> Tensor:
        return F.cross_entropy(model(batch[:, :-1]).float().mT, batch[:, 1:])


class Regression:
    """Regress the sum of the sines of eight numbers with a network of two layers.

    Args:
        is_half: True stores the parameters in fp16, as `model.half()` does.
        loss_weight: Factor on the loss, and so on the gradients.
    """

    def __init__(self, *, is_half: bool = False, loss_weight: float = 1.0) -> None:
        self._is_half = is_half
        self._loss_weight = loss_weight
        drawn = self.batches(32, torch.Generator().manual_seed(99))
        self._probe = [next(drawn) for _ in range(8)]

    def model(self) -> nn.Module:
        network = nn.Sequential(nn.Linear(NUM_INPUTS, 32), nn.ReLU(), nn.Linear(32, 1))
        return network.half() if self._is_half else network

    def batches(self, batch_size: int, generator: torch.Generator) -> Iterator[Pair]:
        while True:
            inputs = torch.randn(batch_size, NUM_INPUTS, generator=generator)
            yield inputs, inputs.sin().sum(1, keepdim=True)

    def probe(self) -> Sequence[Pair]:
        return self._probe

    def loss(self, model: nn.Module, batch: Pair) -> Tensor:
        inputs, targets = batch
        outputs = model(inputs.to(next(model.parameters()).dtype))
        return self._loss_weight * F.mse_loss(outputs.float(), targets)


class LoudAttention(nn.Module):
    """One head of attention whose logits are not divided by the root of its width."""

    def __init__(self, gain: float) -> None:
        super().__init__()
        self.gain = gain
        self.query, self.key, self.value = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        for layer in (self.query, self.key):
            nn.init.normal_(layer.weight, std=WIDTH**-0.5)

    def forward(self, hidden: Tensor) -> Tensor:
        """Map (batch, tokens, WIDTH) to the same shape."""
        query, key = (self.gain * layer(hidden) for layer in (self.query, self.key))
        weights = cap_logits(query @ key.mT).float().softmax(-1)
        return weights.to(hidden.dtype) @ self.value(hidden)


class Retrieval:
    """Regress the mean of the tokens' first feature through one layer of attention.

    Args:
        gain: Factor on queries and keys.
    """

    def __init__(self, *, gain: float = 1.0) -> None:
        self._gain = gain
        drawn = self.batches(16, torch.Generator().manual_seed(99))
        self._probe = [next(drawn) for _ in range(8)]

    def model(self) -> nn.Module:
        return nn.Sequential(LoudAttention(self._gain), nn.Linear(WIDTH, 1))

    def batches(self, batch_size: int, generator: torch.Generator) -> Iterator[Pair]:
        while True:
            tokens = torch.randn(batch_size, LENGTH, WIDTH, generator=generator)
            yield tokens, tokens[:, :, 0].mean(1)

    def probe(self) -> Sequence[Pair]:
        return self._probe

    def loss(self, model: nn.Module, batch: Pair) -> Tensor:
        tokens, targets = batch
        return F.mse_loss(model(tokens).float()[:, :, 0].mean(1), targets)


class Transcription:
    """Label 12 frames by CTC; now and then a clip is too short for its labels.

    Args:
        defect: What every `defect_every`-th batch holds: `none`, `long` (8 labels on 5 frames)
            or `repeats` (three equal labels on 4 frames, which need 5).
        defect_every: Batches from one such batch to the next, >= 1.
        zero_infinity: As in `torch.nn.functional.ctc_loss`.
        filters: True leaves such clips out, as a careful loader would.
    """

    def __init__(
        self,
        *,
        defect: str = "none",
        defect_every: int = 5,
        zero_infinity: bool = False,
        filters: bool = False,
    ) -> None:
        self._defect = defect
        self._defect_every = defect_every
        self._zero_infinity = zero_infinity
        self._filters = filters
        generator = torch.Generator().manual_seed(99)
        self._probe = [_clips(8, generator) for _ in range(8)]

    def model(self) -> nn.Module:
        return nn.Sequential(
            nn.Linear(NUM_CTC_CLASSES, 32), nn.ReLU(), nn.Linear(32, NUM_CTC_CLASSES + 1)
        )

    def batches(self, batch_size: int, generator: torch.Generator) -> Iterator[Ctc]:
        index = 0
        while True:
            index += 1
            clips = _clips(batch_size, generator)
            if self._defect != "none" and index % self._defect_every == 0:
                clips = _with_defect(clips, self._defect)
            yield _fitting(clips) if self._filters else clips

    def probe(self) -> Sequence[Ctc]:
        return self._probe

    def loss(self, model: nn.Module, batch: Ctc) -> Tensor:
        frames, labels, num_frames, num_labels = batch
        log_probs = model(frames).float().log_softmax(-1).transpose(0, 1)
        return F.ctc_loss(
            log_probs, labels, num_frames, num_labels, zero_infinity=self._zero_infinity
        )


def _clips(count: int, generator: torch.Generator) -> Ctc:
    """Draw clips of 12 frames: four labels of three noisy frames each."""
    labels = torch.randint(1, NUM_CTC_CLASSES + 1, (count, 4), generator=generator)
    clean = F.one_hot(labels - 1, NUM_CTC_CLASSES).float().repeat_interleave(3, dim=1)
    frames = clean + 0.1 * torch.randn(clean.shape, generator=generator)
    labels = torch.cat([labels, labels], dim=1)  # room for the eight labels of a defect
    return frames, labels, torch.full((count,), 12), torch.full((count,), 4)


def _with_defect(clips: Ctc, defect: str) -> Ctc:
    """Make the first clip too short for its labels."""
    frames, labels, num_frames, num_labels = (part.clone() for part in clips)
    if defect == "long":
        num_frames[0], num_labels[0] = 5, 8
    else:
        num_frames[0], num_labels[0] = 4, 3
        labels[0] = 1
    return frames, labels, num_frames, num_labels


def _fitting(clips: Ctc) -> Ctc:
    """Leave out clips whose labels, and a blank between equal neighbours, need more frames."""
    _, labels, num_frames, num_labels = clips
    kept = []
    for row, frames, count in zip(labels, num_frames.tolist(), num_labels.tolist(), strict=True):
        said = row[:count]
        num_repeats = int((said[1:] == said[:-1]).sum())
        kept.append(count + num_repeats <= frames)
    chosen = torch.tensor(kept)
    frames, labels, num_frames, num_labels = clips
    return frames[chosen], labels[chosen], num_frames[chosen], num_labels[chosen]
