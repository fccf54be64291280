"""The detector's terms by hand, and what each clamp does to a value and to its gradient."""

import math

import pytest
import torch
from torch import Tensor

from stability_search.tasks import detector_losses as losses

FREE = losses.clamping(frozenset())


def boxes(*rows: tuple[float, float, float, float]) -> Tensor:
    return torch.tensor(rows, dtype=torch.float32, requires_grad=True)


def alike(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return cosines of three objects, two of them of one class, all of them 0.95 alike."""
    similar = torch.full((3, 2), 0.95, dtype=dtype, requires_grad=True)
    is_same = torch.tensor([[True, False], [True, False], [False, False]])
    return similar, is_same


# -- boxes and classes -----------------------------------------------------------------------


def test_wise_iou_is_zero_for_the_right_box_and_grows_with_the_distance() -> None:
    target = boxes((0, 0, 4, 4))
    assert losses.wise_iou(target, target, FREE).item() == pytest.approx(0, abs=1e-6)
    half = losses.wise_iou(boxes((2, 0, 6, 4)), target, FREE).item()
    # Shared 8 of 24; the centres lie 2 apart, in a box of 6 x 4.
    assert half == pytest.approx((1 - 8 / 24) * math.exp(4 / 52))
    apart = losses.wise_iou(boxes((8, 0, 12, 4)), target, FREE).item()
    assert apart == pytest.approx(math.exp(64 / 160))


def test_a_box_is_pulled_to_its_target_and_not_rewarded_for_a_larger_surrounding() -> None:
    """WIoU takes the smallest box around both for a constant."""
    found = boxes((8, 0, 12, 4))
    losses.wise_iou(found, boxes((0, 0, 4, 4)), FREE).sum().backward()
    assert found.grad is not None
    pull = math.exp(64 / 160) * 8 / 160
    assert found.grad[0].tolist() == pytest.approx([pull, 0, pull, 0])


def test_a_box_apart_and_an_empty_one_still_have_a_finite_gradient() -> None:
    found = boxes((8, 0, 12, 4), (2, 2, 2, 2), (3, 3, 1, 1))
    losses.wise_iou(found, boxes((0, 0, 4, 4)).expand(3, 4), FREE).sum().backward()
    assert found.grad is not None
    assert found.grad.isfinite().all()
    assert found.grad[0].any()


def test_no_finite_box_ever_meets_the_clamps_of_the_box_loss() -> None:
    """IoU and delta are at most 1 by construction, the loss at most e."""
    generator = torch.Generator().manual_seed(0)
    corners = 32 * torch.rand(2, 2000, 2, 2, generator=generator).sort(dim=2).values
    found, target = corners.flatten(2)
    fracs: dict[str, float] = {}
    each = losses.wise_iou(found, target, losses.counting(FREE, fracs))
    assert each.max() <= math.e
    assert (fracs["delta"], fracs["box_loss"]) == (0.0, 0.0)
    assert fracs["iou"] > 0.1  # boxes apart, whose IoU has no gradient anyway


def test_class_loss_sums_over_cells_and_classes() -> None:
    logits = torch.zeros(3, 2)
    assert losses.class_loss(logits, torch.zeros(3, 2), FREE).item() == pytest.approx(
        6 * math.log(2)
    )


def test_a_clamped_class_logit_can_no_longer_be_corrected() -> None:
    logits = torch.tensor([[20.0, 5.0]], requires_grad=True)
    wrong = torch.zeros(1, 2)
    losses.class_loss(logits, wrong, losses.clamping({"class_logit"})).backward()
    assert logits.grad is not None
    assert logits.grad[0, 0] == 0
    assert logits.grad[0, 1] > 0.9


def test_distribution_focal_is_the_cross_entropy_of_the_two_nearest_bins() -> None:
    logits = torch.zeros(1, 4, 5)
    distances = torch.tensor([[0.0, 1.25, 4.0, 99.0]])
    assert losses.distribution_focal(logits, distances).item() == pytest.approx(math.log(5))
    sharp = torch.full((1, 4, 5), -20.0)
    sharp[0, :, 1:3] = 0
    between = torch.full((1, 4), 1.5)
    assert losses.distribution_focal(sharp, between).item() == pytest.approx(math.log(2))


@pytest.mark.parametrize(("dtype", "is_nan"), [(torch.float16, True), (torch.float32, False)])
def test_a_sharp_and_right_distribution_is_nan_in_fp16(
    dtype: torch.dtype, *, is_nan: bool
) -> None:
    """The bin beside the true one has weight 0 and, in fp16, the logarithm of 0."""
    logits = torch.zeros(1, 4, 5, dtype=dtype)
    logits[:, :, 2] = 18.0
    loss = losses.distribution_focal(logits, torch.full((1, 4), 2.0))
    assert math.isnan(loss.item()) is is_nan


# -- embeddings ------------------------------------------------------------------------------


def test_others_leaves_the_diagonal_out() -> None:
    pairs = torch.arange(9).view(3, 3)
    assert losses.others(pairs).tolist() == [[1, 2], [3, 5], [6, 7]]


def test_the_contrastive_terms_by_hand() -> None:
    similar = torch.tensor([[0.5, -0.5], [0.5, 0.0], [-0.5, 0.0]])
    is_same = torch.tensor([[True, False], [True, False], [False, False]])
    expected = (math.log1p(math.exp(-10.0)) + math.log1p(math.exp(-5.0))) / 2
    found = losses.supervised_contrastive(similar, is_same).item()
    assert found == pytest.approx(expected, rel=1e-4)
    over = losses.CPE_TEMPERATURE
    expected = (math.log1p(math.exp(-1 / over)) + math.log1p(math.exp(-0.5 / over))) / 2
    assert losses.cpe(similar, is_same, FREE).item() == pytest.approx(expected, rel=1e-3)
    # Margin .3: own at .5, others at -.5 and 0, both farther by more than that.
    assert losses.triplet(similar, is_same).item() == 0.0
    assert losses.triplet(-similar, is_same).item() == pytest.approx((1.3 + 0.8) / 2)


def test_without_a_partner_the_embedding_terms_are_zero_with_a_gradient_of_zero() -> None:
    similar = torch.tensor([[0.5], [0.5]], requires_grad=True)
    nobody = torch.zeros(2, 1, dtype=torch.bool)
    terms = (
        losses.supervised_contrastive(similar, nobody),
        losses.cpe(similar, nobody, FREE),
        losses.triplet(similar, nobody),
    )
    assert [term.item() for term in terms] == [0.0, 0.0, 0.0]
    torch.stack(terms).sum().backward()
    assert similar.grad is not None
    assert not similar.grad.any()


def test_cosines_keep_the_embeddings_precision_and_leave_out_lengths() -> None:
    embeddings = torch.tensor([[1000.0, 0.0], [0.0, 2000.0], [3000.0, 3000.0]]).half()
    found = losses.cosines(embeddings)
    assert found.dtype is torch.float16
    root = math.sqrt(0.5)
    torch.testing.assert_close(
        found.float(), torch.tensor([[0, root], [0, root], [root, root]]), atol=1e-3, rtol=0
    )


@pytest.mark.parametrize(
    ("clamped", "is_loss_finite", "is_gradient_finite"),
    [
        (frozenset(), False, False),
        ({"similarity"}, True, True),
        ({"exponential"}, True, False),
        ({"cpe_loss"}, False, False),
        ({"similarity", "exponential", "cpe_loss"}, True, True),
    ],
    ids=["none", "similarity", "exponentials", "loss", "all"],
)
def test_only_the_clamp_before_the_exponential_cures_cpe_in_fp16(
    clamped: set[str], *, is_loss_finite: bool, is_gradient_finite: bool
) -> None:
    """Behind it the loss may be finite, but 0 times Inf is in the gradient; clamp(nan) is NaN."""
    similar, is_same = alike(torch.float16)
    loss = losses.cpe(similar, is_same, losses.clamping(clamped))
    loss.backward()
    assert similar.grad is not None
    assert math.isfinite(loss.item()) is is_loss_finite
    assert bool(similar.grad.isfinite().all()) is is_gradient_finite


def test_exponentials_keep_their_precision_where_autocast_would_raise_them() -> None:
    """As on CUDA: autocast is off there, whatever is on around it."""
    seen = []

    def bound(name: str, value: Tensor) -> Tensor:
        seen.append((name, value.dtype, torch.is_autocast_enabled("cpu")))
        return value

    similar, is_same = alike(torch.float16)
    with torch.autocast("cpu", torch.float16):
        losses.cpe(similar, is_same, bound)
    assert seen[:2] == [
        ("similarity", torch.float16, False),
        ("exponential", torch.float16, False),
    ]


def test_cpe_is_sound_in_fp32_and_beyond_its_clamp_it_teaches_nothing() -> None:
    similar, is_same = alike(torch.float32)
    losses.cpe(similar, is_same, FREE).backward()
    assert similar.grad is not None
    assert similar.grad[0, 1] > 1  # the other class is to be pushed away
    clamped, is_same = alike(torch.float32)
    losses.cpe(clamped, is_same, losses.clamping({"similarity"})).backward()
    assert clamped.grad is not None
    assert not clamped.grad.any()


# -- clamps ----------------------------------------------------------------------------------


def test_a_value_is_counted_before_it_is_clamped_and_nan_lies_beyond() -> None:
    fracs: dict[str, float] = {}
    bound = losses.counting(losses.clamping({"class_logit"}), fracs)
    value = torch.tensor([5.0, -11.0, 10.0, math.nan])
    assert bound("class_logit", value)[:3].tolist() == [5.0, -10.0, 10.0]
    assert fracs == {"class_logit": 0.5}


def test_counting_alone_changes_nothing() -> None:
    fracs: dict[str, float] = {}
    value = torch.tensor([11.0])
    assert losses.counting(FREE, fracs)("class_logit", value) is value
    assert fracs == {"class_logit": 1.0}
    losses.counting(FREE, fracs)("class_logit", torch.empty(0))
    assert fracs == {"class_logit": 0.0}
