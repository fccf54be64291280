"""The terms of the detector's loss, and the clamps its team put into them.

A clamp is a value's name and its limits. The terms hand every such value to a `Bound`, which
clamps it, counts it, or leaves it alone; so one piece of code serves training and counting.
"""

from collections.abc import Callable
from collections.abc import Set as AbstractSet
from types import MappingProxyType

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

Bound = Callable[[str, Tensor], Tensor]
"""Takes a value by its name in `LIMITS` and returns it, clamped or not."""

LIMITS = MappingProxyType(
    {
        "class_logit": (-10.0, 10.0),
        "iou": (1e-6, 1.0),
        "delta": (0.0, 1.0),
        "box_loss": (0.0, 10.0),
        "similarity": (-torch.inf, 10.0),
        "exponential": (1e-6, 1e4),
        "cpe_loss": (0.0, 10.0),
    }
)
CONTRASTIVE_TEMPERATURE = 0.1
CPE_TEMPERATURE = 0.08  # equal embeddings have similarity 12.5; e^11.09 is Inf in fp16
TRIPLET_MARGIN = 0.3
_EPS = 1e-9  # of an area in square pixels: no box is so small, and 0 / 0 is no overlap


def clamping(names: AbstractSet[str]) -> Bound:
    """Return what clamps these values and leaves all others alone."""

    def bound(name: str, value: Tensor) -> Tensor:
        return value.clamp(*LIMITS[name]) if name in names else value

    return bound


def counting(bound: Bound, fracs: dict[str, float]) -> Bound:
    """Return what also writes down which share of a value lies beyond its limits.

    Args:
        bound: What happens to the value afterwards.
        fracs: Receives the share by name, in [0, 1]; NaN lies beyond, and of nothing it is 0.
    """

    def counted(name: str, value: Tensor) -> Tensor:
        low, high = LIMITS[name]
        is_within = (value >= low) & (value <= high)
        fracs[name] = 1 - is_within.float().mean().item() if value.numel() else 0.0
        return bound(name, value)

    return counted


def mean_over_objects(values: Tensor) -> Tensor:
    """Average; 0 without objects."""
    return values.sum() / max(len(values), 1)


def iou(boxes: Tensor, targets: Tensor) -> Tensor:
    """Return the shared area of two boxes over the area of both, (objects,) in [0, 1]."""
    low, high = torch.maximum(boxes, targets)[:, :2], torch.minimum(boxes, targets)[:, 2:]
    shared = (high - low).clamp(min=0).prod(dim=1)
    areas = [(box[:, 2:] - box[:, :2]).prod(dim=1) for box in (boxes, targets)]
    return shared / (areas[0] + areas[1] - shared + _EPS)


def wise_iou(boxes: Tensor, targets: Tensor, bound: Bound) -> Tensor:
    """Compute the box loss of each object.

    Args:
        boxes: (objects, 4) float32: left, top, right, bottom.
        targets: The same of the true boxes, none of them empty.
        bound: Sees `iou`, `delta` (squared distance of the centres over the squared diagonal of
            the smallest box around both) and `box_loss`.

    Returns:
        (objects,): (1 - IoU) e^delta, in [0, e]; 0 is perfect.

    Source:
        WIoU v1: Tong et al. 2023, arXiv 2301.10051.
    """
    overlap = bound("iou", iou(boxes, targets))
    apart = (boxes[:, :2] + boxes[:, 2:] - targets[:, :2] - targets[:, 2:]) / 2
    corners = torch.maximum(boxes, targets)[:, 2:] - torch.minimum(boxes, targets)[:, :2]
    around = corners.detach().square().sum(dim=1)
    delta = bound("delta", apart.square().sum(dim=1) / (around + _EPS))
    return bound("box_loss", (1 - overlap) * delta.exp())


def class_loss(logits: Tensor, targets: Tensor, bound: Bound) -> Tensor:
    """Compute the binary cross-entropy of every cell and class, summed.

    Args:
        logits: (cells, classes).
        targets: The same shape, 1 where an object of the class is centred in the cell.
        bound: Sees `class_logit`.
    """
    bounded = bound("class_logit", logits.float())
    return F.binary_cross_entropy_with_logits(bounded, targets, reduction="sum")


def distribution_focal(edge_logits: Tensor, distances: Tensor) -> Tensor:
    """Compute how little of each distribution lies on the two bins around the true distance.

    Args:
        edge_logits: (objects, 4, bins).
        distances: (objects, 4) in bins; beyond the first or last they count as those.

    Returns:
        (objects,), a mean over the edges. Probabilities are kept in the precision of the logits,
        as the team's were: in fp16 one below 3e-8 is 0, its logarithm -Inf, and times a weight of
        0 that is NaN.

    Source:
        Generalized focal loss: Li et al. 2020, arXiv 2006.04388.
    """
    last = edge_logits.shape[2] - 1
    places = distances.clamp(0, last)
    below = places.floor().clamp(max=last - 1)
    above_weight = places - below
    logs = edge_logits.float().softmax(dim=2).to(edge_logits.dtype).log().float()
    index = below.long().unsqueeze(2)
    log_below, log_above = (logs.gather(2, at).squeeze(2) for at in (index, index + 1))
    return -((1 - above_weight) * log_below + above_weight * log_above).mean(dim=1)


# -- embeddings ------------------------------------------------------------------------------


def cosines(embeddings: Tensor) -> Tensor:
    """Compare each object with every other.

    Args:
        embeddings: (objects, embedding), at least two objects.

    Returns:
        (objects, objects - 1), an object itself left out. Lengths are taken in fp32; under
        autocast the product has its precision.
    """
    unit = F.normalize(embeddings.float(), dim=1).to(embeddings.dtype)
    return others(unit @ unit.T)


def others(pairs: Tensor) -> Tensor:
    """Leave the diagonal of (objects, objects) out: (objects, objects - 1)."""
    count = len(pairs)
    return pairs.flatten()[1:].view(count - 1, count + 1)[:, :-1].reshape(count, count - 1)


def supervised_contrastive(similar: Tensor, is_same: Tensor) -> Tensor:
    """Compute how unlikely objects of one class find each other, a mean over their pairs.

    Args:
        similar: What `cosines` returned.
        is_same: The same shape, bool, True for pairs of one class.

    Returns:
        A scalar >= 0; 0 where no two objects share a class.

    Source:
        Khosla et al. 2020, arXiv 2004.11362, the sum outside the logarithm.
    """
    logs = F.log_softmax(similar.float() / CONTRASTIVE_TEMPERATURE, dim=1)
    counts = is_same.sum(dim=1)
    each = -(logs * is_same).sum(dim=1) / counts.clamp(min=1)
    return each.sum() / (counts > 0).sum().clamp(min=1)


def cpe(similar: Tensor, is_same: Tensor, bound: Bound) -> Tensor:
    """Compute the same with the sum inside the logarithm, by exponentials, as the team did.

    Exponentials have the precision of the cosines, on CUDA too, where autocast would raise them
    to fp32: in fp16 they overflow once two embeddings have a cosine above 0.887. Inf over Inf is
    NaN.

    Args:
        similar: What `cosines` returned, in fp32 or as it was.
        is_same: As above.
        bound: Sees `similarity` (a cosine over the temperature), `exponential` and `cpe_loss`,
            the loss of each object.

    Returns:
        A scalar >= 0; 0 where no two objects share a class.
    """
    with torch.autocast(similar.device.type, enabled=False):
        similarity = bound("similarity", similar / CPE_TEMPERATURE)
        exponentials = bound("exponential", similarity.exp()).float()
    total = exponentials.sum(dim=1)
    has_same = is_same.any(dim=1)
    # Without a partner the loss is log(total / total): 0, and no gradient.
    wanted = torch.where(has_same, (exponentials * is_same).sum(dim=1), total)
    each = bound("cpe_loss", -(wanted / total).log())
    return each.sum() / has_same.sum().clamp(min=1)


def triplet(similar: Tensor, is_same: Tensor) -> Tensor:
    """Compute by how much the farthest object of one's class is farther than the nearest other.

    Args:
        similar: What `cosines` returned.
        is_same: As above.

    Returns:
        A scalar >= 0, a mean over objects that have both.

    Source:
        Hermans et al. 2017, arXiv 1703.07737 ("batch hard"), on cosines.
    """
    near = similar.float()
    farthest = near.masked_fill(~is_same, torch.inf).amin(dim=1)
    nearest = near.masked_fill(is_same, -torch.inf).amax(dim=1)
    has_both = is_same.any(dim=1) & (~is_same).any(dim=1)
    short = torch.where(has_both, nearest - farthest + TRIPLET_MARGIN, 0.0)
    return F.relu(short).sum() / has_both.sum().clamp(min=1)
