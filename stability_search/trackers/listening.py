"""Listening to a study for the tools it is logged to.

Nothing here raises into the study, and nothing waits while it runs. A tracker that fails is said
once, as a message among the study's events, and is silent from then on.
"""

import contextlib
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from stability_search.errors import StabilitySearchError
from stability_search.events import Event, EventName, Listener, ignore, message
from stability_search.records.verdict import VerdictKind
from stability_search.trackers.feed import Feed
from stability_search.trackers.names import named_trackers
from stability_search.trackers.run_files import newest_attempt, study_id, trial_names

DRAIN_S = 60.0  # after a study that ended, for what is not logged yet
INTERRUPTED_DRAIN_S = 5.0  # after one that somebody or something stopped
_LEAVE_S = 0.0  # after SIGTERM, which leaves two seconds for everything
_STOP_S = 0.5  # of them, for a tool to end what it holds open
_EXIT_TERMINATED = 143
_PATIENCE_S = 1.0  # a wait that is longer is announced


@contextlib.contextmanager
def tracking(names: Sequence[str], on_event: Listener = ignore) -> Iterator[Listener]:
    """Log a study to one or more tools.

    Args:
        names: Of `tensorboard`, `mlflow` and `wandb`.
        on_event: Hears every event too, and a `message` for each tracker that fails.

    Yields:
        What to hand to `run(space, on_event=...)`. On leaving, what is not logged yet has 60 s
        (5 s where the study did not end by itself); then the tools' processes are ended.

    Raises:
        UsageError: There is no such tracker, or its extra is not installed.

    Example:
        >>> from stability_search import run
        >>> with tracking(["tensorboard"]) as on_event:  # doctest: +SKIP
        ...     run("teacher.yaml", on_event=on_event)
    """
    heard = _Tracking([Feed(name) for name in named_trackers(names)], on_event)
    try:
        yield heard.hear
    finally:
        heard.leave()


class _Tracking:
    def __init__(self, feeds: Sequence[Feed], on_event: Listener) -> None:
        self._feeds = feeds
        self._on_event = on_event
        self._directory: Path | None = None
        self._drain_s = _LEAVE_S
        self._said: set[str] = set()

    def hear(self, event: Event) -> None:
        """Pass an event on, and queue what it means for the tools."""
        self._on_event(event)
        match event.name:
            case EventName.STUDY_STARTED:
                self._begin(Path(event.text("run_directory")))
            case EventName.TRIAL_FINISHED:
                self._add_trial(event)
            case EventName.STUDY_FINISHED:
                self._finish(event)
        self._say_problems()

    def leave(self) -> None:
        """Wait a bounded time for what is not logged yet; Ctrl-C ends the wait."""
        for feed in self._feeds:
            feed.end()
        with contextlib.suppress(KeyboardInterrupt):
            self._drain()
            self._stop()
        for feed in self._feeds:
            feed.leave()
            if feed.num_left and self._directory is not None and not feed.problem:
                count = "1 entry was" if feed.num_left == 1 else f"{feed.num_left} entries were"
                feed.problem = f"{count} not logged in time"
        self._say_problems()

    def _drain(self) -> None:
        until = time.monotonic() + self._drain_s
        patience_s = min(_PATIENCE_S, self._drain_s)
        slow = [feed for feed in self._feeds if not feed.is_done_within(patience_s)]
        if slow and self._drain_s > _PATIENCE_S:
            names = ", ".join(
                f"{feed.name} ({feed.num_left} left)" if feed.num_left else feed.name
                for feed in slow
            )
            text = f"Still logging to {names}; at most {self._drain_s:g} s."
            self._on_event(message("info", text))
        for feed in slow:
            feed.is_done_within(max(0.0, until - time.monotonic()))

    def _stop(self) -> None:
        until = time.monotonic() + _STOP_S
        for feed in self._feeds:
            feed.stop()
        for feed in self._feeds:
            feed.is_done_within(max(0.0, until - time.monotonic()))

    def _begin(self, directory: Path) -> None:
        self._directory = directory
        try:
            identity, names = study_id(directory), trial_names(directory)
        except (OSError, StabilitySearchError) as error:
            for feed in self._feeds:
                feed.problem = str(error)
            return
        for feed in self._feeds:
            feed.begin(directory, identity, names)

    def _add_trial(self, event: Event) -> None:
        if self._directory is not None:
            name = newest_attempt(self._directory, event.text("trial_id"))
            for feed in self._feeds:
                feed.add({"do": "trial", "name": name, "q": event.number("q")})

    def _finish(self, event: Event) -> None:
        exit_code = int(event.number("exit_code") or 0)
        if exit_code == _EXIT_TERMINATED:
            return
        if self._directory is None:  # a finished run, resumed: there was nothing left to do
            self._begin(Path(event.text("report")).parent)
        verdict = event.text("verdict")
        is_whole = verdict != VerdictKind.INCOMPLETE
        self._drain_s = DRAIN_S if is_whole else INTERRUPTED_DRAIN_S
        for feed in self._feeds:
            feed.add({"do": "finish", "verdict": verdict, "exit_code": exit_code})

    def _say_problems(self) -> None:
        for feed in self._feeds:
            if feed.problem and feed.name not in self._said:
                self._said.add(feed.name)
                again = f"`resume` with --tracker {feed.name} logs what is missing."
                text = f"{feed.name}: {feed.problem.rstrip('.')}. {again}"
                self._on_event(message("warning", text))
