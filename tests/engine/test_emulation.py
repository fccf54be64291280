"""Emulated fp16 overflows where the CPU's own does, and leaves nothing behind."""

from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - torch's own convention
from torch import nn

from stability_search.engine import GuardedEngine, emulation
from stability_search.errors import UsageError
from stability_search.settings import EngineSettings

LARGEST = 65504.0  # of fp16; from 65520 on it rounds to Inf
Run = Callable[..., torch.Tensor]


@pytest.fixture(autouse=True)
def leaves_nothing_installed() -> Iterator[None]:
    yield
    assert not emulation.is_installed()


# Each takes x of the shape given; weights of .5 keep sums of powers of two exact.
OPERATORS: dict[str, tuple[tuple[int, ...], Run]] = {
    "linear": ((2, 4), lambda x: F.linear(x, torch.full((3, 4), 0.5), torch.full((3,), 0.25))),
    "matmul": ((2, 4), lambda x: x @ torch.full((4, 3), 0.5)),
    "matmul of vectors": ((4,), lambda x: x @ torch.full((4,), 0.5)),
    "mm": ((2, 4), lambda x: torch.mm(x, torch.full((4, 3), 0.5))),
    "bmm": ((2, 2, 4), lambda x: torch.bmm(x, torch.full((2, 4, 3), 0.5))),
    "addmm": ((2, 4), lambda x: torch.addmm(torch.ones(3), x, torch.full((4, 3), 0.5))),
    "addmm, weighted": (
        (2, 4),
        lambda x: torch.addmm(torch.ones(3), x, torch.full((4, 3), 0.5), beta=2, alpha=0.5),
    ),
    "baddbmm": (
        (2, 2, 4),
        lambda x: torch.baddbmm(torch.ones(2, 2, 3), x, torch.full((2, 4, 3), 0.5)),
    ),
    "addbmm": (
        (2, 2, 4),
        lambda x: torch.addbmm(torch.ones(2, 3), x, torch.full((2, 4, 3), 0.5)),
    ),
    "einsum": ((2, 4), lambda x: torch.einsum("bi,io->bo", x, torch.full((4, 3), 0.5))),
    "conv1d": ((1, 2, 6), lambda x: F.conv1d(x, torch.full((3, 2, 3), 0.5))),
    "conv1d, same": ((1, 2, 6), lambda x: F.conv1d(x, torch.full((3, 2, 3), 0.5), padding="same")),
    "conv2d": (
        (1, 2, 4, 4),
        lambda x: F.conv2d(x, torch.full((3, 2, 2, 2), 0.5), torch.full((3,), 0.25), stride=2),
    ),
    "conv3d": ((1, 1, 3, 3, 3), lambda x: F.conv3d(x, torch.full((2, 1, 2, 2, 2), 0.5))),
    "conv_transpose1d": (
        (1, 2, 4),
        lambda x: F.conv_transpose1d(x, torch.full((2, 3, 2), 0.5)),
    ),
    "conv_transpose2d": (
        (1, 2, 3, 3),
        lambda x: F.conv_transpose2d(x, torch.full((2, 3, 2, 2), 0.5)),
    ),
    "conv_transpose3d": (
        (1, 1, 2, 2, 2),
        lambda x: F.conv_transpose3d(x, torch.full((1, 2, 2, 2, 2), 0.5)),
    ),
    "scaled_dot_product_attention": (
        (1, 1, 3, 4),
        lambda x: F.scaled_dot_product_attention(torch.ones(1, 1, 3, 4), x * 0.001, 2 * x),
    ),
}

# Largest value of the output, by which x is chosen, and where the overflow is put.
FORWARD = [16384.0, 60000.0, LARGEST, 65512.0, 65528.0, 70000.0, 1e6]


def observe(
    run: Run, x: torch.Tensor, gradient: float, *, is_emulated: bool
) -> list[torch.Tensor]:
    x = x.clone().requires_grad_()
    if is_emulated:
        emulation.acquire()
        with emulation.emulated_fp16(), torch.autocast("cpu", dtype=torch.float16):
            y = run(x)
        emulation.release()
    else:
        with torch.autocast("cpu", dtype=torch.float16):
            y = run(x)
    assert y.dtype == torch.float16
    y.backward(torch.full_like(y, gradient))
    assert x.grad is not None
    return [y.detach(), x.grad]


@pytest.mark.parametrize("name", OPERATORS)
def test_outputs_overflow_where_native_fp16_does(name: str) -> None:
    shape, run = OPERATORS[name]
    unit = run(torch.ones(shape)).abs().max().item()
    for target in FORWARD:
        x = torch.full(shape, target / unit)
        native = observe(run, x, 1.0, is_emulated=False)
        emulated = observe(run, x, 1.0, is_emulated=True)
        for ours, theirs in zip(emulated, native, strict=True):
            assert torch.equal(torch.isfinite(ours), torch.isfinite(theirs)), target
            finite = torch.isfinite(theirs)
            assert torch.allclose(ours[finite], theirs[finite], rtol=2e-3), target


# Torch's own gradient of a weighted addmm rounds once more, between its two factors.
@pytest.mark.parametrize("name", [name for name in OPERATORS if name != "addmm, weighted"])
def test_gradients_overflow_where_native_fp16_does(name: str) -> None:
    shape, run = OPERATORS[name]
    for gradient in (1.0, 8192.0, 60000.0):
        x = torch.ones(shape)
        native = observe(run, x, gradient, is_emulated=False)
        emulated = observe(run, x, gradient, is_emulated=True)
        for ours, theirs in zip(emulated, native, strict=True):
            assert torch.equal(torch.isfinite(ours), torch.isfinite(theirs)), gradient
            finite = torch.isfinite(theirs)
            assert torch.allclose(ours[finite], theirs[finite], rtol=2e-3), gradient


def test_the_tables_reach_both_sides_of_the_edge() -> None:
    """The twin: comparing finiteness means something only if some of it is lost."""
    shape, run = OPERATORS["matmul"]
    unit = run(torch.ones(shape)).abs().max().item()
    finite = [
        bool(
            torch.isfinite(
                observe(run, torch.full(shape, t / unit), 1.0, is_emulated=True)[0]
            ).all()
        )
        for t in FORWARD
    ]
    assert finite == [True, True, True, True, False, False, False]
    overflown = observe(run, torch.ones(shape), 60000.0, is_emulated=True)[1]
    assert not torch.isfinite(overflown).any()


def test_small_values_vanish_as_in_fp16() -> None:
    for is_emulated in (False, True):
        weight = torch.full((2, 4), 1e-8)
        y = observe(
            lambda x: F.linear(x, torch.full((1, 4), 1.0)), weight, 1.0, is_emulated=is_emulated
        )
        assert y[0].abs().max().item() == 0.0


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


def test_double_precision_stays_as_it_is() -> None:
    emulation.acquire()
    with emulation.emulated_fp16(), torch.autocast("cpu", dtype=torch.float16):
        result = torch.ones(2, 2).double() @ torch.full((2, 2), 1e6).double()
    emulation.release()
    assert (result.dtype, result.max().item()) == (torch.float64, 2e6)


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
