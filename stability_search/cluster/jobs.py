"""Ray's job interface, as far as a study needs it.

Paths and answers are those of Ray 2.60: `/api/jobs/`, `/api/packages/` and, for files of a node's
log folder, `/api/v0/logs/file`, which reads them where they lie and sends them as they are.
"""

import re
import urllib.parse
from collections.abc import Generator, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Protocol

from stability_search.cluster.connection import LONGEST_S, Connection, NotThereError
from stability_search.errors import InfrastructureError

NODE_ID_LABEL = "ray.io/node-id"  # every node has it; selects one node
_LOG_FILE = "/api/v0/logs/file"
_NODE_ID = re.compile(r"[0-9a-zA-Z]{0,100}")  # it stands in requests


class JobState(StrEnum):
    """How Ray says a job is."""

    PENDING = "PENDING"
    RUNNING = "RUNNING"
    STOPPED = "STOPPED"
    SUCCEEDED = "SUCCEEDED"
    FAILED = "FAILED"

    @property
    def is_over(self) -> bool:
        """True once no process of the job is left."""
        return self not in {JobState.PENDING, JobState.RUNNING}


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """What a cluster says about a job.

    Attributes:
        id: Its submission id.
        state: How it is.
        message: What Ray says about that.
        node_id: The node that its driver runs or ran on; empty before.
        exit_code: Of its command; None where it has none.
        metadata: What was submitted with it.
    """

    id: str
    state: JobState
    message: str = ""
    node_id: str = ""
    exit_code: int | None = None
    metadata: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class JobRequest:
    """A job to submit.

    Attributes:
        id: Its submission id.
        command: The shell command that is its driver.
        num_cpus: CPUs that are reserved for it; with 0 it runs on `node_id`.
        node_id: The node that it must run on; empty for any.
        metadata: Kept with it; plain strings.
        package: Name of an uploaded archive that is its working directory; empty for none.
        environment: Environment variables of its driver and its workers.
    """

    id: str
    command: str
    num_cpus: int = 0
    node_id: str = ""
    metadata: Mapping[str, str] = field(default_factory=dict)
    package: str = ""
    environment: Mapping[str, str] = field(default_factory=dict)


class Jobs(Protocol):
    """A cluster, as far as a study needs it. Every method raises like `Connection.get_json`."""

    @property
    def url(self) -> str:
        """Its address, as messages name it."""

    def ray_version(self) -> str:
        """Return the version of Ray there."""

    def find(self, job_id: str) -> Job | None:
        """Return a job; None if there is none of that id."""

    def submit(self, request: JobRequest) -> bool:
        """Start a job; False where there is one of that id already."""

    def stop(self, job_id: str) -> None:
        """Ask a job to end: SIGTERM, and SIGKILL if it does not."""

    def delete(self, job_id: str) -> None:
        """Forget a job that is over."""

    def log(self, job_id: str) -> str:
        """Return all that a job has printed."""

    def upload(self, package: str, data: bytes) -> None:
        """Keep an archive for jobs to come."""

    def read_file(self, node_id: str, name: str) -> bytes:
        """Return a small file of a node's log folder."""

    def read_blocks(self, node_id: str, name: str) -> Generator[bytes]:
        """Return a file of a node's log folder as it comes, however large."""

    def has_node(self, node_id: str) -> bool:
        """Say whether a node is alive."""


class RayJobs:
    """`Jobs` of a Ray cluster.

    Args:
        connection: Requests to its dashboard.
    """

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    @property
    def url(self) -> str:
        """Its address, as messages name it."""
        return self._connection.url

    def ray_version(self) -> str:
        """Return the version of Ray there."""
        try:
            answer = self._connection.get_json("/api/version")
        except NotThereError:  # something else listens there
            answer = None
        if not isinstance(answer, dict) or "ray_version" not in answer:
            raise InfrastructureError(
                f"{self.url}: the answer is not that of a Ray dashboard.",
                hint="Give its URL, e.g. http://localhost:8265.",
            )
        return str(answer["ray_version"])

    def find(self, job_id: str) -> Job | None:
        """Return a job; None if there is none of that id."""
        try:
            return _job(job_id, self._connection.get_json(_path(job_id)))
        except NotThereError:
            return None

    def submit(self, request: JobRequest) -> bool:
        """Start a job; False where there is one of that id already."""
        runtime: dict[str, Any] = {"env_vars": dict(request.environment)}
        if request.package:
            runtime["working_dir"] = f"gcs://{request.package}"
        body: dict[str, Any] = {
            "entrypoint": request.command,
            "submission_id": request.id,
            "runtime_env": runtime,
            "metadata": dict(request.metadata),
            "entrypoint_num_cpus": request.num_cpus,
        }
        if request.node_id:
            body["entrypoint_label_selector"] = {NODE_ID_LABEL: request.node_id}
        try:
            self._connection.post_json("/api/jobs/", body)
        except InfrastructureError:
            if self.find(request.id) is not None:  # somebody was faster; or the answer was lost
                return False
            raise
        return True

    def stop(self, job_id: str) -> None:
        """Ask a job to end: SIGTERM, and SIGKILL if it does not."""
        self._connection.post_json(f"{_path(job_id)}/stop", {})

    def delete(self, job_id: str) -> None:
        """Forget a job that is over."""
        self._connection.delete(_path(job_id))

    def log(self, job_id: str) -> str:
        """Return all that a job has printed."""
        answer = self._connection.get_json(f"{_path(job_id)}/logs")
        return str(answer["logs"]) if isinstance(answer, dict) and "logs" in answer else ""

    def upload(self, package: str, data: bytes) -> None:
        """Keep an archive for jobs to come."""
        path = f"/api/packages/gcs/{urllib.parse.quote(package, safe='')}"
        try:
            self._connection.get(path)  # also keeps one that is there from being forgotten
        except NotThereError:
            self._connection.put(path, data)

    def read_file(self, node_id: str, name: str) -> bytes:
        """Return a small file of a node's log folder."""
        return self._connection.get(_LOG_FILE, _file_query(node_id, name))

    def read_blocks(self, node_id: str, name: str) -> Generator[bytes]:
        """Return a file of a node's log folder as it comes, however large."""
        return self._connection.get_blocks(_LOG_FILE, _file_query(node_id, name))

    def has_node(self, node_id: str) -> bool:
        """Say whether a node is alive."""
        query = {"filter_keys": "node_id", "filter_predicates": "=", "filter_values": node_id}
        answer = self._connection.get_json("/api/v0/nodes", query)
        try:
            nodes = answer["data"]["result"]["result"]
            return any(one["node_id"] == node_id and one["state"] == "ALIVE" for one in nodes)
        except (TypeError, KeyError) as error:
            raise InfrastructureError(f"{self.url}: the list of nodes cannot be read.") from error


def _file_query(node_id: str, name: str) -> Mapping[str, str]:
    return {
        "node_id": node_id,
        "filename": name,
        "lines": "-1",
        "timeout": f"{LONGEST_S:.0f}",
    }


def _path(job_id: str) -> str:
    return f"/api/jobs/{urllib.parse.quote(job_id, safe='')}"


def _job(job_id: str, answer: Any) -> Job:  # noqa: ANN401 - JSON
    try:
        job = Job(
            id=job_id,
            state=JobState(answer["status"]),
            message=str(answer.get("message") or ""),
            node_id=str(answer.get("driver_node_id") or ""),
            exit_code=answer.get("driver_exit_code"),
            metadata={str(k): str(v) for k, v in (answer.get("metadata") or {}).items()},
        )
        is_clear = _NODE_ID.fullmatch(job.node_id) and type(job.exit_code) in {int, type(None)}
    except (TypeError, KeyError, ValueError, AttributeError):
        is_clear = False
    if not is_clear:
        raise InfrastructureError(f"job {job_id}: what the cluster says is not clear.")
    return job
