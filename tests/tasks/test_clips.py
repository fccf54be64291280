"""Clips: drawn from recordings, or read from a user's folder with clear words about mistakes."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from stability_search.tasks.clips import (
    PIECE_FRAMES,
    Clip,
    ClipData,
    collate,
    draw_clip,
    read_basic_motions,
    read_folder,
)
from stability_search.tasks.teacher import Teacher
from stability_search.testing import check_task


def motions() -> ClipData:
    return read_basic_motions(raw_units=False, input_scale=1.0)


def draws(num: int, seed: int = 0) -> list[Clip]:
    generator = torch.Generator().manual_seed(seed)
    train = motions().train
    return [draw_clip(train, generator) for _ in range(num)]


def test_streams_are_accelerometer_gyroscope_and_differences() -> None:
    data = read_basic_motions(raw_units=True, input_scale=1.0)
    assert data.stream_sizes == (3, 3, 6)
    assert data.num_classes == 4
    frames = data.train.clips[0].frames
    assert frames.shape == (100, 12)
    torch.testing.assert_close(frames[1:, 6:], frames[1:, :6] - frames[:-1, :6])
    assert not frames[0, 6:].any()
    assert frames[:, :6].abs().max() > 1.5


def test_channels_are_standardised_by_the_training_split() -> None:
    frames = torch.cat([clip.frames for clip in motions().train.clips])
    torch.testing.assert_close(frames.mean(dim=0), torch.zeros(12), atol=1e-4, rtol=0)
    torch.testing.assert_close(frames.std(dim=0, correction=0), torch.ones(12), atol=1e-4, rtol=0)
    held_out = torch.cat([clip.frames for clip in motions().test.clips])
    assert held_out.mean(dim=0).abs().max() > 1e-3


def test_a_clip_joins_two_to_four_pieces_and_neighbours_differ() -> None:
    clips = draws(300)
    assert {len(clip.labels) for clip in clips} == {2, 3, 4}
    assert {label for clip in clips for label in clip.labels} == {1, 2, 3, 4}
    for clip in clips:
        pairs = zip(clip.labels, clip.labels[1:], strict=False)
        assert all(left != right for left, right in pairs)
        low, high = (frames * len(clip.labels) for frames in PIECE_FRAMES)
        assert low <= len(clip.frames) <= high


def test_a_generator_decides_the_clips() -> None:
    same, other = draws(3), draws(3, seed=1)
    again = draws(3)
    assert all(torch.equal(a.frames, b.frames) for a, b in zip(same, again, strict=True))
    assert not all(a.frames.shape == b.frames.shape for a, b in zip(same, other, strict=True))


def test_a_batch_is_padded_with_zeros_to_its_longest_clip() -> None:
    clips = [
        Clip(frames=torch.ones(3, 2), labels=(1, 2)),
        Clip(frames=torch.ones(5, 2), labels=(3,)),
    ]
    batch = collate(clips)
    assert batch.frames.sum(dim=2).tolist() == [[2, 2, 2, 0, 0], [2, 2, 2, 2, 2]]
    assert batch.padding.tolist() == [[False] * 3 + [True] * 2, [False] * 5]
    assert batch.labels.tolist() == [1, 2, 3]
    assert (batch.frame_lengths, batch.label_lengths) == ((3, 5), (2, 1))


def write(folder: Path, split: str, name: str, **arrays: Any) -> None:  # noqa: ANN401
    (folder / split).mkdir(exist_ok=True)
    np.savez(folder / split / f"{name}.npz", **arrays)


@pytest.fixture
def own(tmp_path: Path) -> Path:
    numbers = np.random.default_rng(0)
    for split, num in (("train", 6), ("test", 8)):
        for index in range(num):
            length = 40 + index
            write(
                tmp_path,
                split,
                f"clip{index}",
                pose=numbers.normal(size=(length, 4)),
                hands=numbers.normal(5, 2, size=(length, 2)),
                labels=np.array([index % 3, (index + 1) % 3]),
            )
    return tmp_path


def test_own_clips_are_whole_and_their_arrays_are_the_streams(own: Path) -> None:
    data = read_folder(own, raw_units=False, input_scale=1.0)
    assert data.stream_sizes == (2, 4, 6)  # by name: hands, pose, then the differences
    assert data.num_classes == 3
    assert [len(clip.frames) for clip in data.train.clips] == [40, 41, 42, 43, 44, 45]
    assert data.train.clips[2].labels == (3, 1)


def test_a_teacher_trains_on_own_clips(own: Path) -> None:
    assert check_task(Teacher(data_dir=str(own), hidden=16)) == ()


def test_nan_in_own_clips_stays_in_its_clip(own: Path) -> None:
    pose = np.ones((40, 4), dtype=np.float32)
    pose[7, 1] = np.nan
    labels = np.array([0])
    write(own, "train", "clip0", pose=pose, hands=np.ones((40, 2)), labels=labels)
    data = read_folder(own, raw_units=False, input_scale=1.0)
    finite = [bool(clip.frames.isfinite().all()) for clip in data.train.clips]
    assert finite == [False, True, True, True, True, True]


def test_a_constant_channel_becomes_zero(tmp_path: Path) -> None:
    for split in ("train", "test"):
        write(tmp_path, split, "a", x=np.full((9, 1), 7.0), labels=np.array([0]))
    data = read_folder(tmp_path, raw_units=False, input_scale=1.0)
    assert not data.train.clips[0].frames.any()


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"x": np.zeros((9, 2))}, r"bad\.npz must hold `labels`, integers .* but there is none"),
        ({"x": np.zeros((9, 2)), "labels": np.array([0.5])}, r"but got float64 \(1,\)"),
        ({"x": np.zeros((9, 2)), "labels": np.array([-1])}, r"none below 0, but got \[-1\]"),
        ({"x": np.zeros((9, 2)), "labels": np.array([], int)}, r"at least one label.*\[\]"),
        ({"labels": np.array([0])}, r"must hold streams .* but got none"),
        ({"x": np.zeros(9), "labels": np.array([0])}, r"streams .* but got x \(9,\)"),
        ({"x": np.zeros((0, 2)), "labels": np.array([0])}, r"but got x \(0, 2\)"),
        ({"x": np.array([["a"]]), "labels": np.array([0])}, r"of numbers"),
        (
            {"x": np.zeros((9, 2)), "y": np.zeros((8, 2)), "labels": np.array([0])},
            r"same number of frames, but got x \(9, 2\), y \(8, 2\)",
        ),
        (
            {"pose": np.zeros((9, 3)), "hands": np.zeros((9, 2)), "labels": np.array([0])},
            r"same streams, but .* channels \(2, 4\) and .* \(2, 3\)",
        ),
    ],
)
def test_a_bad_clip_is_named_with_what_is_wrong(
    own: Path, arrays: dict[str, Any], message: str
) -> None:
    write(own, "train", "bad" if "pose" not in arrays else "other", **arrays)
    if "pose" in arrays:  # not the first file, by name
        (own / "train" / "other.npz").rename(own / "train" / "z.npz")
    with pytest.raises(ValueError, match=message):
        read_folder(own, raw_units=False, input_scale=1.0)


def test_a_bad_folder_is_named(own: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"gone is not there"):
        Teacher(data_dir=str(tmp_path / "gone"))
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(ValueError, match=r"file is not a folder"):
        Teacher(data_dir=str(file))
    for clip in (own / "test").iterdir():
        clip.unlink()
    with pytest.raises(
        ValueError, match=r"test must hold at least one \.npz file, but holds none"
    ):
        Teacher(data_dir=str(own))
    (own / "test").rmdir()
    with pytest.raises(ValueError, match=r"but is not there\. Put one file a clip"):
        Teacher(data_dir=str(own))


def test_a_file_that_is_no_archive_and_a_pickle_are_refused(own: Path) -> None:
    (own / "train" / "a.npz").write_bytes(b"no archive")
    with pytest.raises(ValueError, match=r"a\.npz cannot be read as an \.npz archive"):
        Teacher(data_dir=str(own))
    np.savez(own / "train" / "a.npz", labels=np.array([object()]), allow_pickle=True)
    with pytest.raises(ValueError, match=r"a\.npz cannot be read as .* without pickles"):
        Teacher(data_dir=str(own))


def test_clips_without_one_finite_frame_have_no_statistics(tmp_path: Path) -> None:
    for split in ("train", "test"):
        write(tmp_path, split, "a", x=np.full((9, 1), np.nan), labels=np.array([0]))
    with pytest.raises(ValueError, match=r"every frame holds NaN or Inf"):
        Teacher(data_dir=str(tmp_path))
