"""The detector's network: convolutions down to one cell of 8 x 8 pixels, then three heads.

Each cell says how far the four edges of its object lie from its centre, as a distribution over
bins whose mean is the distance; which class it is; and an embedding for the contrastive terms.
Norms and the softmax over bins are computed in fp32 whatever the autocast does, so that the CPU
and CUDA agree about them.
"""

import itertools
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from stability_search.tasks.scenes import CELL

NUM_BINS = 9  # distances a box edge is a distribution over: whole pixels in scenes of digits
EMBEDDING = 16
CLASS_PRIOR = 0.28  # of a class in a cell, before anything is learned


class Detections(NamedTuple):
    """What the network says of every cell, scene by scene and row by row.

    Attributes:
        boxes: (cells, 4) float32: left, top, right, bottom in pixels.
        edge_logits: (cells, 4, bins) logits of the distances from the cell's centre to the edges.
        class_logits: (cells, classes).
        embeddings: (cells, embedding).
    """

    boxes: Tensor
    edge_logits: Tensor
    class_logits: Tensor
    embeddings: Tensor

    def at(self, cells: Tensor) -> "Detections":
        """Keep the cells with these indices, (objects,) int64."""
        return Detections(*(part.index_select(0, cells) for part in self))


def cells_of(boxes: Tensor, scenes: Tensor, images: Tensor) -> Tensor:
    """Return the cell that each object's centre lies in, (objects,) int64.

    Args:
        boxes: (objects, 4) in pixels.
        scenes: (objects,) int64, the scene of each.
        images: (scenes, channels, height, width); only its shape is used.
    """
    rows, columns = images.shape[2] // CELL, images.shape[3] // CELL
    places = ((boxes[:, :2] + boxes[:, 2:]) / (2 * CELL)).long()
    return (scenes * rows + places[:, 1]) * columns + places[:, 0]


def cell_centers(cells: Tensor, images: Tensor) -> Tensor:
    """Return the centres (x, y) in pixels of cells as `cells_of` counts them, (cells, 2)."""
    rows, columns = images.shape[2] // CELL, images.shape[3] // CELL
    x, y = cells % columns, torch.div(cells, columns, rounding_mode="floor") % rows
    return (torch.stack([x, y], dim=1) + 0.5) * CELL


def edge_distances(boxes: Tensor, centers: Tensor) -> Tensor:
    """Return how far left, top, right and bottom lie from the cell's centre, outwards positive."""
    return torch.cat([centers - boxes[:, :2], boxes[:, 2:] - centers], dim=1)


class DetectorNetwork(nn.Module):
    """Turns scenes into what is said of each of their cells.

    Args:
        hidden: Channels of the deepest convolutions, >= 2.
        num_channels: Channels of an image.
        num_classes: Classes.
        reach: Largest distance, in pixels, from the centre of a cell to an edge of its object.
    """

    distances: Tensor

    def __init__(self, *, hidden: int, num_channels: int, num_classes: int, reach: float) -> None:
        super().__init__()
        # Each block halves the sides: three make one cell of 8 x 8 pixels.
        widths = (num_channels, hidden // 2, hidden, hidden)
        self.blocks = nn.ModuleList(itertools.starmap(ConvBlock, itertools.pairwise(widths)))
        self.edges = nn.Conv2d(hidden, 4 * NUM_BINS, 1)
        self.classes = nn.Conv2d(hidden, num_classes, 1)
        self.embedding = nn.Conv2d(hidden, EMBEDDING, 1)
        assert self.classes.bias is not None  # noqa: S101
        nn.init.constant_(self.classes.bias, float(torch.logit(torch.tensor(CLASS_PRIOR))))
        self.register_buffer("distances", torch.linspace(0, reach, NUM_BINS), persistent=False)

    def forward(self, images: Tensor) -> Detections:
        """Map (scenes, channels, height, width), sides multiples of 8, to their cells."""
        features = raw = images
        for block in self.blocks:
            raw = block(features)
            features = F.relu(raw)
        by_edge = _by_cell(self.edges(features))
        edge_logits = by_edge.view(len(by_edge), 4, NUM_BINS)
        shares = edge_logits.float().softmax(dim=2)
        to_edges = (shares * self.distances).sum(dim=2)  # a matrix product would be fp16
        cells = torch.arange(len(by_edge), device=images.device)
        centers = cell_centers(cells, images)
        return Detections(
            boxes=torch.cat([centers - to_edges[:, :2], centers + to_edges[:, 2:]], dim=1),
            edge_logits=edge_logits,
            class_logits=_by_cell(self.classes(features)),
            embeddings=_by_cell(self.embedding(raw)),
        )


def _by_cell(features: Tensor) -> Tensor:
    """Turn (scenes, channels, rows, columns) into (cells, channels)."""
    return features.permute(0, 2, 3, 1).flatten(0, 2)


class ConvBlock(nn.Module):
    """A 3 x 3 convolution that halves the sides, and BatchNorm."""

    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(before, after, 3, stride=2, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(after)

    def forward(self, features: Tensor) -> Tensor:
        """Map (scenes, before, rows, columns) to (scenes, after, rows/2, columns/2)."""
        normed: Tensor = self.norm(self.conv(features).float())
        return normed
