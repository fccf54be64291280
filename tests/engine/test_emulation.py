"""Emulated fp16 gives the gradients of the CPU's own, and leaves nothing behind."""

import contextlib
import threading
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - torch's own convention
from torch import nn
from torch.utils.checkpoint import checkpoint

from stability_search.engine import GuardedEngine, emulation
from stability_search.errors import UsageError
from stability_search.settings.engine import EngineSettings

Run = Callable[..., torch.Tensor]
FP16 = torch.float16


@pytest.fixture(autouse=True)
def leaves_nothing_installed() -> Iterator[None]:
    yield
    assert not emulation.is_installed()


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_recurrent_nets_train_and_agree_with_native_fp16(kind: type[nn.RNNBase]) -> None:
    torch.manual_seed(0)
    layer, x = kind(3, 4, num_layers=2), torch.randn(5, 2, 3)
    with torch.autocast("cpu", dtype=torch.float16), torch.no_grad():
        native = layer(x)[0]
    emulation.acquire()
    with emulation.emulated_fp16(), torch.autocast("cpu", dtype=torch.float16):
        emulated = layer(x)[0]
        emulated.float().sum().backward()
    emulation.release()
    assert emulated.dtype == native.dtype
    assert torch.allclose(emulated.float(), native.float(), atol=2e-3)
    assert all(torch.isfinite(parameter.grad).all() for parameter in layer.parameters())


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_recurrent_nets_lose_finite_values_where_native_fp16_does(kind: type[nn.RNNBase]) -> None:
    torch.manual_seed(0)
    layer, x = kind(3, 4), torch.ones(5, 2, 3)
    lost = []
    for size in (1.0, 60000.0, 1e6):
        with torch.autocast("cpu", dtype=FP16), torch.no_grad():
            native = layer(size * x)[0]
        with emulating(), torch.no_grad():
            emulated = layer(size * x)[0]
        assert torch.equal(torch.isfinite(emulated), torch.isfinite(native)), size
        lost.append(not torch.isfinite(emulated).all())
    assert lost == [False, False, True]  # the twin: both sides of the edge were seen


def test_every_state_of_a_recurrent_net_is_fp16() -> None:
    with emulating():
        output, (hidden, cell) = nn.LSTM(3, 4)(torch.ones(5, 2, 3))
    assert [output.dtype, hidden.dtype, cell.dtype] == [FP16, FP16, FP16]


def test_double_precision_stays_as_it_is() -> None:
    emulation.acquire()
    with emulation.emulated_fp16(), torch.autocast("cpu", dtype=torch.float16):
        result = torch.ones(2, 2).double() @ torch.full((2, 2), 1e6).double()
    emulation.release()
    assert (result.dtype, result.max().item()) == (torch.float64, 2e6)


# -- weights, gradients, threads -------------------------------------------------------------


@contextlib.contextmanager
def emulating() -> Iterator[None]:
    emulation.acquire()
    try:
        with emulation.emulated_fp16(), torch.autocast("cpu", dtype=FP16):
            yield
    finally:
        emulation.release()


def weight_gradient(context: contextlib.AbstractContextManager[Any], xs: list[Any]) -> Any:
    """Return the gradient of a weight used twice in each of some micro-batches."""
    weight = nn.Parameter(torch.full((2, 2), 0.5))
    with context:
        for x in xs:
            F.linear(F.linear(x, weight), weight).float().sum().backward()
    return weight.grad


def test_gradients_of_a_shared_weight_add_up_over_micro_batches() -> None:
    xs = [torch.tensor([[1.0, 3.0]]), torch.tensor([[2.0, -1.0]])]
    expected = weight_gradient(torch.autocast("cpu", dtype=FP16), xs)
    assert torch.equal(weight_gradient(emulating(), xs), expected)
    assert not torch.equal(weight_gradient(emulating(), xs[:1]), expected)  # the twin


def test_a_weight_changed_within_the_window_is_seen_at_once() -> None:
    """Even through `.data`, which leaves its version as it was."""
    weight, x = nn.Parameter(torch.ones(1, 1)), torch.ones(1, 1)
    with emulating():
        before = F.linear(x, weight).item()
        version = weight._version  # noqa: SLF001 - what the change must not show in
        weight.data.fill_(2.0)
        after = F.linear(x, weight).item()
    assert weight._version == version  # noqa: SLF001 - as above
    assert (before, after) == (1.0, 2.0)


def num_casts(y: torch.Tensor) -> int:
    """Count the casts that a backward pass would go through."""
    left, seen = [y.grad_fn], set()
    while left:
        node = left.pop()
        if node is not None and node not in seen:
            seen.add(node)
            left += [following for following, _ in node.next_functions]
    return sum("ToCopy" in node.name() for node in seen)


def test_an_input_that_is_fp16_already_is_not_rounded_again() -> None:
    weight = torch.ones(2, 2)
    with emulating():
        fp16 = F.linear(torch.ones(1, 2, dtype=FP16, requires_grad=True), weight)
        fp32 = F.linear(torch.ones(1, 2, requires_grad=True), weight)
    assert (num_casts(fp16), num_casts(fp32)) == (2, 3)


@pytest.mark.parametrize("is_reentrant", [False, True])
def test_checkpointing_recomputes_in_emulated_fp16(*, is_reentrant: bool) -> None:
    torch.manual_seed(0)
    layer, x = nn.Linear(8, 8), torch.randn(4, 8)
    depths: list[int] = []

    def block(x: torch.Tensor) -> torch.Tensor:
        depths.append(emulation._depth())  # noqa: SLF001 - what this test is about
        return torch.tanh(layer(x))

    def gradient(run: Run) -> Any:
        layer.zero_grad()
        with emulating():
            run(x.clone().requires_grad_()).float().square().sum().backward()
        return layer.weight.grad.clone()  # type: ignore[union-attr]

    plain = gradient(block)
    assert depths == [1]
    assert torch.equal(gradient(lambda x: checkpoint(block, x, use_reentrant=is_reentrant)), plain)
    assert depths == [1, 1, 1]


def test_a_recomputation_after_the_context_is_not_emulated() -> None:
    """The twin: why the backward pass belongs inside."""
    depths: list[int] = []

    def block(x: torch.Tensor) -> torch.Tensor:
        depths.append(emulation._depth())  # noqa: SLF001 - what this test is about
        return x * x

    with emulating():
        y = checkpoint(block, torch.ones(1, requires_grad=True), use_reentrant=False)
    y.backward()
    assert depths == [1, 0]


def test_only_the_thread_inside_the_context_emulates() -> None:
    depths: list[int] = []

    def look() -> None:
        depths.append(emulation._depth())  # noqa: SLF001 - what this test is about

    with emulating():
        thread = threading.Thread(target=look)
        thread.start()
        thread.join()
        look()
    assert depths == [0, 1]


def test_a_gradient_of_a_gradient_is_that_of_native_fp16() -> None:
    def penalty(context: contextlib.AbstractContextManager[Any]) -> Any:
        weight = nn.Parameter(torch.full((1, 2), 0.5))
        x = torch.tensor([[1.0, 3.0]], requires_grad=True)
        with context:
            y = F.linear(x, weight).float().square().sum()
            (slope,) = torch.autograd.grad(y, x, create_graph=True)
            slope.square().sum().backward()
        return weight.grad

    expected = penalty(torch.autocast("cpu", dtype=FP16))
    assert expected.abs().min() > 0  # the twin: there is something to compare
    assert torch.equal(penalty(emulating()), expected)


def test_patches_of_torchs_functions_do_not_reach_the_kernels(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    own, ones = F.scaled_dot_product_attention, torch.ones(1, 1, 2, 4)

    def refuse(*_: object, **__: object) -> torch.Tensor:
        raise KeyError("somebody's patch")

    monkeypatch.setattr(F, "scaled_dot_product_attention", refuse)
    with emulating():
        assert own(ones, ones, ones).dtype == FP16
        with pytest.raises(KeyError, match="somebody's patch"):  # the twin
            F.scaled_dot_product_attention(ones, ones, ones)


# -- what is left behind ---------------------------------------------------------------------


def probe() -> torch.Tensor:
    torch.manual_seed(0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return torch.randn(3, 3) @ torch.randn(3, 3)


def test_outside_its_context_autocast_does_what_it_does_without() -> None:
    before = probe()
    emulation.acquire()
    assert torch.equal(probe(), before)
    assert probe().dtype == torch.bfloat16
    with torch.autocast("cpu", dtype=torch.float16):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float16
    with emulation.emulated_fp16():  # only fp16 is emulated
        assert torch.equal(probe(), before)
    emulation.release()
    assert torch.equal(probe(), before)


def test_outside_its_context_autocast_still_rounds_a_weight_once() -> None:
    """Its casts of weights are kept: the uses of one are summed in half precision, to the bit."""
    torch.manual_seed(0)
    xs = [torch.randn(64, 2) for _ in range(2)]
    bf16, uncached = (
        torch.autocast("cpu", torch.bfloat16, cache_enabled=k) for k in (True, False)
    )
    before = weight_gradient(bf16, xs)
    emulation.acquire()
    assert torch.equal(weight_gradient(bf16, xs), before)
    assert not torch.equal(weight_gradient(uncached, xs), before)  # the twin
    emulation.release()


def test_engines_share_the_kernels_and_the_last_takes_them_away() -> None:
    settings = EngineSettings(learning_rate=0.1, precision="fp16")
    outer = GuardedEngine(nn.Linear(2, 1), settings)
    inner = GuardedEngine(nn.Linear(2, 1), settings)
    assert emulation.is_installed()
    inner.close()
    inner.close()  # closing twice counts once
    assert emulation.is_installed()
    outer.close()
    assert not emulation.is_installed()


def test_an_engine_that_steps_inside_anothers_loss_leaves_it_its_emulation() -> None:
    settings = EngineSettings(learning_rate=0.1, precision="fp16", init_scale=1.0)
    outer, inner = (GuardedEngine(nn.Linear(2, 1), settings) for _ in range(2))
    x = torch.ones(3, 2)
    depths = []

    def inner_loss(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
        return model(batch).float().square().mean()

    def outer_loss(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
        with torch.enable_grad():
            depths.append(inner.step([batch], inner_loss).label.value)
        depths.append(emulation._depth())  # noqa: SLF001 - what this test is about
        return inner_loss(model, batch)

    with outer, inner:
        assert outer.step([x], outer_loss).label.value == "ok"
    assert depths == ["ok", 1]
    assert emulation._depth() == 0  # noqa: SLF001 - as above


def test_everything_is_restored_after_an_exception() -> None:
    settings = EngineSettings(learning_rate=0.1, precision="fp16")

    def refuse(_model: nn.Module, _batch: torch.Tensor) -> torch.Tensor:
        raise KeyError("user code")

    with (
        pytest.raises(KeyError, match="user code"),
        GuardedEngine(nn.Linear(2, 1), settings) as engine,
    ):
        engine.step([torch.ones(1, 2)], refuse)
    assert emulation._depth() == 0  # noqa: SLF001 - what this test is about


def test_native_fp16_and_other_precisions_install_nothing() -> None:
    for more in ({"precision": "fp16", "fp16_on_cpu": "native"}, {"precision": "bf16"}, {}):
        with GuardedEngine(nn.Linear(2, 1), EngineSettings(learning_rate=0.1, **more)):
            assert not emulation.is_installed()


def test_a_torch_without_its_private_names_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(emulation, "_PRIVATE_NAMES", ("_GoneInTheNextVersion",))
    with pytest.raises(UsageError, match=r"needs torch\._C\._GoneInTheNextVersion"):
        GuardedEngine(nn.Linear(2, 1), EngineSettings(learning_rate=0.1, precision="fp16"))


def test_a_torch_without_one_of_the_operators_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(emulation, "_OPERATORS", ("mm", "gone_in_the_next_version"))
    with pytest.raises(UsageError, match=r"needs aten::gone_in_the_next_version"):
        emulation.acquire()


def num_casts_of_linear() -> int:
    return num_casts(F.linear(torch.ones(1, 1, requires_grad=True), torch.ones(1, 1)))


def test_a_registration_that_breaks_off_leaves_no_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    make = emulation._kernel  # noqa: SLF001 - where the fault is planted

    def kernel(operator: Any) -> Any:
        if operator is torch.ops.aten.bmm.default:  # after linear in the list
            raise KeyError("planted")
        return make(operator)

    with torch.autocast("cpu", dtype=FP16), emulation.emulated_fp16():
        native = num_casts_of_linear()
        with monkeypatch.context() as patch:
            patch.setattr(emulation, "_kernel", kernel)
            with pytest.raises(KeyError, match="planted"):
                emulation.acquire()
        assert num_casts_of_linear() == native
        with emulating():
            assert num_casts_of_linear() != native  # the twin: linear had been replaced


def test_a_kernel_that_somebody_else_registered_is_back_afterwards() -> None:
    other: Any = torch.library.Library("aten", "IMPL")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns at the first replacement in a process
        other.impl("linear", lambda *_: torch.full((), 7.0), "AutocastCPU")
    one = torch.ones(1, 1)
    try:
        with emulating():
            assert F.linear(one, one).item() == 1.0
        with torch.autocast("cpu", dtype=FP16):
            assert F.linear(one, one).item() == 7.0
    finally:
        other._destroy()  # noqa: SLF001 - torch offers no public way


def test_a_torch_that_cannot_hand_out_its_kernels_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delattr(torch.library, "get_kernel")
    with pytest.raises(UsageError, match=r"needs torch\.library\.get_kernel"):
        emulation.acquire()
