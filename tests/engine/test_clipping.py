"""The norm, and the one pass that unscales and clips."""

import math
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from stability_search.engine.clipping import (
    clip_factor,
    gradient_fault,
    rescale_gradients,
    tensor_norms,
)


def total_norm(gradients: Sequence[torch.Tensor]) -> torch.Tensor:
    return torch.linalg.vector_norm(tensor_norms(gradients))


def test_each_gradient_has_its_norm() -> None:
    norms = tensor_norms([torch.tensor([3.0]), torch.tensor([[4.0, 12.0]]), torch.zeros(2)])
    assert norms.tolist() == pytest.approx([3.0, 160**0.5, 0.0])


def test_the_norm_is_torchs_to_the_bit() -> None:
    torch.manual_seed(0)
    gradients = [torch.randn(n, 7) for n in range(1, 30)]
    assert total_norm(gradients).item() == torch.nn.utils.get_total_norm(gradients).item()


@pytest.mark.parametrize(
    ("gradient", "fault"),
    [
        ([1.0, math.nan], "gradient is NaN or Inf"),
        ([1.0, math.inf], "gradient is NaN or Inf"),
        ([1.5e19, 1.0], "gradient norm is 9.2e+18 or more, and its square overflows"),
    ],
)
@pytest.mark.parametrize("clip_norm", [None, 1.0])
def test_what_is_wrong_is_still_seen_after_clipping(
    gradient: list[float], fault: str, clip_norm: float | None
) -> None:
    gradients = [torch.ones(2), torch.tensor(gradient)]
    rescale_gradients(gradients, total_norm(gradients), inverse_scale=1.0, clip_norm=clip_norm)
    assert gradient_fault(gradients) == fault


@pytest.mark.parametrize(("norm", "factor"), [(0.5, 1.0), (4.0, 0.25), (0.0, 1.0)])
def test_the_factor_of_clipping_is_at_most_one(norm: float, factor: float) -> None:
    assert clip_factor(norm, 1.0) == pytest.approx(factor, rel=1e-5)


def test_the_norm_is_over_all_gradients() -> None:
    assert total_norm([torch.tensor([3.0]), torch.tensor([[4.0, 12.0]])]).item() == 13.0
    assert torch.isnan(total_norm([torch.ones(2), torch.tensor([float("nan")])]))
    assert torch.isinf(total_norm([torch.ones(2), torch.tensor([float("inf")])]))


@pytest.mark.parametrize("clip_norm", [0.1, 1.0, 13.0, 20.0])
def test_it_clips_as_torch_does(clip_norm: float) -> None:
    ours = [torch.tensor([3.0]), torch.tensor([[4.0, 12.0]])]
    theirs = [torch.nn.Parameter(torch.zeros_like(g)) for g in ours]
    for parameter, gradient in zip(theirs, ours, strict=True):
        parameter.grad = gradient.clone()
    torch.nn.utils.clip_grad_norm_(theirs, clip_norm)

    rescale_gradients(ours, total_norm(ours), inverse_scale=1.0, clip_norm=clip_norm)

    assert all(torch.equal(p.grad, g) for p, g in zip(theirs, ours, strict=True))


@given(
    values=st.lists(st.floats(-1e3, 1e3, width=32), min_size=1, max_size=6),
    clip_norm=st.none() | st.floats(1e-2, 1e2),
    exponent=st.integers(0, 20),
)
def test_it_keeps_the_direction_and_the_limit(
    values: list[float], clip_norm: float | None, exponent: int
) -> None:
    true = torch.tensor(values)
    scaled = [true * 2.0**exponent]
    norm = total_norm(scaled) * 2.0**-exponent

    rescale_gradients(scaled, norm, inverse_scale=2.0**-exponent, clip_norm=clip_norm)

    factor = 1.0 if clip_norm is None else min(1.0, clip_norm / (float(norm) + 1e-6))
    assert torch.allclose(scaled[0], true * factor, rtol=1e-5, atol=1e-6)
    if clip_norm is not None:
        assert total_norm(scaled).item() <= clip_norm * (1 + 1e-5)
