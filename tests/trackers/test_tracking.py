import dataclasses
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from stability_search.errors import UsageError
from stability_search.events import Event, EventName
from stability_search.trackers import feed as feeds
from stability_search.trackers import listening
from stability_search.trackers.feed import Feed
from stability_search.trackers.listening import tracking
from stability_search.trackers.names import TrackerName
from tests.trackers.fake_run import (
    NAMES,
    event,
    file_name,
    finished,
    played,
    q_of,
    rows,
    started,
    trial_event,
    write_run,
    write_trial,
)

# Writes what it is told to a file; answers the first `count` lines, and then does `after`.
PROCESS = """
import json, sys, time
log, count, after = open(sys.argv[1], "a"), int(sys.argv[2]), sys.argv[3]
for number, line in enumerate(sys.stdin):
    if number == count:
        exec(after)
    log.write(line)
    log.flush()
    print(json.dumps({"logged": json.loads(sys.argv[4])} if number == 0 else {}), flush=True)
open(sys.argv[1] + "-ended", "w").close()
"""
# A pipe, at whose other end the test waits.
HANG = 'open(sys.argv[1] + "-hangs", "w").close(); time.sleep(600)'
WAIT = """
if number == 1:
    open(sys.argv[1] + "-hangs", "w").close()
    open(sys.argv[1] + "-goes-on").close()
"""
DIE = "sys.exit(7)"
FAIL = """
print(json.dumps({"error": "ConnectionError: the server is gone"}), flush=True)
sys.exit()
"""

HALF = """
sys.stdout.write('{"logg')
sys.exit()
"""
LONG_S = 60.0  # a busy machine is no failure

StartProcess = Callable[..., None]


@pytest.fixture(name="script")
def _script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[StartProcess]:
    """Put a scripted process in the place of a tool's; all must be gone at the end."""
    processes: list[subprocess.Popen[str]] = []
    os.mkfifo(tmp_path / "told-hangs")
    monkeypatch.setattr(feeds, "_END_S", LONG_S)

    def script(
        *,
        answers: int = 1000,
        after: str = "pass",
        logged: tuple[str, ...] = (),
        hangs_at_once: bool = False,
    ) -> None:
        words = [str(tmp_path / "told"), str(answers), after, json.dumps(logged)]
        program = "import time; time.sleep(600)" if hangs_at_once else PROCESS

        def start(_name: TrackerName, _log: object) -> "subprocess.Popen[str]":
            process = subprocess.Popen(  # noqa: S603 - our own words
                [sys.executable, "-I", "-S", "-c", program, *words],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                process_group=0,
            )
            processes.append(process)
            return process

        monkeypatch.setattr(feeds, "_start", start)

    yield script
    left = [process.pid for process in processes if process.poll() is None]
    for process in processes:
        process.kill()
        process.wait()
    assert not left, "a tracker's process was left behind"


def told(tmp_path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (tmp_path / "told").read_text().splitlines()]


def told_trials(tmp_path: Path) -> list[object]:
    return [job["name"] for job in told(tmp_path) if job.get("do") == "trial"]


def wait_until_it_hangs(tmp_path: Path) -> None:
    (tmp_path / "told-hangs").read_text()


def warnings_in(heard: list[Event]) -> list[str]:
    messages = [one for one in heard if one.name == EventName.MESSAGE]
    return [one.text("text") for one in messages if one.text("level") == "warning"]


def test_a_tracker_is_told_of_every_trial_once_with_its_score(
    tmp_path: Path, script: StartProcess
) -> None:
    script()
    heard: list[Event] = []
    run = write_run(tmp_path / "run")

    with tracking(["tensorboard"], heard.append) as hear:
        for one in played(run):
            hear(one)

    begin, *trials, finish = told(tmp_path)
    assert begin["directory"] == str(run.path)
    assert trials == [{"do": "trial", "name": file_name(row), "q": q_of(row)} for row in rows()]
    assert finish == {"do": "finish", "verdict": "stable", "exit_code": 0}
    assert warnings_in(heard) == []


def test_the_listener_behind_hears_every_event_first(tmp_path: Path, script: StartProcess) -> None:
    script()
    heard: list[Event] = []
    events: list[Event] = []

    with tracking(["tensorboard"], heard.append) as hear:
        for one in played(write_run(tmp_path / "run")):
            events.append(one)
            hear(one)
            assert [e for e in heard if e.name != EventName.MESSAGE] == events


def test_a_failure_is_one_warning_and_then_silence(tmp_path: Path, script: StartProcess) -> None:
    script(answers=3, after=FAIL)
    heard: list[Event] = []

    with tracking(["mlflow"], heard.append) as hear:
        for one in played(write_run(tmp_path / "run")):
            hear(one)

    (said,) = warnings_in(heard)
    assert said.startswith("mlflow: ConnectionError: the server is gone. `resume` with --tracker")
    assert len(told(tmp_path)) == 3


def test_a_failure_is_told_while_the_study_runs(
    tmp_path: Path, script: StartProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    script(answers=0, after=FAIL)
    heard: list[Event] = []
    run = write_run(tmp_path / "run")
    (feed,) = made = [Feed(TrackerName.MLFLOW)]
    monkeypatch.setattr(listening, "Feed", lambda _name: made.pop())

    with tracking(["mlflow"], heard.append) as hear:
        hear(started(run))
        assert feed.is_done_within(LONG_S)
        hear(event(EventName.TRIAL_PROGRESS, trial_id="search-000", step=1))
        assert len(warnings_in(heard)) == 1
        before = len(heard)
        hear(finished(run))

    assert [one.name for one in heard[before:]] == [EventName.STUDY_FINISHED]


def test_one_tracker_that_fails_leaves_the_others_alone(
    tmp_path: Path, script: StartProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    script()
    good = feeds._start  # noqa: SLF001

    def start(name: TrackerName, log: object) -> object:
        if name is TrackerName.WANDB:
            raise OSError("no more processes")
        return good(name, log)  # type: ignore[arg-type]

    monkeypatch.setattr(feeds, "_start", start)
    heard: list[Event] = []

    with tracking(["wandb", "tensorboard"], heard.append) as hear:
        for one in played(write_run(tmp_path / "run")):
            hear(one)

    assert [text.partition(":")[0] for text in warnings_in(heard)] == ["wandb"]
    assert told_trials(tmp_path) == list(NAMES)


def test_a_process_that_dies_is_a_failure_that_names_the_log(
    tmp_path: Path, script: StartProcess
) -> None:
    script(answers=2, after=DIE)
    heard: list[Event] = []

    with tracking(["wandb"], heard.append) as hear:
        for one in played(write_run(tmp_path / "run")):
            hear(one)

    (said,) = warnings_in(heard)
    assert said.startswith("wandb: its process ended; see run.log.")


def test_half_an_answer_is_a_failure_too(tmp_path: Path, script: StartProcess) -> None:
    script(answers=0, after=HALF)
    heard: list[Event] = []

    with tracking(["wandb"], heard.append) as hear:
        for one in played(write_run(tmp_path / "run")):
            hear(one)

    (said,) = warnings_in(heard)
    assert said.startswith("wandb: its answer cannot be read; see run.log.")


def test_a_process_that_is_there_only_after_it_was_left_is_ended_at_once(
    tmp_path: Path, script: StartProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    script(hangs_at_once=True)
    monkeypatch.setattr(feeds, "_CLOSE_S", 600.0)
    start, kill, was_left = feeds._start, Feed._kill, threading.Event()  # noqa: SLF001

    def start_late(name: TrackerName, log: object) -> object:
        assert was_left.wait(LONG_S)
        return start(name, log)  # type: ignore[arg-type]

    def kill_and_go_on(feed: Feed) -> None:
        kill(feed)
        was_left.set()

    monkeypatch.setattr(feeds, "_start", start_late)
    monkeypatch.setattr(Feed, "_kill", kill_and_go_on)
    feed = Feed(TrackerName.WANDB)
    feed.begin(write_run(tmp_path / "run").path, "1" * 32, [])

    feed.leave()

    assert feed.is_done_within(0.0)
    assert feed.problem == ""


def test_a_tool_that_hangs_is_left_after_a_bounded_time_and_what_is_left_is_counted(
    tmp_path: Path, script: StartProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(listening, "DRAIN_S", 0.3)
    script(answers=2, after=HANG)
    heard: list[Event] = []

    with tracking(["mlflow"], heard.append) as hear:
        for one in played(write_run(tmp_path / "run")):
            hear(one)
        wait_until_it_hangs(tmp_path)

    (said,) = warnings_in(heard)
    assert "entries were not logged in time" in said


def test_after_sigterm_nothing_is_waited_for(
    tmp_path: Path, script: StartProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    script(answers=1, after=HANG)
    waits: list[float] = []
    wait = Feed.is_done_within

    def noted(feed: Feed, seconds: float) -> bool:
        waits.append(seconds)
        return wait(feed, seconds)

    monkeypatch.setattr(Feed, "is_done_within", noted)
    run = write_run(tmp_path / "run")
    heard: list[Event] = []

    with tracking(["mlflow"], heard.append) as hear:
        hear(started(run))
        write_trial(run, rows()[0])
        hear(trial_event(rows()[0]))
        wait_until_it_hangs(tmp_path)
        hear(event(EventName.STUDY_FINISHED, verdict="incomplete", exit_code=143, report=None))

    assert waits[:-1] == [0.0, 0.0]
    assert 0.0 <= waits[-1] <= 0.5
    (said,) = warnings_in(heard)
    assert said.startswith("mlflow: 1 entry was not logged in time.")


def test_after_sigterm_a_tool_may_end_what_it_holds_open_and_logs_nothing_more(
    tmp_path: Path, script: StartProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(listening, "_STOP_S", LONG_S)
    script(answers=1, after=WAIT)
    run = write_run(tmp_path / "run")
    heard: list[Event] = []
    os.mkfifo(tmp_path / "told-goes-on")
    stop = Feed.stop

    def stop_and_let_go(feed: Feed) -> None:
        stop(feed)
        (tmp_path / "told-goes-on").write_text("")

    monkeypatch.setattr(Feed, "stop", stop_and_let_go)

    with tracking(["mlflow"], heard.append) as hear:
        hear(started(run))
        for row in rows()[:4]:
            write_trial(run, row)
            hear(trial_event(row))
        wait_until_it_hangs(tmp_path)
        hear(event(EventName.STUDY_FINISHED, verdict="incomplete", exit_code=143, report=None))

    assert (tmp_path / "told-ended").exists()
    assert told_trials(tmp_path) == [file_name(rows()[0])]
    (said,) = warnings_in(heard)
    assert said.startswith("mlflow: 3 entries were not logged in time.")


@pytest.mark.parametrize(
    ("verdict", "exit_code", "seconds"), [("stable", 0, 60.0), ("incomplete", 130, 5.0)]
)
def test_a_study_that_was_stopped_waits_less_than_one_that_ended(  # noqa: PLR0913, PLR0917 - a table
    verdict: str,
    exit_code: int,
    seconds: float,
    tmp_path: Path,
    script: StartProcess,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    script(answers=1, after=HANG)
    waits: list[float] = []
    monkeypatch.setattr(listening, "time", SimpleNamespace(monotonic=lambda: 7.0))
    monkeypatch.setattr(Feed, "is_done_within", lambda _feed, wait_s: waits.append(wait_s))
    run = write_run(tmp_path / "run")

    with tracking(["mlflow"]) as hear:
        hear(started(run))
        end = finished(run)
        hear(
            dataclasses.replace(
                end, fields={**end.fields, "verdict": verdict, "exit_code": exit_code}
            )
        )
        wait_until_it_hangs(tmp_path)

    assert waits == [1.0, seconds, 0.5]  # a moment before it is said, all of it, and to stop


def test_what_was_logged_before_is_not_logged_again(tmp_path: Path, script: StartProcess) -> None:
    script(logged=NAMES[:4])
    run = write_run(tmp_path / "run")
    for row in rows()[:6]:  # of an earlier process
        write_trial(run, row)

    with tracking(["tensorboard"]) as hear:
        for one in played(run, rows()[6:]):
            hear(one)

    assert sorted(map(str, told_trials(tmp_path))) == sorted(NAMES[4:])


def test_a_finished_run_that_is_resumed_is_logged_whole(
    tmp_path: Path, script: StartProcess
) -> None:
    script()
    run = write_run(tmp_path / "run")
    *_, end = played(run)

    with tracking(["mlflow"]) as hear:
        hear(end)  # the study had nothing left to do

    assert sorted(map(str, told_trials(tmp_path))) == sorted(NAMES)
    assert told(tmp_path)[-1]["do"] == "finish"


def test_a_run_directory_that_takes_no_file_is_a_warning(
    tmp_path: Path, script: StartProcess
) -> None:
    script()
    heard: list[Event] = []
    run = write_run(tmp_path / "run")
    (run.path / "trackers.json").mkdir()

    with tracking(["tensorboard", "mlflow"], heard.append) as hear:
        for one in played(run):
            hear(one)

    assert [text.partition(":")[0] for text in warnings_in(heard)] == ["tensorboard", "mlflow"]
    assert all("could not be written" in text for text in warnings_in(heard))


def test_a_study_that_never_starts_says_nothing_of_trackers(script: StartProcess) -> None:
    script()
    heard: list[Event] = []

    with pytest.raises(UsageError, match="locked"), tracking(["tensorboard"], heard.append):
        raise UsageError("locked")

    assert heard == []
