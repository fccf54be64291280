"""What a study runs on: the device, and how many trials at once."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from stability_search.errors import UsageError
from stability_search.space import Space

Device = Literal["cpu", "cuda"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Machine:
    """What a study runs on.

    Attributes:
        device: `cpu` or `cuda`.
        num_slots: Trials at once.
        cpu_per_trial: CPU cores of a trial.
        gpu_per_trial: GPUs of a trial.
    """

    device: Device
    num_slots: int
    cpu_per_trial: float
    gpu_per_trial: float


def num_cpus() -> int:
    """Return how many CPU cores this process may use."""
    if hasattr(os, "sched_getaffinity"):  # Linux; a container may have fewer than the machine
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def choose_machine(space: Space, offered: Mapping[str, float]) -> Machine:
    """Decide the device and how many trials run at once.

    Args:
        space: Its `search.resources` and `search.max_concurrent` are used.
        offered: What Ray offers: `CPU`, and `GPU` where there is one.

    Raises:
        UsageError: A trial needs more than there is.
    """
    resources = space.study.search.resources
    num_gpus = offered.get("GPU", 0.0)
    gpu = resources.gpu
    if gpu is None:
        gpu = 1.0 if num_gpus >= 1 and _torch_has_gpu() else 0.0
    slots = num_slots_for(offered, space, gpu_per_trial=gpu)
    if slots < 1:
        raise UsageError(
            f"search.resources: a trial needs {resources.cpu:g} CPU and {gpu:g} GPU, but there "
            f"are {offered.get('CPU', 0.0):g} and {num_gpus:g}.",
            hint="Lower search.resources.",
        )
    wanted = space.study.search.max_concurrent
    return Machine(
        device="cuda" if gpu > 0 else "cpu",
        num_slots=slots if wanted is None else min(wanted, slots),
        cpu_per_trial=resources.cpu,
        gpu_per_trial=gpu,
    )


def num_slots_for(offered: Mapping[str, float], space: Space, *, gpu_per_trial: float) -> int:
    """Return how many trials fit into what Ray offers."""
    slots = int(offered.get("CPU", 1.0) / space.study.search.resources.cpu)
    if gpu_per_trial > 0:
        slots = min(slots, int(offered.get("GPU", 0.0) / gpu_per_trial))
    return slots


def _torch_has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()
