"""Waiting for what others occupy, and saying so."""

import time
from collections.abc import Callable, Mapping, Sequence

from stability_search.search.machine import Machine, Node

EVERY_S = 30.0  # between two messages
PARTLY_S = 600.0  # the same where some trials run
PATIENCE_S = 5.0  # what is free is given out within milliseconds; after this it is taken

Amounts = Mapping[str, float]
"""How much of what, by Ray's names."""


class Waiting:
    """Notices that trials find no place because the cluster is busy.

    Args:
        machine: What a trial occupies.
        clock: Seconds from a fixed start.
    """

    def __init__(self, machine: Machine, clock: Callable[[], float] = time.monotonic) -> None:
        self._machine = machine
        self._clock = clock
        self._since: float | None = None
        self._due_s = PATIENCE_S
        self._num_placed = 0

    def note(self, *, num_placed: int, num_unplaced: int) -> None:
        """Hear how many workers have a place, and how many have none yet.

        Args:
            num_placed: Workers that a node has room for.
            num_unplaced: Workers that are wanted and that no node has room for.
        """
        self._num_placed = num_placed
        if not num_unplaced:
            self._since, self._due_s = None, PATIENCE_S
        elif self._since is None:
            self._since = self._clock()

    @property
    def is_due(self) -> bool:
        """True if it is time to say so."""
        due_s = max(self._due_s, EVERY_S) if self._num_placed else self._due_s
        return self._since is not None and self._waited_s >= due_s

    @property
    def _waited_s(self) -> float:
        return 0.0 if self._since is None else self._clock() - self._since

    def message(self, nodes: Sequence[Node], free: Mapping[str, Amounts]) -> str:
        """Say what is waited for; the next message is due later.

        Args:
            nodes: The cluster; only nodes that could run a trial count.
            free: What each node has left, by its id.
        """
        self._due_s += PARTLY_S if self._num_placed else EVERY_S
        usable = [node for node in nodes if self._machine.num_slots_on(node)]
        if usable:
            text = f"waiting for {self._occupied(usable, free)}, {self._waited_s:.0f} s"
        else:
            text = self._nowhere()
        workers = "1 worker goes" if self._num_placed == 1 else f"{self._num_placed} workers go"
        return f"{text}; {workers} on" if self._num_placed else text

    def _occupied(self, usable: Sequence[Node], free: Mapping[str, Amounts]) -> str:
        share = self._machine.share
        left = {
            name: sum(free.get(n.node_id, {}).get(name, 0.0) for n in usable) for name in share
        }
        total = {name: sum(n.resources.get(name, 0.0) for n in usable) for name in share}
        parts = [
            f"{amount:g} {name}: {left[name]:g} of {total[name]:g} free"
            for name, amount in share.items()
            if left[name] < amount
        ]
        if not parts:  # enough is free, but not on one node
            parts = [f"{' and '.join(f'{a:g} {n}' for n, a in share.items())} on one node"]
        return "; ".join(parts)

    def _nowhere(self) -> str:
        """Say what no node has, and what of it may be given up."""
        machine = self._machine
        wanted = [f"{amount:g} {name}" for name, amount in machine.share.items()]
        wanted += [f"{key}: {' or '.join(values)}" for key, values in machine.labels.items()]
        asked = {"labels": machine.labels, "custom": machine.custom}
        keys = [f"search.resources.{key}" for key, value in asked.items() if value]
        text = (
            f"waiting for a node with {', '.join(wanted)}: there is none, {self._waited_s:.0f} s"
        )
        return f"{text}; or stop, and `resume` with other {' and '.join(keys)}" if keys else text
