"""The built-in task `speech_gpt`: a token model fine-tuned in fp16, the one that goes NaN.

A decoder-only transformer over byte-pair tokens, as text-to-speech models have one.
`stability_search/tasks/README.md` explains its failure.
"""

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from stability_search.tasks.bpe import MAX_VOCABULARY, NUM_BYTES
from stability_search.tasks.gpt_model import GptNetwork, GptShape, residual_writers
from stability_search.tasks.texts import (
    TokenBatch,
    read_python_documentation,
    read_text_folder,
    tokenize,
)

PROBE_BATCHES = 8
PROBE_BATCH_SIZE = 8
_FEWEST_TOKENS = 3  # distinct ones in a piece; below it the text repeats itself


class SpeechGpt:
    """A token model that predicts the next byte-pair token of a text.

    Args:
        width: Size of the residual stream, a multiple of `heads`. Narrower is cheaper.
        layers: Blocks, >= 1. Fewer is cheaper and calmer.
        heads: Attention heads; 0 builds the blocks without attention.
        context: Tokens seen at once, >= 2. Longer is dearer.
        vocabulary: Tokens of the tokenizer, 256 (bytes) to 1024. It is learned from the text.
        residual_scale: Factor on everything written into the residual stream, finite and > 0. In
            fp32 one above 1 changes nothing; raise it to bring the end of fp16 (65504) within
            reach, as in a model that was trained with a wider range.
        missing_tokens: So many of the tokenizer's last ids are not in the model's tables, >= 0: a
            vocabulary that was extended after the model was made. The first batch with such an id
            raises `IndexError`.
        data_dir: Folder of your own .txt files in UTF-8, in any script; None takes the
            documentation that comes with Python, which differs between versions.

    Raises:
        ValueError: An argument is out of its range, or `data_dir` cannot be used; all at once.
    """

    def __init__(  # noqa: PLR0913 - each is a setting that a space file may name
        self,
        *,
        width: int = 64,
        layers: int = 2,
        heads: int = 4,
        context: int = 64,
        vocabulary: int = 512,
        residual_scale: float = 1.0,
        missing_tokens: int = 0,
        data_dir: str | None = None,
    ) -> None:
        problems = [
            *_integer_problems("width", width, low=1),
            *_integer_problems("layers", layers, low=1),
            *_integer_problems("heads", heads, low=0),
            *_integer_problems("context", context, low=2),
            *_integer_problems("vocabulary", vocabulary, low=NUM_BYTES, high=MAX_VOCABULARY),
            *_integer_problems("missing_tokens", missing_tokens, low=0, high=NUM_BYTES - 2),
        ]
        if not problems and heads and width % heads:
            problems.append(f"width: a multiple of {heads} (heads) must hold, but got {width}.")
        if not 0 < residual_scale < math.inf:
            problems.append(
                f"residual_scale: finite and > 0 must hold, but got {residual_scale!r}."
            )
        if problems:
            raise ValueError(" ".join(problems))
        texts = (
            read_python_documentation() if data_dir is None else read_text_folder(Path(data_dir))
        )
        self._streams = tokenize(texts, vocabulary=vocabulary, context=context)
        self._shape = GptShape(
            width=width,
            layers=layers,
            heads=heads,
            context=context,
            vocabulary=self._streams.pairs.vocabulary - missing_tokens,
            residual_scale=residual_scale,
        )
        self._probe = self._held_out_batches()

    def model(self) -> GptNetwork:
        """Build the untrained network from the global random state."""
        return GptNetwork(self._shape)

    def batches(self, batch_size: int, generator: torch.Generator) -> Iterator[TokenBatch]:
        """Yield pieces of the training text, cut anywhere, without end."""
        stream = self._streams.train
        num_starts = len(stream) - self._shape.context
        while True:
            starts = torch.randint(num_starts, (batch_size,), generator=generator)
            yield self._streams.pieces(stream, starts, self._shape.context)

    def probe(self) -> Sequence[TokenBatch]:
        """Return pieces spread evenly over the held-out text."""
        return self._probe

    def loss(self, model: nn.Module, batch: TokenBatch) -> Tensor:
        """Compute the mean cross entropy of the next token, in nats.

        Raises:
            IndexError: The batch has a token id that the model's tables do not have.
        """
        logits = self._logits(model, batch)
        return F.cross_entropy(logits.flatten(0, 1), batch.tokens[:, 1:].flatten())

    def metrics(self, model: nn.Module, batch: TokenBatch) -> dict[str, float]:
        """Measure what does not depend on the tokenizer, and how often the guess is right.

        Returns:
            `bits_per_byte`: cost of the text, 8 for one that cannot be predicted; lower is
            better. `accuracy`: share of tokens whose likeliest guess is right, in [0, 1].
        """
        targets = batch.tokens[:, 1:]
        with torch.no_grad():
            logits = self._logits(model, batch)
            nats = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum").item()
        return {
            "bits_per_byte": nats / math.log(2) / batch.num_bytes,
            "accuracy": (logits.argmax(dim=2) == targets).float().mean().item(),
        }

    def baseline(self) -> float:
        """Return the probe loss of the best distribution that is the same at every place."""
        targets = torch.cat([batch.tokens[:, 1:].flatten() for batch in self._probe])
        shares = targets.bincount().double() / len(targets)
        return float(torch.special.entr(shares).sum())

    def init_gain_parameters(self, model: nn.Module) -> list[str]:
        """Name what is written into the residual stream: a gain on all of it keeps the function.

        So `init_gain` 1/16 takes a factor of 16 out of the activations and nothing else.
        """
        return residual_writers(model)

    def ablations(self) -> dict[str, dict[str, Any]]:
        """Return how to build the model without attention, and a smaller one."""
        found: dict[str, dict[str, Any]] = {}
        if self._shape.heads:
            found["attention_bypassed"] = {"heads": 0}
        smaller: dict[str, Any] = {}
        if self._shape.layers > 1:
            smaller["layers"] = self._shape.layers // 2
        half = self._shape.width // 2
        if half and half % max(1, self._shape.heads) == 0:
            smaller["width"] = half
        if smaller:
            found["smaller_model"] = smaller
        return found

    def check_batch(self, batch: TokenBatch) -> list[str]:
        """Say which pieces hold ids beyond the vocabulary, no text, or one text repeated."""
        found: list[str] = []
        for index, piece in enumerate(batch.tokens):
            highest = int(piece.max())
            if highest >= self._shape.vocabulary:
                found.append(
                    f"sample {index}: token id {highest} is beyond the model's vocabulary of "
                    f"{self._shape.vocabulary}."
                )
            text = self._streams.pairs.decode(piece.int().numpy())
            num_distinct = len(piece.unique())
            if not text.strip():
                found.append(f"sample {index}: the text is blank.")
            elif num_distinct < _FEWEST_TOKENS:
                found.append(
                    f"sample {index}: the text repeats itself, {num_distinct} distinct tokens in "
                    f"{len(piece)}."
                )
        return found

    def _logits(self, model: nn.Module, batch: TokenBatch) -> Tensor:
        """Run the model, unless a token has no row: on a GPU that lookup would end the process."""
        if batch.highest >= self._shape.vocabulary:
            raise IndexError(
                f"token ids below {self._shape.vocabulary} (the model's vocabulary) must hold, "
                f"but a batch has {batch.highest}: the tokenizer knows more tokens than the "
                "model. Resize the model's token table and output, or take its own tokenizer."
            )
        logits: Tensor = model(batch.tokens[:, :-1])
        return logits.float()

    def _held_out_batches(self) -> tuple[TokenBatch, ...]:
        stream, context = self._streams.test, self._shape.context
        num_pieces = PROBE_BATCHES * PROBE_BATCH_SIZE
        starts = torch.linspace(0, len(stream) - context - 1, num_pieces).long()
        return tuple(
            self._streams.pieces(stream, part, context)
            for part in torch.split(starts, PROBE_BATCH_SIZE)
        )


def _integer_problems(
    name: str, value: object, *, low: int, high: int | None = None
) -> Iterator[str]:
    limits = f">= {low}" if high is None else f"from {low} to {high}"
    if type(value) is not int or value < low or (high is not None and value > high):
        yield f"{name}: an integer {limits} must hold, but got {value!r}."
