"""Where events go: JSON lines, plain lines, or the live view.

An outlet never stops a study: one that nobody reads any more (a closed pipe, a closed terminal)
falls silent, and the study goes on.
"""

import contextlib
import io
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from types import TracebackType
from typing import Protocol, Self, TextIO

from stability_search.cli.board import Board
from stability_search.cli.lines import event_line, heartbeat
from stability_search.events import Event, EventName

HEARTBEAT_S = 30.0
_STOP_WAIT_S = 2.0


class Sink:
    """A stream that takes whole lines and survives its reader.

    Args:
        stream: Where the lines go.

    Attributes:
        failure: Why lines were lost; empty while none were, or where the reader had enough.
    """

    def __init__(self, stream: TextIO) -> None:
        self.failure = ""
        self._stream = stream
        self._is_open = True

    def write(self, *lines: str) -> None:
        """Write lines and flush them, or nothing once that has failed."""
        if not self._is_open:
            return
        try:
            self._stream.write("".join(f"{line}\n" for line in lines))
            self._stream.flush()
        except BrokenPipeError:
            self._is_open = False
            _discard(self._stream)
        except OSError as error:
            self.failure = error.strerror or str(error)
            self._is_open = False
            _discard(self._stream)


@contextlib.contextmanager
def data_sink() -> Iterator[Sink]:
    """Open a sink on a copy of standard output.

    While Ray runs, file descriptor 1 may lead to a log; the copy still leads to the reader.
    """
    try:
        descriptor = os.dup(sys.stdout.fileno())
    except (io.UnsupportedOperation, OSError):  # not a real file, as in a notebook
        yield Sink(sys.stdout)
        return
    with os.fdopen(descriptor, "w", encoding="utf-8", errors="backslashreplace") as stream:
        yield Sink(stream)


@contextlib.contextmanager
def kept_stderr() -> Iterator[TextIO]:
    """Open a copy of standard error, which leads to the reader while Ray's own goes to a log."""
    try:
        descriptor = os.dup(sys.stderr.fileno())
    except (io.UnsupportedOperation, OSError):  # not a real file, as in a notebook
        yield sys.stderr
        return
    with os.fdopen(descriptor, "w", encoding="utf-8", errors="backslashreplace") as stream:
        yield stream


def message_sink() -> Sink:
    """Return a sink on standard error."""
    return Sink(sys.stderr)


class Outlet(Protocol):
    """Shows events while it is entered."""

    def __enter__(self) -> Self:
        """Start showing."""

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Stop showing; what was shown stays."""

    def show(self, event: Event) -> None:
        """Show one event."""


class JsonLines(contextlib.AbstractContextManager["JsonLines"]):
    """One JSON object a line; messages go to standard error, progress is left out.

    Args:
        out: Takes the JSON lines.
        err: Takes the messages.
    """

    def __init__(self, out: Sink, err: Sink) -> None:
        self._out, self._err = out, err

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Leave nothing behind: every line was flushed."""

    def show(self, event: Event) -> None:
        """Write one event."""
        if event.name == EventName.MESSAGE:
            self._err.write(event_line(event))
        elif event.name != EventName.TRIAL_PROGRESS:
            self._out.write(json.dumps(event.to_json(), allow_nan=False))


class PlainLines(contextlib.AbstractContextManager["PlainLines"]):
    """A line per event, and one every 30 s that tells where the study is.

    Args:
        err: Takes the lines.
        clock: Seconds of a clock that does not run backwards.
        utc: The time of day.
    """

    def __init__(
        self,
        err: Sink,
        *,
        clock: Callable[[], float] = time.monotonic,
        utc: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        self._err, self._clock, self._utc = err, clock, utc
        self._board = Board()
        self._lock = threading.Lock()
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._keep_beating, daemon=True)

    def __enter__(self) -> Self:
        """Start the 30 s lines."""
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Stop the 30 s lines."""
        self._stopped.set()
        self._thread.join(_STOP_WAIT_S)

    def show(self, event: Event) -> None:
        """Write the line of one event."""
        with self._lock:
            self._board.apply(event, self._clock())
            line = event_line(event)
            if line:
                self._err.write(f"{clock_time(event.time)} {line}")

    def beat(self) -> None:
        """Write the line that tells where the study is."""
        with self._lock:
            line = heartbeat(self._board, self._clock())
            self._err.write(f"{self._utc():%H:%M:%S} {line}")

    def _keep_beating(self) -> None:
        while not self._stopped.wait(HEARTBEAT_S):
            self.beat()


def clock_time(iso: str) -> str:
    """Return hours, minutes and seconds of a UTC time; dashes where it cannot be read."""
    try:
        return f"{datetime.fromisoformat(iso):%H:%M:%S}"
    except ValueError:
        return "--:--:--"


def choose_outlet(*, json_events: bool, out: Sink, err: TextIO) -> Outlet:
    """Return the outlet for where the command runs.

    Args:
        json_events: True if standard output shall be JSON lines only.
        out: Standard output.
        err: Standard error, or a copy of it.
    """
    if json_events:
        return JsonLines(out, Sink(err))
    if err.isatty() and os.environ.get("TERM", "dumb") != "dumb":
        from stability_search.cli.live import LiveView  # Rich costs 0.1 s

        return LiveView(err)
    return PlainLines(Sink(err))


def _discard(stream: TextIO) -> None:
    """Lead the stream nowhere, so that Python's last flush cannot fail."""
    with contextlib.suppress(OSError, ValueError):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, stream.fileno())
        os.close(null)
