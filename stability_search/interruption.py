"""How a signal reaches long work, and how a process ends with the one that started it."""

import ctypes
import os
import select
import signal
import socket
import sys
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

from stability_search.errors import StabilitySearchError

_PR_SET_PDEATHSIG = 1  # of Linux: which signal a process gets when its parent dies


class Interrupted(StabilitySearchError):  # noqa: N818 - no error: somebody asked for it
    """A signal asked the work to stop; everything finished is kept."""

    def __init__(self, signum: int, *, hint: str = "") -> None:
        super().__init__(f"stopped by {signal.Signals(signum).name}", hint=hint)
        self.signum = signum
        self.exit_code = 128 + signum  # type: ignore[misc]


def _nothing() -> None:
    return


class Signals:
    """Turns SIGINT and SIGTERM into `Interrupted`, at a point where nothing is half done.

    A second SIGINT ends the process at once, after `last_words`.

    Args:
        terminate_s: Seconds after SIGTERM at which the process ends in the same way if it still
            runs; None leaves it all the time it takes.
    """

    def __init__(self, *, terminate_s: float | None = None) -> None:
        self.received: int | None = None
        self.last_words: Callable[[], None] = _nothing
        self._before: dict[int, Any] = {}
        self._terminate_s = terminate_s
        self._timer: threading.Timer | None = None

    def install(self) -> None:
        """Take the signals over; called again after Ray has taken them."""
        for signum in (signal.SIGINT, signal.SIGTERM):
            before = signal.signal(signum, self._handle)
            self._before.setdefault(signum, before)

    def restore(self) -> None:
        """Give the signals back."""
        if self._timer is not None:
            self._timer.cancel()
        for signum, before in self._before.items():
            signal.signal(signum, before)
        self._before.clear()

    def _handle(self, signum: int, _frame: FrameType | None) -> None:
        if self.received is not None and signum == signal.SIGINT:
            self._end(signum)  # asked twice: at once
        if signum == signal.SIGTERM and self._terminate_s is not None and self._timer is None:
            self._timer = threading.Timer(self._terminate_s, self._end, [signum])
            self._timer.daemon = True
            self._timer.start()
        self.received = signum

    def _end(self, signum: int) -> None:
        self.last_words()
        os._exit(128 + signum)

    def check(self) -> None:
        """Raise if a signal has arrived.

        Raises:
            Interrupted: With the signal.
        """
        if self.received is not None:
            raise Interrupted(self.received)


def end_with_parent(parent: int | None = None) -> None:
    """Ask Linux to end this process with the thread that started it.

    Elsewhere a process ends once it finds its connection closed.

    Args:
        parent: Process id of the one that started it. Linux says nothing of a parent that had died
            before it was asked: this process then ends now. None where `has_hung_up` is asked.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if parent not in {None, os.getppid()}:
            signal.raise_signal(signal.SIGKILL)


def has_hung_up(connection: socket.socket) -> bool:
    """Return True if the other end of a connection is closed, whatever is left to be read.

    Args:
        connection: One of a pair of sockets.
    """
    poll = select.poll()
    poll.register(connection, 0)  # a closed end is told unasked
    return bool(poll.poll(0))
