"""Sensor clips with label sequences: recorded, standardised, drawn into batches."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

FloatArray = npt.NDArray[np.float32]

BASIC_MOTIONS = Path(__file__).parent / "data" / "basic_motions.npz"
PIECE_FRAMES = (20, 30)  # 2 to 3 s at 10 Hz: long enough for a gait cycle, short enough for a step
LABELS_PER_CLIP = (2, 4)
_DRAWS_PER_CLIP = 16  # a fixed number, so that a planted defect does not shift later clips


@dataclass(frozen=True, kw_only=True, slots=True)
class ClipBatch:
    """Padded clips of one micro-batch.

    Attributes:
        frames: (batch, frames, channels) float32, zero where padded.
        padding: (batch, frames) bool, True where a clip has ended.
        frame_lengths: Frames of each clip; plain integers, so that a loss needs no transfer.
        labels: (sum of label_lengths,) int64, all sequences one after the other, classes from 1
            because CTC's blank is 0.
        label_lengths: Labels of each clip.
    """

    frames: Tensor
    padding: Tensor
    frame_lengths: tuple[int, ...]
    labels: Tensor
    label_lengths: tuple[int, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Clip:
    """One clip: frames (frames, channels) float32, and its labels, classes from 1."""

    frames: Tensor
    labels: tuple[int, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class ClipSet:
    """Clips or recordings of one split.

    Attributes:
        clips: Every recording with its labels.
        are_joined: True where a drawn clip joins pieces of several one-label recordings; False
            where it is one of `clips`, whole.
    """

    clips: tuple[Clip, ...]
    are_joined: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class ClipData:
    """What a task trains on and what it is judged by.

    Attributes:
        train: Recordings to train on.
        test: Held-out recordings.
        stream_sizes: Channels of each stream, in the order in which they stand in the frames.
        num_classes: Labels, the blank not counted.
    """

    train: ClipSet
    test: ClipSet
    stream_sizes: tuple[int, ...]
    num_classes: int


def draw_clip(clips: ClipSet, generator: torch.Generator) -> Clip:
    """Draw one clip.

    Args:
        clips: The split to draw from.
        generator: Decides everything; each clip takes equally many numbers from it.

    Returns:
        A whole clip of the split, or 2 to 4 pieces of its recordings joined. Neighbours never
        share a label: the seam between two pieces of the same activity cannot be seen.
    """
    draws = iter(torch.rand(_DRAWS_PER_CLIP, generator=generator).tolist())
    if not clips.are_joined:
        return clips.clips[_pick(next(draws), 0, len(clips.clips) - 1)]
    pieces: list[Tensor] = []
    labels: list[int] = []
    for _ in range(_pick(next(draws), *LABELS_PER_CLIP)):
        others = [clip for clip in clips.clips if not labels or clip.labels[0] != labels[-1]]
        recording = others[_pick(next(draws), 0, len(others) - 1)]
        length = _pick(next(draws), *PIECE_FRAMES)
        start = _pick(next(draws), 0, len(recording.frames) - length)
        pieces.append(recording.frames[start : start + length])
        labels.append(recording.labels[0])
    return Clip(frames=torch.cat(pieces), labels=tuple(labels))


def _pick(draw: float, low: int, high: int) -> int:
    """Turn a number in [0, 1) into an integer in [low, high]."""
    return low + min(int(draw * (high - low + 1)), high - low)


def collate(clips: Sequence[Clip]) -> ClipBatch:
    """Pad clips to the longest one and make a batch of them."""
    lengths = tuple(len(clip.frames) for clip in clips)
    frames = pad_sequence([clip.frames for clip in clips], batch_first=True)
    ends = torch.tensor(lengths).unsqueeze(1)
    return ClipBatch(
        frames=frames,
        padding=torch.arange(frames.shape[1]) >= ends,
        frame_lengths=lengths,
        labels=torch.tensor([label for clip in clips for label in clip.labels]),
        label_lengths=tuple(len(clip.labels) for clip in clips),
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class Recording:
    """What stands in a file.

    Attributes:
        streams: Each (frames, channels) by its name, all equally long.
        labels: Its labels in order, classes from 0.
    """

    streams: Mapping[str, FloatArray]
    labels: tuple[int, ...]

    def frames(self) -> FloatArray:
        """Put streams and their differences side by side: (frames, channels of all)."""
        frames = np.concatenate(list(self.streams.values()), axis=1)
        # Taken inside a recording, so that the seam of two joined pieces is no spike.
        differences = np.diff(frames, axis=0, prepend=frames[:1])
        return np.concatenate([frames, differences], axis=1)


@dataclass(frozen=True, kw_only=True, slots=True)
class Units:
    """In which units the model sees the frames.

    Attributes:
        raw_units: True leaves the units of the recordings as they are; False brings every
            channel to mean 0 and standard deviation 1.
        input_scale: Factor on everything, > 0.
    """

    raw_units: bool
    input_scale: float

    def shift_and_factor(self, frames: Sequence[FloatArray]) -> tuple[FloatArray, FloatArray]:
        """Return what to subtract from a channel and multiply it by.

        Args:
            frames: The training frames, at least one of them finite.
        """
        everything = np.concatenate(frames)
        if self.raw_units:
            zeros = np.zeros(everything.shape[1], dtype=np.float32)
            return zeros, zeros + np.float32(self.input_scale)
        finite = everything[np.isfinite(everything).all(axis=1)]
        std = finite.std(axis=0)
        # A constant channel carries nothing; dividing it by 0 would make NaN of it.
        factor = self.input_scale / np.where(std > 0, std, 1)
        return finite.mean(axis=0), factor.astype(np.float32)


def read_basic_motions(units: Units) -> ClipData:
    """Read the recordings that come with the package.

    Args:
        units: Raw ones are metres per second squared and radians per second.

    Returns:
        Streams accelerometer (3), gyroscope (3) and frame differences (6); four activities.
    """
    with np.load(BASIC_MOTIONS, allow_pickle=False) as archive:
        return clip_data(
            train=_cut(archive, "train"),
            test=_cut(archive, "test"),
            num_classes=len(archive["classes"]),
            are_joined=True,
            units=units,
        )


def _cut(archive: "np.lib.npyio.NpzFile[np.float32]", split: str) -> list[Recording]:
    ends = np.cumsum(archive[f"{split}_lengths"])[:-1]
    recordings = np.split(archive[f"{split}_frames"].astype(np.float32), ends)
    return [
        Recording(
            streams={"accelerometer": frames[:, :3], "gyroscope": frames[:, 3:]},
            labels=(int(label),),
        )
        for frames, label in zip(recordings, archive[f"{split}_labels"], strict=True)
    ]


def clip_data(
    *,
    train: Sequence[Recording],
    test: Sequence[Recording],
    num_classes: int,
    are_joined: bool,
    units: Units,
) -> ClipData:
    """Make what a task trains on and is judged by.

    Args:
        train: Recordings to train on, at least one; units are taken from them.
        test: Held-out recordings with the same streams, at least one.
        num_classes: Labels, the blank not counted.
        are_joined: As in `ClipSet`.
        units: In which the model sees them.

    Returns:
        The clips, with the frame differences of all streams as one more stream.
    """
    sizes = tuple(stream.shape[1] for stream in train[0].streams.values())
    mean, factor = units.shift_and_factor([recording.frames() for recording in train])

    def clips(recordings: Sequence[Recording]) -> ClipSet:
        made = tuple(
            Clip(
                frames=torch.from_numpy((recording.frames() - mean) * factor),
                labels=tuple(label + 1 for label in recording.labels),
            )
            for recording in recordings
        )
        return ClipSet(clips=made, are_joined=are_joined)

    return ClipData(
        train=clips(train),
        test=clips(test),
        stream_sizes=(*sizes, sum(sizes)),
        num_classes=num_classes,
    )
