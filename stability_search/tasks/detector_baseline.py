"""How far a detector gets that never looks at the scene: the loss of the best constant answer."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from stability_search.tasks.detector_losses import clamping, wise_iou
from stability_search.tasks.detector_model import cell_centers, cells_of, edge_distances
from stability_search.tasks.scenes import CELL, SceneBatch


def constant_losses(probe: Sequence[SceneBatch], *, num_classes: int) -> tuple[float, float]:
    """Return box and class loss of the best box and class that are the same in every cell.

    Args:
        probe: Batches, of which the mean is taken.
        num_classes: Classes.

    Returns:
        Both not weighted: the lowest mean WIoU that four constant distances reach, found by
        Nelder and Mead's method from their medians, and the lowest cross-entropy, in closed form.
    """
    return _box_loss(probe), _class_loss(probe, num_classes)


def _box_loss(probe: Sequence[SceneBatch]) -> float:
    from scipy.optimize import minimize  # a third of a second to load

    shares, centers, targets = [], [], []
    for batch in probe:
        count = max(len(batch.boxes), 1)
        shares.append(torch.full((len(batch.boxes),), 1 / (count * len(probe))))
        cells = cells_of(batch.boxes, batch.scenes, batch.images)
        centers.append(cell_centers(cells, batch.images))
        targets.append(batch.boxes)
    share, center, target = torch.cat(shares), torch.cat(centers), torch.cat(targets)
    if not len(target):
        return 0.0
    free = clamping(frozenset())

    def mean_loss(distances: npt.NDArray[np.float64]) -> float:
        edges = torch.from_numpy(distances).float()
        boxes = torch.cat([center - edges[:2], center + edges[2:]], dim=1)
        return float((share * wise_iou(boxes, target, free)).sum())

    start = edge_distances(target, center).median(dim=0).values.double().numpy()
    return float(minimize(mean_loss, start, method="Nelder-Mead").fun)


def _class_loss(probe: Sequence[SceneBatch], num_classes: int) -> float:
    """Weigh cells as the loss does: their sum over the objects of their batch."""
    positives = torch.zeros(num_classes, dtype=torch.float64)
    cells = torch.zeros((), dtype=torch.float64)
    for batch in probe:
        weight = 1 / (max(len(batch.labels), 1) * len(probe))
        there = torch.zeros(_num_cells(batch), num_classes, dtype=torch.float64)
        there[cells_of(batch.boxes, batch.scenes, batch.images), batch.labels] = 1
        positives += weight * there.sum(dim=0)
        cells += weight * len(there)
    share = positives / cells
    entropy = -(torch.xlogy(share, share) + torch.xlogy(1 - share, 1 - share))
    return float((cells * entropy).sum())


def _num_cells(batch: SceneBatch) -> int:
    scenes, _, height, width = batch.images.shape
    return scenes * (height // CELL) * (width // CELL)
