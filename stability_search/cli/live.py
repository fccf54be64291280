"""The board as a live view on a terminal.

Every string reaches Rich as `Text`, which reads no markup, after `inert` has spelled out its
control characters.
"""

import contextlib
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import Self, TextIO

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from stability_search.cli.board import NUM_RECENT_EVENTS, Board, RunningTrial
from stability_search.cli.inert import inert
from stability_search.cli.lines import (
    best_words,
    duration,
    event_line,
    outcome_words,
    setting_words,
    stage_words,
)
from stability_search.events import Event, EventName

_REFRESHES_PER_S = 4
_FIXED_ROWS = 9  # every line but the running trials and the recent events


class LiveView(contextlib.AbstractContextManager["LiveView"]):
    """Counts, time left, the best so far, running trials and the last events, redrawn in place.

    Args:
        stream: The terminal.
        clock: Seconds of a clock that does not run backwards.
    """

    def __init__(self, stream: TextIO, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._console = Console(file=stream, markup=False, emoji=False, highlight=False)
        self._clock = clock
        self._board = Board()
        self._lock = threading.Lock()
        self._live = Live(
            console=self._console,
            get_renderable=self._render,
            refresh_per_second=_REFRESHES_PER_S,
            redirect_stdout=False,  # while Ray runs, standard output is a log
        )

    def __enter__(self) -> Self:
        """Draw the view and keep it drawn."""
        self._live.start(refresh=True)
        self._console.show_cursor()  # a process that ends at once must not leave it hidden
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Draw the view a last time and leave it on the terminal."""
        self._live.stop()

    def show(self, event: Event) -> None:
        """Take in one event; warnings and errors also stay above the view."""
        with self._lock:
            self._board.apply(event, self._clock())
        if event.name == EventName.MESSAGE and event.text("level") in {"warning", "error"}:
            self._console.print(Text(event_line(event)), soft_wrap=True)

    def _render(self) -> RenderableType:
        with self._lock:
            return view(self._board, self._clock(), height=self._console.height)


def view(board: Board, now_s: float, *, height: int) -> RenderableType:
    """Draw the board.

    Args:
        board: State of the study.
        now_s: The time on the clock that the board was given.
        height: Rows of the terminal; running trials beyond it are counted, not listed.
    """
    num_listed = max(1, height - _FIXED_ROWS - NUM_RECENT_EVENTS)
    trials = list(board.running.values())
    parts: list[RenderableType] = [*_summary(board, now_s)]
    if trials:
        parts += [Text(""), _running(trials[:num_listed], now_s)]
        if len(trials) > num_listed:
            parts.append(_row(f"and {len(trials) - num_listed} more", style="dim"))
    if board.recent:
        parts += [Text(""), *(_row(event_line(event), style="dim") for event in board.recent)]
    return Group(*parts)


def _summary(board: Board, now_s: float) -> list[Text]:
    place = f"  {inert(board.run_directory)}" if board.run_directory else ""
    device = f"  on {inert(board.device)}" if board.device else ""
    rows = [
        _row(f"stability-search{place}{device}", style="bold"),
        _row(stage_words(board, now_s)),
    ]
    if board.outcomes:
        saved = f"; about {duration(board.saved_s)} saved by stopping early" * bool(board.saved_s)
        rows.append(_row(f"{outcome_words(board)}{saved}"))
    if board.best:
        rows.append(Text(f"best so far: {best_words(board.best)}", overflow="fold"))
    return rows


def _running(trials: list[RunningTrial], now_s: float) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), expand=True)
    table.add_column("running", no_wrap=True)
    for name in ("step", "bad", "scale", "grad norm", "last word"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("settings", no_wrap=True, overflow="ellipsis", ratio=1)
    for trial in trials:
        planned = "" if trial.num_planned_steps is None else f"/{trial.num_planned_steps}"
        table.add_row(
            Text(inert(trial.trial_id)),
            f"{trial.step}{planned}",
            Text(str(trial.num_bad_steps), style="red" if trial.num_bad_steps else ""),
            "-" if trial.scale is None else f"{trial.scale:g}",
            "-" if trial.grad_norm is None else f"{trial.grad_norm:.3g}",
            f"{duration(now_s - trial.last_word_s)} ago",
            Text(setting_words(trial.settings)),
        )
    return table


def _row(text: str, *, style: str = "") -> Text:
    return Text(text, style=style, no_wrap=True, overflow="ellipsis")
