"""How long workers have had nothing to do."""

import time
from collections.abc import Callable
from typing import Any

IDLE_S = 60.0  # what a worker's start takes, and more: one that is needed again starts anew


class Idleness:
    """Notes since when workers have been idle, and says which of them have been so long enough.

    Args:
        limit_s: Seconds a worker may be idle; infinite where its place is of use to nobody else.
        clock: Seconds from a fixed start.
    """

    def __init__(self, limit_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.limit_s = limit_s
        self._clock = clock
        self._since: dict[Any, float] = {}  # by worker

    def is_over_limit(self, worker: Any) -> bool:  # noqa: ANN401 - Ray's handle has no public type
        """Hear that a worker has nothing to do; return True if that has been so for too long."""
        return self._clock() - self._since.setdefault(worker, self._clock()) > self.limit_s

    def forget(self, worker: Any) -> None:  # noqa: ANN401 - as above
        """Hear that a worker has work, or that it is about to come: it counts anew."""
        self._since.pop(worker, None)
