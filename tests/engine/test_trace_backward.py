"""Where a gradient first became non-finite."""

import math
from collections import OrderedDict
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - torch's own convention
from torch import nn

from stability_search.engine.trace import Origin, trace_backward, trace_forward
from tests.engine.breaking import (
    NOT_KNOWN,
    Breaks,
    Refuses,
    Through,
    Times,
    Wired,
    back,
    backward_at,
    fail,
    forward_at,
    ones,
    trace,
)


@pytest.mark.parametrize(
    ("factors", "expected"),
    [
        ((1.0, 1.0, 1.0), Origin()),
        ((1.0, math.inf, 2.0), backward_at("2", 10.0)),
        ((1.0, math.inf, math.nan), backward_at("3", 5.0)),
        ((math.inf, 3.0, 2.0), backward_at("1", 30.0)),
        ((2.0**70, 2.0**60, 1.0), backward_at("1", 5 * 2.0**60)),
    ],
)
def test_the_first_module_that_broke_finite_gradients_is_named(
    factors: tuple[float, ...], expected: Origin
) -> None:
    net = nn.Sequential(ones(2), *map(Times, factors))
    found = back(net, torch.ones(1, 2), lambda y: 5 * y.sum())
    assert found == expected


@pytest.mark.parametrize(("factor", "name"), [(math.nan, "1.1"), (1.0, None)])
def test_the_innermost_module_breaks_gradients(factor: float, name: str | None) -> None:
    net = nn.Sequential(ones(2), nn.Sequential(nn.ReLU(), Times(factor), nn.ReLU()))
    assert back(net, torch.ones(1, 2)).module == name


@pytest.mark.parametrize("broken", ["q", "k", "v", None])
def test_modules_with_one_input_are_told_apart(broken: str | None) -> None:
    """The gradient of what they share is one sum: it shows that one of them broke, not which."""
    parts = {name: Times(math.inf if name == broken else 1.0) for name in "qkv"}
    net = Wired(
        lambda m, x: 2 * m.q(h := m.first(x)) + 3 * m.k(h) + 4 * m.v(h) + h,
        first=ones(2),
        **parts,
    )
    expected = {"q": 2.0, "k": 3.0, "v": 4.0}
    found = back(net, torch.ones(1, 2))
    assert found == (backward_at(broken, expected[broken]) if broken else Origin())


@pytest.mark.parametrize(
    ("factor", "expected"), [(1.0, Origin()), (math.inf, backward_at("Wired", 2.0))]
)
def test_a_function_between_modules_breaks_gradients_for_what_holds_it(
    factor: float, expected: Origin
) -> None:
    net = Wired(lambda m, x: 2 * m.b(Through.apply(m.a(x), factor)), a=ones(2), b=nn.ReLU())
    found = back(net, torch.ones(1, 2), lambda y: 2 * y.sum())
    assert found == expected


@pytest.mark.parametrize(("size", "expected"), [(1e38, Origin()), (2e38, backward_at("1", 3.0))])
def test_a_weight_gradient_alone_is_enough(size: float, expected: Origin) -> None:
    """The first layer has no input gradient, and here that of the second is fine."""
    layer = nn.Linear(1, 1, bias=False)
    with torch.no_grad():
        layer.weight.fill_(1e-38)
    net = nn.Sequential(Breaks(0.0), layer, nn.Identity())
    found = back(net, torch.tensor([[size]]), lambda y: 3 * y.sum())
    assert found == expected


@pytest.mark.parametrize("name", ["first", "second", None])
def test_a_weight_in_two_modules_breaks_in_one_of_them(name: str | None) -> None:
    first, second = (
        Wired(lambda m, x: F.linear(x, Through.apply(m.weight, m.factor))) for _ in "12"
    )
    weight = nn.Parameter(torch.eye(2))
    net = nn.Sequential(OrderedDict(first=first, second=second))
    for label, module in net.named_children():
        module.weight = weight
        module.factor = math.inf if label == name else 1.0
    expected = Origin() if name is None else backward_at(name, 3.0)
    assert back(net, torch.ones(1, 2), lambda y: 3 * y.sum()) == expected


@pytest.mark.parametrize(("num_calls", "expected"), [(2, None), (3, 2.0**100)])
def test_a_shared_module_is_judged_call_by_call(num_calls: int, expected: float | None) -> None:
    net = nn.Sequential(ones(1), *[Times(2.0**50)] * num_calls)
    found = back(net, torch.ones(1, 1))
    assert found == (Origin() if expected is None else backward_at("1", expected))


def test_gradients_that_break_where_they_are_summed_belong_to_what_holds_the_sum() -> None:
    for factor, expected in ((1e38, Origin()), (2e38, backward_at("1", 1.0))):
        block = Wired(lambda m, x: m.a(x) + m.b(x), a=Times(factor), b=Times(factor))
        net = nn.Sequential(ones(2), block)
        assert back(net, torch.ones(1, 2)) == expected
    for factor, expected in ((1e38, Origin()), (2e38, backward_at("Sequential", 1.0))):
        # A tied weight is a sum as well, of two modules' gradients.
        tied = [Wired(lambda m, x, f=factor: x + Through.apply(m.weight, f)) for _ in "12"]
        tied[0].weight = tied[1].weight = nn.Parameter(torch.ones(1))
        assert back(nn.Sequential(*tied), torch.ones(1)) == expected


def test_gradients_that_a_mask_takes_away_again_are_no_fault() -> None:
    """A square root at zero has an infinite gradient; where its result is masked, that is lost."""
    lost = nn.Sequential(Wired(lambda _, x: Masked.apply(x)), Times(math.inf))
    assert back(nn.Sequential(ones(2), lost), torch.ones(1, 2)) == Origin()
    # The one that reaches a weight is named, though the other came first.
    both = Wired(lambda m, x: m.lost(x) + x, lost=lost)
    found = back(nn.Sequential(ones(2), Times(math.nan), both), torch.ones(1, 2))
    assert found == backward_at("1", 1.0)


class Masked(torch.autograd.Function):
    """Pass values on and replace what is not finite in their gradient by zero."""

    @staticmethod
    def forward(_ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(_ctx: Any, *grads: torch.Tensor) -> torch.Tensor:
        return torch.nan_to_num(grads[0], nan=0.0, posinf=0.0, neginf=0.0)


def test_a_hook_that_breaks_the_gradient_of_an_output_counts_as_the_modules_own() -> None:
    for factor, expected in ((1.0, Origin()), (math.inf, backward_at("0", 4.0))):
        net = nn.Sequential(ones(2), nn.ReLU())

        def plant(_m: nn.Module, _a: object, y: torch.Tensor, by: float = factor) -> None:
            y.register_hook(lambda grad: grad * by)

        net[0].register_forward_hook(plant)
        assert back(net, torch.ones(1, 2), lambda y: 4 * y.sum()) == expected


def test_a_hook_that_breaks_the_gradient_of_a_weight_counts_as_the_modules_own() -> None:
    for factor, expected in ((1.0, Origin()), (math.inf, backward_at("0", 6.0))):
        net = nn.Sequential(ones(2), nn.Identity())
        net[0].weight.register_hook(lambda g, f=factor: g * f)
        assert back(net, torch.ones(1, 2), lambda y: 6 * y.sum()) == expected


class Widens(torch.autograd.Function):
    """Hand back a gradient of a wider type than its input's, as a careless kernel does."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, size: float) -> torch.Tensor:
        ctx.size = size
        return x.float()

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        return grads[0].float() * ctx.size, None


@pytest.mark.parametrize(("size", "expected"), [(6e4, Origin()), (7e4, backward_at("1", 1.0))])
def test_a_gradient_that_its_type_cannot_hold_is_the_fault_of_who_made_it(
    size: float, expected: Origin
) -> None:
    net = nn.Sequential(
        Wired(lambda m, x: (m.inner(x)).half(), inner=ones(2)),
        Wired(lambda _, x: Widens.apply(x, size)),
    )
    assert back(net, torch.ones(1, 2)) == expected


# -- phases ----------------------------------------------------------------------------------


def test_a_loss_whose_own_gradient_breaks_is_its_own_phase() -> None:
    net = nn.Sequential(ones(2), Times(math.inf))
    found = back(net, torch.ones(1, 2), lambda y: 4 + (y - y.detach()).abs().sum().sqrt())
    assert found == Origin(phase="loss", last_finite_max=4.0)
    assert back(net[:1], torch.ones(1, 2), lambda y: 4 + (y - y.detach()).sum()) == Origin()


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_forward_pass_that_breaks_again_is_told_as_such(value: float) -> None:
    net = nn.Sequential(ones(1), Breaks(value))
    run = lambda: net(torch.ones(1)).sum()  # noqa: E731 - one run for both
    assert back(net, torch.ones(1)) == trace_forward(net, run)
    assert back(net, torch.ones(1)).module == "1"
    hidden = back(net, torch.ones(1), lambda y: torch.nan_to_num(y, posinf=0.0).sum())
    assert hidden == forward_at("1", 1.0)  # the loss is fine, what the model returned is not
    found = back(ones(1), torch.full((1,), 3.0), lambda y: y.sum() * value)
    assert found == Origin(phase="loss", last_finite_max=3.0)


@pytest.mark.parametrize("factor", [1.0, math.inf])
def test_minus_infinity_that_a_layer_masks_with_is_no_broken_forward_pass(factor: float) -> None:
    masked = nn.Linear(3, 3)
    nn.init.eye_(masked.weight)
    nn.init.zeros_(masked.bias)
    masked.register_forward_hook(lambda _m, _a, y: y + torch.tensor([0.0, 0.0, -math.inf]))
    net = nn.Sequential(ones(3), Times(factor), masked, nn.Softmax(-1))
    assert trace(net, torch.ones(1, 3)) == forward_at("2", 3.0)  # asked of the forward pass alone
    found = back(net, torch.ones(1, 3), lambda y: y[:, 0].sum())
    assert found == (Origin() if factor == 1.0 else backward_at("1", 0.25))


def test_gradients_of_other_leaves_do_not_count() -> None:
    net = nn.Sequential(ones(2), Wired(lambda m, x: x * Through.apply(m.gain, math.inf)))
    net[1].gain = nn.Parameter(torch.ones(2))
    run = lambda: net(torch.ones(1, 2)).sum()  # noqa: E731 - as above
    assert trace_backward(net, run, [net[0].weight]) == Origin()
    assert trace_backward(net, run, [net[1].gain]) == backward_at("1", 1.0)
    assert trace_backward(net, run, net.parameters()) == backward_at("1", 1.0)


@pytest.mark.parametrize("factor", [1.0, math.inf])
def test_frozen_parts_are_left_out(factor: float) -> None:
    net = nn.Sequential(ones(2), Times(factor), ones(2))
    net[0].requires_grad_(False)
    assert back(net, torch.ones(1, 2)) == Origin()
    assert not net[0].weight.requires_grad
    net[0].bias.requires_grad_(True)
    assert (back(net, torch.ones(1, 2)).module == "1") == (factor == math.inf)


@pytest.mark.parametrize("factor", [1.0, math.inf])
def test_a_parameter_that_the_loss_does_not_use_is_left_out(factor: float) -> None:
    net = nn.Sequential(ones(2), Times(factor))
    net.spare = nn.Linear(2, 2)
    found = trace_backward(net, lambda: net[1](net[0](torch.ones(1, 2))).sum(), net.parameters())
    assert found == (Origin() if factor == 1.0 else backward_at("1", 1.0))


@pytest.mark.parametrize("factor", [1.0, math.inf])
def test_a_caller_without_gradients_does_not_matter(factor: float) -> None:
    with torch.no_grad():
        found = back(nn.Sequential(ones(2), Times(factor)), torch.ones(1, 2))
    assert found == (Origin() if factor == 1.0 else backward_at("1", 1.0))


def test_nothing_to_train_breaks_nothing() -> None:
    net = nn.Sequential(ones(2)).requires_grad_(False)
    assert back(net, torch.ones(1, 2)) == Origin()


@pytest.mark.parametrize(
    ("error", "factor", "expected"),
    [
        (FloatingPointError, 1.0, backward_at("1", 1.0)),
        (ValueError, 1.0, NOT_KNOWN),
        (FloatingPointError, math.inf, backward_at("2", 1.0)),
        (ValueError, math.inf, backward_at("2", 1.0)),
    ],
)
def test_what_the_backward_pass_raises_is_swallowed(
    error: type[Exception], factor: float, expected: Origin
) -> None:
    refusing = Wired(lambda _, x: Refuses.apply(x, error))
    net = nn.Sequential(ones(2), refusing, Times(factor))
    assert back(net, torch.ones(1, 2)) == expected


def test_anomaly_detection_does_not_hide_the_origin() -> None:
    net = nn.Sequential(ones(2), Times(math.nan), nn.ReLU())
    with (
        pytest.warns(UserWarning, match="Anomaly Detection has been enabled"),
        torch.autograd.detect_anomaly(),
        pytest.warns(UserWarning, match="Error detected in ThroughBackward"),
    ):
        assert back(net, torch.ones(1, 2)).module == "1"


def test_what_the_forward_pass_raises_is_swallowed() -> None:
    assert back(ones(1), torch.ones(1), fail(ValueError)) == NOT_KNOWN
    assert back(ones(1), torch.ones(1), lambda y: y.detach().sum()) == NOT_KNOWN
    broken = nn.Sequential(ones(1), Breaks(math.nan))
    assert back(broken, torch.ones(1), fail(ValueError)) == forward_at("1", 1.0)
    numerical = nn.Sequential(ones(1), Wired(fail(FloatingPointError)))
    assert back(numerical, torch.ones(1)) == forward_at("1", 1.0)
