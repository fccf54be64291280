"""The log of a job, line by line, until the job ends - whatever happens to the connection.

The whole log is asked for again and again, and only what is new is handed on: a dropped
connection then costs nothing, and no line comes twice. The larger the log, the less often.
Where only the log cannot be read, the cluster still says whether the job has ended.
"""

import time
from collections.abc import Callable

from stability_search.cluster.jobs import Job, Jobs, JobState
from stability_search.errors import InfrastructureError

_POLL_S = 2.0
_MAX_BYTES_PER_S = 100_000  # a log of 1 MB is asked for every 10 s
_PATIENCE_S = 600.0  # of a cluster that does not answer
_LOG_PATIENCE_S = 20.0  # of the log of a job that is over
_WAIT_WORD_S = 30.0  # between two words about a job that waits


class _Silence:
    """Something that does not answer: said once, and once more when it answers again."""

    def __init__(self, say: Callable[[str], None], clock: Callable[[], float]) -> None:
        self._say, self._clock = say, clock
        self._since: float | None = None

    def go_on(self, text: str) -> float:
        """Return for how many seconds there has been no answer."""
        if self._since is None:
            self._since = self._clock()
            self._say(text)
        return self._clock() - self._since

    def end(self, text: str) -> None:
        """Say that there is an answer, if there was none."""
        if self._since is not None:
            self._since = None
            self._say(text)


class _Waiting:
    """A job that has not begun: what it waits for is said again and again."""

    def __init__(self, say: Callable[[str], None], clock: Callable[[], float]) -> None:
        self._say, self._clock = say, clock
        self._since = clock()
        self._num_words = 0

    def look(self, job: Job) -> None:
        """Say that it waits where it is time to."""
        waited_s = self._clock() - self._since
        if job.state is JobState.PENDING and waited_s >= (self._num_words + 1) * _WAIT_WORD_S:
            self._num_words += 1
            self._say(
                f"{job.id}: it waits for a free CPU, {waited_s:.0f} s so far; Ray gives up after "
                "15 minutes."
            )


def follow(  # noqa: PLR0913 - what is followed, who hears of it, and two clocks
    jobs: Jobs,
    job_id: str,
    write: Callable[[str], None],
    *,
    say: Callable[[str], None],
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> Job:
    """Hand on every line of a job's log until the job is over.

    Args:
        jobs: The cluster.
        job_id: The job.
        write: Takes one line at a time, each once.
        say: Takes news of the connection.
        clock: Seconds of a clock that does not run backwards.
        sleep: Waits so many seconds.

    Returns:
        The job, over.

    Raises:
        InfrastructureError: The cluster does not answer for ten minutes, or does not know the
            job any more: its head was started anew.
    """
    num_written = 0
    cluster, printed, waiting = _Silence(say, clock), _Silence(say, clock), _Waiting(say, clock)
    while True:
        try:
            job = jobs.find(job_id)  # before its log: what it printed last is then in it
        except InfrastructureError as error:
            text = f"{error.message} Trying again; the study goes on meanwhile."
            if cluster.go_on(text) > _PATIENCE_S:
                raise
            sleep(_POLL_S)
            continue
        cluster.end(f"{jobs.url}: connected again.")
        if job is None:
            raise InfrastructureError(
                f"{job_id}: {jobs.url} knows no such job any more: its head was started anew.",
                hint="Submit the study again; it goes on where its files are.",
            )
        waiting.look(job)
        try:
            text = jobs.log(job_id)
        except InfrastructureError as error:
            said = f"{error} Its log is asked for again; the study goes on, and its end is told."
            if printed.go_on(said) >= _LOG_PATIENCE_S and job.state.is_over:
                return job
            sleep(_POLL_S)
            continue
        printed.end(f"{jobs.url}: its log can be read again.")
        end = len(text) if job.state.is_over else text.rfind("\n") + 1
        for line in text[num_written:end].splitlines():
            write(line)
        num_written = max(num_written, end)
        if job.state.is_over:
            return job
        sleep(max(_POLL_S, len(text) / _MAX_BYTES_PER_S))
