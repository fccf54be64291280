"""Fp16 autocast on the CPU, computed in fp32 and rounded to fp16 operator by operator.

A CPU's own fp16 kernels are many times slower than fp32. Here every operator that autocast sends
to fp16 rounds its inputs to fp16, computes in fp32, and rounds its output, gradients likewise,
so that it overflows where fp16 overflows. Operators outside that list (softmax, layer norm, exp)
run in the CPU's fp16, as in native CPU autocast; on CUDA autocast raises them to fp32, so a
verdict about them does not transfer.

The kernels are registered for the whole process while at least one engine needs them, and act
only inside `emulated_fp16`; elsewhere they call those they replaced.
"""

import contextlib
import threading
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch

from stability_search.errors import UsageError

_PRIVATE_NAMES = (
    "_DisableAutocast",
    "DispatchKeySet",
    "DispatchKey",
    "_VariableFunctions",
    "_nn",
)

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
# What autocast casts: not float64, which stays as it is.
_CASTABLE = {torch.float32, torch.float16, torch.bfloat16}

_lock = threading.Lock()
_library: Any = None
_num_users = 0


class _Active(threading.local):
    depth = 0  # of `emulated_fp16` contexts, on each thread


_active = _Active()


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
    _active.depth += 1
    try:
        yield
    finally:
        _active.depth -= 1


def _depth() -> int:
    return _active.depth


def _register() -> Any:  # noqa: ANN401 - torch gives its library no types
    _check_torch()
    library: Any = torch.library.Library("aten", "IMPL")  # type: ignore[no-untyped-call]
    try:
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
    except BaseException:
        library._destroy()  # noqa: SLF001 - what was replaced so far is given back
        raise
    return library


def _check_torch() -> None:
    missing = [f"torch._C.{name}" for name in _PRIVATE_NAMES if not hasattr(torch._C, name)]  # noqa: SLF001
    if not hasattr(torch.library, "get_kernel"):
        missing.append("torch.library.get_kernel")
    if not hasattr(torch.library.Library, "_destroy"):
        missing.append("torch.library.Library._destroy")
    missing += [f"aten::{name}" for name in _OPERATORS if not hasattr(torch.ops.aten, name)]
    if missing:
        raise UsageError(
            f"fp16_on_cpu: `emulated` needs {missing[0]}, which torch {torch.__version__} does "
            "not have.",
            hint="Use fp16_on_cpu: native, which is slower.",
        )


def _kernel(operator: Any) -> Callable[..., Any]:  # noqa: ANN401 - torch gives it no type
    autocast_key = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU)  # noqa: SLF001
    without_autocast = torch._C._DisableAutocast  # noqa: SLF001
    replaced = torch.library.get_kernel(operator, "AutocastCPU")
    # Python's own binding: a call through torch.ops costs more, and the same name in torch or in
    # torch.nn.functional may be somebody's patch.
    name = operator.overloadpacket.__name__
    functions = torch._C._VariableFunctions  # noqa: SLF001
    compute = getattr(torch._C._nn, name, None) or getattr(functions, name)  # noqa: SLF001
    num_tensors = _num_leading_tensors(operator)
    fp16, fp32 = torch.float16, torch.float32

    # Runs at every operator of a step, beside microseconds of arithmetic: kept short.
    def run(*args: Any, **kwargs: Any) -> Any:  # noqa: ANN401 - an operator's own
        if _active.depth == 0 or torch.get_autocast_dtype("cpu") is not fp16:
            return replaced.call_boxed(autocast_key, *args, **kwargs)
        with without_autocast():
            rounded = map(_rounded, args[:num_tensors])
            result = compute(*rounded, *args[num_tensors:], **kwargs)
            if isinstance(result, tuple):
                return tuple(map(_half, result))
            return result.half() if result.dtype is fp32 else result

    return run


def _num_leading_tensors(operator: Any) -> int:  # noqa: ANN401 - as above
    """Return how many of its arguments are tensors or None; they come first."""
    are_tensors = ["Tensor" in str(argument.type) for argument in operator._schema.arguments]  # noqa: SLF001
    assert are_tensors == sorted(are_tensors, reverse=True)  # noqa: S101
    return sum(are_tensors)


# Every use rounds anew. Keeping a rounded weight for the window gained nothing measurable, and
# would miss a change of its `.data`, which leaves no trace in its version.
def _rounded(value: torch.Tensor | None) -> torch.Tensor | None:
    if value is None:
        return None
    dtype = value.dtype
    if dtype is torch.float16:
        return value.float()
    return value.half().float() if dtype in _CASTABLE else value


def _half(result: torch.Tensor | None) -> torch.Tensor | None:
    # Without gradients the workspace of an LSTM is None.
    return result.half() if result is not None and result.dtype is torch.float32 else result
