import io
import json
import math
import os
import sys
import threading
from datetime import UTC, datetime
from typing import Any

import pytest
from rich.console import Console

from stability_search.cli.board import Board
from stability_search.cli.lines import duration, event_line, setting_words
from stability_search.cli.live import LiveView, view
from stability_search.cli.outlets import JsonLines, PlainLines, Sink, choose_outlet, clock_time
from stability_search.events import Event
from stability_search.inert import inert
from stability_search.records.values import Json

HOSTILE = (
    "\x1b[2J\x1b]0;title\x07",
    "[/red][bold]",
    "\r\x08\x7f\x9b31m",
    "a\u202eb\u2028c",
    "\ud800",
    "line\nline",
)
SETTINGS: dict[str, Json] = {"learning_rate": 1e-4, "precision": "fp16", "clip_norm": None}


def event(name: str, second: int = 0, **fields: Json) -> Event:
    return Event(name=name, time=f"2026-03-01T12:00:{second:02d}+00:00", fields=fields)


STORY = (
    event(
        "study_started",
        run_directory="reports/t-1",
        device="cpu",
        trials=48,
        slots=2,
        space="teacher.yaml",
    ),
    event("stage_started", 1, stage="search", planned=48),
    event("trial_started", 2, trial_id="search-0000", stage="search", settings=SETTINGS),
    event("trial_started", 2, trial_id="search-0001", stage="search", settings=SETTINGS),
    event(
        "trial_progress",
        3,
        trial_id="search-0000",
        step=120,
        num_planned_steps=200,
        num_bad_steps=3,
        scale=1024.0,
        grad_norm=0.4567,
        loss=math.nan,
    ),
    event(
        "trial_finished",
        4,
        trial_id="search-0001",
        stage="search",
        outcome="pruned",
        reason="evidence 104 >= 100",
        q=0.0,
        num_steps=17,
        num_planned_steps=200,
        wall_s=1.25,
        settings=SETTINGS,
    ),
    event("trial_retried", 5, trial_id="search-0002", attempt=2, reason="its node was lost"),
    event("node_quarantined", 6, node="node-2", reason="3 infrastructure ends in a row"),
    event("message", 7, level="warning", text="fp16 on a CPU"),
    event("message", 8, level="info", text="nothing more"),
    event("study_finished", 9, verdict="none", exit_code=3, report="reports/t-1/report.html"),
)


def rendered(board: Board, now_s: float, *, width: int = 100, height: int = 24) -> str:
    out = io.StringIO()
    console = Console(file=out, width=width, height=height, markup=False, highlight=False)
    console.print(view(board, now_s, width=width, height=height))
    return out.getvalue()


def test_plain_lines_word_by_word() -> None:
    err = io.StringIO()
    with PlainLines(Sink(err), clock=lambda: 0.0) as outlet:
        for one in STORY:
            outlet.show(one)

    assert err.getvalue().splitlines() == [
        "12:00:00 study started, 48 search trials, 2 at a time, on cpu; files in reports/t-1",
        "12:00:01 stage search, 48 trials",
        "12:00:02 search-0000 started: learning_rate=0.0001 precision=fp16 clip_norm=null",
        "12:00:02 search-0001 started: learning_rate=0.0001 precision=fp16 clip_norm=null",
        "12:00:04 search-0001 pruned (evidence 104 >= 100), q 0.000, 17 of 200 steps in 1.2 s",
        "12:00:05 search-0002 is tried again: its node was lost",
        "12:00:06 node node-2 is left out: 3 infrastructure ends in a row",
        "12:00:07 warning: fp16 on a CPU",
        "12:00:08 nothing more",
        "12:00:09 study finished: none, exit 3",
    ]


def test_the_line_of_every_30_s_tells_progress_outcomes_and_silence() -> None:
    err, clock = io.StringIO(), iter([0.0] * 5 + [1.0, 20.0])
    outlet = PlainLines(
        Sink(err),
        clock=lambda: next(clock),
        utc=lambda: datetime(2026, 3, 1, 12, 0, 30, tzinfo=UTC),
    )
    for one in STORY[:6]:
        outlet.show(one)
    outlet.beat()

    assert err.getvalue().splitlines()[-1] == (
        "12:00:30 search: 1 of 48 trials done, about 10 min left in this stage; "
        "so far 1 pruned; 1 trial running, longest silence 20 s"
    )


def test_the_30_s_lines_come_by_themselves_and_end_with_the_outlet(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("stability_search.cli.outlets.HEARTBEAT_S", 0.001)
    has_written = threading.Event()

    class Stream(io.StringIO):
        def flush(self) -> None:
            has_written.set()

    err, before = Stream(), set(threading.enumerate())
    with PlainLines(Sink(err)):
        assert has_written.wait(60)
        (beating,) = [
            one for one in set(threading.enumerate()) - before if "_keep_beating" in one.name
        ]
    beating.join(60)
    assert not beating.is_alive()
    assert "starting" in err.getvalue()


def test_json_lines_hold_every_event_but_progress_and_messages() -> None:
    out, err = io.StringIO(), io.StringIO()
    with JsonLines(Sink(out), Sink(err)) as outlet:
        for one in STORY:
            outlet.show(one)

    lines = [json.loads(line, parse_constant=pytest.fail) for line in out.getvalue().splitlines()]
    assert [line["event"] for line in lines] == [
        "study_started",
        "stage_started",
        "trial_started",
        "trial_started",
        "trial_finished",
        "trial_retried",
        "node_quarantined",
        "study_finished",
    ]
    assert lines[4]["reason"] == "evidence 104 >= 100"
    assert {line["schema"] for line in lines} == {"stability-search/events/1"}
    assert err.getvalue() == "warning: fp16 on a CPU\nnothing more\n"


def test_the_live_view_row_by_row() -> None:
    board = Board()
    for one in STORY[:6]:
        board.apply(one, 0.0)
    board.apply(
        event(
            "trial_finished",
            trial_id="search-0003",
            stage="search",
            outcome="completed",
            q=0.8125,
            settings=SETTINGS,
        ),
        0.0,
    )

    text = [line.rstrip() for line in rendered(board, 48.0, width=140).splitlines()]

    assert text[:6] == [
        "stability-search on cpu  reports/t-1",
        "search: 2 of 48 trials done, about 14 min left in this stage",
        "1 completed, 1 pruned",
        "about 13 s saved by stopping early",
        "best so far: q 0.406 (search, 2 seeds)",
        f"  {setting_words(SETTINGS)}",
    ]
    assert text[7].split() == [
        *("running", "step", "bad", "scale", "grad", "norm", "last", "word", "settings")
    ]
    assert text[8].split() == [
        *("search-0000", "120/200", "3", "1024", "0.457", "48", "s", "ago"),
        *("learning_rate=0.0001", "precision=fp16", "clip_norm=null"),
    ]
    assert text[-1] == "12:00:00 search-0003 completed, q 0.812"


@pytest.mark.parametrize(
    ("width", "lines"),
    [
        (
            80,
            [
                "running         step  bad  scale  grad norm  last word",
                "search-0000  120/200    3   1024      0.457   48 s ago",
                "  learning_rate=0.0001 precision=fp16 clip_norm=null",
            ],
        ),
        (
            50,
            [
                "running",
                "search-0000  120/200",
                "  3 bad, scale 1024, grad norm 0.457, 48 s ago",
                "  learning_rate=0.0001 precision=fp16 clip_norm=n\u2026",
            ],
        ),
    ],
)
def test_a_narrow_terminal_gets_every_number_on_lines_of_its_own(
    width: int, lines: list[str]
) -> None:
    board = Board()
    for one in (*STORY[:3], STORY[4]):
        board.apply(one, 0.0)

    text = [line.rstrip() for line in rendered(board, 48.0, width=width).splitlines()]

    first = next(index for index, line in enumerate(text) if line.startswith("running"))
    assert text[first : first + len(lines)] == [*lines]
    assert max(map(len, text)) <= width


@pytest.mark.parametrize("width", [40, 50, 80, 120])
@pytest.mark.parametrize("height", [16, 20, 24, 40])
def test_the_view_of_a_busy_study_fits_the_terminal(width: int, height: int) -> None:
    board = Board()
    for one in (*STORY[:3], *STORY[4:-1]):
        board.apply(one, 0.0)
    for index in range(30):
        board.apply(event("trial_started", trial_id=f"t{index}", settings=SETTINGS), 0.0)

    text = rendered(board, 9.0, width=width, height=height)

    assert len(text.splitlines()) < height
    assert "search-0000" in text
    assert text.count("\nand ") == 1


def test_a_low_terminal_counts_the_trials_it_cannot_list() -> None:
    board = Board()
    for index in range(30):
        board.apply(event("trial_started", trial_id=f"t{index}", settings={}), 0.0)

    text = rendered(board, 0.0, height=20)

    assert "and 24 more" in text
    assert len(text.splitlines()) < 20  # a row is left for the cursor


@pytest.mark.parametrize("variable", [None, "1"])
def test_no_color_is_obeyed(variable: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    if variable:
        monkeypatch.setenv("NO_COLOR", variable)
    terminal = Terminal()
    with LiveView(terminal) as live:
        for one in STORY[:6]:
            live.show(one)

    assert ("\x1b[31m" in terminal.getvalue()) == (variable is None)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_what_others_print_while_the_live_view_is_drawn_does_not_reach_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Ray writes to `sys.stderr`, whose descriptor leads to the log meanwhile."""
    monkeypatch.setenv("TERM", "xterm-256color")
    others = io.StringIO()
    monkeypatch.setattr("sys.stderr", others)
    terminal = Terminal()

    with LiveView(terminal):
        sys.stderr.write("a word of Ray's\n")

    assert others.getvalue() == "a word of Ray's\n"
    assert "Ray" not in terminal.getvalue()


def test_the_live_view_leaves_the_cursor_visible_while_it_runs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A second Ctrl-C ends the process at once: nobody would show the cursor again."""
    monkeypatch.setenv("TERM", "xterm-256color")
    terminal = Terminal()
    with LiveView(terminal):
        text = terminal.getvalue()
        assert text.rindex("\x1b[?25h") > text.rindex("\x1b[?25l")


@pytest.mark.parametrize("hostile", HOSTILE)
def test_hostile_strings_are_inert_wherever_they_appear(
    hostile: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TERM", "dumb")
    fields: dict[str, Any] = dict.fromkeys(
        (
            *("run_directory", "device", "stage", "trial_id", "outcome", "reason", "node"),
            *("text", "level", "verdict"),
        ),
        hostile,
    )
    err, terminal, board = io.StringIO(), Terminal(), Board()
    plain, live = PlainLines(Sink(err), clock=lambda: 0.0), LiveView(terminal)
    names = ("study_started", "stage_started", "trial_started", "trial_retried", "message")
    for name in (*names, "node_quarantined", "trial_finished", "trial_started", "study_finished"):
        one = event(name, **fields, settings={hostile: hostile}, q=0.5)
        plain.show(one)
        live.show(one)
        board.apply(one, 0.0)
        assert event_line(one) in err.getvalue()
    plain.beat()

    text = err.getvalue() + terminal.getvalue() + rendered(board, 0.0, height=40)
    assert all(character == "\n" or character.isprintable() for character in text)
    # Only a message may have several lines, and those are set in.
    assert err.getvalue().count("\n") - err.getvalue().count("\n    ") == 10
    text.encode()  # no lone surrogate


def test_the_twin_a_string_that_is_not_spelled_out_would_be_seen() -> None:
    assert not HOSTILE[0].isprintable()
    assert inert(HOSTILE[0]) == r"\x1b[2J\x1b]0;title\x07"
    assert inert("a\nb", keeps="\n") == "a\nb"


def test_a_closed_pipe_silences_the_sink_and_raises_nothing() -> None:
    read_end, write_end = os.pipe()
    os.close(read_end)
    stream = os.fdopen(write_end, "w")
    sink = Sink(stream)

    sink.write("one")
    sink.write("two")
    stream.close()  # its last flush leads nowhere

    with pytest.raises(BrokenPipeError, match="Broken pipe"):  # the twin
        _write_to_closed_pipe()


def _write_to_closed_pipe() -> None:
    read_end, write_end = os.pipe()
    os.close(read_end)
    try:
        os.write(write_end, b"one")
    finally:
        os.close(write_end)


def test_a_pipe_gets_plain_lines_and_a_terminal_the_live_view(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out, err = Sink(io.StringIO()), io.StringIO()
    assert isinstance(choose_outlet(json_events=False, out=out, err=err), PlainLines)
    assert isinstance(choose_outlet(json_events=True, out=out, err=err), JsonLines)

    monkeypatch.setenv("TERM", "xterm")
    assert isinstance(choose_outlet(json_events=False, out=out, err=Terminal()), LiveView)
    monkeypatch.setenv("TERM", "dumb")
    assert isinstance(choose_outlet(json_events=False, out=out, err=Terminal()), PlainLines)


@pytest.mark.parametrize(
    ("iso", "shown"),
    [("2026-03-01T12:34:56Z", "12:34:56"), ("\x1b[31m", "--:--:--"), ("", "--:--:--")],
)
def test_an_unreadable_time_is_dashes(iso: str, shown: str) -> None:
    assert clock_time(iso) == shown


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        *((0, "0.0 s"), (9.94, "9.9 s"), (9.99, "10 s"), (119.4, "119 s")),
        *((119.9, "2 min"), (3590, "1 h 00 min"), (7500, "2 h 05 min")),
    ],
)
def test_durations_as_a_reader_says_them(seconds: float, words: str) -> None:
    assert duration(seconds) == words
