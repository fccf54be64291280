"""What a study runs on: the device, and how many trials at once."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

from stability_search.errors import UsageError
from stability_search.settings import Resources
from stability_search.space import Space

Device = Literal["cpu", "cuda"]
Offer: TypeAlias = Mapping[str, float]
"""What one node offers, by Ray's names: `CPU`, `GPU`, `accelerator_type:H100`."""

_ACCELERATOR = "accelerator_type:"
_ACCELERATOR_SHARE = 0.001  # Ray offers 1 of it on each node, and only asks whether it is there
_SLACK = 1e-9  # of a division that is whole but for rounding


@dataclass(frozen=True, kw_only=True, slots=True)
class Machine:
    """What a study runs on.

    Attributes:
        device: `cpu` or `cuda`.
        num_slots: Trials at once.
        cpu_per_trial: CPU cores of a trial.
        gpu_per_trial: GPUs of a trial; below 1 it is the share of one GPU, and of its memory.
        accelerator: GPU model that every trial runs on, as Ray names it; None for any.
    """

    device: Device
    num_slots: int
    cpu_per_trial: float
    gpu_per_trial: float
    accelerator: str | None = None

    def resources(self) -> dict[str, float]:
        """Return what to ask Ray Tune for, for each trial."""
        asked = {"cpu": self.cpu_per_trial, "gpu": self.gpu_per_trial}
        if self.accelerator is not None:
            asked[f"{_ACCELERATOR}{self.accelerator}"] = _ACCELERATOR_SHARE
        return asked


def num_cpus() -> int:
    """Return how many CPU cores this process may use."""
    if hasattr(os, "sched_getaffinity"):  # Linux; a container may have fewer than the machine
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def choose_machine(space: Space, *nodes: Offer) -> Machine:
    """Decide the device and how many trials run at once.

    Args:
        space: Its `search.resources` and `search.max_concurrent` are used.
        nodes: What each node offers.

    Raises:
        UsageError: A trial needs more than any node has, or no node has the GPU model asked for.
    """
    resources = space.study.search.resources
    usable = _with_accelerator(nodes, resources)
    gpu = resources.gpu
    if gpu is None:
        gpu = 1.0 if _has_gpu(usable, resources) else 0.0
    slots = sum(num_slots_for(node, space, gpu_per_trial=gpu) for node in usable)
    if slots < 1:
        largest = max(usable, key=lambda node: (node.get("GPU", 0.0), node.get("CPU", 0.0)))
        raise UsageError(
            f"search.resources: a trial needs {resources.cpu:g} CPU and {gpu:g} GPU, but there "
            f"are {largest.get('CPU', 0.0):g} and {largest.get('GPU', 0.0):g}"
            f"{' on the largest node' if len(usable) > 1 else ''}.",
            hint="Lower search.resources.",
        )
    wanted = space.study.search.max_concurrent
    return Machine(
        device="cuda" if gpu > 0 else "cpu",
        num_slots=slots if wanted is None else min(wanted, slots),
        cpu_per_trial=resources.cpu,
        gpu_per_trial=gpu,
        accelerator=resources.accelerator,
    )


def num_slots_for(node: Offer, space: Space, *, gpu_per_trial: float) -> int:
    """Return how many trials fit onto one node; a share of a GPU never spans two of them."""
    slots = int(node.get("CPU", 0.0) / space.study.search.resources.cpu + _SLACK)
    num_gpus = node.get("GPU", 0.0)
    if 0 < gpu_per_trial < 1:
        slots = min(slots, int(num_gpus) * int(1 / gpu_per_trial + _SLACK))
    elif gpu_per_trial >= 1:
        slots = min(slots, int(num_gpus / gpu_per_trial))
    return slots


def _with_accelerator(nodes: Sequence[Offer], resources: Resources) -> Sequence[Offer]:
    """Return the nodes that have the GPU model asked for; all where none is."""
    model = resources.accelerator
    if model is None:
        return nodes
    usable = [node for node in nodes if node.get(f"{_ACCELERATOR}{model}", 0.0) > 0]
    if not usable:
        known = sorted(
            {
                name.removeprefix(_ACCELERATOR)
                for node in nodes
                for name in node
                if name.startswith(_ACCELERATOR)
            }
        )
        found = f"there is {', '.join(known)}" if known else "no node names any"
        raise UsageError(
            "search.resources.accelerator: a GPU model that a node has must be named, but got "
            f"{model!r}, and {found}.",
            hint="Name one of these, or leave it out." if known else "Leave it out.",
        )
    return usable


def _has_gpu(nodes: Sequence[Offer], resources: Resources) -> bool:
    if not any(node.get("GPU", 0.0) >= 1 for node in nodes):
        return False
    return resources.accelerator is not None or _torch_has_gpu()


def _torch_has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()
