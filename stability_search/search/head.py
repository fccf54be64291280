"""Whether the head of a cluster that was joined can be reached: without it nothing goes on.

Once it cannot, whatever asks Ray for anything waits in Ray's own code, also what would leave the
cluster, and no signal is heard: Ray itself sees in a minute that a head has died and ends the
process without a word, and it does not see for many minutes that the way there is cut. So a
thread looks, and is all that can still act.

A head that takes connections and does not answer may come back, and then the study goes on by
itself: it is told of as soon, and given up late.
"""

import threading
import time
from collections.abc import Callable
from typing import Self

from stability_search.search.joining import Reach, reach

CHECK_S = 5.0  # between two looks; one waits as long at most
TOLD_S = 15.0  # of silence
GONE_S = 40.0  # of silence; Ray's own patience, where it notices, is 60 s
HUNG_S = 600.0  # the same where it still takes connections, which Ray waits for without end

Say = Callable[[str], None]
"""Takes a sentence without its full stop."""


class HeadWatch:
    """Looks for the head again and again, tells of its silence, and at last gives it up.

    Args:
        address: `HOST:PORT` on which it takes connections.
        say: Hears in a thread of ours that it is silent, and that it answers again.
        give_up: Called once, in the same thread, when it has been silent for `GONE_S`, or for
            `HUNG_S` where it takes connections.
        reach: Says how much of it can be reached.
        clock: Seconds from a fixed start.
    """

    def __init__(
        self,
        address: str,
        *,
        say: Say,
        give_up: Say,
        reach: Callable[[str], Reach] = reach,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._address = address
        self._say, self._give_up = say, give_up
        self._reach, self._clock = reach, clock
        self._silent_since: float | None = None
        self._is_told = False
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._look_again_and_again, daemon=True)

    def __enter__(self) -> Self:
        """Begin to look."""
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Stop looking."""
        self._is_over.set()

    def look(self) -> None:
        """Look once, and act on it."""
        began = self._clock()
        reached = self._reach(self._address)
        if reached is Reach.ANSWERS:
            if self._is_told:
                self._say("the cluster's head answers again")
            self._silent_since, self._is_told = None, False
            return
        if self._silent_since is None:
            self._silent_since = began
        silent_s = self._clock() - self._silent_since
        text = f"the cluster's head, {self._address}, has not answered for {silent_s:.0f} s"
        if self._is_over.is_set():  # left meanwhile
            return
        if silent_s >= (GONE_S if reached is Reach.GONE else HUNG_S):
            self._is_over.set()
            self._give_up(text)
        elif silent_s >= TOLD_S and not self._is_told:
            self._is_told = True
            self._say(text)

    def _look_again_and_again(self) -> None:
        while not self._is_over.wait(CHECK_S):
            self.look()
