"""Around the CTC loss: greedy decoding, edit distance, and what a blind prediction costs."""

from collections.abc import Sequence
from itertools import groupby, pairwise

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

BLANK = 0
_MAX_ROUNDS = 400
_CONVERGED = 1e-9  # change of the loss in a round

# Output frames of each sequence, all labels one after the other, labels of each sequence.
Targets = tuple[tuple[int, ...], Tensor, tuple[int, ...]]


def greedy_labels(path: Sequence[int]) -> list[int]:
    """Merge repeats, then drop blanks.

    Example:
        >>> greedy_labels([0, 2, 2, 0, 2, 1])
        [2, 2, 1]
    """
    return [label for label, _ in groupby(path) if label != BLANK]


def num_frames_needed(labels: Sequence[int]) -> int:
    """Count the output frames without which CTC's loss is infinite.

    Each label takes one, and so does the blank that keeps two equal neighbours apart.

    Example:
        >>> num_frames_needed([1, 1, 2])
        4
    """
    return len(labels) + sum(left == right for left, right in pairwise(labels))


def num_edits(said: Sequence[int], wanted: Sequence[int]) -> int:
    """Count the fewest insertions, deletions and substitutions between two sequences.

    Example:
        >>> num_edits([1, 2, 3], [1, 3])
        1
    """
    row = list(range(len(wanted) + 1))
    for i, left in enumerate(said, start=1):
        previous, row = row, [i]
        for j, right in enumerate(wanted, start=1):
            row.append(min(previous[j] + 1, row[-1] + 1, previous[j - 1] + (left != right)))
    return row[-1]


def constant_prediction_loss(batches: Sequence[Targets], *, num_classes: int) -> float:
    """Find the lowest mean CTC loss of one distribution used at every frame.

    Args:
        batches: Targets of each batch; each must fit into its frames.
        num_classes: Labels, the blank not counted.

    Returns:
        The mean over batches of the mean loss per label, as `F.ctc_loss` takes it. Found by
        expectation maximisation: the next distribution is the expected share of each symbol
        under the present one, so the loss never rises and no step size is to be chosen.
    """
    frames = tuple(length for lengths, _, _ in batches for length in lengths)
    counts = tuple(count for _, _, per_clip in batches for count in per_clip)
    labels = torch.cat([labels for _, labels, _ in batches])
    weights = torch.tensor(
        [
            1 / (max(count, 1) * len(per_clip) * len(batches))
            for _, _, per_clip in batches
            for count in per_clip
        ],
        dtype=torch.float64,
    )
    weighted_frames = weights @ torch.tensor(frames, dtype=torch.float64)
    share = torch.full((num_classes + 1,), 1 / (num_classes + 1), dtype=torch.float64)
    lowest = float("inf")
    for _ in range(_MAX_ROUNDS):
        log_share = share.log().requires_grad_()
        log_probs = log_share.expand(max(frames), len(frames), num_classes + 1)
        losses = F.ctc_loss(
            log_probs, labels, torch.tensor(frames), torch.tensor(counts), reduction="none"
        )
        loss = weights @ losses
        if lowest - loss.item() < _CONVERGED:
            break
        lowest = loss.item()
        # PyTorch's gradient here is (share * frames - expected count of each symbol), weighted.
        (slope,) = torch.autograd.grad(loss, log_share)
        share = (share - slope / weighted_frames).clamp_min(torch.finfo(share.dtype).tiny)
    return min(lowest, loss.item())
