"""Utterances: standardised, shuffled, padded; a folder is read, or refused in clear words."""

import math
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from stability_search.errors import UsageError
from stability_search.tasks.speech_lora import SpeechLora
from stability_search.tasks.utterance_folder import read_folder
from stability_search.tasks.utterances import (
    Recording,
    Utterance,
    collate,
    constant_prediction_loss,
    read_japanese_vowels,
    shuffled,
    spread_batches,
    utterance_data,
)
from stability_search.testing import check_task


def utterance(num_frames: int, label: int = 0) -> Utterance:
    return Utterance(frames=torch.ones(num_frames, 2), label=label)


def recording(frames: Any, label: int = 0) -> Recording:  # noqa: ANN401 - anything numpy takes
    return Recording(frames=np.array(frames, dtype=np.float32), label=label)


# -- the recordings of the package ------------------------------------------------------------


def test_nine_speakers_say_utterances_of_7_to_29_frames() -> None:
    data = read_japanese_vowels()
    assert (len(data.train), len(data.test)) == (270, 370)
    assert (data.num_channels, data.num_classes) == (12, 9)
    lengths = {len(one.frames) for one in (*data.train, *data.test)}
    assert (min(lengths), max(lengths)) == (7, 29)
    assert {one.label for one in data.train} == {one.label for one in data.test} == set(range(9))


def test_channels_are_standardised_by_the_training_split() -> None:
    data = read_japanese_vowels()
    frames = torch.cat([one.frames for one in data.train])
    torch.testing.assert_close(frames.mean(dim=0), torch.zeros(12), atol=1e-4, rtol=0)
    torch.testing.assert_close(frames.std(dim=0, correction=0), torch.ones(12), atol=1e-4, rtol=0)
    held_out = torch.cat([one.frames for one in data.test])
    assert held_out.mean(dim=0).abs().max() > 1e-2


def test_a_frame_of_nan_spoils_no_statistics_and_a_constant_channel_becomes_zero() -> None:
    data = utterance_data(
        train=[recording([[1, 7], [3, 7]]), recording([[np.nan, 7]], label=1)],
        test=[recording([[2, 7]])],
    )
    assert data.train[0].frames.tolist() == [[-1, 0], [1, 0]]
    assert data.train[1].frames.isnan().tolist() == [[True, False]]
    assert data.test[0].frames.tolist() == [[0, 0]]


# -- batches ----------------------------------------------------------------------------------


def test_every_utterance_comes_once_an_epoch_and_epochs_differ() -> None:
    utterances = [utterance(1, label) for label in range(20)]
    stream = shuffled(utterances, torch.Generator().manual_seed(0))
    first, second = ([one.label for one in islice(stream, 20)] for _ in range(2))
    assert sorted(first) == sorted(second) == list(range(20))
    assert first != second
    again = shuffled(utterances, torch.Generator().manual_seed(0))
    assert [one.label for one in islice(again, 20)] == first


def test_a_batch_is_padded_with_zeros_to_its_longest_utterance() -> None:
    batch = collate([utterance(1, 3), utterance(3, 4)])
    assert batch.frames.sum(dim=2).tolist() == [[2, 0, 0], [2, 2, 2]]
    assert batch.padding.tolist() == [[False, True, True], [False, False, False]]
    assert batch.labels.tolist() == [3, 4]


def test_a_batch_without_any_frame_is_all_padding() -> None:
    batch = collate([utterance(0), utterance(0)])
    assert batch.frames.shape == (2, 1, 2)
    assert batch.padding.all()


def test_held_out_batches_take_some_from_everywhere() -> None:
    utterances = [utterance(1, label) for label in range(100)]
    batches = spread_batches(utterances, num_batches=4, batch_size=5)
    labels = [batch.labels.tolist() for batch in batches]
    assert labels[0] == [0, 20, 40, 60, 80]
    assert labels[3] == [15, 35, 55, 75, 95]


@pytest.mark.parametrize(("num", "sizes"), [(10, [3, 3, 2, 2]), (3, [1, 1, 1])])
def test_few_held_out_utterances_all_count_once(num: int, sizes: list[int]) -> None:
    utterances = [utterance(1, label) for label in range(num)]
    batches = spread_batches(utterances, num_batches=4, batch_size=5)
    assert [len(batch.labels) for batch in batches] == sizes
    assert sorted(label for batch in batches for label in batch.labels.tolist()) == list(
        range(num)
    )


def test_the_best_constant_prediction_costs_the_entropy_of_the_labels() -> None:
    even = collate([utterance(1, label) for label in (0, 1, 2, 3)])
    assert constant_prediction_loss([even], num_classes=9) == pytest.approx(math.log(4))
    lone = collate([utterance(1, 5)])
    assert constant_prediction_loss([lone], num_classes=9) == 0
    # Batches count equally, whatever their size, as in the probe loss.
    mixed = constant_prediction_loss([even, lone], num_classes=9)
    assert mixed == pytest.approx(4 * (1 / 8) * math.log(8) + (1 / 2) * math.log(2))


# -- a user's own folder ----------------------------------------------------------------------


def write(folder: Path, name: str, **arrays: Any) -> None:  # noqa: ANN401 - anything numpy saves
    file = folder / f"{name}.npz"
    file.parent.mkdir(exist_ok=True)
    np.savez(file, **arrays)


@pytest.fixture
def own(tmp_path: Path) -> Path:
    numbers = np.random.default_rng(0)
    for index in range(6):
        for split in ("train", "test"):
            frames = numbers.normal(3, 2, size=(4 + index, 5))
            write(tmp_path, f"{split}/{index}", frames=frames, label=np.int64(index % 3))
    return tmp_path


def test_own_utterances_are_read(own: Path) -> None:
    data = read_folder(own)
    assert (data.num_channels, data.num_classes) == (5, 3)
    assert [len(one.frames) for one in data.train] == [4, 5, 6, 7, 8, 9]
    assert [one.label for one in data.test] == [0, 1, 2, 0, 1, 2]


def test_a_speech_model_trains_on_own_utterances(own: Path) -> None:
    assert check_task(SpeechLora(data_dir=str(own), width=8, heads=2, layers=1, rank=2)) == ()


def test_a_training_utterance_may_hold_nan_or_nothing(own: Path) -> None:
    write(own, "train/6", frames=np.full((3, 5), np.nan), label=1)
    write(own, "train/7", frames=np.zeros((0, 5)), label=1)
    task = SpeechLora(data_dir=str(own), width=8, heads=2, layers=1, rank=2)
    batch = next(task.batches(8, torch.Generator().manual_seed(0)))
    losses = [
        task.loss(task.model(), collate([one])).isnan().item() for one in read_folder(own).train
    ]
    assert losses == [False] * 6 + [True] * 2
    (empty,) = (~batch.padding).sum(dim=1).eq(0).nonzero().flatten().tolist()
    assert task.check_batch(batch) == [f"utterance {empty} has no frame, so its mean is NaN"]


def test_everything_wrong_with_a_folder_is_said_at_once(own: Path) -> None:
    (own / "train" / "a.npz").write_bytes(b"no archive")
    np.savez(own / "train" / "b.npz", frames=np.array([object()]), allow_pickle=True)
    write(own, "train/c", features=np.zeros((3, 5)), speaker=2)
    write(own, "train/d", frames=np.zeros(3), label=0.5)
    write(own, "train/e", frames=np.zeros((3, 4)), label=-1)
    write(own, "train/f", frames=np.zeros((3, 4)), label=[1])
    write(own, "test/a", frames=np.full((3, 5), np.inf), label=7)
    write(own, "test/b", frames=np.zeros((0, 5)), label=1)
    with pytest.raises(UsageError, match="cannot be trained on, 11 problems") as caught:
        SpeechLora(data_dir=str(own))
    _, *listed, hint = str(caught.value).splitlines()
    for line, (start, end) in zip(
        listed,
        [
            ("train/a.npz must be an .npz archive", "but is none."),
            ("train/b.npz must be readable", "when allow_pickle=False."),
            ("train/c.npz must hold `frames`", "but got only features, speaker."),
            ("train/c.npz must hold `label`, one integer", "but got only features, speaker."),
            ("train/d.npz must hold `frames`", "but got float64 (3,)."),
            ("train/d.npz must hold `label`, one integer", "but got float64 ()."),
            ("train/e.npz must hold a `label` of 0 or more", "but got -1."),
            ("train/f.npz must have the 5 channels of the other", "but got 4."),
            ("test/a.npz must be finite and not empty", "frame 0 holds NaN or Inf."),
            ("test/a.npz must have a label that stands in train/ too", "but got 7."),
            ("test/b.npz must be finite and not empty", "but it has no frame."),
        ],
        strict=True,
    ):
        assert line.strip().startswith(start)
        assert line.endswith(end)
    assert hint == "Correct these files, or take them out of the folder."


def test_of_very_many_problems_twenty_are_named(own: Path) -> None:
    for index in range(25):
        write(own, f"train/bad{index}", label=1)
    with pytest.raises(UsageError, match="25 problems") as caught:
        read_folder(own)
    assert str(caught.value).count("must hold `frames`") == 20
    assert "  And 5 more.\n" in str(caught.value)


def test_a_bad_folder_is_named(own: Path) -> None:
    with pytest.raises(UsageError, match=r"train/\*\.npz .* needed, but .*gone is not there"):
        read_folder(own / "gone")
    with pytest.raises(UsageError, match=r"0\.npz is not a folder"):
        read_folder(own / "train" / "0.npz")
    for file in (own / "test").iterdir():
        file.unlink()
    with pytest.raises(UsageError, match=r"1 problem:\n  test/ must hold .*, but it holds none"):
        read_folder(own)
    (own / "test").rmdir()
    with pytest.raises(UsageError, match=r"test/ must hold .*, but it is not there"):
        read_folder(own)


def test_what_cannot_be_learned_from_is_refused(tmp_path: Path) -> None:
    for split in ("train", "test"):
        write(tmp_path, f"{split}/a", frames=np.full((3, 2), np.nan), label=4)
    with pytest.raises(UsageError, match="3 problems") as caught:
        read_folder(tmp_path)
    assert "train/ must hold two labels at least, but every label is 4." in str(caught.value)
    assert "train/ must hold one finite frame at least, but none is." in str(caught.value)
