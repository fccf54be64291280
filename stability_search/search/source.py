"""What the driver of Ray asks of a study, and how a signal reaches both."""

import os
import signal
from collections.abc import Callable, Mapping
from types import FrameType
from typing import Any, Protocol

from stability_search.errors import StabilitySearchError
from stability_search.records import TrialSummary
from stability_search.search.request import TrialRequest


class Interrupted(StabilitySearchError):  # noqa: N818 - no error: somebody asked for it
    """A signal asked the study to stop; everything finished is kept."""

    def __init__(self, signum: int) -> None:
        super().__init__(f"stopped by {signal.Signals(signum).name}")
        self.signum = signum
        self.exit_code = 128 + signum  # type: ignore[misc]


class TrialSource(Protocol):
    """Says which trial comes next, and is told what became of it."""

    def next_trial(self) -> TrialRequest | None:
        """Return the next trial; None where it depends on one that is running."""
        ...

    @property
    def is_over(self) -> bool:
        """True once no further trial will come."""
        ...

    def trial_started(self, request: TrialRequest, node: str) -> None:
        """Hear that a worker has taken the trial."""
        ...

    def trial_progressed(self, request: TrialRequest, progress: Mapping[str, Any]) -> None:
        """Hear how far a trial is."""
        ...

    def trial_ended(
        self, request: TrialRequest, summary: TrialSummary, steps: bytes | None, node: str
    ) -> None:
        """Hear how a trial ended, exactly once; the next trial may depend on it."""
        ...

    def node_quarantined(self, node: str, reason: str) -> None:
        """Hear that a node gets no further trials."""
        ...

    def settle(self) -> None:
        """Write down what has ended: a trial is finished when it is written down."""
        ...


def _nothing() -> None:
    return


class Signals:
    """Turns SIGINT and SIGTERM into `Interrupted`, at a point where nothing is half done.

    A second SIGINT ends the process at once, after `last_words`.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self.last_words: Callable[[], None] = _nothing
        self._before: dict[int, Any] = {}

    def install(self) -> None:
        """Take the signals over; called again after Ray has taken them."""
        for signum in (signal.SIGINT, signal.SIGTERM):
            before = signal.signal(signum, self._handle)
            self._before.setdefault(signum, before)

    def restore(self) -> None:
        """Give the signals back."""
        for signum, before in self._before.items():
            signal.signal(signum, before)
        self._before.clear()

    def _handle(self, signum: int, _frame: FrameType | None) -> None:
        if self.received is not None and signum == signal.SIGINT:
            self.last_words()
            os._exit(128 + signum)  # asked twice: at once
        self.received = signum

    def check(self) -> None:
        """Raise if a signal has arrived.

        Raises:
            Interrupted: With the signal.
        """
        if self.received is not None:
            raise Interrupted(self.received)
