"""Fp16 autocast on the CPU, computed in fp32 and rounded to fp16 operator by operator.

A CPU's own fp16 kernels are many times slower than fp32. Here every operator that autocast sends
to fp16 rounds its inputs to fp16, computes in fp32, and rounds its output, gradients likewise,
so that it overflows where fp16 overflows. Operators outside that list (softmax, layer norm, exp)
run in the CPU's fp16, as in native CPU autocast; on CUDA autocast raises them to fp32, so a
verdict about them does not transfer.

The kernels are registered for the whole process while at least one engine needs them, and act
only inside `emulated_fp16`; elsewhere they do what autocast would have done.
"""

import contextlib
import threading
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch

# The operators that CPU autocast runs in lower precision (torch 2.13, "CPU Op-Specific
# Behavior"); the rarely used tails of that list stay native.
_OPERATORS = (
    "linear",
    "matmul",
    "mm",
    "bmm",
    "addmm",
    "baddbmm",
    "addbmm",
    "conv1d",
    "conv2d",
    "conv3d",
    "conv_transpose1d",
    "conv_transpose2d",
    "conv_transpose3d",
    "scaled_dot_product_attention",
)
_OVERLOADS = ("default", "padding", "input")

_lock = threading.Lock()
_library: torch.library.Library | None = None
_num_users = 0
_active = threading.local()


def _round(value: Any) -> Any:  # noqa: ANN401 - an operator takes anything
    if isinstance(value, torch.Tensor) and value.is_floating_point():
        return value.half().float()
    return value


def _cast(value: Any, dtype: torch.dtype) -> Any:  # noqa: ANN401 - an operator takes anything
    if isinstance(value, torch.Tensor) and value.dtype in {
        torch.float32,
        torch.float16,
        torch.bfloat16,
    }:
        return value.to(dtype)
    return value


def _kernel(operator: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    autocast_key = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU)  # noqa: SLF001

    def run(*args: Any, **kwargs: Any) -> torch.Tensor:  # noqa: ANN401 - an operator's own
        dtype = torch.get_autocast_dtype("cpu")
        with torch._C._ExcludeDispatchKeyGuard(autocast_key):  # noqa: SLF001
            if dtype == torch.float16 and getattr(_active, "depth", 0):
                rounded = operator(
                    *map(_round, args), **{name: _round(value) for name, value in kwargs.items()}
                )
                return rounded.half()
            return operator(
                *(_cast(value, dtype) for value in args),
                **{name: _cast(value, dtype) for name, value in kwargs.items()},
            )

    return run


def acquire() -> None:
    """Register the kernels, unless another engine already has."""
    global _library, _num_users  # noqa: PLW0603 - the registration is the process's
    with _lock:
        _num_users += 1
        if _library is not None:
            return
        library = torch.library.Library("aten", "IMPL")
        with warnings.catch_warnings():
            # torch says once that a kernel is replaced, which is the point.
            warnings.filterwarnings("ignore", message=".*Overriding a previously registered.*")
            warnings.filterwarnings("ignore", message=".*only once for all operators.*")
            for name in _OPERATORS:
                packet = getattr(torch.ops.aten, name)
                for overload in packet.overloads():
                    if overload in _OVERLOADS:
                        operator = getattr(packet, overload)
                        library.impl(operator, _kernel(operator), "AutocastCPU")
        _library = library


def release() -> None:
    """Take the kernels away once nobody needs them; torch's own are back then."""
    global _library, _num_users  # noqa: PLW0603 - the registration is the process's
    with _lock:
        _num_users -= 1
        if _num_users == 0 and _library is not None:
            _library._destroy()  # noqa: SLF001 - torch offers no public way
            _library = None


def is_installed() -> bool:
    """Return True while the kernels are registered."""
    return _library is not None


@contextlib.contextmanager
def emulated_fp16() -> Iterator[None]:
    """Let the kernels emulate fp16 within this context, on this thread."""
    _active.depth = getattr(_active, "depth", 0) + 1
    try:
        yield
    finally:
        _active.depth -= 1
