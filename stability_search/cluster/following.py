"""The log of a job, line by line, until the job ends - whatever happens to the connection.

The whole log is asked for again and again, and only what is new is handed on: a dropped
connection then costs nothing, and no line comes twice. The larger the log, the less often.
"""

import time
from collections.abc import Callable

from stability_search.cluster.jobs import Job, Jobs
from stability_search.errors import InfrastructureError

_POLL_S = 2.0
_MAX_BYTES_PER_S = 100_000  # a log of 1 MB is asked for every 10 s
_PATIENCE_S = 600.0  # of a cluster that does not answer


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
    silent_since: float | None = None
    while True:
        try:
            job = jobs.find(job_id)  # before its log: what it printed last is then in it
            text = "" if job is None else jobs.log(job_id)
        except InfrastructureError as error:
            if silent_since is None:
                silent_since = clock()
                say(f"{error.message} Trying again; the study goes on meanwhile.")
            elif clock() - silent_since > _PATIENCE_S:
                raise
            sleep(_POLL_S)
            continue
        if job is None:
            raise InfrastructureError(
                f"{job_id}: {jobs.url} knows no such job any more: its head was started anew.",
                hint="Submit the study again; it goes on where its files are.",
            )
        if silent_since is not None:
            silent_since = None
            say(f"{jobs.url}: connected again.")
        end = len(text) if job.state.is_over else text.rfind("\n") + 1
        for line in text[num_written:end].splitlines():
            write(line)
        num_written = max(num_written, end)
        if job.state.is_over:
            return job
        sleep(max(_POLL_S, len(text) / _MAX_BYTES_PER_S))
