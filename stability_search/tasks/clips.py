"""Sensor clips with label sequences: read from recordings, standardised, drawn into batches."""

import zipfile
from collections.abc import Sequence
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
class _Raw:
    """A recording as it stands in a file: streams (frames, channels), labels from 0."""

    streams: tuple[FloatArray, ...]
    labels: tuple[int, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class _Units:
    """In which units the model sees the frames."""

    raw_units: bool
    input_scale: float

    def shift_and_factor(self, frames: list[FloatArray]) -> tuple[FloatArray, FloatArray]:
        """Return what to subtract and multiply by a channel, from the training frames."""
        everything = np.concatenate(frames)
        if self.raw_units:
            zeros = np.zeros(everything.shape[1], dtype=np.float32)
            return zeros, zeros + np.float32(self.input_scale)
        finite = everything[np.isfinite(everything).all(axis=1)]
        if not len(finite):
            raise ValueError(
                "data_dir: the training clips must have finite frames to take mean and standard "
                "deviation from, but every frame holds NaN or Inf."
            )
        std = finite.std(axis=0)
        # A constant channel carries nothing; dividing it by 0 would make NaN of it.
        factor = self.input_scale / np.where(std > 0, std, 1)
        return finite.mean(axis=0), factor.astype(np.float32)


def read_basic_motions(*, raw_units: bool, input_scale: float) -> ClipData:
    """Read the recordings that come with the package.

    Args:
        raw_units: True leaves metres per second squared and radians per second as they are;
            False brings every channel to mean 0 and standard deviation 1.
        input_scale: Factor on everything, > 0.

    Returns:
        Streams accelerometer (3), gyroscope (3) and frame differences (6); four activities.
    """
    with np.load(BASIC_MOTIONS, allow_pickle=False) as archive:
        splits = {split: _cut(archive, split) for split in ("train", "test")}
        num_classes = len(archive["classes"])
    units = _Units(raw_units=raw_units, input_scale=input_scale)
    return _clip_data(splits, num_classes=num_classes, are_joined=True, units=units)


def _cut(archive: "np.lib.npyio.NpzFile[np.float32]", split: str) -> list[_Raw]:
    ends = np.cumsum(archive[f"{split}_lengths"])[:-1]
    recordings = np.split(archive[f"{split}_frames"].astype(np.float32), ends)
    return [
        _Raw(streams=(frames[:, :3], frames[:, 3:]), labels=(int(label),))
        for frames, label in zip(recordings, archive[f"{split}_labels"], strict=True)
    ]


def read_folder(folder: Path, *, raw_units: bool, input_scale: float) -> ClipData:
    """Read a user's own clips.

    Args:
        folder: Holds `train/*.npz` and `test/*.npz`, one file a clip: `labels` (labels,) integers
            from 0, and every other array a stream (frames, channels) of numbers. All clips have
            the same streams. Clips may be unequally long.
        raw_units: As in `read_basic_motions`.
        input_scale: As in `read_basic_motions`.

    Returns:
        The clips with one more stream: the frame differences of all others.

    Raises:
        ValueError: Names the folder or file and what is wrong with it.
    """
    if not folder.is_dir():
        raise ValueError(
            f"data_dir: a folder with train/*.npz and test/*.npz is needed, but {folder} is "
            f"{'not a folder' if folder.exists() else 'not there'}."
        )
    splits = {split: _read_split(folder / split) for split in ("train", "test")}
    shapes = [
        (split, tuple(stream.shape[1] for stream in raw.streams))
        for split, raws in splits.items()
        for raw in raws
    ]
    wanted = shapes[0][1]
    for split, sizes in shapes:
        if sizes != wanted:
            raise ValueError(
                f"data_dir: all clips must have the same streams, but the first of train has "
                f"channels {wanted} and one of {split} has {sizes}."
            )
    num_classes = 1 + max(
        label for raws in splits.values() for raw in raws for label in raw.labels
    )
    units = _Units(raw_units=raw_units, input_scale=input_scale)
    return _clip_data(splits, num_classes=num_classes, are_joined=False, units=units)


def _read_split(folder: Path) -> list[_Raw]:
    files = sorted(folder.glob("*.npz"))
    if not files:
        raise ValueError(
            f"data_dir: {folder} must hold at least one .npz file, but "
            f"{'holds none' if folder.is_dir() else 'is not there'}. "
            "Put one file a clip into train/ and test/."
        )
    return [_read_clip(file) for file in files]


def _read_clip(file: Path) -> _Raw:
    try:
        with np.load(file, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in sorted(archive.files)}
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise ValueError(
            f"data_dir: {file} cannot be read as an .npz archive without pickles: {error}."
        ) from error
    labels = arrays.pop("labels", None)
    if labels is None or labels.ndim != 1 or not np.issubdtype(labels.dtype, np.integer):
        got = "there is none" if labels is None else f"got {labels.dtype} {labels.shape}"
        raise ValueError(f"data_dir: {file} must hold `labels`, integers (labels,), but {got}.")
    if not labels.size or labels.min() < 0:
        raise ValueError(
            f"data_dir: {file} must hold at least one label and none below 0, "
            f"but got {labels.tolist()}."
        )
    lengths = {array.shape[0] for array in arrays.values() if array.ndim}
    is_numeric = all(
        array.ndim == 2 and np.issubdtype(array.dtype, np.number)  # noqa: PLR2004
        for array in arrays.values()
    )
    if not arrays or not is_numeric or len(lengths) != 1 or 0 in lengths:
        got = ", ".join(f"{name} {array.shape}" for name, array in arrays.items()) or "none"
        raise ValueError(
            f"data_dir: {file} must hold streams (frames, channels) of numbers, all with the same "
            f"number of frames, but got {got}."
        )
    streams = tuple(array.astype(np.float32) for array in arrays.values())
    return _Raw(streams=streams, labels=tuple(int(label) for label in labels))


def _clip_data(
    splits: dict[str, list[_Raw]], *, num_classes: int, are_joined: bool, units: _Units
) -> ClipData:
    """Add the differences, standardise by the training split, count classes from 1."""
    first = splits["train"][0].streams
    sizes = tuple(stream.shape[1] for stream in first)
    frames = {
        split: [_with_differences(raw.streams) for raw in raws] for split, raws in splits.items()
    }
    mean, factor = units.shift_and_factor(frames["train"])
    sets = {
        split: ClipSet(
            clips=tuple(
                Clip(
                    frames=torch.from_numpy((array - mean) * factor),
                    labels=tuple(label + 1 for label in raw.labels),
                )
                for raw, array in zip(splits[split], arrays, strict=True)
            ),
            are_joined=are_joined,
        )
        for split, arrays in frames.items()
    }
    return ClipData(
        train=sets["train"],
        test=sets["test"],
        stream_sizes=(*sizes, sum(sizes)),
        num_classes=num_classes,
    )


def _with_differences(streams: tuple[FloatArray, ...]) -> FloatArray:
    frames = np.concatenate(streams, axis=1)
    # Taken inside a recording, so that the seam of two joined pieces is no spike.
    differences = np.diff(frames, axis=0, prepend=frames[:1])
    return np.concatenate([frames, differences], axis=1)
