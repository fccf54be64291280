"""Clipping looks at unscaled gradients and never writes NaN into them."""

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

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


def scaled_and_not(scaled: nn.Parameter, plain: nn.Parameter, *, is_first: bool) -> Scripted:
    """Send a scaled loss of 2 times one weight and a plain one of another backward."""
    scripted = Scripted()
    if is_first:
        scripted.scaler.scale((scaled * 2).sum()).backward()
    (plain * 8).sum().backward()
    if not is_first:
        scripted.scaler.scale((scaled * 2).sum()).backward()
    return scripted


@pytest.mark.parametrize("is_first", [False, True])
def test_gradients_that_no_scaler_scaled_are_clipped_beside_scaled_ones(
    patched: Install, capsys: Captured, *, is_first: bool
) -> None:
    patched(every_steps=1)
    scaled, plain = (nn.Parameter(torch.zeros(1)) for _ in range(2))
    scaler = scaled_and_not(scaled, plain, is_first=is_first).scaler
    optimizers = [torch.optim.SGD([weight], lr=0.5) for weight in (plain, scaled)]
    assert nn.utils.clip_grad_norm_([plain], 1.0).item() == 8.0
    optimizers[0].step()
    scaler.step(optimizers[1])
    scaler.update()

    assert plain.item() == pytest.approx(-0.5)
    assert scaled.item() == -1.0
    lines = [line for line in capsys.readouterr().err.splitlines() if "grad_norm" in line]
    assert ["grad_norm 8," in lines[0], "grad_norm 2," in lines[1]] == [True, True]
    assert ["loss scale" in line for line in lines] == [False, True]


def test_a_scaled_norm_of_a_mixed_window_is_said_unscaled(
    patched: Install, capsys: Captured
) -> None:
    patched(every_steps=1)
    scaled, plain = (nn.Parameter(torch.zeros(1)) for _ in range(2))
    scaler = scaled_and_not(scaled, plain, is_first=True).scaler
    nn.utils.clip_grad_norm_([scaled], 1.0)  # before `unscale_`, as PyTorch has it
    scaler.step(torch.optim.SGD([scaled], lr=0.5))

    assert scaled.item() == pytest.approx(-0.5 / 1024)
    assert "grad_norm 2," in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_checkpointed_parts_belong_to_the_scaled_loss(patched: Install) -> None:
    patched()
    scripted = Scripted()
    loss = checkpoint(lambda weight: weight.sum() * 0.5, scripted.weight, use_reentrant=True)
    scripted.scaler.scale(loss * 1).backward()
    nn.utils.clip_grad_norm_([scripted.weight], 1.0)
    scripted.scaler.step(scripted.optimizer)

    assert scripted.value == 1.0 - 0.5 * 0.125


def test_an_overflow_of_what_was_not_clipped_is_seen(patched: Install) -> None:
    patched()
    clipped, other = weights(1.0, INF)
    optimizer = torch.optim.SGD([other], lr=0.5)
    nn.utils.clip_grad_norm_([clipped], 1.0)
    optimizer.step()

    assert other.item() == 0.0


def test_an_overflow_after_clipping_is_seen(patched: Install) -> None:
    patched()
    weight = nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.SGD([weight], lr=0.5)
    weight.sum().backward()
    nn.utils.clip_grad_norm_([weight], 1.0)
    weight.sqrt().sum().backward()  # 0, with a gradient of Inf
    optimizer.step()

    assert weight.tolist() == [0.0, 0.0]


def test_the_norm_of_clipping_before_unscaling_is_not_unscaled_again(
    patched: Install, capsys: Captured
) -> None:
    patched(every_steps=1)
    clip_before_unscaling(Scripted())

    assert "grad_norm 0.7071," in capsys.readouterr().err
