"""What can be seen of a cluster from outside: by looking at its dashboard, and running nothing.

What `/nodes` answers is that of Ray 2.60's own dashboard page; whatever of it is not there is not
told. Whoever owns the cluster writes it: every value is checked before anything is done with it.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from stability_search.cluster.address import ClusterAddress
from stability_search.cluster.connection import Connection
from stability_search.cluster.jobs import RayJobs
from stability_search.errors import InfrastructureError, UsageError

TIMEOUT_S = 10.0
_MAX_NODES = 10_000
_MOST = 2.0**63
_MAX_WORDS = 200  # of a name that the cluster gives


class TokenUse(StrEnum):
    """What became of our token."""

    NOT_WANTED = "not wanted"  # whoever reaches the dashboard may use it
    ACCEPTED = "accepted"
    REFUSED = "refused"
    MISSING = "missing"  # it wants one, and we have none
    KEPT_BACK = "kept back"  # it could be read on the way


@dataclass(frozen=True, kw_only=True, slots=True)
class OutsideNode:
    """One node as the dashboard tells it; None for what it does not tell.

    Attributes:
        name: Its host.
        is_alive: True while it lives.
        cpus: CPU cores that Ray gives to trials.
        gpus: GPUs that Ray gives to trials.
        gpu_models: Models of the GPUs that its driver names, each once.
        memory_free_bytes: Memory that is left.
        disk_free_bytes: Disk that is left where Ray keeps its files.
    """

    name: str
    is_alive: bool
    cpus: float | None = None
    gpus: float | None = None
    gpu_models: tuple[str, ...] = ()
    memory_free_bytes: float | None = None
    disk_free_bytes: float | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Outside:
    """A cluster seen from outside.

    Attributes:
        token: What became of our token.
        ray_version: The version of Ray there; empty where we may not ask.
        nodes: Its nodes; None where they were not told.
    """

    token: TokenUse
    ray_version: str = ""
    nodes: tuple[OutsideNode, ...] | None = None


def look_from_outside(address: ClusterAddress, *, timeout_s: float = TIMEOUT_S) -> Outside:
    """Ask a dashboard who may use it, and what it tells of its cluster; nothing is run there.

    It is asked without a token first. Over plain HTTP to another machine none is sent at all.

    Args:
        address: Where it is.
        timeout_s: Longest silence of an answer.

    Raises:
        InfrastructureError: It does not answer, or is no Ray.
    """
    bare = Connection(dataclasses.replace(address, token=""), timeout_s=timeout_s)
    try:
        version = RayJobs(bare).ray_version()
    except UsageError:  # it wants a token
        pass
    else:
        return Outside(token=TokenUse.NOT_WANTED, ray_version=version, nodes=_nodes(bare))
    if not address.token:
        return Outside(token=TokenUse.MISSING)
    if address.is_readable_on_the_way:
        return Outside(token=TokenUse.KEPT_BACK)
    known = Connection(address, timeout_s=timeout_s)
    try:
        version = RayJobs(known).ray_version()
    except UsageError:
        return Outside(token=TokenUse.REFUSED)
    return Outside(token=TokenUse.ACCEPTED, ray_version=version, nodes=_nodes(known))


def _nodes(connection: Connection) -> tuple[OutsideNode, ...] | None:
    try:
        answer = connection.get_json("/nodes", {"view": "summary"})
        listed = answer["data"]["summary"][:_MAX_NODES]
        found = [_node(one) for one in listed]
    except (InfrastructureError, UsageError, TypeError, KeyError):
        return None
    return tuple(sorted(found, key=lambda one: one.name)) or None  # none: it has just started


def _node(told: Any) -> OutsideNode:  # noqa: ANN401 - JSON
    raylet = _mapping(told, "raylet")
    resources = _mapping(raylet, "resourcesTotal")
    memory = told.get("mem")
    disks = [one for one in _mapping(told, "disk").values() if isinstance(one, dict)]
    free = [_number(disk.get("free")) for disk in disks]
    gpus = told.get("gpus")
    named = [one for one in (gpus if isinstance(gpus, list) else []) if isinstance(one, dict)]
    return OutsideNode(
        name=str(told.get("hostname") or raylet.get("nodeManagerHostname") or "?")[:_MAX_WORDS],
        is_alive=raylet.get("state") == "ALIVE",
        cpus=_number(resources.get("CPU", 0.0)) if resources else None,
        gpus=_number(resources.get("GPU", 0.0)) if resources else None,
        gpu_models=tuple(sorted({str(one.get("name"))[:_MAX_WORDS] for one in named})),
        memory_free_bytes=_number(memory[1])
        if isinstance(memory, list) and len(memory) > 1
        else None,
        disk_free_bytes=min((one for one in free if one is not None), default=None),
    )


def _mapping(told: Any, name: str) -> Mapping[str, Any]:  # noqa: ANN401 - JSON
    if not isinstance(told, dict):
        raise TypeError("no node")
    found = told.get(name)
    return found if isinstance(found, dict) else {}


def _number(value: Any) -> float | None:  # noqa: ANN401 - JSON
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if is_number and 0 <= value < _MOST else None  # NaN is not either
