"""What a study runs on: the device, and how many trials at once."""

import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from stability_search.errors import UsageError
from stability_search.settings.study import DRIVER_CPUS, Resources
from stability_search.space import Space

Device = Literal["cpu", "cuda"]

_ACCELERATOR = "accelerator_type:"
_ACCELERATOR_SHARE = 0.001  # Ray offers 1 of it on each node, and only asks whether it is there
_SLACK = 1e-9  # of a division that is whole but for rounding
_RAYS_LABELS = "ray.io/"
_RAYS_OWN = frozenset({"CPU", "GPU", "memory", "object_store_memory"})  # the rest has a colon
_UNNAMED = "an unnamed model"
_GROW = ", or set search.max_concurrent: a cluster that grows is asked for so much room."


@dataclass(frozen=True, kw_only=True, slots=True)
class Node:
    """What one node offers.

    Attributes:
        node_id: Ray's id of it; empty for this machine without Ray.
        host: Its name.
        address: Its IP address; empty for this machine without Ray.
        resources: By Ray's names: `CPU`, `GPU`, `accelerator_type:H100`, custom ones.
        labels: Its labels.
    """

    node_id: str = ""
    host: str = ""
    address: str = ""
    resources: Mapping[str, float]
    labels: Mapping[str, str] = field(default_factory=dict)

    @property
    def gpu_model(self) -> str:
        """The model of its GPUs as Ray names it; empty where it has none."""
        if self.resources.get("GPU", 0.0) <= 0:
            return ""
        named = [name for name in self.resources if name.startswith(_ACCELERATOR)]
        return named[0].removeprefix(_ACCELERATOR) if named else _UNNAMED


@dataclass(frozen=True, kw_only=True, slots=True)
class Machine:
    """What a study runs on.

    Attributes:
        device: `cpu` or `cuda`.
        num_slots: Trials at once, at most.
        cpu_per_trial: CPU cores of a trial.
        gpu_per_trial: GPUs of a trial; below 1 it is the share of one GPU, and of its memory.
        accelerator: GPU model that every trial runs on, as Ray names it; None for any.
        custom: Other resources of a trial, by name.
        labels: Labels a node must have, with the values they may have.
        num_unplaced: Slots among `num_slots` that no node has room for yet.
    """

    device: Device
    num_slots: int
    cpu_per_trial: float
    gpu_per_trial: float
    accelerator: str | None = None
    custom: Mapping[str, float] = field(default_factory=dict)
    labels: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    num_unplaced: int = 0

    @property
    def share(self) -> dict[str, float]:
        """What a trial occupies of its node, by Ray's names."""
        named = {"CPU": self.cpu_per_trial, "GPU": self.gpu_per_trial, **self.custom}
        if self.accelerator is not None:
            named[f"{_ACCELERATOR}{self.accelerator}"] = _ACCELERATOR_SHARE
        return {name: amount for name, amount in named.items() if amount > 0}

    @property
    def label_selector(self) -> dict[str, str]:
        """Which nodes may run a trial, as Ray selects them by their labels."""
        return {
            name: values[0] if len(values) == 1 else f"in({','.join(values)})"
            for name, values in self.labels.items()
        }

    def num_slots_on(self, node: Node) -> int:
        """Return how many trials fit onto a node; a share of a GPU never spans two of them."""
        if not _has_labels(node, self.labels):
            return 0
        return min(
            _num_shares(node.resources.get(name, 0.0), amount, is_gpu=name == "GPU")
            for name, amount in self.share.items()
        )


def _num_shares(offered: float, amount: float, *, is_gpu: bool) -> int:
    if is_gpu and amount < 1:
        return int(offered) * int(1 / amount + _SLACK)
    return int(offered / amount + _SLACK)


def num_cpus() -> int:
    """Return how many CPU cores this process may use."""
    if hasattr(os, "sched_getaffinity"):  # Linux; a container may have fewer than the machine
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def this_machine() -> Node:
    """Return what this machine offers to trials on the CPU, without asking Ray."""
    return Node(host=os.uname().nodename, resources={"CPU": float(num_cpus())})


def left_to_trials(
    nodes: Sequence[Node], driver_id: str, environment: Mapping[str, str]
) -> list[Node]:
    """Return what each node offers to trials where a job reserves CPU cores for this driver.

    Args:
        nodes: What each node offers.
        driver_id: Ray's id of the node that this process runs on.
        environment: Says how many cores are reserved; none where it does not.
    """
    reserved = float(environment.get(DRIVER_CPUS, 0.0))
    return [
        replace(node, resources={**node.resources, "CPU": node.resources["CPU"] - reserved})
        if node.node_id == driver_id and node.resources.get("CPU", 0.0) >= reserved > 0
        else node
        for node in nodes
    ]


def choose_machine(space: Space, *nodes: Node, is_joined: bool = False) -> Machine:
    """Decide the device and how many trials run at once.

    Args:
        space: Its `search.resources` and `search.max_concurrent` are used.
        nodes: What each node offers.
        is_joined: True for a cluster that was joined: its nodes say whether they have a GPU, and
            this process's torch does not. There may be more nodes later, so that as many trials
            are planned at once as `search.max_concurrent` says.

    Raises:
        UsageError: A trial needs more than any node has, no node has the GPU model, the labels or
            the custom resources asked for, or trials would run on GPUs of several models.
    """
    resources = space.study.search.resources
    usable = _with_labels(_with_accelerator(nodes, resources), resources)
    _refuse_unknown_custom(usable, resources)
    gpu = resources.gpu
    if gpu is None:
        gpu = 1.0 if _has_gpu(usable, resources, is_joined=is_joined) else 0.0
    machine = _without_slots(resources, gpu)
    slots = sum(map(machine.num_slots_on, usable))
    if slots < 1:
        raise _too_large(machine, usable, hint=_more_room(space, is_joined=is_joined))
    if gpu > 0:
        _refuse_several_models(filter(machine.num_slots_on, usable))
    wanted = space.study.search.max_concurrent or slots
    if not is_joined:
        return replace(machine, num_slots=min(wanted, slots))
    return replace(machine, num_slots=wanted, num_unplaced=max(0, wanted - slots))


def room_for_one(space: Space) -> Machine:
    """Return what a trial occupies, as far as `search.resources` says it, without any slots."""
    resources = space.study.search.resources
    return _without_slots(resources, resources.gpu or 0.0)


def _without_slots(resources: Resources, gpu: float) -> Machine:
    return Machine(
        device="cuda" if gpu > 0 else "cpu",
        num_slots=0,
        cpu_per_trial=resources.cpu,
        gpu_per_trial=gpu,
        accelerator=resources.accelerator,
        custom=resources.custom,
        labels=resources.labels,
    )


def _more_room(space: Space, *, is_joined: bool) -> str:
    if not is_joined:
        return "Lower search.resources."
    if space.study.search.max_concurrent is None:
        return f"Lower search.resources{_GROW}"
    return "Lower search.resources: the cluster was asked for such a node, and started none."


def _too_large(machine: Machine, nodes: Sequence[Node], *, hint: str) -> UsageError:
    asked = {"CPU": machine.cpu_per_trial, "GPU": machine.gpu_per_trial, **machine.custom}
    names = list(asked)
    # What is rarer comes later: the node that has it is the one to be named.
    largest = max(nodes, key=lambda node: [node.resources.get(name, 0.0) for name in names[::-1]])
    there = [f"{largest.resources.get(name, 0.0):g}" for name in names]
    return UsageError(
        f"search.resources: a trial needs {_listed([f'{asked[n]:g} {n}' for n in names])}, but "
        f"there are {_listed(there)}{' on the largest node' if len(nodes) > 1 else ''}.",
        hint=hint,
    )


def _listed(words: Sequence[str]) -> str:
    return f"{', '.join(words[:-1])} and {words[-1]}" if len(words) > 1 else words[0]


def _with_accelerator(nodes: Sequence[Node], resources: Resources) -> Sequence[Node]:
    """Return the nodes that have the GPU model asked for; all where none is."""
    model = resources.accelerator
    if model is None:
        return nodes
    usable = [node for node in nodes if node.resources.get(f"{_ACCELERATOR}{model}", 0.0) > 0]
    if not usable:
        known = sorted(
            {
                name.removeprefix(_ACCELERATOR)
                for node in nodes
                for name in node.resources
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


def _with_labels(nodes: Sequence[Node], resources: Resources) -> Sequence[Node]:
    """Return the nodes that have the labels asked for; all where none is."""
    usable = [node for node in nodes if _has_labels(node, resources.labels)]
    if not usable:
        wanted = ", ".join(f"{key}: {' or '.join(v)}" for key, v in resources.labels.items())
        known = sorted(
            {
                f"{key}: {value}"
                for node in nodes
                for key, value in node.labels.items()
                if not key.startswith(_RAYS_LABELS)
            }
        )
        found = f"there is {'; '.join(known)}" if known else "no node has a label of its own"
        raise UsageError(
            f"search.resources.labels: a node must have {wanted}, but {found}.",
            hint=_way_out("labels", nodes),
        )
    return usable


def _refuse_unknown_custom(nodes: Sequence[Node], resources: Resources) -> None:
    offered = {name for node in nodes for name, amount in node.resources.items() if amount > 0}
    missing = sorted(resources.custom.keys() - offered)
    if missing:
        known = sorted(name for name in offered if name not in _RAYS_OWN and ":" not in name)
        found = f"there is {', '.join(known)}" if known else "no node has a resource of its own"
        whose = "a node with these labels" if resources.labels else "a node"
        raise UsageError(
            f"search.resources.custom: {whose} must have {_listed(missing)}, but {found}.",
            hint=_way_out("custom", nodes),
        )


def _way_out(key: str, nodes: Sequence[Node]) -> str:
    """Say how to go on where no node has what is asked for."""
    is_joined = any(node.node_id for node in nodes)
    other = "Ask for what a node has" if is_joined else "Join a cluster by --address"
    return (
        f"{other}, or ask for nothing by `--set search.resources.{key}={{}}`; "
        "`run` and `resume` both take it."
    )


def _has_labels(node: Node, labels: Mapping[str, tuple[str, ...]]) -> bool:
    return all(node.labels.get(key) in values for key, values in labels.items())


def _refuse_several_models(nodes: Iterable[Node]) -> None:
    """Refuse to pool GPU models: what is stable on one may not be on another."""
    models = Counter(node.gpu_model for node in nodes)
    if len(models) > 1:
        found = ", ".join(f"{name} on {count}" for name, count in sorted(models.items()))
        raise UsageError(
            f"search.resources.accelerator: all trials must run on one GPU model, but got {found} "
            "of the nodes.",
            hint=f"Name one, as by `--set search.resources.accelerator={min(models)}`.",
        )


def _has_gpu(nodes: Sequence[Node], resources: Resources, *, is_joined: bool) -> bool:
    if not any(node.resources.get("GPU", 0.0) >= 1 for node in nodes):
        return False
    return is_joined or resources.accelerator is not None or _torch_has_gpu()


def _torch_has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()
