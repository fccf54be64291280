"""Stop a study: its driver is asked to end, and writes what it has."""

import time
from collections.abc import Callable

from stability_search.cluster.attempt import STOP_WAIT_S
from stability_search.cluster.jobs import Job, Jobs, JobState
from stability_search.errors import InfrastructureError

_POLL_S = 0.5
_PENDING_S = 3.0  # Ray tells a job that it shall end only once it runs
_SLACK_S = 30.0  # of Ray's own, beyond the time that the driver has


def stop(jobs: Jobs, job: Job, *, sleep: Callable[[float], None] = time.sleep) -> Job:
    """Stop an attempt and wait until it is over.

    Args:
        jobs: The cluster.
        job: The attempt.
        sleep: Waits so many seconds.

    Returns:
        The attempt, over; or still waiting for a CPU, and to end as soon as it gets one.

    Raises:
        InfrastructureError: The cluster does not answer, or the attempt does not end.
    """
    jobs.stop(job.id)
    for number in range(int((STOP_WAIT_S + _SLACK_S) / _POLL_S)):
        found = jobs.find(job.id)
        if found is not None and found.state.is_over:
            return found
        if found is not None and found.state is JobState.PENDING and number * _POLL_S > _PENDING_S:
            return found
        sleep(_POLL_S)
    raise InfrastructureError(
        f"{job.id}: it has not ended {STOP_WAIT_S + _SLACK_S:.0f} s after it was asked to.",
        hint="Try again, or stop it in the cluster's dashboard.",
    )
