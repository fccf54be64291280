"""A user's own scenes with boxes, read from a folder; all its faults are said at once."""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from stability_search.tasks.own_folder import (
    read_split,
    refuse,
    require_folder,
    sparse_labels,
)
from stability_search.tasks.scenes import CELL, Scene, SceneData, box_faults, label_faults

_SPLITS = ("train", "test")


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredScenes:
    """Scenes that are used as they are.

    Attributes:
        scenes: At least one.
    """

    scenes: tuple[Scene, ...]

    def draw(self, generator: torch.Generator) -> Scene:
        """Return one of them."""
        return self.scenes[int(torch.randint(len(self.scenes), (), generator=generator))]

    def held_out(self, count: int) -> list[Scene]:
        """Return at most so many, spread evenly."""
        every = max(1, len(self.scenes) // count)
        return list(self.scenes[::every][:count])


def read_scenes(folder: Path) -> SceneData:
    """Read a user's own scenes.

    Args:
        folder: Holds `train/*.npz` and `test/*.npz`, one file a scene: `image` (height, width) or
            (height, width, channels), numbers; `boxes` (objects, 4): left, top, right, bottom in
            pixels; `labels` (objects,) integers from 0. All images have one shape, with sides
            that are multiples of 8.

    Returns:
        The scenes; pixels have mean 0 and deviation 1 over the training images, NaN left out.
        A NaN pixel stays one: the engine tells such a step apart.

    Raises:
        UsageError: Names every file and what is wrong with it.
    """
    require_folder(folder)
    faults: list[str] = []
    splits = {split: _read_split(folder, split, faults) for split in _SPLITS}
    _check_together(splits, faults)
    scenes = (scene for split in splits.values() for scene in split.values())
    faults += sparse_labels(label for scene in scenes for label in scene.labels.tolist())
    refuse(folder, faults)
    images = torch.stack([scene.image for scene in splits["train"].values()])
    finite = images[images.isfinite()]
    std = finite.std(correction=0).item()
    mean, factor = finite.mean().item(), 1 / std if std > 0 else 1.0
    train, test = (
        StoredScenes(scenes=tuple(_scaled(scene, mean, factor) for scene in scenes.values()))
        for scenes in splits.values()
    )
    boxes = torch.cat([scene.boxes for scene in train.scenes])
    return SceneData(
        train=train,
        test=test,
        num_classes=1 + max(int(label) for scene in train.scenes for label in scene.labels),
        num_channels=images.shape[1],
        reach=float((boxes[:, 2:] - boxes[:, :2]).max() + CELL) / 2,
    )


def _scaled(scene: Scene, mean: float, factor: float) -> Scene:
    return Scene(image=(scene.image - mean) * factor, boxes=scene.boxes, labels=scene.labels)


def _read_split(folder: Path, split: str, faults: list[str]) -> dict[str, Scene]:
    scenes = {}
    for name, arrays in read_split(folder / split, "scene", faults):
        found: list[str] = []
        scene = _read_scene(arrays, found)
        faults += [f"{name}: {fault}" for fault in found]
        if scene is not None:
            scenes[name] = scene
    return scenes


def _read_scene(arrays: dict[str, npt.NDArray[np.generic]], faults: list[str]) -> Scene | None:
    image = _array(arrays, "image", ("height, width", "height, width, channels"), faults)
    boxes = _array(arrays, "boxes", ("objects, 4",), faults)
    labels = _array(arrays, "labels", ("objects",), faults)
    if image is None or boxes is None or labels is None:
        return None
    if len(boxes) != len(labels):
        faults.append(f"there must be a label a box, but got {len(boxes)} and {len(labels)}")
    pixels = torch.from_numpy(np.atleast_3d(image).astype(np.float32)).permute(2, 0, 1)
    if any(side % CELL or not side for side in image.shape[:2]):
        faults.append(
            f"the sides of `image` must be multiples of {CELL} pixels, but got {image.shape}"
        )
    if not bool(pixels.isfinite().any()):
        faults.append("`image` must hold a finite pixel, but has none")
    scene = Scene(
        image=pixels.contiguous(),
        boxes=torch.from_numpy(boxes.astype(np.float32).reshape(-1, 4)),
        labels=torch.from_numpy(labels.astype(np.int64)),
    )
    _, height, width = scene.image.shape
    for index, box in enumerate(scene.boxes.tolist()):
        faults += [f"object {index}: {it}" for it in box_faults(box, width=width, height=height)]
    return scene


def _array(
    arrays: dict[str, npt.NDArray[np.generic]],
    name: str,
    shapes: tuple[str, ...],
    faults: list[str],
) -> npt.NDArray[np.generic] | None:
    """Return an array of one of these shapes, or None and say why not."""
    array = arrays.get(name)
    kind = np.integer if name == "labels" else np.number
    wanted = " or ".join(f"({shape})" for shape in shapes)
    if array is None:
        faults.append(
            f"`{name}` {wanted} must be there, but there is {sorted(arrays) or 'nothing'}"
        )
        return None
    has_shape = any(array.ndim == shape.count(",") + 1 for shape in shapes)
    if name == "boxes" and array.size:
        has_shape = has_shape and array.shape[1] == 4  # noqa: PLR2004 - edges
    if array.size == 0 and name != "image":
        return array.reshape((0, 4) if name == "boxes" else 0)  # a scene without objects
    if not has_shape or not np.issubdtype(array.dtype, kind):
        noun = "integers" if kind is np.integer else "numbers"
        faults.append(f"`{name}` must be {noun} {wanted}, but got {array.dtype} {array.shape}")
        return None
    return array


def _check_together(splits: dict[str, dict[str, Scene]], faults: list[str]) -> None:
    """Say which scenes do not go with most, or hold a class that training lacks."""
    everything = [item for scenes in splits.values() for item in scenes.items()]
    known = [int(label) for scene in splits["train"].values() for label in scene.labels]
    if splits["train"] and not known:
        faults.append("train must hold an object, but no scene there has one")
    shapes = Counter(tuple(scene.image.shape) for _, scene in everything)
    usual = [shape for shape, _ in shapes.most_common(1)]  # the odd one is named, not all others
    for name, scene in everything:
        got = tuple(scene.image.shape)
        if got not in usual:
            faults.append(
                f"{name}: all images must have the shape {usual[0]} (channels, height, width) of "
                f"most, but this has {got}"
            )
        if known:
            faults += [
                f"{name}, object {index}: {fault} (the largest label of train is {max(known)})"
                for index, label in enumerate(scene.labels.tolist())
                for fault in label_faults(label, 1 + max(known))
            ]
