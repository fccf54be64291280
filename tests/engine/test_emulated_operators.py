"""Every emulated operator overflows where the CPU's own fp16 does, and gives its values."""

from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - torch's own convention

from stability_search.engine import emulation

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
    "einsum of batches": (
        (2, 2, 4),
        lambda x: torch.einsum("bij,bjk->bik", x, torch.full((2, 4, 3), 0.5)),
    ),
    "tensordot": ((2, 4), lambda x: torch.tensordot(x, torch.full((4, 3), 0.5), dims=1)),
    "conv1d": ((1, 2, 6), lambda x: F.conv1d(x, torch.full((3, 2, 3), 0.5))),
    "conv1d, same": ((1, 2, 6), lambda x: F.conv1d(x, torch.full((3, 2, 3), 0.5), padding="same")),
    "conv2d": (
        (1, 2, 4, 4),
        lambda x: F.conv2d(x, torch.full((3, 2, 2, 2), 0.5), torch.full((3,), 0.25), stride=2),
    ),
    "conv2d, in groups": (
        (1, 4, 4, 4),
        lambda x: F.conv2d(x, torch.full((4, 2, 2, 2), 0.5), groups=2, dilation=2),
    ),
    "conv2d, same": (
        (1, 2, 4, 4),
        lambda x: F.conv2d(x, torch.full((3, 2, 3, 3), 0.5), padding="same"),
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
    "conv_transpose2d, strided": (
        (1, 2, 3, 3),
        lambda x: F.conv_transpose2d(
            x,
            torch.full((2, 3, 2, 2), 0.5),
            torch.full((3,), 0.25),
            stride=2,
            padding=1,
            output_padding=1,
        ),
    ),
    "scaled_dot_product_attention": (
        (1, 1, 3, 4),
        lambda x: F.scaled_dot_product_attention(torch.ones(1, 1, 3, 4), x * 0.001, 2 * x),
    ),
    "scaled_dot_product_attention, masked": (
        (1, 1, 3, 4),
        lambda x: F.scaled_dot_product_attention(
            torch.ones(1, 1, 3, 4), x * 0.001, 2 * x, torch.ones(3, 3, dtype=torch.bool).tril()
        ),
    ),
    "scaled_dot_product_attention, biased": (
        (1, 1, 3, 4),
        lambda x: F.scaled_dot_product_attention(
            torch.ones(1, 1, 3, 4), x * 0.001, 2 * x, torch.full((3, 3), 0.5)
        ),
    ),
    "scaled_dot_product_attention, causal": (
        (1, 1, 3, 4),
        lambda x: F.scaled_dot_product_attention(
            torch.ones(1, 1, 3, 4), x * 0.001, 2 * x, is_causal=True, scale=0.5
        ),
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


def relative_difference(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return ((ours.float() - theirs.float()).abs().max() / theirs.float().abs().max()).item()


@pytest.mark.parametrize("name", OPERATORS)
def test_ordinary_values_and_gradients_are_those_of_native_fp16(name: str) -> None:
    shape, run = OPERATORS[name]
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator)
    native = observe(run, x, 0.3, is_emulated=False)
    emulated = observe(run, x, 0.3, is_emulated=True)
    for ours, theirs in zip(emulated, native, strict=True):
        assert relative_difference(ours, theirs) <= 1.1e-3


def test_what_is_not_rounded_to_fp16_lies_further_away() -> None:
    """The twin: the tolerance tells one precision from the next."""
    x = torch.randn(8, 64, generator=torch.Generator().manual_seed(0))
    native = observe(lambda x: x @ x.T, x, 0.3, is_emulated=False)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert relative_difference(x @ x.T, native[0]) > 1.1e-3


def test_small_values_vanish_as_in_fp16() -> None:
    for is_emulated in (False, True):
        weight = torch.full((2, 4), 1e-8)
        y = observe(
            lambda x: F.linear(x, torch.full((1, 4), 1.0)), weight, 1.0, is_emulated=is_emulated
        )
        assert y[0].abs().max().item() == 0.0


def test_every_emulated_operator_stands_in_the_table() -> None:
    """The recurrent one has tests of its own, in test_emulation.py."""
    spelled = {name.split(",")[0].split(" ")[0] for name in OPERATORS}
    assert set(emulation._OPERATORS) - spelled == {"mkldnn_rnn_layer"}  # noqa: SLF001
