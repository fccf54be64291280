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
from rich.text import Text

from stability_search.cli.board import Board, RunningTrial
from stability_search.cli.lines import (
    best_words,
    duration,
    event_line,
    outcome_words,
    setting_words,
    stage_words,
)
from stability_search.cli.outlets import clock_time
from stability_search.events import Event, EventName
from stability_search.inert import inert

_REFRESHES_PER_S = 4
_FRAME_ROWS = 5  # two blank ones, the heading, the count of what is not listed, the cursor
_WIDE, _NARROW = 140, 72
_HEADING = ("running", "step", "bad", "scale", "grad norm", "last word")
_BAD = 2  # position of the bad steps among them


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
            redirect_stdout=False,  # what Ray and a task print is for the log
            redirect_stderr=False,
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
            console = self._console
            return view(self._board, self._clock(), width=console.width, height=console.height)


def view(board: Board, now_s: float, *, width: int, height: int) -> RenderableType:
    """Draw the board.

    Args:
        board: State of the study.
        now_s: The time on the clock that the board was given.
        width: Columns of the terminal; below 140 settings get a line of their own, below 72
            the numbers of a trial, too.
        height: Rows of the terminal; running trials beyond it are counted, not listed.
    """
    parts = _summary(board, now_s)
    trials = list(board.running.values())
    heading, *blocks = _blocks(trials, now_s, width)
    rows_each = len(blocks[0]) if blocks else 0
    spare = height - len(parts) - _FRAME_ROWS - rows_each  # beyond one trial
    recent = _recent(board, width)[-spare:] if spare > 0 else []
    if trials:
        num_listed = 1 + max(0, (spare - len(recent)) // rows_each)
        parts += [Text(""), *heading]
        parts += [line for block in blocks[:num_listed] for line in block]
        if len(trials) > num_listed:
            parts.append(_row(f"and {len(trials) - num_listed} more", style="dim"))
    if recent:
        parts += [Text(""), *recent]
    return Group(*parts)


def _summary(board: Board, now_s: float) -> list[Text]:
    device = f" on {inert(board.device)}" if board.device else ""
    place = f"  {inert(board.run_directory)}" if board.run_directory else ""
    rows = [
        _row(f"stability-search{device}{place}", style="bold"),
        _row(stage_words(board, now_s)),
    ]
    if board.outcomes:
        rows.append(_row(outcome_words(board)))
    if board.saved_s:
        rows.append(_row(f"about {duration(board.saved_s)} saved by stopping early"))
    if board.best:
        rows += [
            _row(f"best so far: {best_words(board.best)}"),
            _row(f"  {setting_words(board.best.settings)}"),
        ]
    return rows


def _recent(board: Board, width: int) -> list[Text]:
    has_times = width >= _NARROW
    return [
        _row(f"{clock_time(event.time)} " * has_times + event_line(event), style="dim")
        for event in board.recent
    ]


def _blocks(trials: list[RunningTrial], now_s: float, width: int) -> list[list[Text]]:
    """Return the lines of the heading, then those of each trial."""
    if width < _NARROW:
        return [[_row("running", style="bold")], *(_narrow(trial, now_s) for trial in trials)]
    rows = [_HEADING, *(_cells(trial, now_s) for trial in trials)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(_HEADING))]
    first, *others = (_aligned(row, widths) for row in rows)
    heading = _row(first + "  settings" * (width >= _WIDE), style="bold")
    blocks = []
    for line, trial in zip(others, trials, strict=True):
        numbers, settings = _row(line), setting_words(trial.settings)
        if trial.num_bad_steps:
            _mark_bad(numbers, widths)
        if width >= _WIDE:
            blocks.append([numbers.append(f"  {settings}")])
        else:
            blocks.append([numbers, _row(f"  {settings}", style="dim")])
    return [[heading], *blocks]


def _cells(trial: RunningTrial, now_s: float) -> tuple[str, ...]:
    planned = "" if trial.num_planned_steps is None else f"/{trial.num_planned_steps}"
    return (
        inert(trial.trial_id),
        f"{trial.step}{planned}",
        str(trial.num_bad_steps),
        "-" if trial.scale is None else f"{trial.scale:g}",
        "-" if trial.grad_norm is None else f"{trial.grad_norm:.3g}",
        f"{duration(now_s - trial.last_word_s)} ago",
    )


def _aligned(cells: tuple[str, ...], widths: list[int]) -> str:
    numbers = (cell.rjust(width) for cell, width in zip(cells[1:], widths[1:], strict=True))
    return "  ".join((cells[0].ljust(widths[0]), *numbers))


def _mark_bad(line: Text, widths: list[int]) -> None:
    end = sum(widths[: _BAD + 1]) + 2 * _BAD
    line.stylize("red", end - widths[_BAD], end)


def _narrow(trial: RunningTrial, now_s: float) -> list[Text]:
    name, step, bad, scale, norm, age = _cells(trial, now_s)
    numbers = _row(f"  {bad} bad, scale {scale}, grad norm {norm}, {age}")
    if trial.num_bad_steps:
        numbers.stylize("red", 2, 2 + len(bad))
    return [
        _row(f"{name}  {step}"),
        numbers,
        _row(f"  {setting_words(trial.settings)}", style="dim"),
    ]


def _row(text: str, *, style: str = "") -> Text:
    return Text(text, style=style, no_wrap=True, overflow="ellipsis")
