"""The backward pass of models as they are is traced, and nothing of the trace is left."""

import gc
import math
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - torch's own convention
from torch import nn
from torch.utils.checkpoint import checkpoint

from stability_search.engine import gradient_flow
from stability_search.engine.overrides import ForwardOverrides
from stability_search.engine.trace import Origin, trace_backward
from tests.engine.breaking import (
    NOT_KNOWN,
    Refuses,
    Through,
    Times,
    Wired,
    back,
    backward_at,
    num_hooks,
    ones,
    trace,
)

# -- models as they are ----------------------------------------------------------------------


@pytest.mark.parametrize("factor", [1.0, math.inf])
@pytest.mark.parametrize(
    "change",
    [
        nn.ReLU(inplace=True),
        Wired(lambda _, x: x.add_(1.0)),
        Wired(lambda _, x: (x[:, :1].mul_(2.0), x)[1]),
        Wired(lambda _, x: F.relu_(x[:, :2])),
        Wired(lambda _, x: torch.stack([p * 2 for p in x.chunk(2, dim=1)]).squeeze(-1)),
    ],
)
def test_in_place_operators_change_nothing(change: nn.Module, factor: float) -> None:
    for place in (1, 2, 3):
        parts = [ones(2), nn.Identity(), change, nn.Identity()]
        parts.insert(place, Times(factor))
        found = back(nn.Sequential(*parts), torch.ones(2, 2))
        assert (found.module, found.phase) == (
            (None, None) if factor == 1.0 else (str(place), "backward")
        )


class Checkpointed(nn.Module):
    """Recompute its member in the backward pass."""

    def __init__(self, inner: nn.Module, *, use_reentrant: bool = False) -> None:
        super().__init__()
        self.inner = inner
        self.use_reentrant = use_reentrant

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = checkpoint(self.inner, x, use_reentrant=self.use_reentrant)
        return y


@pytest.mark.parametrize("factor", [1.0, math.inf])
def test_checkpointed_modules_are_named_all_the_same(factor: float) -> None:
    def block() -> nn.Module:
        return nn.Sequential(ones(2), nn.Dropout(0.5), Times(factor), nn.Tanh())

    net = nn.Sequential(ones(2), Checkpointed(block()), Checkpointed(ones(2)))
    assert back(net, torch.ones(1, 2)).module == (None if factor == 1.0 else "1.inner.2")


def test_reentrant_checkpointing_cannot_be_traced() -> None:
    net = nn.Sequential(ones(2), Checkpointed(nn.Sequential(ones(2)), use_reentrant=True))
    assert back(net, torch.ones(1, 2)) == NOT_KNOWN


def names(net: nn.Module) -> Iterator[str]:
    """Names of the modules that a forward pass calls."""
    called: list[nn.Module] = []
    hooks = [m.register_forward_hook(lambda m, *_: called.append(m)) for m in net.modules()]
    net(torch.zeros(1, 3, 8))
    for hook in hooks:
        hook.remove()
    yield from (name for name, m in net.named_modules() if name and m in called)


def transformer() -> nn.Module:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.1, batch_first=True)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)


@pytest.mark.parametrize("name", [*names(transformer()), None])
def test_every_module_of_a_transformer_is_found(name: str | None) -> None:
    """Residual branches pass gradients round each of them."""
    net = nn.Sequential(ones(8), transformer())

    def break_gradient(_module: nn.Module, _args: object, output: Any) -> Any:
        if isinstance(output, tuple):
            return (Through.apply(output[0], math.inf), *output[1:])
        return Through.apply(output, math.inf)

    if name is not None:
        net[1].get_submodule(name).register_forward_hook(break_gradient)
    found = back(net, torch.randn(4, 3, 8), lambda y: y.square().mean())
    assert (found.module, found.phase) == (
        (f"1.{name}", "backward") if name is not None else (None, None)
    )
    assert name is None or (found.last_finite_max or 0.0) > 0.0


@pytest.mark.parametrize(("scale", "expected"), [(2.0**12, Origin()), (2.0**15, "1")])
def test_an_overflow_of_fp16_is_found_in_its_linear(scale: float, expected: object) -> None:
    """Its four weights of one and the loss scale make 2^17 of a gradient of 2^15."""
    net = nn.Sequential(ones(4), ones(4), nn.Identity())

    def run() -> torch.Tensor:
        with torch.autocast("cpu", torch.float16):
            return net(torch.ones(1, 4) / 64).float().sum() * scale

    found = trace_backward(net, run, net.parameters())
    assert found == (backward_at("1", scale) if expected == "1" else expected)


def test_an_overflow_of_fp16_where_the_loss_begins_is_the_losss() -> None:
    net = nn.Sequential(ones(4))

    def run(scale: float) -> torch.Tensor:
        with torch.autocast("cpu", torch.float16):
            return net(torch.zeros(1, 4)).float().sum() * scale + 2

    found = trace_backward(net, lambda: run(2.0**17), net.parameters())
    assert found == Origin(phase="loss", last_finite_max=2.0)
    assert trace_backward(net, lambda: run(2.0**10), net.parameters()) == Origin()


@pytest.mark.parametrize("factor", [1.0, math.inf])
def test_a_replaced_forward_is_watched(factor: float) -> None:
    net = nn.Sequential(ones(2), nn.ReLU(), ones(2))
    overrides = ForwardOverrides()
    overrides.replace(net[1], lambda forward: lambda x: Through.apply(forward(x), factor))
    assert back(net, torch.ones(1, 2)).module == (None if factor == 1.0 else "1")
    overrides.undo()


@pytest.mark.parametrize("factor", [1.0, math.inf])
def test_sparse_gradients_are_read(factor: float) -> None:
    net = nn.Sequential(nn.Embedding(3, 2, sparse=True), Times(factor))
    found = back(net, torch.tensor([1, 1]), lambda y: 2 * y.sum())
    assert found == (Origin() if factor == 1.0 else backward_at("1", 2.0))


@pytest.mark.parametrize("factor", [1.0, math.inf])
def test_a_part_that_is_called_without_the_model_is_named(factor: float) -> None:
    net = Wired(lambda _: None, encoder=ones(2), head=Times(factor))
    found = trace_backward(
        net, lambda: net.head(net.encoder(torch.ones(1, 2))).sum(), net.parameters()
    )
    assert found == (Origin() if factor == 1.0 else backward_at("head", 1.0))


@pytest.mark.parametrize("factor", [1.0, math.inf])
def test_a_model_called_twice_in_one_loss_is_watched_in_both(factor: float) -> None:
    switch = Wired(lambda m, x: Through.apply(x, m.factors.pop(0)))
    net = nn.Sequential(ones(2), switch)
    switch.factors = [1.0, factor]
    found = back(net, torch.ones(1, 2), lambda y: (y + 7 * net(y.detach())).sum())
    assert found == (Origin() if factor == 1.0 else backward_at("1", 7.0))


# -- nothing is left -------------------------------------------------------------------------


@pytest.mark.parametrize("factor", [1.0, math.inf])
def test_gradients_hooks_and_flags_are_as_before(factor: float) -> None:
    net = nn.Sequential(ones(2), Times(factor), ones(2))
    net(torch.ones(1, 2)).nan_to_num().sum().backward()
    before = [(p.grad, p.grad.clone()) for p in net.parameters()]
    back(net, torch.ones(1, 2))
    trace(net, torch.ones(1, 2))
    assert num_hooks(net) == 0
    for parameter, (grad, copied) in zip(net.parameters(), before, strict=True):
        assert parameter.requires_grad
        assert parameter.grad is grad
        assert torch.equal(torch.nan_to_num(grad), torch.nan_to_num(copied))


@pytest.mark.parametrize("keeps", [False, True])
@pytest.mark.parametrize("factor", [1.0, math.inf])
@pytest.mark.parametrize("error", [None, FloatingPointError])
def test_the_graph_dies_with_the_trace(
    error: type[Exception] | None, factor: float, *, keeps: bool
) -> None:
    """Without the garbage collector: the memory is needed at once."""
    kept: list[object] = []
    alive: list[weakref.ref[torch.Tensor]] = []

    def compute(wired: Any, x: torch.Tensor) -> torch.Tensor:
        y = wired.times(wired.first(x))
        alive.append(weakref.ref(y))
        kept.extend([y] if keeps else [])
        return y if error is None else Refuses.apply(y, error)

    net = Wired(compute, first=ones(2), times=Times(factor))
    gc.collect()
    gc.disable()
    try:
        back(net, torch.ones(1, 2))
        assert (alive[0]() is not None) == keeps
    finally:
        gc.enable()


def test_the_hooks_on_the_graph_go_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """A graph that saves nothing may be used again, if somebody kept it."""
    seen: list[object] = []
    monkeypatch.setattr(gradient_flow, "_note_left", lambda *args: seen.append(args))
    net = Wired(lambda m, x: x + m.bias)
    net.bias = nn.Parameter(torch.ones(2))
    loss = net(torch.ones(2)).sum()
    trace_backward(net, lambda: loss, net.parameters())
    assert len(seen) == 2
    loss.backward()
    assert len(seen) == 2
