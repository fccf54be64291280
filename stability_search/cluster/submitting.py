"""Start a study on a cluster, go on with it, or find it again: the same study never runs twice."""

import hashlib
import shlex
from dataclasses import dataclass
from enum import StrEnum

from stability_search import __version__
from stability_search.cluster.attempt import STOP_WAIT_S, AttemptOrder
from stability_search.cluster.endings import read_result
from stability_search.cluster.jobs import Job, JobRequest, Jobs
from stability_search.cluster.naming import attempt_id
from stability_search.cluster.parcel import SPACE_FILE, Parcel
from stability_search.cluster.result import NOT_INSTALLED
from stability_search.errors import UsageError, UserCodeError
from stability_search.settings.study import DRIVER_CPUS

RUNS_FOLDER = "~/.stability-search/runs"  # on the node of the driver, of whoever runs Ray there
FOLDER_KEY = "stability_search_folder"  # metadata of an attempt: where run directories are
PYTHON_KEY = "stability_search_python"  # the same: which Python runs it
PYTHON = "python"  # what runs it where nobody names one

_SPACE_KEY = "stability_search_space"
_STUDY_KEY = "stability_search_study"  # what of the space no resumption may change
_TASK_KEY = "stability_search_task"
_FINAL = (0, 3, UserCodeError.exit_code)  # the same study would end in the same way
_MAX_ATTEMPTS = 1000
_DRIVER_CPUS = 1  # without one Ray puts it on the head node, beside everybody else's


class Found(StrEnum):
    """What became of a submission."""

    STARTED = "started"
    RESUMED = "resumed"  # an earlier attempt was stopped, or failed
    RUNNING = "running"  # it runs already: nothing was submitted
    FINISHED = "finished"  # it has a verdict already: nothing was submitted


@dataclass(frozen=True, kw_only=True, slots=True)
class Submission:
    """A study on a cluster, after `submit`.

    Attributes:
        name: The study's name there.
        attempt: Submission id of its latest attempt.
        found: What became of it.
    """

    name: str
    attempt: str
    found: Found


@dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """How and where a study is kept on the node of its driver.

    Attributes:
        folder: Where run directories are; `~` is the home of whoever runs Ray there.
        python: The Python to run, a program of that node; None takes the one of the study's
            last attempt, or `python`.
    """

    folder: str = RUNS_FOLDER
    python: str | None = None


def submit(jobs: Jobs, name: str, parcel: Parcel, place: Place) -> Submission:
    """Start a study unless it runs or has finished.

    Args:
        jobs: The cluster.
        name: The study's name.
        parcel: What is sent.
        place: Where it is kept there.

    Raises:
        InfrastructureError: The cluster does not answer, or not as it should.
        UsageError: It wants another token, or has another study of that name.
    """
    latest = latest_attempt(jobs, name)
    number = 1
    if latest is not None:
        number, job = latest
        _refuse_other_study(name, _latest_that_began(jobs, name, number), parcel)
        found = _what_to_do(jobs, job, parcel)
        if found is not Found.RESUMED:
            return Submission(name=name, attempt=job.id, found=found)
        number += 1
        earlier = place_of(job)  # its files are where they are; its Python may have been wrong
        place = Place(folder=earlier.folder, python=place.python or earlier.python)
    jobs.upload(parcel.package_name, parcel.archive())
    attempt = attempt_id(name, number)
    node_id = "" if latest is None else _node_to_resume_on(jobs, latest[1])
    if not jobs.submit(_request(name, attempt, parcel, place, node_id)):
        _refuse_other_study(name, jobs.find(attempt), parcel)  # of whoever was faster
        return Submission(name=name, attempt=attempt, found=Found.RUNNING)
    found = Found.STARTED if latest is None else Found.RESUMED
    return Submission(name=name, attempt=attempt, found=found)


def latest_attempt(jobs: Jobs, name: str) -> tuple[int, Job] | None:
    """Return the latest attempt of a study and its number; None if the cluster knows none."""
    found = None
    for number in range(1, _MAX_ATTEMPTS):
        job = jobs.find(attempt_id(name, number))
        if job is None:
            break
        found = (number, job)
    return found


def known_attempt(jobs: Jobs, name: str) -> Job:
    """Return the latest attempt of a study that must be there.

    Raises:
        UsageError: The cluster knows no study of that name.
    """
    latest = latest_attempt(jobs, name)
    if latest is None:
        raise UsageError(
            f"{name}: {jobs.url} knows no study of that name; a cluster that was started anew "
            "knows none from before.",
            hint="`stability-search submit` prints the name; submitted again, a study goes on "
            "where its files are on the node.",
        )
    return latest[1]


def place_of(job: Job) -> Place:
    """Return where an attempt keeps its study."""
    return Place(
        folder=job.metadata.get(FOLDER_KEY, RUNS_FOLDER),
        python=job.metadata.get(PYTHON_KEY, PYTHON),
    )


def command_of(module: str, order: str, python: str) -> str:
    """Return the shell command that runs one of our modules in a job.

    It says by its exit code where there is no stability-search to run.

    Args:
        module: Name of the module below `stability_search.cluster`.
        order: Its one argument.
        python: The Python to run.
    """
    look = "import importlib.util as u, sys; sys.exit(u.find_spec('stability_search') is None)"
    program = shlex.quote(python)
    run = f"exec {program} -m stability_search.cluster.{module} {shlex.quote(order)}"
    return f"{program} -c {shlex.quote(look)} || exit {NOT_INSTALLED}; {run}"


def _latest_that_began(jobs: Jobs, name: str, number: int) -> Job | None:
    """Return the latest attempt that may have left files; the first to do so chose the task."""
    for one in range(number, 0, -1):
        job = jobs.find(attempt_id(name, one))
        if job is not None and not _has_never_begun(jobs, job):
            return job
    return None


def _has_never_begun(jobs: Jobs, job: Job) -> bool:
    if not job.state.is_over:
        return False
    if not job.node_id or job.exit_code == NOT_INSTALLED:
        return True
    result = read_result(jobs, job)
    return result is not None and bool(result.problem)


def _refuse_other_study(name: str, job: Job | None, parcel: Parcel) -> None:
    if job is None:
        return
    ours = {"task": (_TASK_KEY, parcel.task_sha256), "space": (_STUDY_KEY, parcel.identity)}
    others = [
        f"another {what}"
        for what, (key, value) in ours.items()
        if job.metadata.get(key, value) != value  # earlier versions kept neither
    ]
    if others:
        raise UsageError(
            f"{name} on the cluster has {' and '.join(others)} than is to be sent.",
            hint="Undo the change, or give this study another --name.",
        )


def _what_to_do(jobs: Jobs, job: Job, parcel: Parcel) -> Found:
    if not job.state.is_over:
        return Found.RUNNING
    result = read_result(jobs, job)
    is_same = job.metadata.get(_SPACE_KEY) == _space_sha256(parcel)  # else a budget was raised
    is_final = result is not None and not result.problem and result.exit_code in _FINAL
    return Found.FINISHED if is_same and is_final else Found.RESUMED


def _node_to_resume_on(jobs: Jobs, job: Job) -> str:
    """Return the node that has the run directory; without it the study starts anew."""
    return job.node_id if job.node_id and jobs.has_node(job.node_id) else ""


def _request(name: str, attempt: str, parcel: Parcel, place: Place, node_id: str) -> JobRequest:
    python = place.python or PYTHON
    order = AttemptOrder(attempt=attempt, name=name, folder=place.folder, version=__version__)
    return JobRequest(
        id=attempt,
        command=command_of("attempt", order.to_text(), python),
        num_cpus=_DRIVER_CPUS,
        node_id=node_id,
        metadata={
            FOLDER_KEY: place.folder,
            PYTHON_KEY: python,
            _SPACE_KEY: _space_sha256(parcel),
            _STUDY_KEY: parcel.identity,
            _TASK_KEY: parcel.task_sha256,
        },
        package=parcel.package_name,
        environment={
            "RAY_JOB_STOP_WAIT_TIME_S": str(STOP_WAIT_S),
            DRIVER_CPUS: str(_DRIVER_CPUS),
        },
    )


def _space_sha256(parcel: Parcel) -> str:
    return hashlib.sha256(parcel.files[SPACE_FILE]).hexdigest()
