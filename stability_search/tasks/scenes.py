"""Scenes with boxes: handwritten digits pasted together, or a user's own; drawn into batches."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

DIGITS = Path(__file__).parent / "data" / "digits.npz"
CELL = 8  # pixels of a cell, along each side: the detector looks for one object in each
SCENE_CELLS = 4  # along each side of a drawn scene
OBJECTS_PER_SCENE = (2, 4)
DIGIT_PIXELS = (8, 11)  # height and width of a pasted digit; in the file they have 8
OFF_CENTER = 2  # pixels that a digit's centre may lie from that of its cell, each way
LARGEST_GREY = 16.0
_HELD_OUT_DIGITS = 360  # the last fifth; the file is in order of its writers
_UNIT_SCENES = 64  # drawn once, for mean and deviation
_UNIT_SEED = 30  # any fixed number, as the next: the same for every study
_PROBE_SEED = 31


@dataclass(frozen=True, kw_only=True, slots=True)
class Scene:
    """One scene.

    Attributes:
        image: (channels, height, width) float32.
        boxes: (objects, 4) float32: left, top, right, bottom in pixels.
        labels: (objects,) int64, classes from 0.
    """

    image: Tensor
    boxes: Tensor
    labels: Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class SceneBatch:
    """Scenes of one micro-batch; their objects stand one after the other.

    Attributes:
        images: (scenes, channels, height, width) float32.
        boxes: (objects, 4) float32: left, top, right, bottom in pixels.
        labels: (objects,) int64, classes from 0.
        scenes: (objects,) int64, the scene an object is in.
    """

    images: Tensor
    boxes: Tensor
    labels: Tensor
    scenes: Tensor


class SceneSet(Protocol):
    """Scenes of one split."""

    def draw(self, generator: torch.Generator) -> Scene:
        """Return one scene; the generator decides everything."""

    def held_out(self, count: int) -> list[Scene]:
        """Return at most so many scenes, the same ones at every call."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SceneData:
    """What a detector trains on and what it is judged by.

    Attributes:
        train: Scenes to train on.
        test: Held-out scenes.
        num_classes: Classes.
        num_channels: Channels of an image.
        reach: Pixels from the centre of a cell that the edge of an object there may lie away.
    """

    train: SceneSet
    test: SceneSet
    num_classes: int
    num_channels: int
    reach: float


def collate(scenes: Sequence[Scene]) -> SceneBatch:
    """Make a batch of scenes of one size."""
    counts = torch.tensor([len(scene.labels) for scene in scenes])
    return SceneBatch(
        images=torch.stack([scene.image for scene in scenes]),
        boxes=torch.cat([scene.boxes for scene in scenes]),
        labels=torch.cat([scene.labels for scene in scenes]),
        scenes=torch.repeat_interleave(torch.arange(len(scenes)), counts),
    )


def misfits(batch: SceneBatch, *, num_classes: int) -> list[str]:
    """Return a sentence for each object that cannot be learned from.

    Args:
        batch: Scenes on the CPU.
        num_classes: Classes the detector knows.
    """
    height, width = batch.images.shape[-2:]
    rows = zip(batch.boxes.tolist(), batch.labels.tolist(), batch.scenes.tolist(), strict=True)
    return [
        f"Scene {scene}, object {index}: {fault}."
        for index, (box, label, scene) in enumerate(rows)
        for fault in (
            *box_faults(box, width=width, height=height),
            *label_faults(label, num_classes),
        )
    ]


def box_faults(box: Sequence[float], *, width: int, height: int) -> list[str]:
    """Say what is wrong with a box in a scene of this size; empty if nothing is."""
    left, top, right, bottom = box
    spelled = f"[{', '.join(f'{edge:g}' for edge in box)}]"
    if not all(map(math.isfinite, box)):
        return [f"the box {spelled} holds NaN or Inf"]
    if not (left < right and top < bottom):
        return [f"the box {spelled} is empty (left < right and top < bottom must hold)"]
    if left < 0 or top < 0 or right > width or bottom > height:
        return [f"the box {spelled} lies outside the scene of {width} x {height} pixels"]
    return []


def label_faults(label: int, num_classes: int) -> list[str]:
    """Say what is wrong with a label; empty if nothing is."""
    if 0 <= label < num_classes:
        return []
    return [f"the label {label} is none of the {num_classes} classes, which count from 0"]


# -- digits ----------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class DigitScenes:
    """Scenes that are made when drawn: 2 to 4 digits, each near the centre of its own cell.

    Attributes:
        digits: (digits, 1, 8, 8) float32, grey levels in [0, 1].
        labels: (digits,) int64.
        mean: What is subtracted from every pixel.
        std: What every pixel is divided by, > 0.
    """

    digits: Tensor
    labels: Tensor
    mean: float = 0.0
    std: float = 1.0

    def draw(self, generator: torch.Generator) -> Scene:
        """Draw a scene; each takes equally many numbers from the generator."""
        draws = iter(torch.rand(1 + 6 * OBJECTS_PER_SCENE[1], generator=generator).tolist())

        def pick(low: int, high: int) -> int:
            return low + min(int(next(draws) * (high - low + 1)), high - low)

        image = torch.zeros(1, SCENE_CELLS * CELL, SCENE_CELLS * CELL)
        free = list(range(SCENE_CELLS**2))
        boxes, labels = [], []
        for _ in range(pick(*OBJECTS_PER_SCENE)):
            digit = pick(0, len(self.labels) - 1)
            row, column = divmod(free.pop(pick(0, len(free) - 1)), SCENE_CELLS)
            height, width = pick(*DIGIT_PIXELS), pick(*DIGIT_PIXELS)
            top, left = _place(row, height, pick), _place(column, width, pick)
            pasted = F.interpolate(
                self.digits[digit : digit + 1], (height, width), mode="bilinear"
            )
            patch = image[:, top : top + height, left : left + width]
            torch.maximum(patch, pasted[0], out=patch)  # where two overlap, ink stays ink
            boxes.append([left, top, left + width, top + height])
            labels.append(int(self.labels[digit]))
        return Scene(
            image=(image - self.mean) / self.std,
            boxes=torch.tensor(boxes, dtype=torch.float32),
            labels=torch.tensor(labels),
        )

    def held_out(self, count: int) -> list[Scene]:
        """Draw so many scenes from a generator of its own."""
        generator = torch.Generator().manual_seed(_PROBE_SEED)
        return [self.draw(generator) for _ in range(count)]


def _place(cell: int, size: int, pick: Callable[[int, int], int]) -> int:
    """Choose the first pixel of a digit near its cell's centre, all of it inside the scene."""
    middle = (cell + 0.5) * CELL - size / 2
    lowest = max(0, math.ceil(middle - OFF_CENTER))
    return pick(lowest, min(SCENE_CELLS * CELL - size, math.floor(middle + OFF_CENTER)))


def read_digits() -> SceneData:
    """Read the digits that come with the package; pixels have mean 0 and deviation 1."""
    with np.load(DIGITS, allow_pickle=False) as archive:
        digits = torch.from_numpy(archive["images"]).float().unsqueeze(1) / LARGEST_GREY
        labels = torch.from_numpy(archive["labels"])
    parts = {"train": slice(None, -_HELD_OUT_DIGITS), "test": slice(-_HELD_OUT_DIGITS, None)}
    raw = DigitScenes(digits=digits[parts["train"]], labels=labels[parts["train"]])
    generator = torch.Generator().manual_seed(_UNIT_SEED)
    pixels = torch.stack([raw.draw(generator).image for _ in range(_UNIT_SCENES)])
    mean, std = pixels.mean().item(), pixels.std().item()
    train, test = (
        DigitScenes(digits=digits[part], labels=labels[part], mean=mean, std=std)
        for part in parts.values()
    )
    return SceneData(
        train=train,
        test=test,
        num_classes=int(labels.max()) + 1,
        num_channels=1,
        reach=OFF_CENTER + DIGIT_PIXELS[1] / 2 + 0.5,
    )
