"""How an attempt ended: by its record; where there is none, why."""

import contextlib
import re
import shlex

from stability_search.cluster.connection import AgentUnreachableError
from stability_search.cluster.jobs import Job, Jobs, JobState
from stability_search.cluster.result import NOT_INSTALLED, AttemptResult, record_name
from stability_search.errors import InfrastructureError, UsageError

_MAX_WORDS = 300
_NUMBER = re.compile(r"\.\d+$")  # of a later attempt


def read_result(jobs: Jobs, job: Job) -> AttemptResult | None:
    """Return the record of an attempt that is over; None where it left none."""
    with contextlib.suppress(AgentUnreachableError):
        return _record(jobs, job)
    return None


def result_of(jobs: Jobs, job: Job) -> AttemptResult:
    """Return how an attempt that is over ended.

    Raises:
        UsageError: It never ran because of what was asked for.
        InfrastructureError: It never ran, or ended without a record: its node or its driver died;
            or the record cannot be asked for.
    """
    result = _record(jobs, job)
    if result is None:
        raise InfrastructureError(_why_no_record(jobs, job), hint=_way_out(jobs, job))
    if result.problem:
        kind = UsageError if result.exit_code == UsageError.exit_code else InfrastructureError
        raise kind(result.problem)
    return result


def _record(jobs: Jobs, job: Job) -> AttemptResult | None:
    """Return a record; raise where a node that is alive cannot be asked for it."""
    if not job.node_id:
        return None
    try:
        return AttemptResult.from_text(jobs.read_file(job.node_id, record_name(job.id)))
    except AgentUnreachableError as error:
        if jobs.has_node(job.node_id):
            said = f"{job.id}: it has ended, but its record cannot be read: {error.message}"
            raise AgentUnreachableError(said, hint=error.hint) from error
    except (InfrastructureError, ValueError):
        pass
    return None


def _why_no_record(jobs: Jobs, job: Job) -> str:
    if job.exit_code == NOT_INSTALLED:
        return f"{job.id}: its node has no stability-search that its Python finds."
    if job.state is JobState.STOPPED:
        return f"{job.id}: it was stopped before it could begin, or killed when it did not end."
    if job.node_id and not jobs.has_node(job.node_id):
        return f"{job.id}: the node that its driver ran on has died."
    lines = job.message.strip().splitlines()
    said = lines[-1][:_MAX_WORDS].rstrip(".") if lines else "nothing"
    code = "" if job.exit_code is None else f" with exit code {job.exit_code}"
    return f"{job.id}: its driver ended{code} and left no record; Ray says: {said}."


def _way_out(jobs: Jobs, job: Job) -> str:
    if job.exit_code == NOT_INSTALLED:
        return (
            "Install the same version on every node, and start Ray in that environment or name "
            "its Python by --python."
        )
    name = _NUMBER.sub("", job.id)  # commands take the name, and mean the latest attempt
    command = f"stability-search logs {name} --address {shlex.quote(jobs.url)}"
    return f"`{command}` shows what it printed; submit again to go on."
