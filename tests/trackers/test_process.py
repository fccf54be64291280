import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from stability_search.trackers.base import StudyEnd, StudyLog, TrialLog
from stability_search.trackers.process import serve
from tests.trackers.fake_run import file_name, rows, write_end, write_run, write_trial


class Scripted:
    """Notes what it is told, and raises where it shall."""

    def __init__(self, *, fails_at: str = "", known: frozenset[str] = frozenset()) -> None:
        self.told: list[str] = []
        self._fails_at, self._known = fails_at, known

    def _note(self, what: str) -> None:
        self.told.append(what)
        if what == self._fails_at:
            raise ConnectionError("the server\nis gone")

    def begin(self, study: StudyLog) -> frozenset[str]:
        self._note(f"begin {study.name} {study.study_id}")
        return self._known

    def add_trial(self, trial: TrialLog) -> None:
        self._note(trial.name)

    def finish(self, end: StudyEnd) -> None:
        self._note(f"finish {end.verdict} {end.choice}")

    def stop(self) -> None:
        self._note("stop")

    def close(self) -> None:
        self._note("close")


def answers(tracker: Scripted, jobs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    said: list[dict[str, Any]] = []
    serve(lambda: tracker, iter([json.dumps(job) for job in jobs]), said.append)
    return said


@pytest.fixture(name="jobs")
def _jobs(tmp_path: Path) -> list[dict[str, Any]]:
    run = write_run(tmp_path / "run")
    names = [file_name(row) for row in rows()[:2]]
    for row in rows()[:2]:
        write_trial(run, row)
    write_end(run)
    return [
        {"directory": str(run.path), "study_id": "1" * 32},
        *({"do": "trial", "name": name, "q": None} for name in names),
        {"do": "finish", "verdict": "stable", "exit_code": 0},
    ]


def test_a_tracker_is_told_of_the_study_its_trials_and_its_end_and_is_closed(
    jobs: list[dict[str, Any]],
) -> None:
    tracker = Scripted(known=frozenset({"b", "a"}))

    said = answers(tracker, jobs)

    assert said == [{"logged": ["a", "b"]}, {}, {}, {}]
    assert tracker.told == [
        f"begin teacher {'1' * 32}",
        *(file_name(row) for row in rows()[:2]),
        "finish stable c0ffee",
        "close",
    ]


def test_a_tracker_is_told_where_the_study_went_away_without_an_end(
    jobs: list[dict[str, Any]],
) -> None:
    tracker = Scripted()

    assert answers(tracker, jobs[:2]) == [{"logged": []}, {}]
    assert tracker.told[-2:] == ["stop", "close"]

    tracker = Scripted(fails_at="stop")
    assert answers(tracker, jobs[:1])[-1] == {"error": "ConnectionError: the server is gone"}
    assert tracker.told[-2:] == ["stop", "close"]
    assert answers(Scripted(), []) == []  # it was stopped before it began


def test_the_first_error_is_told_in_one_line_and_ends_it(jobs: list[dict[str, Any]]) -> None:
    first = file_name(rows()[0])
    tracker = Scripted(fails_at=first)

    said = answers(tracker, jobs)

    assert said == [{"logged": []}, {"error": "ConnectionError: the server is gone"}]
    assert tracker.told == [f"begin teacher {'1' * 32}", first, "close"]


def test_a_damaged_space_is_an_error_and_no_traceback(
    tmp_path: Path, jobs: list[dict[str, Any]]
) -> None:
    (tmp_path / "run" / "space.yaml").write_text("task: [")
    tracker = Scripted()

    (said,) = answers(tracker, jobs)

    assert said["error"].startswith("SpaceError: ")
    assert "\n" not in said["error"]
    assert tracker.told == []  # nothing was opened


HANGING = """
import time
from stability_search.trackers import process

class Hanging:
    def begin(self, study):
        print("printed by a tool")
        time.sleep(600)

    def stop(self):
        pass

    def close(self):
        pass

process._LINGER_S = 0.1
process.new_tracker = lambda name: Hanging()
process.main()
"""


@pytest.mark.fault
def test_its_process_ends_when_the_study_s_is_gone_even_in_a_call_that_hangs(
    jobs: list[dict[str, Any]],
) -> None:
    process = subprocess.Popen(  # noqa: S603 - our own words
        [sys.executable, "-c", HANGING, "tensorboard"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )

    out, err = process.communicate(json.dumps(jobs[0]) + "\n")  # closes its input, and waits

    assert (process.returncode, out) == (1, "")
    assert "Traceback" not in err


@pytest.mark.fault
def test_what_a_tool_prints_is_kept_apart_from_the_answers(jobs: list[dict[str, Any]]) -> None:
    chatty = HANGING.replace("time.sleep(600)", "return frozenset()").replace("0.1", "600.0")
    done = subprocess.run(  # noqa: S603 - our own words
        [sys.executable, "-c", chatty, "tensorboard"],
        input=json.dumps(jobs[0]) + "\n",
        capture_output=True,
        text=True,
        check=True,
    )

    assert done.stdout == '{"logged": []}\n'
    assert done.stderr == "printed by a tool\n"


@pytest.mark.fault
def test_its_process_ends_after_an_error_while_the_study_s_goes_on(
    jobs: list[dict[str, Any]],
) -> None:
    failing = HANGING.replace("time.sleep(600)", "raise ConnectionError('gone')")
    process = subprocess.Popen(  # noqa: S603 - our own words
        [sys.executable, "-c", failing, "tensorboard"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    with process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdin.write(json.dumps(jobs[0]) + "\n")
        process.stdin.flush()

        assert json.loads(process.stdout.readline()) == {"error": "ConnectionError: gone"}
        assert process.wait() == 0  # its input is still open
        assert process.stderr.read() == "printed by a tool\n"
