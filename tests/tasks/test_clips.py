"""Clips: drawn from recordings, or read from a user's folder with clear words about mistakes."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from stability_search.errors import UsageError
from stability_search.tasks.clip_folder import read_folder
from stability_search.tasks.clips import (
    PIECE_FRAMES,
    Clip,
    ClipData,
    Units,
    collate,
    draw_clip,
    read_basic_motions,
)
from stability_search.tasks.teacher import Teacher
from stability_search.testing import check_task

STANDARDISED = Units(raw_units=False, input_scale=1.0)


def motions() -> ClipData:
    return read_basic_motions(STANDARDISED)


def read(folder: Path) -> ClipData:
    return read_folder(folder, STANDARDISED, time_stride=4)


def draws(num: int, seed: int = 0) -> list[Clip]:
    generator = torch.Generator().manual_seed(seed)
    train = motions().train
    return [draw_clip(train, generator) for _ in range(num)]


def test_streams_are_accelerometer_gyroscope_and_differences() -> None:
    data = read_basic_motions(Units(raw_units=True, input_scale=1.0))
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
    data = read(own)
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
    data = read(own)
    finite = [bool(clip.frames.isfinite().all()) for clip in data.train.clips]
    assert finite == [False, True, True, True, True, True]


def test_a_constant_channel_becomes_zero(tmp_path: Path) -> None:
    for split in ("train", "test"):
        write(tmp_path, split, "a", x=np.full((9, 1), 7.0), labels=np.array([0]))
    data = read(tmp_path)
    assert not data.train.clips[0].frames.any()


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"x": np.zeros((9, 2))}, r"bad\.npz must hold `labels`, integers .* but there is none"),
        ({"x": np.zeros((9, 2)), "labels": np.array([0.5])}, r"but got float64 \(1,\)"),
        ({"x": np.zeros((9, 2)), "labels": np.array([-1])}, r"none below 0, but got \[-1\]"),
        ({"x": np.zeros((9, 2)), "labels": np.array([], int)}, r"at least one label.*\[\]"),
        ({"labels": np.array([0])}, r"must hold streams .* but got none"),
        ({"x": np.zeros(9), "labels": np.array([0])}, r"but got x float64 \(9,\)"),
        ({"x": np.zeros((0, 2)), "labels": np.array([0])}, r"but got x float64 \(0, 2\)"),
        ({"x": np.zeros((9, 0)), "labels": np.array([0])}, r"but got x float64 \(9, 0\)"),
        ({"x": np.array([["a"]]), "labels": np.array([0])}, r"of real numbers.* x <U1"),
        ({"x": np.ones((9, 2)) * 1j, "labels": np.array([0])}, r"of real numbers.* x complex128"),
        (
            {"x": np.zeros((9, 2)), "y": np.zeros((8, 2)), "labels": np.array([0])},
            r"with as many frames, but got x float64 \(9, 2\), y float64 \(8, 2\)",
        ),
        (
            {"pose": np.zeros((9, 3)), "hands": np.zeros((9, 2)), "labels": np.array([0])},
            r"streams of the other clips, hands 2, pose 4 channels, but got hands 2, pose 3",
        ),
        (
            {"face": np.zeros((9, 4)), "hands": np.zeros((9, 2)), "labels": np.array([0])},
            r"hands 2, pose 4 channels, but got face 4, hands 2",
        ),
    ],
)
def test_a_bad_clip_is_named_with_what_is_wrong(
    own: Path, arrays: dict[str, Any], message: str
) -> None:
    write(own, "train", "bad", **arrays)
    with pytest.raises(UsageError, match=message) as caught:
        read(own)
    assert str(caught.value).splitlines()[0].endswith("cannot be trained on, 1 problem:")


def test_all_mistakes_of_all_files_are_told_at_once(own: Path) -> None:
    """Each file at fault has its line, and a file with two mistakes has two."""
    (own / "train" / "clip0.npz").write_bytes(b"no archive")
    write(own, "train", "clip1", pose=np.zeros((9, 4)), hands=np.zeros((8, 2)))
    write(own, "train", "clip2", pose=np.zeros((9, 4)), labels=np.array([0]))
    streams = {"pose": np.zeros((9, 4)), "hands": np.zeros((9, 2))}
    write(own, "test", "clip3", **streams, labels=np.array([1, 1, 0]))
    streams["hands"][4, 1] = np.inf
    write(own, "test", "clip4", **streams, labels=np.array([1]))
    with pytest.raises(UsageError) as caught:
        Teacher(data_dir=str(own))
    lines = str(caught.value).splitlines()
    assert lines[0] == f"data_dir: {own} cannot be trained on, 6 problems:"
    assert [line.split()[0] for line in lines[1:-1]] == [
        "train/clip0.npz",
        "train/clip1.npz",
        "train/clip1.npz",
        "train/clip2.npz",
        "test/clip3.npz",
        "test/clip4.npz",
    ]
    assert lines[5] == (
        "  test/clip3.npz must have at least 13 frames for its 3 labels, since it judges every "
        "configuration, but got 9."
    )
    assert "frame 4 holds NaN or Inf" in lines[6]
    assert lines[-1] == "Correct these files, or take them out of the folder."


def test_a_folder_of_many_mistakes_is_cut_short(own: Path) -> None:
    for index in range(30):
        write(own, "train", f"bad{index}", x=np.zeros((9, 2)))
    with pytest.raises(UsageError, match=r"30 problems:(?s:.*)\n  And 10 more\.\n"):
        read(own)


def test_a_test_clip_just_long_enough_is_taken(own: Path) -> None:
    """Two equal labels need a blank between them: three frames of four, the last one begun."""
    streams = {"pose": np.zeros((9, 4)), "hands": np.zeros((9, 2))}
    write(own, "test", "clip0", **streams, labels=np.array([1, 1]))
    assert math.isfinite(Teacher(data_dir=str(own)).baseline())
    streams = {name: stream[:8] for name, stream in streams.items()}
    write(own, "test", "clip0", **streams, labels=np.array([1, 1]))
    with pytest.raises(UsageError, match=r"at least 9 frames .* but got 8"):
        read(own)


def test_a_label_that_no_training_clip_has_cannot_be_judged_by(own: Path) -> None:
    streams = {"pose": np.zeros((40, 4)), "hands": np.zeros((40, 2))}
    write(own, "test", "clip0", **streams, labels=np.array([7, 1, 5]))
    with pytest.raises(UsageError, match=r"test/clip0\.npz must have .* no such clip has 5, 7\."):
        read(own)


def test_a_bad_folder_is_named(own: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"gone is not there"):
        Teacher(data_dir=str(tmp_path / "gone"))
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(UsageError, match=r"file is not a folder"):
        Teacher(data_dir=str(file))
    for clip in (own / "test").iterdir():
        clip.unlink()
    with pytest.raises(UsageError, match=r"test/ must hold one \.npz .* but it holds none"):
        Teacher(data_dir=str(own))
    (own / "test").rmdir()
    with pytest.raises(UsageError, match=r"test/ must hold .* but it is not there"):
        Teacher(data_dir=str(own))


def test_a_file_that_is_no_archive_is_refused(own: Path) -> None:
    file = own / "train" / "clip0.npz"
    whole = file.read_bytes()
    for content in (b"no archive", b"", whole[:-40]):
        file.write_bytes(content)
        with pytest.raises(UsageError, match=r"train/clip0\.npz must be an \.npz archive"):
            read(own)
    with file.open("wb") as lone_array:
        np.save(lone_array, np.zeros((9, 2)))
    with pytest.raises(UsageError, match=r"train/clip0\.npz must be an \.npz archive"):
        read(own)


def test_a_damaged_archive_and_a_pickle_are_refused(own: Path) -> None:
    file = own / "train" / "clip0.npz"
    changed = bytearray(file.read_bytes())
    changed[200] ^= 255
    file.write_bytes(changed)
    with pytest.raises(UsageError, match=r"clip0\.npz must be readable .* Bad CRC-32"):
        read(own)
    np.savez(file, labels=np.array([object()]), allow_pickle=True)
    with pytest.raises(UsageError, match=r"clip0\.npz must be readable without pickles"):
        read(own)


def test_clips_without_one_finite_frame_have_no_statistics(own: Path) -> None:
    for file in (own / "train").iterdir():
        write(
            own,
            "train",
            file.stem,
            pose=np.full((9, 4), np.nan),
            hands=np.zeros((9, 2)),
            labels=np.array([0]),
        )
    with pytest.raises(UsageError, match=r"train/: one frame at least must be finite"):
        read(own)
