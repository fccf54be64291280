"""Clipping looks at unscaled gradients and never writes NaN into them."""

import pytest
import torch
from torch import nn

from tests.patches.conftest import Install
from tests.patches.loops import INF, NAN, Scripted

Captured = pytest.CaptureFixture[str]


def weights(*gradients: float) -> list[nn.Parameter]:
    found = [nn.Parameter(torch.zeros(1)) for _ in gradients]
    for weight, value in zip(found, gradients, strict=True):
        weight.grad = torch.tensor([value])
    return found


def grads(parameters: list[nn.Parameter]) -> list[float]:
    return [p.grad.item() for p in parameters if p.grad is not None]


@pytest.mark.parametrize("kind", [1.0, 2.0, INF])
@pytest.mark.parametrize("max_norm", [1.0, 100.0])
def test_finite_gradients_are_clipped_as_pytorch_does(
    kind: float, max_norm: float, patched: Install
) -> None:
    plain, ours = weights(3.0, 4.0), weights(3.0, 4.0)
    wanted = nn.utils.clip_grad_norm_(plain, max_norm, kind)
    patched()

    assert torch.equal(nn.utils.clip_grad_norm_(ours, max_norm, kind), wanted)
    assert grads(ours) == grads(plain)


@pytest.mark.parametrize("value", [INF, NAN])
def test_gradients_of_a_norm_that_is_not_finite_stay_as_they_are(
    value: float, patched: Install
) -> None:
    patched()
    ours = weights(value, 4.0)

    assert not torch.isfinite(nn.utils.clip_grad_norm_(ours, 1.0))
    assert grads(ours)[1] == 4.0


def test_the_twin_pytorch_writes_into_them() -> None:
    ours = weights(INF, 4.0)
    nn.utils.clip_grad_norm_(ours, 1.0)

    assert grads(ours)[1] == 0.0


def test_an_error_that_was_asked_for_is_raised(patched: Install) -> None:
    patched()

    with pytest.raises(RuntimeError, match="non-finite, so it cannot be clipped"):
        nn.utils.clip_grad_norm_(weights(INF), 1.0, error_if_nonfinite=True)


def test_an_empty_generator_is_warned_of_as_before(patched: Install) -> None:
    patched()

    with pytest.warns(UserWarning, match="empty generator"):
        nn.utils.clip_grad_norm_((p for p in weights()), 1.0)


def clip_before_unscaling(scripted: Scripted, *, by_value: bool = False) -> float:
    scripted.backward(0.5)
    if by_value:
        nn.utils.clip_grad_value_([scripted.weight], 1.0)
    else:
        nn.utils.clip_grad_norm_([scripted.weight], 1.0)
    scripted.scaler.step(scripted.optimizer)
    scripted.scaler.update()
    return scripted.value


@pytest.mark.parametrize("by_value", [False, True])
def test_clipping_before_unscaling_acts_on_unscaled_gradients(
    patched: Install, capsys: Captured, *, by_value: bool
) -> None:
    patched()
    scripted = Scripted()

    assert clip_before_unscaling(scripted, by_value=by_value) == 1.0 - 0.5 * 0.125
    assert "clipping was called before `scaler.unscale_`" in capsys.readouterr().err


@pytest.mark.parametrize("by_value", [False, True])
def test_the_twin_without_the_patches_it_cuts_the_learning_rate(*, by_value: bool) -> None:
    assert clip_before_unscaling(Scripted(), by_value=by_value) > 0.999


def test_a_value_clip_does_not_hide_an_overflow(patched: Install, capsys: Captured) -> None:
    patched()
    weight = nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.SGD([weight], lr=0.5)
    weight.grad = torch.tensor([INF, 1.0])
    nn.utils.clip_grad_value_([weight], 1.0)
    optimizer.step()

    assert weight.tolist() == [0.0, 0.0]
    assert "skipped, bad: gradient is Inf" in capsys.readouterr().err


def test_the_norm_in_the_messages_is_that_before_clipping(
    patched: Install, capsys: Captured
) -> None:
    patched(every_steps=1)
    weight = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([weight], lr=0.5)
    weight.grad = torch.tensor([8.0])
    nn.utils.clip_grad_norm_([weight], 1.0)
    optimizer.step()

    assert "grad_norm 8," in capsys.readouterr().err
    assert weight.item() == pytest.approx(-0.5)
