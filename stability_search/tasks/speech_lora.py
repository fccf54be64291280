"""The built-in task `speech_lora`: a frozen fp16 speech encoder, fine-tuned with LoRA in fp16.

The adapters are trainable parameters stored in fp16, whose gradients torch's `GradScaler` refuses
to unscale. `stability_search/tasks/README.md` explains why that is, and what does not cause it.
"""

import copy
import math
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from stability_search.tasks.speech_lora_model import (
    EncoderShape,
    Mixing,
    SpeakerClassifier,
    SpeechEncoder,
)
from stability_search.tasks.utterance_folder import read_folder
from stability_search.tasks.utterances import (
    UtteranceBatch,
    collate,
    constant_prediction_loss,
    read_japanese_vowels,
    shuffled,
    spread_batches,
)

AdapterDtype = Literal["fp16", "fp32"]

PROBE_BATCHES = 8
PROBE_BATCH_SIZE = 16
_ENCODER_SEED = 4  # any fixed number: all trials adapt the same encoder
_DTYPES: dict[AdapterDtype, torch.dtype] = {"fp16": torch.float16, "fp32": torch.float32}
_SMALLER_WIDTH, _SMALLER_HEADS = 32, 4


class SpeechLora:
    """Speakers told apart by a frozen encoder, LoRA adapters on it and a small head.

    Args:
        rank: Inner width of an adapter, >= 1. Lower saves memory; at the default width 64 is the
            full rank of the matrix it adapts.
        alpha: Strength of an adapter, > 0; its update is scaled by `alpha / rank`. Raise it to
            learn more at the same learning rate.
        adapter_dtype: What the adapters are stored in: `fp16` as in the failing script, or `fp32`.
            The encoder is stored in fp16, the head in fp32, whatever this says.
        width: Width of the encoder, a multiple of 2 and of `heads`. Narrower is cheaper.
        heads: Attention heads, >= 1.
        layers: Blocks of the encoder, >= 1. Fewer are cheaper and calmer.
        mixing: `attention`, or `mean` with no attention at all; `heads` then means nothing.
        data_dir: Folder of your own utterances, see `utterance_folder.read_folder`; None takes the
            recordings that come with the package.

    Raises:
        ValueError: Names every argument that is out of its range.
        UsageError: `data_dir` cannot be used; names everything that is wrong with it.
    """

    def __init__(  # noqa: PLR0913 - each is a setting that a space file may name
        self,
        *,
        rank: int = 64,
        alpha: float = 64.0,
        adapter_dtype: AdapterDtype = "fp16",
        width: int = 64,
        heads: int = 4,
        layers: int = 2,
        mixing: Mixing = "attention",
        data_dir: str | None = None,
    ) -> None:
        problems = [
            *_integer_problems(rank=rank, width=width, heads=heads, layers=layers),
            *_word_problems("adapter_dtype", adapter_dtype, get_args(AdapterDtype)),
            *_word_problems("mixing", mixing, get_args(Mixing)),
        ]
        if not problems and width % math.lcm(2, heads):
            problems.append(f"width: a multiple of 2 and of {heads} (heads), but got {width}.")
        if not 0 < alpha < math.inf:
            problems.append(f"alpha: finite and > 0 must hold, but got {alpha!r}.")
        if problems:
            raise ValueError(" ".join(problems))
        self._rank, self._alpha, self._adapter_dtype = rank, alpha, _DTYPES[adapter_dtype]
        self._shape = EncoderShape(width=width, heads=heads, layers=layers, mixing=mixing)
        self._data = read_japanese_vowels() if data_dir is None else read_folder(Path(data_dir))
        self._encoder = _frozen_encoder(self._shape, self._data.num_channels)
        self._probe = spread_batches(
            self._data.test, num_batches=PROBE_BATCHES, batch_size=PROBE_BATCH_SIZE
        )

    def model(self) -> SpeakerClassifier:
        """Put new adapters and a new head, from the global random state, on the same encoder."""
        return SpeakerClassifier(
            copy.deepcopy(self._encoder),
            rank=self._rank,
            alpha=self._alpha,
            adapter_dtype=self._adapter_dtype,
            num_classes=self._data.num_classes,
        )

    def batches(self, batch_size: int, generator: torch.Generator) -> Iterator[UtteranceBatch]:
        """Yield batches of training utterances, every utterance once an epoch, without end."""
        utterances = shuffled(self._data.train, generator)
        while True:
            yield collate(list(islice(utterances, batch_size)))

    def probe(self) -> Sequence[UtteranceBatch]:
        """Return held-out batches, spread evenly over the test utterances."""
        return self._probe

    def loss(self, model: nn.Module, batch: UtteranceBatch) -> Tensor:
        """Compute the cross-entropy of the speaker, a float32 mean over utterances.

        Returns:
            A scalar; NaN where an utterance has no frame, on purpose: leaving it out here would
            hide bad data.
        """
        logits: Tensor = model(batch.frames, batch.padding)
        return F.cross_entropy(logits.float(), batch.labels)

    def probe_loss(self, model: nn.Module, batch: UtteranceBatch) -> Tensor:
        """Return `loss`: no setting of this task changes what it measures."""
        return self.loss(model, batch)

    def metrics(self, model: nn.Module, batch: UtteranceBatch) -> dict[str, float]:
        """Measure `accuracy`, the share of utterances whose speaker comes first, 1 is perfect."""
        with torch.no_grad():
            said = model(batch.frames, batch.padding).argmax(dim=1)
        return {"accuracy": (said == batch.labels).float().mean().item()}

    def baseline(self) -> float:
        """Return the entropy of the probe's labels: the best that ignoring the input can do."""
        return constant_prediction_loss(self._probe, num_classes=self._data.num_classes)

    def init_gain_parameters(self, model: nn.Module) -> list[str]:
        """Name the adapters' first matrices; the second ones start at zero."""
        return [name for name, _ in model.named_parameters() if name.endswith(".down.weight")]

    def ablations(self) -> dict[str, dict[str, Any]]:
        """Return the arguments that take attention away, or make the encoder smaller."""
        found: dict[str, dict[str, Any]] = {}
        if self._shape.mixing == "attention":
            found["attention_bypassed"] = {"mixing": "mean"}
        smaller: dict[str, Any] = {}
        if self._shape.width > _SMALLER_WIDTH:
            smaller |= {"width": _SMALLER_WIDTH, "heads": _SMALLER_HEADS}
        if self._shape.layers > 1:
            smaller["layers"] = 1
        return found | ({"smaller_model": smaller} if smaller else {})

    def check_batch(self, batch: UtteranceBatch) -> Sequence[str]:
        """Name utterances without a frame, and labels that are no class."""
        found = []
        num_frames = (~batch.padding).sum(dim=1).tolist()
        for index, (frames, label) in enumerate(
            zip(num_frames, batch.labels.tolist(), strict=True)
        ):
            if not frames:
                found.append(f"utterance {index} has no frame, so its mean is NaN")
            if not 0 <= label < self._data.num_classes:
                found.append(
                    f"utterance {index} has the label {label}, but labels go from 0 to "
                    f"{self._data.num_classes - 1}"
                )
        return found


def _frozen_encoder(shape: EncoderShape, num_channels: int) -> SpeechEncoder:
    """Draw the encoder that stands for a pretrained one, stored in fp16."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(_ENCODER_SEED)  # the CPU's alone: GPUs are not forked
        return SpeechEncoder(shape, num_channels=num_channels).half()


def _integer_problems(**values: int) -> list[str]:
    return [
        f"{name}: an integer >= 1 must hold, but got {value!r}."
        for name, value in values.items()
        if type(value) is not int or value < 1
    ]


def _word_problems(name: str, value: str, words: Sequence[str]) -> list[str]:
    if value in words:
        return []
    return [f"{name}: one of {', '.join(words)} must hold, but got {value!r}."]
