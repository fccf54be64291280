"""A step of NaN or Inf changes nothing, is labelled, and the run goes on."""

import threading
from collections.abc import Callable, Iterable

import pytest
import torch
from torch import nn

from stability_search.patches import uninstall
from tests.patches.conftest import Install
from tests.patches.loops import INF, NAN, are_equal, is_finite, loader, train, values

Captured = pytest.CaptureFixture[str]


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_poisoned_batch_is_skipped_and_named(
    precision: str, patched: Install, capsys: Captured
) -> None:
    patched()

    model, _, _ = train(loader(5, poisoned=2), precision=precision)

    assert is_finite(model)
    assert "WARNING step 3 epoch 1: skipped, data: NaN in batch[0], batch 2 (from 0)" in (
        capsys.readouterr().err
    )


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_the_twin_without_the_patches_it_ends_in_nan(precision: str) -> None:
    model, _, _ = train(loader(5, poisoned=2), precision=precision)

    assert not is_finite(model)  # in fp16 only the running statistics


@pytest.mark.parametrize("fused", [False, True])
def test_a_skipped_step_leaves_parameters_and_optimizer_state_alone(
    patched: Install, *, fused: bool
) -> None:
    patched()
    with_it, its_optimizer, _ = train(loader(4, poisoned=3), fused=fused)
    without, optimizer, _ = train(loader(4, poisoned=3, drop=1), fused=fused)

    assert are_equal(values(with_it, its_optimizer), values(without, optimizer))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_calm_run_is_the_same_to_the_bit(precision: str, patched: Install) -> None:
    plain = values(*train(loader(6), precision=precision, clip_norm=0.5)[:2])
    patched()

    assert are_equal(plain, values(*train(loader(6), precision=precision, clip_norm=0.5)[:2]))


def test_a_loss_of_nan_with_finite_gradients_is_skipped(
    patched: Install, capsys: Captured
) -> None:
    patched()
    weight = nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([weight], lr=0.5)

    (weight.sum() + NAN).backward()
    optimizer.step()

    assert weight.tolist() == [1.0, 1.0]
    assert "WARNING step 1 epoch 1: skipped, bad: loss is NaN" in capsys.readouterr().err


def test_a_batch_that_the_script_gave_up_does_not_condemn_the_next(patched: Install) -> None:
    patched()
    weight = nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([weight], lr=0.5)

    (weight.sum() + NAN).backward()
    optimizer.zero_grad(set_to_none=False)
    weight.sum().backward()
    optimizer.step()

    assert weight.tolist() == [0.5, 0.5]


def test_gradients_are_there_again_after_a_skip(patched: Install) -> None:
    patched()
    weight = nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([weight], lr=0.5)
    weight.grad = gradient = torch.tensor([INF, 1.0])

    optimizer.step()

    assert weight.grad is gradient
    assert weight.tolist() == [1.0, 1.0]


def test_a_closure_is_judged_by_the_gradients_it_makes(patched: Install) -> None:
    patched()
    weight = nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([weight], lr=0.5)

    def closure(factor: float) -> torch.Tensor:
        optimizer.zero_grad()
        loss = (weight * factor).sum()
        loss.backward()
        return loss

    assert optimizer.step(lambda: closure(INF)) == INF
    assert weight.tolist() == [1.0, 1.0]
    optimizer.step(closure=lambda: closure(1.0))
    assert weight.tolist() == [0.5, 0.5]


def test_lbfgs_does_not_move_on_nan(patched: Install) -> None:
    patched()
    weight = nn.Parameter(torch.ones(2))
    optimizer = torch.optim.LBFGS([weight], lr=0.5)

    def closure(factor: float) -> torch.Tensor:
        optimizer.zero_grad()
        loss = (weight.square() * factor).sum()
        loss.backward()
        return loss

    optimizer.step(lambda: closure(NAN))
    assert weight.tolist() == [1.0, 1.0]
    optimizer.step(lambda: closure(1.0))
    assert weight.abs().max() < 1


def test_each_optimizer_has_its_own_count(patched: Install, capsys: Captured) -> None:
    patched()
    pair = [nn.Parameter(torch.ones(1)) for _ in range(2)]
    optimizers = [torch.optim.SGD([weight], lr=0.5) for weight in pair]
    for factor in (1.0, INF):
        for weight, optimizer in zip(pair, optimizers, strict=True):
            optimizer.zero_grad()
            (weight * factor).sum().backward()
            optimizer.step()

    text = capsys.readouterr().err
    assert "step 2 epoch 1 (optimizer 1, SGD): skipped, bad" in text
    assert "step 2 epoch 1 (optimizer 2, SGD): skipped, bad" in text
    assert [weight.item() for weight in pair] == [0.5, 0.5]


def test_nan_parameters_are_said_for_what_they_are(patched: Install, capsys: Captured) -> None:
    patched()
    weight = nn.Parameter(torch.tensor([NAN]))
    optimizer = torch.optim.SGD([weight], lr=0.5)
    for _ in range(3):
        optimizer.zero_grad()
        weight.square().sum().backward()
        optimizer.step()

    text = capsys.readouterr().err
    assert text.count("CRITICAL step 1: parameters are NaN or Inf") == 1
    assert text.count("CRITICAL") == 1 + text.count("CRITICAL step 3: number of bad steps")


def test_sparse_gradients_are_judged(patched: Install) -> None:
    patched()
    table = nn.Embedding(4, 2, sparse=True)
    before = table.weight.detach().clone()
    optimizer = torch.optim.SGD(table.parameters(), lr=0.5)

    (table(torch.tensor([1, 1])) * INF).sum().backward()
    optimizer.step()

    assert torch.equal(table.weight, before)


def test_a_norm_beyond_the_range_of_fp16_is_no_overflow(patched: Install) -> None:
    patched()
    weight = nn.Parameter(torch.zeros(16, dtype=torch.float16))
    optimizer = torch.optim.SGD([weight], lr=2**-15)
    weight.grad = torch.full((16,), 32768.0, dtype=torch.float16)

    optimizer.step()

    assert weight.tolist() == [-1.0] * 16


def test_anomaly_mode_names_the_operation_and_goes_on(patched: Install, capsys: Captured) -> None:
    weight = nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.SGD([weight], lr=0.5)
    patched(anomaly=True)

    with pytest.warns(UserWarning, match="Error detected in"):  # the trace, on standard error
        (weight.sqrt() * 0).sum().backward()
    optimizer.step()
    uninstall()

    text = capsys.readouterr().err
    assert "CRITICAL anomaly mode: Function 'SqrtBackward0' returned nan values" in text
    assert "step 1 epoch 1: skipped, bad: backward pass ended" in text
    assert weight.tolist() == [0.0, 0.0]
    assert not torch.is_anomaly_enabled()


def test_a_batch_that_was_read_ahead_is_blamed_at_its_own_step_and_once(
    patched: Install, capsys: Captured
) -> None:
    patched()
    weight = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([weight], lr=0.5)
    batches = iter(loader(5, poisoned=2))
    ahead = next(batches)
    for _ in range(5):
        following = next(batches, None)
        gradient = ahead[0].sum() * 0 + (INF if following is None else 1.0)
        weight.grad = gradient.reshape(1)
        optimizer.step()
        ahead = following

    lines = [line for line in capsys.readouterr().err.splitlines() if " skipped, " in line]
    assert [line.partition(" (from 0)")[0] for line in lines] == [
        "WARNING step 3 epoch 1: skipped, data: NaN in batch[0], batch 2",
        "WARNING step 5 epoch 1: skipped, bad: gradient is Inf, batch 4",
    ]


def test_a_batch_is_blamed_once(patched: Install, capsys: Captured) -> None:
    patched()
    weight = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([weight], lr=0.5)
    for _ in loader(4, poisoned=2):
        weight.grad = torch.tensor([INF])
        optimizer.step()

    text = capsys.readouterr().err
    labels = [line.split(": ")[1] for line in text.splitlines() if " skipped, " in line]
    assert labels == ["skipped, bad", "skipped, bad", "skipped, data", "skipped, bad"]


def test_losses_of_a_generator_go_backward(patched: Install) -> None:
    patched(observe=True)
    weight = nn.Parameter(torch.ones(2))

    torch.autograd.backward(loss for loss in (weight.sum(), weight.sum()))

    assert weight.grad is not None
    assert weight.grad.tolist() == [2.0, 2.0]


class Unasking(torch.optim.Optimizer):
    """Counts its steps, and takes a gradient for granted."""

    def __init__(self, parameters: Iterable[torch.Tensor], lr: float = 0.5) -> None:
        super().__init__(parameters, {"lr": lr, "num_steps": 0})

    def step(self, closure: Callable[[], torch.Tensor] | None = None) -> None:  # type: ignore[override]
        if closure is not None:
            closure()
        with torch.no_grad():
            for group in self.param_groups:
                group["num_steps"] += 1
                assert group["params"][0].device.type == "cpu"
                for parameter in group["params"]:
                    parameter.add_(parameter.grad, alpha=-group["lr"])


def test_an_optimizer_that_does_not_ask_for_gradients_survives_a_skip(patched: Install) -> None:
    patched()
    weight = nn.Parameter(torch.ones(2))
    optimizer = Unasking([weight])
    for factor in (INF, 1.0):
        optimizer.zero_grad()
        (weight * factor).sum().backward()
        optimizer.step()

    assert weight.tolist() == [0.5, 0.5]
    (group,) = optimizer.param_groups
    assert (type(group["params"]), group["num_steps"]) == (list, 1)


def test_a_gradient_made_during_a_skipped_step_stays(patched: Install) -> None:
    patched()
    weight = nn.Parameter(torch.ones(2))
    fresh = torch.ones(2)
    optimizer = Unasking([weight])

    def closure() -> torch.Tensor:
        weight.grad = torch.full((2,), INF)
        return torch.ones(())

    optimizer.register_step_post_hook(lambda *_: setattr(weight, "grad", fresh))
    optimizer.step(closure)

    assert weight.grad is fresh


class Around(torch.optim.Optimizer):
    """Lets another optimizer take its steps, as those that average weights do."""

    def __init__(self, inner: torch.optim.Optimizer) -> None:
        self.inner = inner
        super().__init__([dict(group) for group in inner.param_groups], {})

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        self.inner.step(closure)


def test_a_step_inside_a_step_is_counted_once(patched: Install, capsys: Captured) -> None:
    patched(every_steps=1)
    weight = nn.Parameter(torch.ones(2))
    optimizer = Around(Unasking([weight]))
    for factor in (1.0, INF):
        optimizer.zero_grad()
        (weight * factor).sum().backward()
        optimizer.step()

    assert weight.tolist() == [0.5, 0.5]
    text = capsys.readouterr().err
    assert text.count("NaN/Inf skipped") == 2
    assert "optimizer 2" not in text


def test_after_a_step_that_raised_the_next_is_judged(patched: Install) -> None:
    patched()
    weight = nn.Parameter(torch.ones(2))
    inner = torch.optim.SGD([weight], lr=0.5)
    weight.grad = torch.ones(2)
    outer = Around(inner)
    outer.inner = None  # type: ignore[assignment]
    with pytest.raises(AttributeError, match="step"):
        outer.step()

    weight.grad = torch.full((2,), INF)
    inner.step()

    assert weight.tolist() == [1.0, 1.0]


def test_lbfgs_counts_no_evaluation_of_a_skipped_step(patched: Install) -> None:
    patched()
    weight = nn.Parameter(torch.ones(2))
    optimizer = torch.optim.LBFGS([weight], lr=0.5)

    def closure(factor: float) -> torch.Tensor:
        optimizer.zero_grad()
        loss = (weight.square() * factor).sum()
        loss.backward()
        return loss

    optimizer.step(lambda: closure(1.0))
    before = optimizer.state[weight]["func_evals"]
    optimizer.step(lambda: closure(NAN))

    assert optimizer.state[weight]["func_evals"] == before > 0


def late_overflow() -> torch.Tensor:
    """Take one L-BFGS step whose second evaluation has an infinite gradient."""
    weight = nn.Parameter(torch.ones(2))
    optimizer = torch.optim.LBFGS([weight], lr=0.5, max_iter=3)
    factors = iter((1.0, INF, 1.0, 1.0, 1.0))
    losses = iter((5.0, 4.0, 3.0, 2.0, 1.0))

    def closure() -> torch.Tensor:
        weight.grad = weight.detach() * next(factors)
        return torch.tensor(next(losses))

    optimizer.step(closure)
    return weight.detach()


def test_observing_leaves_a_late_evaluation_alone(patched: Install) -> None:
    plain = late_overflow()
    patched(observe=True)
    observed = late_overflow()
    uninstall()
    patched()

    assert torch.equal(observed.nan_to_num(9.0), plain.nan_to_num(9.0))
    assert bool(torch.isfinite(late_overflow()).all())


def test_another_optimizers_loss_skips_no_sound_step(patched: Install) -> None:
    patched()
    pair = [nn.Parameter(torch.ones(1)) for _ in range(2)]
    optimizers = [torch.optim.SGD([weight], lr=0.5) for weight in pair]
    for _ in range(2):
        for weight, optimizer in zip(pair, optimizers, strict=True):
            optimizer.zero_grad()
            weight.sum().backward()
            optimizer.step()
    optimizers[0].zero_grad()
    first, second = (weight.sum() for weight in pair)
    first.backward()
    (second + NAN).backward()
    optimizers[0].step()

    assert pair[0].item() == -0.5  # the third step was taken too


def test_of_several_optimizers_a_loss_skips_those_it_reaches(patched: Install) -> None:
    patched()
    pair = [nn.Parameter(torch.ones(1)) for _ in range(2)]
    optimizers = [torch.optim.SGD([weight], lr=0.5) for weight in pair]
    for factor in (0.0, NAN):
        loss = (pair[0] + pair[1]).sum() + factor
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()

    assert [weight.item() for weight in pair] == [0.5, 0.5]


def test_a_loss_of_another_thread_skips_no_step(patched: Install) -> None:
    patched()
    weight, other = nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([weight], lr=0.5)
    weight.sum().backward()
    thread = threading.Thread(target=(other.sum() + NAN).backward)
    thread.start()
    thread.join()
    optimizer.step()

    assert weight.item() == 0.5


def test_a_step_inside_that_of_other_parameters_is_judged(patched: Install) -> None:
    patched()
    outer, inner = (nn.Parameter(torch.ones(2)) for _ in range(2))
    optimizer = Around(torch.optim.SGD([outer], lr=0.5))
    optimizer.inner = torch.optim.SGD([inner], lr=0.5)
    outer.grad, inner.grad = torch.ones(2), torch.full((2,), INF)
    optimizer.step()

    assert inner.tolist() == [1.0, 1.0]


class Twice(torch.optim.Optimizer):
    """Evaluates its closure twice, and fails where it was asked to."""

    def step(self, closure: Callable[[], torch.Tensor]) -> None:  # type: ignore[override]
        closure()
        if not torch.isfinite(closure()):
            raise ArithmeticError("no step")


def test_a_closure_finds_every_parameter_and_so_does_who_comes_after_a_failure(
    patched: Install,
) -> None:
    patched()
    weight = nn.Parameter(torch.ones(2))
    optimizer, found = Twice([weight], {}), []

    def closure(factor: float) -> torch.Tensor:
        found.append(len(list(optimizer.param_groups[0]["params"])))
        weight.grad = torch.full((2,), factor)
        return weight.grad.sum()

    with pytest.raises(ArithmeticError, match="no step"):
        optimizer.step(lambda: closure(INF))
    optimizer.step(lambda: closure(1.0))

    assert found == [1, 1, 1, 1]
