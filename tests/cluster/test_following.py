"""The log of a job: each line once, whatever happens to the connection."""

from pathlib import Path

import pytest

from stability_search.cluster.connection import AgentUnreachableError
from stability_search.cluster.following import follow
from stability_search.cluster.jobs import Job, JobState
from stability_search.errors import InfrastructureError
from tests.cluster.fake_jobs import FakeJobs

LOG = "".join(f"line {number}\n" for number in range(10))


class Script:
    """A job that prints a little more between two looks, and a clock that only it moves."""

    def __init__(self, jobs: FakeJobs, *, chunk: int = 17, drop_every: int = 0) -> None:
        self.jobs, self.chunk, self.drop_every = jobs, chunk, drop_every
        self.now_s, self.num_sleeps = 0.0, 0
        jobs.set("s", JobState.RUNNING)
        jobs.printed["s"] = ""

    def clock(self) -> float:
        return self.now_s

    def sleep(self, seconds: float) -> None:
        self.now_s += seconds
        self.num_sleeps += 1
        self.jobs.printed["s"] = LOG[: self.num_sleeps * self.chunk]
        if self.jobs.printed["s"] == LOG:
            self.jobs.set("s", JobState.SUCCEEDED, exit_code=0)
        if self.drop_every and self.num_sleeps % self.drop_every == 0:
            self.jobs.failures = 1

    def follow(self) -> tuple[Job, list[str], list[str]]:
        lines: list[str] = []
        news: list[str] = []
        job = follow(
            self.jobs, "s", lines.append, say=news.append, clock=self.clock, sleep=self.sleep
        )
        return job, lines, news


@pytest.fixture
def jobs(tmp_path: Path) -> FakeJobs:
    return FakeJobs(logs=tmp_path)


@pytest.mark.parametrize("chunk", [1, 7, 17, 1000])
def test_every_line_comes_once_and_whole(jobs: FakeJobs, chunk: int) -> None:
    job, lines, news = Script(jobs, chunk=chunk).follow()

    assert lines == LOG.splitlines()
    assert job.state is JobState.SUCCEEDED
    assert news == []


@pytest.mark.parametrize("drop_every", [2, 3, 5])
def test_a_dropped_connection_is_no_end_and_repeats_nothing(
    jobs: FakeJobs, drop_every: int
) -> None:
    job, lines, news = Script(jobs, drop_every=drop_every).follow()

    assert lines == LOG.splitlines()
    assert job.state.is_over
    assert news
    assert "Trying again" in news[0]
    assert news[-1].endswith("connected again.")


def test_a_last_line_without_an_end_is_not_lost(jobs: FakeJobs) -> None:
    jobs.set("s", JobState.FAILED, exit_code=1)
    jobs.printed["s"] = "one\ntwo"

    assert Script.follow(_over(jobs))[1] == ["one", "two"]


def _over(jobs: FakeJobs) -> Script:
    script = Script.__new__(Script)
    script.jobs, script.now_s = jobs, 0.0
    return script


def test_a_cluster_that_stays_away_is_given_up_after_ten_minutes(jobs: FakeJobs) -> None:
    script = Script(jobs)
    jobs.failures = 10**6
    news: list[str] = []

    with pytest.raises(InfrastructureError, match="does not answer"):
        follow(jobs, "s", print, say=news.append, clock=script.clock, sleep=script.sleep)
    assert 600 < script.now_s < 610
    assert len(news) == 1  # said once, not every two seconds


def test_a_cluster_that_was_started_anew_is_told(jobs: FakeJobs) -> None:
    with pytest.raises(InfrastructureError, match="its head was started anew"):
        follow(jobs, "gone", print, say=print)


def test_a_large_log_is_asked_for_less_often(jobs: FakeJobs) -> None:
    script = Script(jobs, chunk=1)
    waits: list[float] = []

    def sleep(seconds: float) -> None:
        waits.append(seconds)
        jobs.printed["s"] = "x" * 10**6 + "\n"
        if len(waits) == 2:
            jobs.set("s", JobState.SUCCEEDED)

    follow(jobs, "s", lambda _line: None, say=print, clock=script.clock, sleep=sleep)

    assert waits == [2.0, pytest.approx(10.0, rel=1e-3)]


def without_a_log(jobs: FakeJobs) -> None:
    def refuse(_job_id: str) -> str:
        raise AgentUnreachableError("no agent: planted.", hint="Give it a port.")

    jobs.log = refuse  # type: ignore[method-assign]


def test_a_log_that_cannot_be_read_does_not_hide_the_end(jobs: FakeJobs) -> None:
    script = Script(jobs, chunk=1)
    without_a_log(jobs)

    job, lines, news = script.follow()

    assert (job.state, lines) == (JobState.SUCCEEDED, [])
    assert script.now_s == pytest.approx(2.0 * len(LOG))  # and not ten minutes later
    (word,) = news
    assert word.startswith("no agent: planted. Give it a port.")


def test_a_connection_that_drops_at_the_very_end_costs_no_line(jobs: FakeJobs) -> None:
    jobs.set("s", JobState.SUCCEEDED, exit_code=0)
    jobs.printed["s"] = LOG
    script = _over(jobs)
    read, lines, news = jobs.log, list[str](), list[str]()

    def drop_once(job_id: str) -> str:
        jobs.log = read  # type: ignore[method-assign]
        raise InfrastructureError(f"{job_id}: the cluster does not answer: planted.")

    jobs.log = drop_once  # type: ignore[method-assign]
    follow(
        jobs, "s", lines.append, say=news.append, clock=script.clock, sleep=lambda _seconds: None
    )

    assert lines == LOG.splitlines()
    assert news[-1].endswith("its log can be read again.")


def test_a_log_that_cannot_be_read_for_an_hour_is_no_end_of_a_running_job(jobs: FakeJobs) -> None:
    jobs.set("s", JobState.RUNNING)
    without_a_log(jobs)
    now_s = 0.0

    def sleep(seconds: float) -> None:
        nonlocal now_s
        now_s += seconds
        if now_s >= 3600:
            jobs.set("s", JobState.STOPPED)

    job = follow(jobs, "s", print, say=print, clock=lambda: now_s, sleep=sleep)

    assert (job.state, now_s) == (JobState.STOPPED, 3600)


def test_a_job_that_waits_for_a_cpu_says_so_every_half_minute(jobs: FakeJobs) -> None:
    jobs.set("s", JobState.PENDING)
    news: list[str] = []
    now_s = 0.0

    def sleep(seconds: float) -> None:
        nonlocal now_s
        now_s += seconds
        if now_s >= 100:
            jobs.set("s", JobState.SUCCEEDED)

    follow(jobs, "s", print, say=news.append, clock=lambda: now_s, sleep=sleep)

    assert [word.partition(" so far")[0] for word in news] == [
        f"s: it waits for a free CPU, {seconds} s" for seconds in (30, 60, 90)
    ]
