"""A user's own clips: a folder of .npz files, read whole or refused with all that is wrong."""

from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from stability_search.tasks.clips import ClipData, Recording, Units, clip_data
from stability_search.tasks.ctc import num_frames_needed
from stability_search.tasks.own_folder import (
    Array,
    read_split,
    refuse,
    require_folder,
    sparse_labels,
)


def read_folder(folder: Path, units: Units, *, time_stride: int) -> ClipData:
    """Read a user's own clips.

    Args:
        folder: Holds `train/*.npz` and `test/*.npz`, one file a clip: `labels` (labels,) integers
            from 0, and every other array a stream (frames, channels) of numbers. All clips have
            the same streams. Clips may be unequally long. Test clips, by which everything is
            judged, are finite, long enough for their labels, and have labels of training clips;
            training clips may be broken.
        units: In which the model sees them.
        time_stride: Frames that the model makes one of before it reads labels off, >= 1.

    Returns:
        The clips with one more stream: the frame differences of all others.

    Raises:
        UsageError: Names every file that cannot be used, and what is wrong with it.
    """
    require_folder(folder)
    problems: list[str] = []
    train = _read_split(folder / "train", problems)
    test = _read_split(folder / "test", problems)
    problems += _odd_streams({**train, **test})
    problems += _unfit_to_judge(test, time_stride)
    problems += _never_taught(train, test)
    if train and not any(_has_finite_frame(clip) for clip in train.values()):
        problems.append(
            "train/: one frame at least must be finite, but every frame holds NaN or Inf"
        )
    clips = (*train.values(), *test.values())
    problems += sparse_labels(label for clip in clips for label in clip.labels)
    refuse(folder, problems)
    return clip_data(
        train=list(train.values()),
        test=list(test.values()),
        num_classes=1 + max(max(clip.labels) for clip in clips),
        are_joined=False,
        units=units,
    )


def _read_split(folder: Path, problems: list[str]) -> dict[str, Recording]:
    """Return the readable clips of a split by `split/file.npz`; note what is wrong with others."""
    clips = {}
    for name, arrays in read_split(folder, "clip", problems):
        labels = arrays.pop("labels", None)
        found = [*_wrong_labels(labels), *_wrong_streams(arrays)]
        problems += [f"{name} {problem}" for problem in found]
        if labels is not None and not found:
            clips[name] = Recording(
                streams={key: array.astype(np.float32) for key, array in arrays.items()},
                labels=tuple(labels.tolist()),
            )
    return clips


def _wrong_labels(labels: Array | None) -> list[str]:
    if labels is None or labels.ndim != 1 or not np.issubdtype(labels.dtype, np.integer):
        got = "there is none" if labels is None else f"got {labels.dtype} {labels.shape}"
        return [f"must hold `labels`, integers (labels,), but {got}"]
    if not labels.size or labels.min() < 0:
        return [f"must hold at least one label and none below 0, but got {labels.tolist()}"]
    return []


def _wrong_streams(streams: Mapping[str, Array]) -> list[str]:
    are_real = all(
        array.ndim == 2  # noqa: PLR2004 - (frames, channels)
        and array.shape[1]
        and np.issubdtype(array.dtype, np.number)
        and not np.issubdtype(array.dtype, np.complexfloating)
        for array in streams.values()
    )
    lengths = {array.shape[0] for array in streams.values() if array.ndim}
    if streams and are_real and len(lengths) == 1 and 0 not in lengths:
        return []
    rule = "must hold streams (frames, channels) of real numbers, all with as many frames"
    got = ", ".join(f"{name} {array.dtype} {array.shape}" for name, array in streams.items())
    return [f"{rule}, but got {got or 'none'}"]


def _odd_streams(clips: Mapping[str, Recording]) -> list[str]:
    """Compare each clip with what most clips have: the odd one is named, not all others."""
    forms = {
        name: ", ".join(f"{key} {array.shape[1]}" for key, array in clip.streams.items())
        for name, clip in clips.items()
    }
    usual = [form for form, _ in Counter(forms.values()).most_common(1)]
    return [
        f"{name} must have the streams of the other clips, {usual[0]} channels, but got {form}"
        for name, form in forms.items()
        if form not in usual
    ]


def _unfit_to_judge(clips: Mapping[str, Recording], time_stride: int) -> list[str]:
    """Name test clips that would make every probe NaN or infinite."""
    problems = []
    for name, clip in clips.items():
        frames = clip.frames()
        bad = np.flatnonzero(~np.isfinite(frames).all(axis=1))
        if len(bad):
            problems.append(
                f"{name} must be finite, since it judges every configuration, but frame {bad[0]} "
                "holds NaN or Inf"
            )
        needed = time_stride * (num_frames_needed(clip.labels) - 1) + 1
        if len(frames) < needed:
            problems.append(
                f"{name} must have at least {needed} frames for its {len(clip.labels)} labels, "
                f"since it judges every configuration, but got {len(frames)}"
            )
    return problems


def _never_taught(train: Mapping[str, Recording], test: Mapping[str, Recording]) -> list[str]:
    taught = {label for clip in train.values() for label in clip.labels}
    unknown = {name: sorted(set(clip.labels) - taught) for name, clip in test.items()}
    return [
        f"{name} must have labels of the training clips, but no such clip has "
        f"{', '.join(map(str, labels))}"
        for name, labels in unknown.items()
        if labels and train
    ]


def _has_finite_frame(clip: Recording) -> bool:
    return bool(np.isfinite(clip.frames()).all(axis=1).any())
