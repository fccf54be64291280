"""Whether a worker process is as a fresh one would be, so that another trial may use it.

What can change the next trial's numbers is compared with the state before the first trial, by
name, so that the log can say what a trial left behind. Random states are not compared, since
every trial seeds them itself; neither are `sys.path` and `sys.modules`: importing is no leak.
"""

import contextlib
import functools
import gc
import locale
import multiprocessing
import os
import random
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

HOST_MEMORY_MIB = 512.0  # resident memory may grow by so much, or by HOST_MEMORY_SHARE
HOST_MEMORY_SHARE = 0.5
GPU_MEMORY_MIB = 256.0  # cuBLAS keeps a workspace of some 10 MiB, which is no leak
SETTLE_S = 1.0  # a data loader's workers need a moment to end

_MIB = 2.0**20
_HELPERS = {"ray", "torch", "tqdm"}  # libraries that keep a thread of their own
_HELPER_COMMANDS = ("resource_tracker", "torch_shm_manager", "compile_worker")  # or a process
_CACHES = ("TORCHINDUCTOR_", "TRITON_")  # variables that torch sets as it first compiles
_SMALLEST = 5e-324  # the smallest positive number

Reader = Callable[[], object]


class CleanProcess:
    """The state of a process in which no trial has run yet.

    Take it after the task is loaded: what a task's file sets while it is imported, it sets in
    every process. Memory is compared with what the first trial left, since a task keeps its data.
    """

    def __init__(self) -> None:
        self._settings = process_state()
        self._functions = [(where, dict(vars(where))) for where in _places()]
        self._threads = _threads()
        self._children = _children()
        self._memory: Mapping[str, float] | None = None

    def changes(self) -> tuple[str, ...]:
        """Return the names of what trials have left behind; none if the process is clean.

        Costs about a millisecond. Where threads, processes or memory seem left behind, garbage
        is collected, and they get `SETTLE_S` to go.
        """
        changed = (*self._changed_settings(), *self._replaced_functions())
        if not changed and self._leaks():
            gc.collect()
            deadline = time.monotonic() + SETTLE_S
            while (changed := self._leaks()) and time.monotonic() < deadline:
                time.sleep(SETTLE_S / 50)
        if self._memory is None:
            self._memory = _memory_mib()
        return changed

    def end_children(self) -> None:
        """Kill the processes that trials have left behind: they outlive the one given up."""
        for pid in self._left_children():
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)

    def _changed_settings(self) -> tuple[str, ...]:
        now = process_state()
        return tuple(name for name, value in self._settings.items() if now[name] != value)

    def _replaced_functions(self) -> tuple[str, ...]:
        """Name functions that are others now; what was added since is none of them."""
        return tuple(
            f"{where.__name__}.{name}"
            for where, functions in self._functions
            for name, function in functions.items()
            if vars(where).get(name) is not function and callable(function)
        )

    def _leaks(self) -> tuple[str, ...]:
        threads = [f"thread {thread.name}" for thread in _threads() - self._threads]
        children = [f"process {pid}" for pid in self._left_children()]
        return (*sorted(threads), *sorted(children), *self._grown_memory())

    def _left_children(self) -> set[int]:
        return {pid for pid in _children() - self._children if _is_leak(pid)}

    def _grown_memory(self) -> tuple[str, ...]:
        if self._memory is None:
            return ()
        now = _memory_mib()
        host = max(HOST_MEMORY_MIB, HOST_MEMORY_SHARE * self._memory["host memory"])
        allowed = {"host memory": host, "GPU memory": GPU_MEMORY_MIB}
        return tuple(
            f"{name} ({before:.0f} to {now[name]:.0f} MiB)"
            for name, before in self._memory.items()
            if now[name] - before > allowed[name]
        )


def process_state() -> dict[str, object]:
    """Return the settings of the whole process that a trial could leave changed, by name.

    One that cannot be read has the error as its value: torch refuses to mix its two ways to set
    TF32, and a working directory may be gone.
    """
    return {name: _read(reader) for name, reader in _readers().items()}


def _read(reader: Reader) -> object:
    try:
        return reader()
    except (OSError, RuntimeError) as error:
        return f"unreadable: {error}"


# -- settings ---------------------------------------------------------------------------------


@functools.cache
def _readers() -> Mapping[str, Reader]:
    return {**_torch_settings(), **_torch_backends(), **_torch_hooks(), **_python_settings()}


def _torch_settings() -> dict[str, Reader]:
    import torch

    devices = ("cpu", "cuda")
    return {
        "default dtype": torch.get_default_dtype,
        "default device": torch.get_default_device,
        "CUDA device": lambda: torch.cuda.current_device() if _is_on_gpu() else 0,
        "torch threads": torch.get_num_threads,
        "torch interop threads": torch.get_num_interop_threads,
        "gradient mode": torch.is_grad_enabled,
        "inference mode": torch.is_inference_mode_enabled,
        "anomaly detection": torch.is_anomaly_enabled,
        "autocast": lambda: [torch.is_autocast_enabled(device) for device in devices],
        "autocast dtype": lambda: [torch.get_autocast_dtype(device) for device in devices],
        "autocast cache": torch.is_autocast_cache_enabled,
        "deterministic algorithms": torch.get_deterministic_debug_mode,
        "uninitialized memory": lambda: (
            torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
        ),
        "denormal numbers": lambda: f"{_SMALLEST * 1.0}",  # as text: flushed, it equals 0
        "process group": lambda: (
            torch.distributed.is_available() and torch.distributed.is_initialized()
        ),
    }


def _torch_backends() -> dict[str, Reader]:
    import torch

    cudnn, cuda, mkldnn = torch.backends.cudnn, torch.backends.cuda, torch.backends.mkldnn
    products = cuda.matmul
    return {
        "fp32 precision": torch.get_float32_matmul_precision,
        "cudnn.enabled": lambda: cudnn.enabled,
        "cudnn.benchmark": lambda: (cudnn.benchmark, cudnn.benchmark_limit),
        "cudnn.deterministic": lambda: cudnn.deterministic,
        "cudnn.allow_tf32": lambda: cudnn.allow_tf32,
        "mkldnn": lambda: (mkldnn.enabled, mkldnn.deterministic),
        "cuda.matmul.allow_tf32": lambda: products.allow_tf32,
        "cuda.matmul precision": lambda: (
            products.allow_fp16_accumulation,
            products.allow_fp16_reduced_precision_reduction,
            products.allow_bf16_reduced_precision_reduction,
        ),
        "attention kernels": lambda: (
            cuda.flash_sdp_enabled(),  # type: ignore[no-untyped-call]
            cuda.mem_efficient_sdp_enabled(),  # type: ignore[no-untyped-call]
            cuda.math_sdp_enabled(),  # type: ignore[no-untyped-call]
            cuda.cudnn_sdp_enabled(),  # type: ignore[no-untyped-call]
            torch.backends.mha.get_fastpath_enabled(),
        ),
        "linear algebra library": cuda.preferred_linalg_library,
        "opt_einsum": lambda: (
            torch.backends.opt_einsum.enabled,
            torch.backends.opt_einsum.strategy,
        ),
    }


def _torch_hooks() -> dict[str, Reader]:
    from torch import _C, Tensor, overrides
    from torch.nn.modules import module
    from torch.optim import optimizer
    from torch.utils import _python_dispatch

    places = [
        vars(where)[name]
        for where in (module, optimizer)
        for name in sorted(vars(where))
        if name.startswith("_global") and name.endswith("hooks")
    ]
    inherited = vars(_C.TensorBase).keys()
    return {
        "replaced methods of Tensor": lambda: vars(Tensor).keys() & inherited,
        "global hooks": lambda: [tuple(place) for place in places],
        "hooks of saved tensors": lambda: _C._autograd._top_saved_tensors_default_hooks(True),  # noqa: SLF001
        "torch function modes": overrides._get_current_function_mode_stack,  # noqa: SLF001
        "torch dispatch modes": _python_dispatch._get_current_dispatch_mode_stack,  # noqa: SLF001
    }


def _python_settings() -> dict[str, Reader]:
    import numpy as np

    return {
        "working directory": os.getcwd,
        "environment variables": lambda: {
            name: value for name, value in os.environ.items() if not name.startswith(_CACHES)
        },
        "CPU affinity": lambda: (
            os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else None
        ),
        "garbage collection": lambda: (gc.isenabled(), gc.get_threshold()),
        "recursion limit": sys.getrecursionlimit,
        "tracing": lambda: (sys.gettrace(), sys.getprofile()),
        "signal handlers": lambda: [
            signal.getsignal(number) for number in sorted(signal.valid_signals())
        ],
        # Any import may add a filter; one that turns a warning into an error ends a trial.
        "warnings as errors": lambda: [f for f in warnings.filters if f[0] == "error"],
        "locale": lambda: locale.setlocale(locale.LC_ALL),
        "numpy's floating-point errors": np.geterr,
    }


# -- functions, threads, processes, memory ----------------------------------------------------


def _places() -> list[Any]:
    """Return modules and classes whose functions scripts like to replace."""
    import torch
    from torch.nn import functional, init

    layers = {where for where in vars(torch.nn).values() if isinstance(where, type)}
    optimizers = {where for where in vars(torch.optim).values() if isinstance(where, type)}
    return [torch, torch.Tensor, functional, init, random, time, *layers, *optimizers]


def _threads() -> set[threading.Thread]:
    return {thread for thread in threading.enumerate() if not _is_helper(thread)}


def _is_helper(thread: threading.Thread) -> bool:
    """Return True for threads of libraries, and of C++ that Python has merely met."""
    target = getattr(thread, "_target", None)
    modules = {type(thread).__module__, getattr(target, "__module__", None) or ""}
    is_foreign = isinstance(thread, threading._DummyThread)  # noqa: SLF001 - has no other name
    return is_foreign or any(module.partition(".")[0] in _HELPERS for module in modules)


def _children() -> set[int]:
    """Return the process ids of this process's children; where /proc is missing, of some."""
    found = {child.pid for child in multiprocessing.active_children() if child.pid is not None}
    for path in Path("/proc/self/task").glob("*/children"):
        try:
            found |= {int(pid) for pid in path.read_text().split()}
        except OSError:  # that thread is gone
            continue
    return found


def _is_leak(pid: int) -> bool:
    """Return False for a process that has ended or that a library keeps for itself."""
    try:
        command = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace")
    except OSError:
        return False
    return bool(command) and not any(name in command for name in _HELPER_COMMANDS)


def _memory_mib() -> dict[str, float]:
    import torch

    return {
        "host memory": _resident_mib(),
        "GPU memory": torch.cuda.memory_allocated() / _MIB if _is_on_gpu() else 0.0,
    }


def _is_on_gpu() -> bool:
    import torch

    return bool(torch.cuda.is_initialized())  # type: ignore[no-untyped-call]


def _resident_mib() -> float:
    """Return the memory this process occupies; 0 where Linux does not say."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        return 0.0
    return pages * os.sysconf("SC_PAGE_SIZE") / _MIB
