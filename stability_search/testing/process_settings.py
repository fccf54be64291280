"""Settings of the whole process that a task could leave changed."""

import contextlib
import os
from collections.abc import Callable, Iterator
from typing import Any

import torch


def _set_benchmark(value: bool) -> None:
    torch.backends.cudnn.benchmark = value


_SETTINGS: tuple[tuple[str, Callable[[], Any], Callable[[Any], object]], ...] = (
    ("torch's default dtype", torch.get_default_dtype, torch.set_default_dtype),
    ("torch's default device", torch.get_default_device, torch.set_default_device),
    ("torch's gradient mode", torch.is_grad_enabled, torch.set_grad_enabled),
    ("torch's number of threads", torch.get_num_threads, torch.set_num_threads),
    (
        "torch's deterministic algorithms",
        torch.are_deterministic_algorithms_enabled,
        torch.use_deterministic_algorithms,
    ),
    ("torch's anomaly detection", torch.is_anomaly_enabled, torch.autograd.set_detect_anomaly),
    (
        "torch's precision of fp32 products",
        torch.get_float32_matmul_precision,
        torch.set_float32_matmul_precision,
    ),
    ("torch.backends.cudnn.benchmark", lambda: torch.backends.cudnn.benchmark, _set_benchmark),
    ("the working directory", os.getcwd, os.chdir),
)


@contextlib.contextmanager
def settings_restored() -> Iterator[list[str]]:
    """Put the settings back at the end, and name those that had changed."""
    before = [read() for _, read, _ in _SETTINGS]
    changed: list[str] = []
    try:
        yield changed
    finally:
        for (name, read, write), value in zip(_SETTINGS, before, strict=True):
            if read() != value:
                changed.append(name)
                write(value)
