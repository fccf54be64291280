"""A user's own utterances: a folder of .npz files, read whole or refused with all its faults."""

from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from stability_search.tasks.own_folder import (
    Array,
    read_split,
    refuse,
    require_folder,
    sparse_labels,
)
from stability_search.tasks.utterances import Recording, UtteranceData, utterance_data


def read_folder(folder: Path) -> UtteranceData:
    """Read a user's own utterances.

    Args:
        folder: Holds `train/*.npz` and `test/*.npz`, one file an utterance: `frames` (frames,
            channels) of numbers, and `label`, an integer from 0. Utterances may be unequally
            long. Test utterances, by which everything is judged, are finite and not empty;
            training utterances need not be: the engine tells such a step apart.

    Returns:
        The utterances, standardised by the training split.

    Raises:
        UsageError: Names every file that cannot be used, and what is wrong with it.
    """
    require_folder(folder)
    problems: list[str] = []
    train = _read_split(folder / "train", problems)
    test = _read_split(folder / "test", problems)
    problems += _odd_channels({**train, **test})
    problems += _unfit_to_train(train)
    problems += _unfit_to_judge(test, {recording.label for recording in train.values()})
    problems += sparse_labels(one.label for one in (*train.values(), *test.values()))
    refuse(folder, problems)
    return utterance_data(train=list(train.values()), test=list(test.values()))


def _read_split(folder: Path, problems: list[str]) -> dict[str, Recording]:
    """Return a split's readable utterances by `split/file.npz`; note what is wrong with others."""
    recordings = {}
    for name, arrays in read_split(folder, "utterance", problems):
        found = [*_wrong_frames(arrays), *_wrong_label(arrays)]
        problems += [f"{name} {problem}" for problem in found]
        if not found:
            recordings[name] = Recording(
                frames=arrays["frames"].astype(np.float32), label=int(arrays["label"].item())
            )
    return recordings


def _wrong_frames(arrays: Mapping[str, Array]) -> list[str]:
    frames = arrays.get("frames")
    if (
        frames is not None
        and frames.ndim == 2  # noqa: PLR2004 - (frames, channels)
        and frames.shape[1]
        and np.issubdtype(frames.dtype, np.number)
        and not np.issubdtype(frames.dtype, np.complexfloating)
    ):
        return []
    return [f"must hold `frames`, real numbers (frames, channels), but got {_got(arrays, frames)}"]


def _wrong_label(arrays: Mapping[str, Array]) -> list[str]:
    label = arrays.get("label")
    if label is None or label.size != 1 or not np.issubdtype(label.dtype, np.integer):
        return [f"must hold `label`, one integer, but got {_got(arrays, label)}"]
    if label.item() < 0:
        return [f"must hold a `label` of 0 or more, but got {label.item()}"]
    return []


def _got(arrays: Mapping[str, Array], array: Array | None) -> str:
    if array is not None:
        return f"{array.dtype} {array.shape}"
    return f"only {', '.join(arrays)}" if arrays else "nothing"


def _odd_channels(recordings: Mapping[str, Recording]) -> list[str]:
    """Compare each utterance with what most have: the odd one is named, not all others."""
    counted = Counter(recording.frames.shape[1] for recording in recordings.values())
    usual = [channels for channels, _ in counted.most_common(1)]
    return [
        f"{name} must have the {usual[0]} channels of the other utterances, but got "
        f"{recording.frames.shape[1]}"
        for name, recording in recordings.items()
        if recording.frames.shape[1] not in usual
    ]


def _unfit_to_train(recordings: Mapping[str, Recording]) -> list[str]:
    problems = []
    labels = {recording.label for recording in recordings.values()}
    if len(labels) == 1:
        problems.append(f"train/ must hold two labels at least, but every label is {min(labels)}")
    finite = (np.isfinite(one.frames).all(axis=1).any() for one in recordings.values())
    if recordings and not any(finite):
        problems.append("train/ must hold one finite frame at least, but none is")
    return problems


def _unfit_to_judge(recordings: Mapping[str, Recording], known: set[int]) -> list[str]:
    """Name test utterances that would make every probe NaN, or that nobody could get right."""
    problems = []
    for name, recording in recordings.items():
        bad = np.flatnonzero(~np.isfinite(recording.frames).all(axis=1))
        if len(bad) or not len(recording.frames):
            got = f"frame {bad[0]} holds NaN or Inf" if len(bad) else "it has no frame"
            problems.append(
                f"{name} must be finite and not empty, since it judges every configuration, but "
                f"{got}"
            )
        if known and recording.label not in known:
            problems.append(
                f"{name} must have a label that stands in train/ too, but got {recording.label}"
            )
    return problems
