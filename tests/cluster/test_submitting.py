"""The same study never runs twice: it is started, followed, reported or gone on with."""

import dataclasses
import json
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from stability_search.cluster.attempt import AttemptOrder
from stability_search.cluster.connection import AgentUnreachableError
from stability_search.cluster.endings import read_result, result_of
from stability_search.cluster.jobs import Job, JobRequest, JobState
from stability_search.cluster.parcel import Parcel
from stability_search.cluster.result import EXIT_CODES, NOT_INSTALLED, AttemptResult
from stability_search.cluster.stopping import stop
from stability_search.cluster.submitting import (
    Found,
    Place,
    command_of,
    known_attempt,
    latest_attempt,
    submit,
)
from stability_search.errors import InfrastructureError, UsageError
from tests.cluster.fake_jobs import NODE, FakeJobs

DEEP = "[" * 5000  # more than a reader of JSON goes down
PARCEL = Parcel(files={"space.yaml": b"search: {trials: 3}", "mine.py": b"x"})
RAISED = Parcel(files={"space.yaml": b"search: {trials: 4}", "mine.py": b"x"})
OTHER_TASK = Parcel(files={"space.yaml": b"search: {trials: 3}", "mine.py": b"y"})
OTHER_SPACE = Parcel(files=PARCEL.files, identity="other")


@pytest.fixture
def jobs(tmp_path: Path) -> FakeJobs:
    return FakeJobs(logs=tmp_path)


def send(jobs: FakeJobs, parcel: Parcel = PARCEL) -> Found:
    return submit(jobs, "s", parcel, Place()).found


def end(jobs: FakeJobs, attempt: str, state: JobState, exit_code: int) -> None:
    jobs.set(attempt, state, exit_code=exit_code)
    jobs.leave(attempt, AttemptResult(exit_code=exit_code, lines=("Verdict.",)))


def test_a_new_study_is_sent_and_gets_a_cpu_for_its_driver(jobs: FakeJobs) -> None:
    assert send(jobs) is Found.STARTED

    (request,) = jobs.requests
    assert request.id == "s"
    assert request.num_cpus == 1
    assert request.node_id == ""
    assert jobs.uploads == {request.package: PARCEL.archive()}
    assert request.num_cpus == 1
    assert request.environment == {
        "RAY_JOB_STOP_WAIT_TIME_S": "60",
        "STABILITY_SEARCH_DRIVER_CPUS": "1",
    }
    order = AttemptOrder(**json.loads(shlex.split(request.command)[-1]))
    assert (order.attempt, order.name, order.folder) == ("s", "s", "~/.stability-search/runs")


@pytest.mark.parametrize("state", [JobState.PENDING, JobState.RUNNING])
def test_a_study_that_runs_is_not_sent_again(jobs: FakeJobs, state: JobState) -> None:
    send(jobs)
    jobs.set("s", state)

    assert send(jobs) is Found.RUNNING
    assert send(jobs, RAISED) is Found.RUNNING
    assert len(jobs.requests) == 1


@pytest.mark.parametrize("exit_code", [0, 3, 5])
def test_a_study_with_a_verdict_is_not_sent_again(jobs: FakeJobs, exit_code: int) -> None:
    send(jobs)
    end(jobs, "s", JobState.FAILED if exit_code else JobState.SUCCEEDED, exit_code)

    assert send(jobs) is Found.FINISHED
    assert len(jobs.requests) == 1


def test_a_study_with_a_verdict_goes_on_with_a_larger_budget(jobs: FakeJobs) -> None:
    send(jobs)
    end(jobs, "s", JobState.SUCCEEDED, 0)

    assert send(jobs, RAISED) is Found.RESUMED
    end(jobs, "s.2", JobState.SUCCEEDED, 0)
    assert send(jobs, RAISED) is Found.FINISHED


@pytest.mark.parametrize("exit_code", [2, 4, 6, 130, 143])
def test_a_study_that_was_stopped_or_failed_goes_on_where_its_files_are(
    jobs: FakeJobs, exit_code: int
) -> None:
    send(jobs)
    end(jobs, "s", JobState.STOPPED, exit_code)

    assert send(jobs) is Found.RESUMED

    first, second = jobs.requests
    assert (second.id, second.node_id) == ("s.2", NODE)
    assert second.metadata == first.metadata
    end(jobs, "s.2", JobState.SUCCEEDED, 0)
    assert send(jobs) is Found.FINISHED
    assert latest_attempt(jobs, "s") == (2, known_attempt(jobs, "s"))


@pytest.mark.parametrize(("parcel", "what"), [(OTHER_TASK, "task"), (OTHER_SPACE, "space")])
@pytest.mark.parametrize("exit_code", [None, 0, 5, 143])
def test_another_study_under_the_name_of_one_is_refused(
    jobs: FakeJobs, exit_code: int | None, parcel: Parcel, what: str
) -> None:
    send(jobs)
    if exit_code is None:
        jobs.set("s", JobState.RUNNING)
    else:
        end(jobs, "s", JobState.FAILED, exit_code)

    with pytest.raises(UsageError, match=f"s on the cluster has another {what} than") as caught:
        send(jobs, parcel)
    assert "another --name" in caught.value.hint
    assert len(jobs.requests) == 1


def test_an_attempt_of_a_version_that_kept_no_hashes_is_believed(jobs: FakeJobs) -> None:
    jobs.set("s", JobState.RUNNING)

    assert send(jobs, OTHER_TASK) is Found.RUNNING


def never_placed(jobs: FakeJobs) -> None:
    jobs.known["s"] = dataclasses.replace(jobs.known["s"], state=JobState.STOPPED)


def never_installed(jobs: FakeJobs) -> None:
    jobs.set("s", JobState.FAILED, exit_code=NOT_INSTALLED)


def refused_there(jobs: FakeJobs) -> None:
    jobs.set("s", JobState.FAILED, exit_code=2)
    jobs.leave("s", AttemptResult(exit_code=2, problem="a study of that name is there"))


@pytest.mark.parametrize("fail", [never_placed, never_installed, refused_there])
def test_a_task_that_changed_before_the_study_ever_began_is_sent(
    jobs: FakeJobs, fail: Callable[[FakeJobs], None]
) -> None:
    send(jobs)
    fail(jobs)

    assert send(jobs, OTHER_TASK) is Found.RESUMED


def test_an_attempt_that_never_began_does_not_hide_the_task_of_one_that_did(
    jobs: FakeJobs,
) -> None:
    send(jobs)
    end(jobs, "s", JobState.STOPPED, 143)
    send(jobs)
    jobs.set("s.2", JobState.FAILED, exit_code=NOT_INSTALLED)

    with pytest.raises(UsageError, match="another task"):
        send(jobs, OTHER_TASK)


def test_a_driver_that_died_without_a_word_goes_on(jobs: FakeJobs) -> None:
    send(jobs)
    jobs.set("s", JobState.FAILED)

    assert send(jobs) is Found.RESUMED


def test_a_study_that_never_began_is_tried_again(jobs: FakeJobs) -> None:
    send(jobs)
    jobs.set("s", JobState.FAILED, exit_code=3)
    jobs.leave("s", AttemptResult(exit_code=3, problem="another version"))

    assert send(jobs) is Found.RESUMED


def test_where_the_node_has_died_the_study_starts_anew_on_any_other(jobs: FakeJobs) -> None:
    send(jobs)
    jobs.set("s", JobState.FAILED)
    jobs.nodes.clear()

    assert send(jobs) is Found.RESUMED
    assert jobs.requests[1].node_id == ""


def test_a_later_attempt_keeps_the_place_of_the_first(jobs: FakeJobs) -> None:
    submit(jobs, "s", PARCEL, Place(folder="/data/runs", python="python3"))
    jobs.set("s", JobState.STOPPED)

    send(jobs)

    assert jobs.requests[1].metadata == jobs.requests[0].metadata
    assert '"folder": "/data/runs"' in jobs.requests[1].command
    assert jobs.requests[1].command.startswith("python3 ")


def test_a_later_attempt_takes_another_python_where_one_is_named(jobs: FakeJobs) -> None:
    send(jobs)  # with the default, which has not the tool
    jobs.set("s", JobState.FAILED)

    submit(jobs, "s", PARCEL, Place(folder="/ignored", python="/venv/bin/python"))

    assert jobs.requests[0].command.startswith("python ")
    assert jobs.requests[1].command.startswith("/venv/bin/python ")
    assert "/ignored" not in jobs.requests[1].command


def test_where_somebody_is_faster_theirs_is_followed(jobs: FakeJobs) -> None:
    def slow_find(job_id: str) -> Job | None:  # it appears between the look and the submission
        found = original(job_id)
        jobs.known.setdefault("s", Job(id="s", state=JobState.PENDING))
        return found

    original = jobs.find
    jobs.find = slow_find  # type: ignore[method-assign]

    assert send(jobs) is Found.RUNNING
    assert jobs.requests == []


def test_where_somebody_is_faster_with_another_task_it_is_refused(jobs: FakeJobs) -> None:
    def slow_submit(request: JobRequest) -> bool:
        submit_theirs(dataclasses.replace(request, metadata=theirs))
        return submit_theirs(request)

    send(jobs, OTHER_TASK)
    theirs = jobs.known.pop("s").metadata
    submit_theirs = jobs.submit
    jobs.submit = slow_submit  # type: ignore[method-assign]

    with pytest.raises(UsageError, match="another task"):
        send(jobs)


def test_a_study_that_is_not_there_is_refused(jobs: FakeJobs) -> None:
    with pytest.raises(UsageError, match="http://localhost:8265 knows no study of that name"):
        known_attempt(jobs, "s")


# The command of a job


def exit_code_of(command: str) -> int:
    return subprocess.run(  # noqa: S602 - our own command, as Ray runs it
        command, shell=True, check=False, stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ).returncode


def test_a_python_that_is_not_there_says_so_by_its_exit_code() -> None:
    assert exit_code_of(command_of("attempt", "{}", "no-such-python")) == NOT_INSTALLED


def test_a_python_without_the_tool_says_so_by_its_exit_code(tmp_path: Path) -> None:
    bare = tmp_path / "python"
    bare.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -I -S "$@"\n')
    bare.chmod(0o700)

    assert exit_code_of(command_of("attempt", "{}", str(bare))) == NOT_INSTALLED


def test_the_twin_a_python_with_the_tool_runs_the_module(tmp_path: Path) -> None:
    program = tmp_path / "python"
    program.write_text('#!/bin/sh\n[ "$1" = -c ] && exit 0\necho "$@" >"$0.words"\nexit 7\n')
    program.chmod(0o700)

    assert exit_code_of(command_of("attempt", "it's {}", str(program))) == 7
    words = (tmp_path / "python.words").read_text()
    assert words == "-m stability_search.cluster.attempt it's {}\n"


# Ends


def test_an_end_is_taken_from_the_record_whatever_ray_says(jobs: FakeJobs) -> None:
    jobs.set("s", JobState.FAILED, exit_code=1)
    jobs.leave("s", AttemptResult(exit_code=0, lines=("Stable.",), run_directory="/r"))

    result = result_of(jobs, jobs.known["s"])

    assert result == AttemptResult(exit_code=0, lines=("Stable.",), run_directory="/r")


RECORD = '{"exit_code": %s, "lines": [], "run_directory": "/r", "problem": ""}'


@pytest.mark.parametrize("exit_code", sorted(EXIT_CODES))
def test_the_twin_a_record_with_an_exit_code_of_ours_is_read(
    jobs: FakeJobs, exit_code: int
) -> None:
    jobs.set("s", JobState.SUCCEEDED, exit_code=0)
    jobs.files = {"stability-search/s/result.json": (RECORD % exit_code).encode()}

    result = read_result(jobs, jobs.known["s"])
    assert result is not None
    assert result.exit_code == exit_code


@pytest.mark.parametrize(
    "text",
    [
        *(b"", b"[]", b'{"exit_code": 0}', b"\xff", DEEP.encode()),
        *(
            (RECORD % value).encode()
            for value in ("256", "-256", "7", "0.0", '"0"', "false", "null", "[]", "Infinity")
        ),
    ],
)
def test_a_record_that_cannot_be_read_is_none(jobs: FakeJobs, text: bytes) -> None:
    jobs.set("s", JobState.SUCCEEDED, exit_code=0)
    jobs.files = {"stability-search/s/result.json": text}

    assert read_result(jobs, jobs.known["s"]) is None


@pytest.mark.parametrize(("exit_code", "kind"), [(2, UsageError), (4, InfrastructureError)])
def test_what_kept_a_study_from_running_is_said(
    jobs: FakeJobs, exit_code: int, kind: type[Exception]
) -> None:
    jobs.set("s", JobState.FAILED, exit_code=exit_code)
    jobs.leave("s", AttemptResult(exit_code=exit_code, problem="the rule, the value"))

    with pytest.raises(kind, match="the rule, the value") as caught:
        result_of(jobs, jobs.known["s"])
    assert getattr(caught.value, "exit_code", None) == exit_code


def test_an_end_without_a_record_is_no_success(jobs: FakeJobs) -> None:
    jobs.set("s", JobState.SUCCEEDED, exit_code=0)

    with pytest.raises(InfrastructureError, match="left no record") as caught:
        result_of(jobs, jobs.known["s"])
    assert caught.value.exit_code == 4


def test_the_way_to_the_log_of_a_later_attempt_is_by_the_name(jobs: FakeJobs) -> None:
    jobs.set("s", JobState.STOPPED)
    jobs.set("s.12", JobState.FAILED, exit_code=0)

    with pytest.raises(InfrastructureError, match="`stability-search logs s --address http"):
        result_of(jobs, jobs.known["s.12"])


def test_a_cluster_without_the_tool_is_told_how_to_get_it(jobs: FakeJobs) -> None:
    jobs.set("s", JobState.FAILED, exit_code=NOT_INSTALLED)

    with pytest.raises(InfrastructureError, match=r"no stability-search .* --python"):
        result_of(jobs, jobs.known["s"])


def test_a_node_that_died_is_named_as_the_cause(jobs: FakeJobs) -> None:
    jobs.set("s", JobState.FAILED)
    jobs.nodes.clear()

    with pytest.raises(InfrastructureError, match="the node that its driver ran on has died"):
        result_of(jobs, jobs.known["s"])


# Stopping


def test_a_running_study_is_asked_to_end(jobs: FakeJobs) -> None:
    send(jobs)

    assert stop(jobs, known_attempt(jobs, "s")).state is JobState.STOPPED
    assert jobs.stopped == ["s"]


def test_the_latest_attempt_is_the_one_that_is_stopped(jobs: FakeJobs) -> None:
    send(jobs)
    jobs.set("s", JobState.STOPPED)
    send(jobs)

    stop(jobs, known_attempt(jobs, "s"))

    assert jobs.stopped == ["s.2"]


def test_a_study_that_waits_for_a_cpu_is_asked_and_not_waited_for(jobs: FakeJobs) -> None:
    send(jobs)
    jobs.stop = jobs.stopped.append  # type: ignore[method-assign]
    waits: list[float] = []

    assert stop(jobs, known_attempt(jobs, "s"), sleep=waits.append).state is JobState.PENDING
    assert jobs.stopped == ["s"]
    assert sum(waits) < 5


def test_a_study_that_does_not_end_is_said(jobs: FakeJobs) -> None:
    send(jobs)
    jobs.set("s", JobState.RUNNING)
    jobs.stop = lambda _job_id: None  # type: ignore[method-assign]
    waits: list[float] = []

    with pytest.raises(InfrastructureError, match="has not ended 90 s after"):
        stop(jobs, known_attempt(jobs, "s"), sleep=waits.append)
    assert sum(waits) == pytest.approx(90)


def test_a_record_that_no_agent_hands_out_is_not_said_to_be_missing(jobs: FakeJobs) -> None:
    def refuse(_node_id: str, _name: str) -> bytes:
        raise AgentUnreachableError("no agent: planted.")

    jobs.set("s", JobState.SUCCEEDED, exit_code=0)
    jobs.read_file = refuse  # type: ignore[method-assign]

    with pytest.raises(AgentUnreachableError, match=r"s: it has ended, but its.*planted"):
        result_of(jobs, jobs.known["s"])
    jobs.nodes.clear()
    with pytest.raises(InfrastructureError, match="the node that its driver ran on has died"):
        result_of(jobs, jobs.known["s"])
