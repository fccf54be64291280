"""Asks a cluster that grows for a node, where none that is there could run a trial."""

import json
import time
from collections.abc import Callable, Sequence

import ray
from ray.autoscaler.v2.sdk import get_cluster_status
from ray.experimental.internal_kv import _internal_kv_get
from ray.util.placement_group import placement_group, remove_placement_group

from stability_search.search.machine import Machine, Node

PATIENCE_S = 30.0  # Ray's autoscaler looks every 5 s, and says what it is about to start
EVERY_S = 30.0  # between two messages
_TURN_S = 0.5
_STATUS = "__autoscaling_status"  # where the first version of Ray's autoscaler says it

Notice = Callable[[str], None]


def wait_for_room(
    machine: Machine,
    living: Callable[[], Sequence[Node]],
    notice: Notice,
    look: Callable[[], None],
    clock: Callable[[], float] = time.monotonic,
) -> None:
    """Ask for room for one trial, and wait as long as the cluster is about to start a node.

    Returns at once where a node has room, whoever occupies it now; and without one where the
    cluster says for half a minute that it starts none.

    Args:
        machine: What a trial occupies.
        living: Returns the nodes of the cluster that live, as of now.
        notice: Told how long it takes.
        look: Called meanwhile; may raise to give up.
        clock: Seconds from a fixed start.
    """
    if _has_room(machine, living()):
        return
    wanted = " and ".join(f"{amount:g} {name}" for name, amount in machine.share.items())
    notice(f"no node has room for a trial: asked the cluster for {wanted}")
    begun = heard = told = clock()
    group = placement_group([machine.share], bundle_label_selector=[machine.label_selector])
    try:
        while not _has_room(machine, living()) and clock() - heard < PATIENCE_S:
            look()
            if is_starting_nodes():
                heard = clock()
            if clock() - told >= EVERY_S:
                told = clock()
                notice(f"waiting for a node with {wanted}, {told - begun:.0f} s")
            time.sleep(_TURN_S)
    finally:
        remove_placement_group(group)


def _has_room(machine: Machine, nodes: Sequence[Node]) -> bool:
    return any(machine.num_slots_on(node) for node in nodes)


def is_starting_nodes() -> bool:
    """Return True if Ray's autoscaler, of either version, says that it is starting a node."""
    status = get_cluster_status(ray.get_runtime_context().gcs_address)
    if status.pending_launches or status.pending_nodes:
        return True
    known = json.loads(_internal_kv_get(_STATUS) or "{}").get("autoscaler_report") or {}
    return bool(known.get("pending_launches") or known.get("pending_nodes"))
