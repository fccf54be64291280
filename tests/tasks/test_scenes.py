"""Scenes of digits, and a user's own from a folder, with all that is wrong said at once."""

from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

from stability_search.errors import UsageError
from stability_search.tasks.detector import Detector
from stability_search.tasks.detector_model import cell_centers, cells_of, edge_distances
from stability_search.tasks.scene_files import read_scenes
from stability_search.tasks.scenes import OFF_CENTER, DigitScenes, collate, misfits, read_digits


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# -- digits ----------------------------------------------------------------------------------


def test_boxes_fit_the_digits_and_each_digit_has_its_own_cell() -> None:
    data = read_digits()
    rng = generator()
    for _ in range(50):
        batch = collate([data.train.draw(rng)])
        assert misfits(batch, num_classes=10) == []
        assert 2 <= len(batch.labels) <= 4
        cells = cells_of(batch.boxes, batch.scenes, batch.images)
        assert len(set(cells.tolist())) == len(cells)
        centers = cell_centers(cells, batch.images)
        middles = (batch.boxes[:, :2] + batch.boxes[:, 2:]) / 2
        assert (middles - centers).abs().max() <= OFF_CENTER
        distances = edge_distances(batch.boxes, centers)
        assert distances.min() > 0
        assert distances.max() <= data.reach


def test_all_ink_lies_in_a_box_and_every_box_holds_ink() -> None:
    data = read_digits()
    scene = data.train.draw(generator(3))
    paper = scene.image.min()
    outside = scene.image[0].clone()
    for left, top, right, bottom in scene.boxes.int().tolist():
        assert scene.image[0, top:bottom, left:right].max() > paper + 1
        outside[top:bottom, left:right] = paper
    assert torch.equal(outside, torch.full_like(outside, paper.item()))


def test_pixels_have_mean_0_and_deviation_1() -> None:
    train, rng = read_digits().train, generator()
    images = torch.stack([train.draw(rng).image for _ in range(60)])
    assert images.mean().item() == pytest.approx(0, abs=0.05)
    assert images.std().item() == pytest.approx(1, abs=0.05)


def test_held_out_digits_are_not_trained_on() -> None:
    data = read_digits()
    assert isinstance(data.train, DigitScenes)
    assert isinstance(data.test, DigitScenes)
    assert len(data.train.labels) + len(data.test.labels) == 1797
    known = {bytes(digit.numpy().tobytes()) for digit in data.train.digits}
    assert not [digit for digit in data.test.digits if digit.numpy().tobytes() in known]
    assert set(data.test.labels.tolist()) == set(range(10))


def test_each_scene_takes_equally_many_numbers() -> None:
    """So that scenes are the same whatever was drawn in those before."""
    rng, other = generator(), generator()
    data = read_digits()
    for _ in range(5):
        data.train.draw(rng)
        torch.rand(25, generator=other)
    assert torch.equal(rng.get_state(), other.get_state())


# -- a user's own folder ---------------------------------------------------------------------


def save(file: Path, **changes: object) -> None:
    """Write a sound scene, but for what is changed; None leaves an array out."""
    rng = np.random.default_rng(abs(hash(file.name)) % 1000)
    arrays = {
        "image": rng.normal(5, 3, (16, 24, 3)).astype(np.float32),
        "boxes": np.array([[1, 2, 9, 12], [12, 4, 20, 15]]),
        "labels": np.array([0, 2]),
    } | changes
    file.parent.mkdir(parents=True, exist_ok=True)
    np.savez(file, **{name: value for name, value in arrays.items() if value is not None})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for index in range(3):
        save(tmp_path / "train" / f"{index}.npz")
    for index in range(4):
        save(tmp_path / "test" / f"{index}.npz")
    return tmp_path


def test_a_folder_of_own_scenes_trains(folder: Path) -> None:
    task = Detector(hidden=8, data_dir=str(folder))
    batch = next(task.batches(2, generator()))
    model = task.model()
    assert batch.images.shape == (2, 3, 16, 24)
    assert model.classes.out_channels == 3
    assert all(bool(term.isfinite()) for term in task.loss(model, batch).values())
    assert len(task.probe()) == 4


def test_own_images_are_brought_to_mean_0_and_deviation_1(folder: Path) -> None:
    data = read_scenes(folder)
    images = torch.stack([scene.image for scene in data.train.held_out(9)])
    assert images.mean().item() == pytest.approx(0, abs=1e-4)
    assert images.std(correction=0).item() == pytest.approx(1, abs=1e-4)


def test_grey_images_scenes_without_objects_and_nan_pixels_are_read(folder: Path) -> None:
    grey = np.ones((16, 24), dtype=np.uint8)
    for file in sorted(folder.glob("*/*.npz")):
        save(file, image=grey)
    save(folder / "train" / "none.npz", image=grey, boxes=np.empty((0, 4)), labels=np.empty(0))
    broken = np.ones((16, 24), dtype=np.float32)
    broken[3, 4] = np.nan
    save(folder / "train" / "nan.npz", image=broken)
    data = read_scenes(folder)
    assert data.num_channels == 1
    task = Detector(hidden=8, data_dir=str(folder))
    batches = list(islice(task.batches(1, generator()), 30))
    assert {len(batch.labels) for batch in batches} == {0, 2}
    assert any(bool(batch.images.isnan().any()) for batch in batches)
    assert all(bool(batch.images.isfinite().all()) for batch in task.probe())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"image": None},
            r"train/0\.npz: `image` \(height, width\).* must be there, but there is",
        ),
        ({"image": np.zeros((16, 20, 3))}, r"multiples of 8 pixels, but got \(16, 20, 3\)"),
        ({"image": np.zeros((8, 24, 3))}, r"all images must have the shape"),
        ({"image": np.full((16, 24, 3), np.nan)}, r"must hold a finite pixel"),
        ({"image": np.zeros((2, 16, 24, 3))}, r"`image` must be numbers .* \(2, 16, 24, 3\)"),
        ({"boxes": np.zeros((2, 5))}, r"`boxes` must be numbers \(objects, 4\), but got float64"),
        ({"boxes": np.array([["a"] * 4] * 2)}, r"`boxes` must be numbers .*, but got <U1"),
        ({"boxes": np.array([[1, 2, 9, 12]])}, r"there must be a label a box, but got 1 and 2"),
        ({"boxes": np.array([[1, 2, 1, 12]] * 2)}, r"object 0: the box \[1, 2, 1, 12\] is empty"),
        ({"boxes": np.array([[1, 2, 9, 17]] * 2)}, r"lies outside the scene of 24 x 16 pixels"),
        ({"boxes": np.full((2, 4), np.nan)}, r"holds NaN or Inf"),
        ({"labels": np.array([0.0, 2.0])}, r"`labels` must be integers \(objects\), but got"),
        ({"labels": np.array([0, -1])}, r"object 1: the label -1 is none of the 3 classes"),
    ],
)
def test_what_is_wrong_with_a_scene_is_named(
    folder: Path, changes: dict[str, object], message: str
) -> None:
    save(folder / "train" / "0.npz", **changes)
    with pytest.raises(UsageError, match=message):
        read_scenes(folder)


def test_a_class_that_training_lacks_is_named(folder: Path) -> None:
    save(folder / "test" / "1.npz", labels=np.array([0, 3]))
    with pytest.raises(UsageError, match=r"test/1\.npz, object 1: the label 3 .*train is 2"):
        read_scenes(folder)


def test_everything_that_is_wrong_is_said_at_once(folder: Path) -> None:
    save(folder / "train" / "0.npz", labels=None)
    save(folder / "train" / "1.npz", boxes=np.array([[5, 5, 5, 5], [0, 0, 99, 9]]))
    (folder / "test" / "2.npz").write_bytes(b"no archive")
    with pytest.raises(UsageError, match="data_dir: ") as caught:
        read_scenes(folder)
    message = str(caught.value)
    for words in ("train/0.npz: `labels`", "object 0: the box", "object 1: the box", "test/2.npz"):
        assert words in message


def test_a_folder_wrong_throughout_does_not_flood_the_screen(folder: Path) -> None:
    for index in range(30):
        save(folder / "train" / f"{index}.npz", labels=None)
    with pytest.raises(UsageError, match=r"And 10 more\.") as caught:
        read_scenes(folder)
    assert len(str(caught.value)) < 3000


def test_a_folder_without_scenes_says_what_is_missing(folder: Path) -> None:
    with pytest.raises(UsageError, match=r"(?s)train/ must hold .* is not there.*test/ must hold"):
        read_scenes(folder / "train")
    with pytest.raises(UsageError, match=r"is needed, but .*nowhere is not there"):
        read_scenes(folder / "nowhere")
