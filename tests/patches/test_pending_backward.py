"""A skip that is noticed while a forward pass awaits its backward, or after the gradients."""

import math

import torch
from torch import nn

from tests.patches.conftest import Install
from tests.patches.loops import NAN, is_finite


def test_statistics_are_put_back_while_a_forward_pass_awaits_its_backward(
    patched: Install,
) -> None:
    """Two optimizers share a norm: the first one's step is judged before the second's backward."""
    patched()
    shared, head = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)), nn.Linear(3, 1)
    first = torch.optim.SGD(head.parameters(), lr=0.1)
    second = torch.optim.SGD(shared.parameters(), lr=0.1)
    for step in range(3):
        x = torch.randn(4, 4, generator=torch.Generator().manual_seed(step))
        x[0, 0] = NAN if step == 1 else x[0, 0]
        hidden = shared(x)
        first.zero_grad()
        head(hidden.detach()).square().mean().backward()
        first.step()
        second.zero_grad()
        hidden.square().mean().backward()
        second.step()
    assert is_finite(shared)
    assert is_finite(head)


def test_a_loss_of_nan_lowers_no_scale_where_its_gradients_are_gone(patched: Install) -> None:
    """`unscale_`, `continue`, and `zero_grad` at the top of the loop."""
    patched()
    model = nn.Linear(4, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024)
    taken = 0
    for step in range(4):
        x = torch.full((2, 4), NAN if step in (1, 2) else 0.5)
        optimizer.zero_grad()
        scaler.scale(model(x).square().mean()).backward()
        scaler.unscale_(optimizer)
        if not math.isfinite(nn.utils.clip_grad_norm_(model.parameters(), 0.5)):
            continue
        scaler.step(optimizer)
        scaler.update()
        taken += 1
    assert taken == 2
    assert scaler.get_scale() == 1024
