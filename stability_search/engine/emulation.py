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
import functools
import threading
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch

from stability_search.errors import UsageError

_PRIVATE_NAMES = ("_ExcludeDispatchKeyGuard", "DispatchKeySet", "DispatchKey")

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
    "mkldnn_rnn_layer",  # of LSTM; its fp16 kernel cannot train (torch 2.13)
)
_OVERLOADS = ("default", "padding", "input")
_CASTABLE = {torch.float32, torch.float16, torch.bfloat16}

_lock = threading.Lock()
_library: Any = None
_num_users = 0
_active = threading.local()


def acquire() -> None:
    """Register the kernels, unless another engine already has.

    Raises:
        UsageError: This torch lacks what they are built on.
    """
    global _library, _num_users  # noqa: PLW0603 - the registration is the process's
    with _lock:
        if _library is None:
            _library = _register()
        _num_users += 1


def release() -> None:
    """Take the kernels away once nobody needs them; torch's own are back then."""
    global _library, _num_users  # noqa: PLW0603 - the registration is the process's
    with _lock:
        _num_users -= 1
        if _num_users == 0:
            _library._destroy()  # noqa: SLF001 - torch offers no public way
            _library = None


def is_installed() -> bool:
    """Return True while the kernels are registered."""
    return _library is not None


@contextlib.contextmanager
def emulated_fp16() -> Iterator[None]:
    """Let the kernels emulate fp16 within this context, on this thread."""
    _active.depth = _depth() + 1
    try:
        yield
    finally:
        _active.depth -= 1


def _depth() -> int:
    depth: int = getattr(_active, "depth", 0)
    return depth


def _register() -> Any:  # noqa: ANN401 - torch gives its library no types
    missing = [name for name in _PRIVATE_NAMES if not hasattr(torch._C, name)]  # noqa: SLF001
    if missing:
        raise UsageError(
            f"fp16_on_cpu: `emulated` needs torch._C.{missing[0]}, which torch "
            f"{torch.__version__} does not have.",
            hint="Use fp16_on_cpu: native, which is slower.",
        )
    library: Any = torch.library.Library("aten", "IMPL")  # type: ignore[no-untyped-call]
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
    return library


def _kernel(operator: Callable[..., Any]) -> Callable[..., Any]:
    autocast_key = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU)  # noqa: SLF001

    def run(*args: Any, **kwargs: Any) -> Any:  # noqa: ANN401 - an operator's own
        dtype = torch.get_autocast_dtype("cpu")
        is_emulated = dtype == torch.float16 and _depth() > 0
        cast = _rounded if is_emulated else functools.partial(_cast, dtype=dtype)
        with torch._C._ExcludeDispatchKeyGuard(autocast_key):  # noqa: SLF001
            result = operator(
                *map(cast, args), **{name: cast(value) for name, value in kwargs.items()}
            )
            if not is_emulated:
                return result
            if isinstance(result, tuple):
                return tuple(map(_half, result))
            return _half(result)

    return run


def _half(result: torch.Tensor) -> torch.Tensor:
    return result.half() if result.dtype == torch.float32 else result


def _rounded(value: Any) -> Any:  # noqa: ANN401 - an operator takes anything
    return value.half().float() if _is_castable(value) else value


def _cast(value: Any, *, dtype: torch.dtype) -> Any:  # noqa: ANN401 - an operator takes anything
    return value.to(dtype) if _is_castable(value) else value


def _is_castable(value: Any) -> bool:  # noqa: ANN401 - as above
    # What autocast casts: not float64, which stays as it is.
    return isinstance(value, torch.Tensor) and value.dtype in _CASTABLE
