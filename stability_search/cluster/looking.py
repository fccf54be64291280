"""Short jobs on the node of a study's driver: its files are listed there, or its status told."""

import secrets
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from stability_search.cluster.jobs import Job, JobRequest, Jobs
from stability_search.cluster.listing import ListedFile, read_listing
from stability_search.cluster.result import NOT_INSTALLED, record_name
from stability_search.cluster.snapshot import (
    LISTING,
    NO_DIRECTORY,
    SnapshotOrder,
    status_file,
)
from stability_search.cluster.submitting import PYTHON, command_of, known_attempt, place_of
from stability_search.errors import InfrastructureError, StabilitySearchError, UsageError

_JOB_WAIT_S = 180.0  # until a short job has started and ended
_POLL_S = 0.5
_STOP_WAIT_S = 5.0  # until one that did not end can be forgotten
_MAX_DROPPED = 5  # connections, of those that only ask whether it has ended
_MAX_WORDS = 300  # of what Ray says about an error

Sleep = Callable[[float], None]


def remote_status(jobs: Jobs, name: str, chosen: str, *, sleep: Sleep = time.sleep) -> str:
    """Return what `status` prints on the node of a study's driver.

    Args:
        jobs: The cluster.
        name: The study's name.
        chosen: Its form: `table`, `json` or `csv`.
        sleep: Waits so many seconds.

    Raises:
        UsageError: There is no such study.
        InfrastructureError: The cluster or the study's node does not answer.
    """
    job = known_attempt(jobs, name)
    with _snapshot(jobs, job, name, sleep, status_format=chosen) as node_id:
        text = jobs.read_file(node_id, record_name(name, status_file(chosen)))
    return text.decode(errors="replace")


def list_files(jobs: Jobs, job: Job, name: str, sleep: Sleep) -> tuple[ListedFile, ...]:
    """Return every file of a study's run directory, as it is now.

    Args:
        jobs: The cluster.
        job: An attempt of the study.
        name: The study's name.
        sleep: Waits so many seconds.

    Raises:
        UsageError: It has no files yet.
        InfrastructureError: The cluster or the study's node does not answer.
    """
    with _snapshot(jobs, job, name, sleep) as node_id:
        text = jobs.read_file(node_id, record_name(name, LISTING))
    try:
        return read_listing(text)
    except ValueError as error:
        raise InfrastructureError(
            f"{name}: the list of its files cannot be used: {error}."
        ) from error


@contextmanager
def _snapshot(
    jobs: Jobs, job: Job, name: str, sleep: Sleep, status_format: str = ""
) -> Iterator[str]:
    """Run a snapshot on the node of a study's driver; it takes no CPU from anybody."""
    if not job.node_id or not jobs.has_node(job.node_id):
        if job.node_id:
            what, hint = "has died", "Its files are there. Wait, or submit the study again."
        elif job.state.is_over:
            what, hint = "never was: its job ended before it began", "Submit the study again."
        else:
            what, hint = "is not known yet: its job waits for a free CPU", "Try again later."
        raise InfrastructureError(f"{name}: the node that its driver runs on {what}.", hint=hint)
    place = place_of(job)
    order = SnapshotOrder(name=name, folder=place.folder, status_format=status_format)
    request = JobRequest(
        id=f"{name}.look-{secrets.token_hex(4)}",
        command=command_of("snapshot", order.to_text(), place.python or PYTHON),
        node_id=job.node_id,
    )
    try:
        jobs.submit(request)
        done = _wait(jobs, request.id, sleep)
        if done.exit_code == NO_DIRECTORY:
            raise UsageError(f"{name}: it has no files yet.", hint="Try again in a minute.")
        if done.exit_code == NOT_INSTALLED:
            raise InfrastructureError(
                f"{name}: its node has no stability-search that {place.python} finds.",
                hint="Install it there again.",
            )
        if done.exit_code is None or (done.exit_code and not status_format):
            lines = done.message.strip().splitlines() or ["nothing"]
            said = lines[-1][:_MAX_WORDS]
            raise InfrastructureError(f"{name}: its files could not be listed: {said}")
        yield job.node_id
    finally:
        with suppress(StabilitySearchError):  # one job more in a list is no harm
            _forget(jobs, request.id, sleep)


def _forget(jobs: Jobs, job_id: str, sleep: Sleep) -> None:
    """Remove a short job; one that still runs is stopped first, for Ray keeps it otherwise."""
    job = jobs.find(job_id)
    if job is not None and not job.state.is_over:
        jobs.stop(job_id)
    for _ in range(int(_STOP_WAIT_S / _POLL_S)):
        if job is None or job.state.is_over:
            break
        sleep(_POLL_S)
        job = jobs.find(job_id)
    if job is not None:
        jobs.delete(job_id)


def _wait(jobs: Jobs, job_id: str, sleep: Sleep) -> Job:
    num_dropped = 0
    for _ in range(int(_JOB_WAIT_S / _POLL_S)):
        try:
            job = jobs.find(job_id)
        except InfrastructureError:
            num_dropped += 1
            if num_dropped > _MAX_DROPPED:
                raise
            job = None
        if job is not None and job.state.is_over:
            return job
        sleep(_POLL_S)
    raise InfrastructureError(
        f"{job_id}: a short job on the study's node did not end within {_JOB_WAIT_S:.0f} s.",
        hint="The cluster may be overloaded; try again.",
    )
