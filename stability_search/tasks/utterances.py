"""Utterances with one label each: standardised, drawn into padded batches."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

FloatArray = npt.NDArray[np.float32]

JAPANESE_VOWELS = Path(__file__).parent / "data" / "japanese_vowels.npz"


@dataclass(frozen=True, kw_only=True, slots=True)
class Recording:
    """An utterance as it stands in a file: (frames, channels), and its label, from 0."""

    frames: FloatArray
    label: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Utterance:
    """One standardised utterance: (frames, channels) float32, and its label, from 0."""

    frames: Tensor
    label: int


@dataclass(frozen=True, kw_only=True, slots=True)
class UtteranceBatch:
    """Padded utterances of one micro-batch.

    Attributes:
        frames: (batch, frames, channels) float32, zero where padded.
        padding: (batch, frames) bool, True where an utterance has ended.
        labels: (batch,) int64.
    """

    frames: Tensor
    padding: Tensor
    labels: Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class UtteranceData:
    """What a task trains on and what it is judged by.

    Attributes:
        train: Utterances to train on.
        test: Held-out utterances.
        num_channels: Channels of every frame.
        num_classes: Labels.
    """

    train: tuple[Utterance, ...]
    test: tuple[Utterance, ...]
    num_channels: int
    num_classes: int


def shuffled(utterances: Sequence[Utterance], generator: torch.Generator) -> Iterator[Utterance]:
    """Yield all utterances in a random order, then all in another, without end."""
    while True:
        for index in torch.randperm(len(utterances), generator=generator).tolist():
            yield utterances[index]


def collate(utterances: Sequence[Utterance]) -> UtteranceBatch:
    """Pad utterances to the longest one, and to one frame at least."""
    frames = pad_sequence([utterance.frames for utterance in utterances], batch_first=True)
    if not frames.shape[1]:
        frames = frames.new_zeros(len(frames), 1, frames.shape[2])
    ends = torch.tensor([len(utterance.frames) for utterance in utterances]).unsqueeze(1)
    return UtteranceBatch(
        frames=frames,
        padding=torch.arange(frames.shape[1]) >= ends,
        labels=torch.tensor([utterance.label for utterance in utterances]),
    )


def spread_batches(
    utterances: Sequence[Utterance], *, num_batches: int, batch_size: int
) -> tuple[UtteranceBatch, ...]:
    """Make batches of held-out utterances, each with some from everywhere in the order.

    Args:
        utterances: What to choose from, at least one.
        num_batches: >= 1; fewer come where there are fewer utterances.
        batch_size: >= 1; smaller where there are not enough utterances.
    """
    wanted = min(len(utterances), num_batches * batch_size)
    chosen = [utterances[index * len(utterances) // wanted] for index in range(wanted)]
    return tuple(collate(chosen[start::num_batches]) for start in range(min(num_batches, wanted)))


def constant_prediction_loss(batches: Sequence[UtteranceBatch], *, num_classes: int) -> float:
    """Return the lowest mean cross-entropy of one distribution for every utterance, in nats.

    It is the entropy of the labels, each batch with equal weight as in the probe loss.
    """
    counts = [torch.bincount(batch.labels, minlength=num_classes).double() for batch in batches]
    shares = torch.stack([count / count.sum() for count in counts]).mean(dim=0)
    return float(-torch.special.xlogy(shares, shares).sum())


# -- from recordings -------------------------------------------------------------------------


def read_japanese_vowels() -> UtteranceData:
    """Read the recordings that come with the package: nine speakers, one pair of vowels."""
    with np.load(JAPANESE_VOWELS, allow_pickle=False) as archive:
        return utterance_data(train=_cut(archive, "train"), test=_cut(archive, "test"))


def _cut(archive: "np.lib.npyio.NpzFile[np.float32]", split: str) -> list[Recording]:
    ends = np.cumsum(archive[f"{split}_lengths"])[:-1]
    frames = np.split(archive[f"{split}_frames"].astype(np.float32), ends)
    labels = archive[f"{split}_labels"].tolist()
    return [Recording(frames=one, label=label) for one, label in zip(frames, labels, strict=True)]


def utterance_data(*, train: Sequence[Recording], test: Sequence[Recording]) -> UtteranceData:
    """Bring every channel to mean 0 and deviation 1 of the finite training frames.

    Args:
        train: At least one, all with the same channels, one frame of them finite.
        test: With the same channels; every label also stands in `train`.
    """
    frames = np.concatenate([recording.frames for recording in train])
    finite = frames[np.isfinite(frames).all(axis=1)]
    mean, std = finite.mean(axis=0), finite.std(axis=0)
    factor = 1 / np.where(std > 0, std, 1)  # a constant channel carries nothing

    def made(recordings: Sequence[Recording]) -> tuple[Utterance, ...]:
        return tuple(
            Utterance(frames=torch.from_numpy((one.frames - mean) * factor), label=one.label)
            for one in recordings
        )

    return UtteranceData(
        train=made(train),
        test=made(test),
        num_channels=frames.shape[1],
        num_classes=1 + max(recording.label for recording in train),
    )
