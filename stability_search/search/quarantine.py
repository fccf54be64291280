"""Keeps trials off nodes of a Ray cluster where workers only die."""

import time
from typing import Any

import ray
from ray.util.placement_group import (
    PlacementGroup,
    placement_group,
    placement_group_table,
    remove_placement_group,
)

from stability_search.search.machine import Machine, Node

_NODE_LABEL = "ray.io/node-id"  # Ray gives it to every node
_WAIT_S = 0.5  # what is free is reserved in some milliseconds; a running trial may take long


class Quarantine:
    """Holds the resources of sick nodes, so that Ray starts workers elsewhere.

    They are reserved, one trial's share at a time, so that what a running trial occupies can be
    held when it ends. A reservation needs no process, and on a sick node none might start. Ray
    takes all of them back when the driver leaves.

    Args:
        machine: What a trial occupies.
    """

    def __init__(self, machine: Machine) -> None:
        self._machine = machine
        self._held: dict[str, list[PlacementGroup]] = {}

    def hold(self, node_id: str) -> None:
        """Hold a node: what is free of it at once.

        Args:
            node_id: Ray's id of the node; one that is gone has nothing to hold.
        """
        self._held.setdefault(node_id, [])
        self.hold_more()
        deadline = time.monotonic() + _WAIT_S
        while not all(map(_is_reserved, self._held[node_id])) and time.monotonic() < deadline:
            time.sleep(_WAIT_S / 50)

    def hold_more(self) -> None:
        """Hold what has become free of held nodes; call it whenever a worker has ended.

        Ray looks at a reservation that had to wait only now and then, and at a new one at once:
        made again, it comes before the next worker's.
        """
        living = {node.node_id: node for node in living_nodes()} if self._held else {}
        for node_id, groups in self._held.items():
            for group in [group for group in groups if not _is_reserved(group)]:
                remove_placement_group(group)
                groups.remove(group)
            num_shares = self._machine.num_slots_on(living[node_id]) if node_id in living else 0
            for _ in range(num_shares - len(groups)):
                label = {_NODE_LABEL: node_id}
                share = self._machine.share
                groups.append(placement_group([share], bundle_label_selector=[label]))

    def is_held(self, node_id: str) -> bool:
        """Return True if the node is held, even if it is gone by now."""
        return node_id in self._held

    @property
    def has_usable_node(self) -> bool:
        """True while some node that is not held could run a trial."""
        return any(
            node.node_id not in self._held and self._machine.num_slots_on(node) > 0
            for node in living_nodes()
        )


def node_of(actor: Any) -> str:  # noqa: ANN401 - Ray's handle has no public type
    """Return the id of the node an actor runs on, or ran on; empty where Ray does not know.

    The actor itself cannot be asked: it may be the one that has just died.
    """
    return node_of_id(actor._actor_id.hex())  # noqa: SLF001 - no public way


def node_of_id(actor_id: str) -> str:
    """Return the same as `node_of` by the actor's id, which is what an error has; maybe empty."""
    if not actor_id:
        return ""
    table = ray._private.state.actors(actor_id)  # noqa: SLF001 - no public way
    node_id = table.get("Address", {}).get("NodeID", "")
    return str(node_id or "")


def host_of(node_id: str) -> str:
    """Return the name of a node's host, of one that is gone as well; empty for no known node."""
    hosts = {
        node["NodeID"]: node["NodeManagerHostname"]
        for node in ray.nodes()  # type: ignore[no-untyped-call]
    }
    return str(hosts.get(node_id, ""))


def _is_reserved(group: PlacementGroup) -> bool:
    return bool(placement_group_table(group)["state"] == "CREATED")


def living_nodes() -> list[Node]:
    """Return what each living node of the cluster offers."""
    return [
        Node(
            node_id=node["NodeID"],
            host=node["NodeManagerHostname"],
            address=node["NodeManagerAddress"],
            resources=node["Resources"],
            labels=node["Labels"],
        )
        for node in ray.nodes()  # type: ignore[no-untyped-call]
        if node["Alive"]
    ]


def free_resources() -> dict[str, dict[str, float]]:
    """Return what each node has left, by its id."""
    state: Any = ray._private.state  # noqa: SLF001 - no public way
    found: dict[str, dict[str, float]] = state.available_resources_per_node()
    return found
