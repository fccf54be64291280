"""Where a non-finite value first appeared in a forward pass."""

import contextlib
import dataclasses
import math
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from stability_search.engine.trace import Origin, trace_forward
from tests.engine.breaking import (
    Breaks,
    Wired,
    back,
    fail,
    forward_at,
    model,
    num_hooks,
    ones,
    trace,
)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ((0.0, 0.0, 0.0), Origin()),
        ((0.0, math.inf, math.nan), forward_at("1", 3.0)),
        ((4.0, 0.0, math.nan), forward_at("2", 6.0)),
        ((math.inf, 0.0, 0.0), forward_at("0", 3.0)),
    ],
)
def test_the_first_module_that_broke_finite_values_is_named(
    values: tuple[float, ...], expected: Origin
) -> None:
    assert trace(model(*values), torch.tensor([2.0, -3.0])) == expected


@pytest.mark.parametrize(("value", "name"), [(math.nan, "1.1"), (0.0, None)])
def test_the_innermost_module_is_named_not_what_holds_it(value: float, name: str | None) -> None:
    nested = nn.Sequential(nn.Identity(), nn.Sequential(nn.Identity(), Breaks(value)))
    assert trace(nested, torch.ones(2)).module == name


def test_a_module_that_only_passes_on_is_not_named() -> None:
    assert trace(model(0.0, 0.0), torch.tensor([math.nan])) == forward_at(None, None)


@pytest.mark.parametrize(
    ("value", "expected"), [(math.inf, forward_at("Wired", 2.0)), (1.0, Origin())]
)
def test_a_function_between_modules_belongs_to_what_holds_it(
    value: float, expected: Origin
) -> None:
    net = Wired(lambda m, x: m.b(m.a(x) * value), a=nn.Identity(), b=nn.Identity())
    assert trace(net, torch.tensor([2.0])) == expected


def test_a_hook_that_raises_and_is_handled_is_no_fault() -> None:
    """Its module was never entered, so that nothing of it may end."""

    def tries(wired: Any, x: torch.Tensor) -> torch.Tensor:
        with contextlib.suppress(FloatingPointError):
            wired.refused(x)
        return wired.safe(x) * wired.value

    for value, expected in ((1.0, Origin()), (math.nan, forward_at("0", 1.0))):
        net = Wired(tries, refused=nn.Identity(), safe=nn.Identity())
        net.value = value
        net.refused.register_forward_pre_hook(fail(FloatingPointError))
        assert trace(nn.Sequential(net), torch.ones(1)) == expected


def test_some_minus_infinity_is_no_offence() -> None:
    """A causal mask is full of it, and a module may make one."""
    mask = torch.tensor([0.0, -math.inf])
    assert trace(Breaks(mask), torch.ones(2), lambda y: y.exp().sum()) == Origin()  # type: ignore[arg-type]
    nothing_but = trace(model(-math.inf), torch.ones(2), lambda y: y.exp().sum())
    assert nothing_but == forward_at("0", 1.0)


def test_minus_infinity_that_went_in_is_no_largest_value() -> None:
    scores = torch.tensor([-50.0, 30.0, -math.inf])
    assert trace(model(math.nan), scores) == forward_at("0", 50.0)


def test_minus_infinity_out_of_weights_is_an_overflow() -> None:
    layer = nn.Linear(1, 2, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[1.0], [-3e38]]))
    net = nn.Sequential(nn.Identity(), layer)
    found = trace(net, torch.full((1, 1), 2.0), lambda y: y.exp().sum())
    assert found == forward_at("1", 2.0)
    passed_on = trace(layer, torch.full((1, 1), -math.inf), lambda y: y[0, 0].exp())
    assert passed_on == forward_at(None, None)


def test_a_loss_that_breaks_finite_outputs_is_its_own_phase() -> None:
    found = trace(model(0.0), torch.tensor([5.0, -7.0]), lambda y: y.sum() * math.nan)
    assert found == Origin(phase="loss", last_finite_max=7.0)
    assert trace(model(0.0), torch.tensor([5.0, -7.0])) == Origin()


def test_what_the_loss_raises_is_swallowed() -> None:
    def refuse(_y: torch.Tensor) -> torch.Tensor:
        raise ValueError("not finite")

    assert trace(model(math.nan), torch.ones(1), refuse) == forward_at("0", 1.0)
    assert trace(model(0.0), torch.ones(1), refuse) == Origin(is_known=False)


def test_a_module_that_raised_a_numerical_error_on_finite_values_is_named() -> None:
    failing = nn.Sequential(nn.Identity(), nn.Sequential(Wired(fail(FloatingPointError))))
    assert trace(failing, torch.full((1,), 3.0)) == forward_at("1.0", 3.0)
    # An error of another kind is the task's own.
    wrong = nn.Sequential(Wired(fail(ValueError)))
    assert trace(wrong, torch.full((1,), 3.0)) == Origin(is_known=False)
    # And it is not the culprit where it refused what was broken before.
    late = nn.Sequential(Breaks(math.nan), Wired(fail(FloatingPointError)))
    assert trace(late, torch.full((1,), 3.0)) == forward_at("0", 3.0)


def test_a_numerical_error_that_the_model_handles_is_no_fault() -> None:
    def tries(wired: Any, x: torch.Tensor) -> torch.Tensor:
        try:
            wired.risky(x)
        except FloatingPointError:
            return wired.safe(x)
        raise AssertionError

    for value, expected in ((0.0, Origin()), (math.nan, forward_at("safe", 1.0))):
        net = Wired(tries, risky=Wired(fail(FloatingPointError)), safe=Breaks(value))
        assert trace(net, torch.ones(1)) == expected


@pytest.mark.parametrize(
    ("num_calls", "expected"), [(2, Origin()), (3, forward_at("0", 2.0**100))]
)
def test_each_call_of_a_shared_module_is_judged_by_itself(
    num_calls: int, expected: Origin
) -> None:
    square = Wired(lambda _, x: x * 2.0**50)
    assert trace(nn.Sequential(*[square] * num_calls), torch.ones(1)) == expected


@pytest.mark.parametrize(
    ("value", "expected"), [(0.0, Origin()), (math.nan, forward_at("1", 3.0))]
)
def test_a_module_that_works_in_place_is_judged_by_what_went_in(
    value: float, expected: Origin
) -> None:
    in_place = Wired(lambda _, x: x.add_(value))
    assert trace(nn.Sequential(nn.Identity(), in_place), torch.full((1,), 3.0)) == expected


@dataclasses.dataclass
class Output:
    """What some models return."""

    logits: torch.Tensor
    cache: object = None


class OrderedOutput(OrderedDict[str, Any]):
    """An ordered dict with its items as attributes, as model libraries return it."""


@pytest.mark.parametrize("value", [0.0, math.inf])
@pytest.mark.parametrize(
    "pack",
    [
        lambda y: (y, None),
        Output,
        lambda y: OrderedOutput(logits=y, past=None),
        lambda y: [{"logits": y}],
    ],
)
def test_any_kind_of_output_is_watched(value: float, pack: Callable[..., Any]) -> None:
    net = Wired(lambda m, x: pack(m.inner(x)), inner=Wired(lambda _, x: pack(x + value)))
    net.compute = lambda m, x: m.inner(x)
    found = trace_forward(net, lambda: net(torch.ones(2)) and torch.zeros(()))
    assert found == (Origin() if value == 0.0 else forward_at("inner", 1.0))


def test_a_module_that_returns_nothing_is_passed_over() -> None:
    kept: list[torch.Tensor] = []
    silent = Wired(lambda _, x: kept.append(x))
    net = Wired(lambda m, x: (m.silent(x), m.loud(x))[1], silent=silent, loud=Breaks(math.nan))
    assert trace(net, torch.ones(1)) == forward_at("loud", 1.0)


@pytest.mark.parametrize(
    ("value", "expected"), [(0.0, Origin()), (math.nan, forward_at("a", 1.0))]
)
def test_a_module_without_gradients_is_watched(value: float, expected: Origin) -> None:
    def compute(wired: Any, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            target = wired.a(x)
        return wired.b(x) * target

    net = Wired(compute, a=Breaks(value), b=ones(2))
    assert trace(net, torch.ones(2)) == expected
    assert back(net, torch.ones(2)) == expected


def test_values_of_every_kind_are_read() -> None:
    kinds = (torch.float16, torch.bfloat16, torch.float64, torch.complex64)
    for dtype in kinds:
        assert trace(model(math.nan), torch.full((2,), 3.0, dtype=dtype)) == forward_at("0", 3.0)
    huge = torch.full((2,), -1e300, dtype=torch.float64)
    assert trace(model(math.nan), huge) == forward_at("0", 1e300)
    sparse = torch.eye(2).to_sparse() * 4
    net = Wired(lambda _, a, x: a @ x * math.nan)
    found = trace_forward(net, lambda: net(sparse, torch.ones(2, 1)).sum())
    assert found == forward_at("Wired", 4.0)


def test_modules_inside_a_transform_are_left_out() -> None:
    inner = Breaks(math.nan)
    net = Wired(lambda m, x: torch.vmap(m.inner)(x), inner=inner)
    assert trace(net, torch.ones(2, 2)) == forward_at("Wired", 1.0)


def test_an_exit_is_not_swallowed_and_the_hooks_go() -> None:
    def leave(_y: torch.Tensor) -> torch.Tensor:
        raise KeyboardInterrupt

    watched = nn.Sequential(ones(1))
    for run in (trace, back):
        with pytest.raises(KeyboardInterrupt):
            run(watched, torch.ones(1), leave)
        assert num_hooks(watched) == 0


def test_the_model_itself_may_be_the_culprit() -> None:
    assert trace(Breaks(math.nan), torch.ones(1)) == forward_at("Breaks", 1.0)
