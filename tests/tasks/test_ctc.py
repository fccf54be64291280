"""Greedy decoding, edit distance and the blind CTC loss, by hand-made numbers."""

import math

import pytest
import torch
from torch.nn import functional as F  # noqa: N812

from stability_search.tasks.ctc import (
    constant_prediction_loss,
    greedy_labels,
    num_edits,
    num_frames_needed,
)


@pytest.mark.parametrize(
    ("path", "labels"),
    [([], []), ([0, 0], []), ([1, 1, 1], [1]), ([1, 0, 1], [1, 1]), ([0, 2, 2, 3, 0], [2, 3])],
)
def test_greedy_decoding_merges_repeats_then_drops_blanks(
    path: list[int], labels: list[int]
) -> None:
    assert greedy_labels(path) == labels


@pytest.mark.parametrize("labels", [[1, 2], [1, 2, 1], [1, 1], [2, 2, 2, 1, 1]])
def test_the_frames_needed_are_those_from_which_ctc_is_finite(labels: list[int]) -> None:
    needed = num_frames_needed(labels)
    for frames, is_finite in ((needed, True), (needed - 1, False)):
        log_probs = torch.zeros(frames, 1, 3).log_softmax(2)
        sizes = torch.tensor([frames]), torch.tensor([len(labels)])
        loss = F.ctc_loss(log_probs, torch.tensor([labels]), *sizes)
        assert bool(loss.isfinite()) is is_finite


@pytest.mark.parametrize(
    ("said", "wanted", "edits"),
    [
        ([], [], 0),
        ([], [1, 2], 2),
        ([1, 2], [], 2),
        ([1, 2, 3], [1, 2, 3], 0),
        ([1, 9, 3], [1, 2, 3], 1),
        ([2, 1], [1, 2], 2),
        ([1, 1, 2, 3], [1, 2], 2),
    ],
)
def test_edits(said: list[int], wanted: list[int], edits: int) -> None:
    assert num_edits(said, wanted) == edits


def test_one_label_on_one_frame_costs_nothing_when_always_the_same() -> None:
    found = constant_prediction_loss([((1,), torch.tensor([1]), (1,))], num_classes=1)
    assert found == pytest.approx(0.0, abs=1e-6)


def test_one_of_two_labels_on_one_frame_costs_ln_2() -> None:
    found = constant_prediction_loss([((1, 1), torch.tensor([1, 2]), (1, 1))], num_classes=2)
    assert found == pytest.approx(math.log(2), abs=1e-9)


def test_two_labels_on_two_frames_cost_ln_2_a_label() -> None:
    found = constant_prediction_loss([((2,), torch.tensor([1, 2]), (2,))], num_classes=2)
    assert found == pytest.approx(math.log(2), abs=1e-9)


def test_batches_count_alike_whatever_their_size() -> None:
    """Shares 3/4 and 1/4 are best: label 2 stands in one clip of four, weighted by batch."""
    one = ((1,), torch.tensor([1]), (1,))
    both = ((1, 1), torch.tensor([1, 2]), (1, 1))
    expected = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert constant_prediction_loss([one, both], num_classes=2) == pytest.approx(expected)
