"""A cluster without Ray: jobs in memory, and a folder on the disk for its node's logs."""

import dataclasses
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from stability_search.cluster.jobs import Job, JobRequest, JobState
from stability_search.cluster.result import AttemptResult, record_name
from stability_search.errors import InfrastructureError

URL = "http://localhost:8265"
NODE = "c0ffee"
BLOCK_BYTES = 1000


def start_nothing(_request: JobRequest, _jobs: "FakeJobs") -> None:
    """Leave a job pending."""


@dataclass
class FakeJobs:
    """`Jobs` that do what a test says.

    `on_submit` plays what a job does; `failures` requests fail first, as without a connection.
    """

    logs: Path
    on_submit: Callable[[JobRequest, "FakeJobs"], None] = start_nothing
    url: str = URL
    failures: int = 0
    nodes: set[str] = field(default_factory=lambda: {NODE})
    known: dict[str, Job] = field(default_factory=dict)
    printed: dict[str, str] = field(default_factory=dict)
    requests: list[JobRequest] = field(default_factory=list)
    uploads: dict[str, bytes] = field(default_factory=dict)
    stopped: list[str] = field(default_factory=list)
    read: list[str] = field(default_factory=list)
    files: Mapping[str, bytes] = field(default_factory=dict)  # instead of those on the disk

    def _answer(self) -> None:
        if self.failures:
            self.failures -= 1
            raise InfrastructureError(f"{self.url}: the cluster does not answer: planted.")

    def set(self, job_id: str, state: JobState, *, exit_code: int | None = None) -> None:
        """Say how a job is from now on."""
        job = self.known.get(job_id) or Job(id=job_id, state=state)
        self.known[job_id] = dataclasses.replace(
            job, state=state, node_id=NODE, exit_code=exit_code
        )

    def leave(self, job_id: str, result: AttemptResult) -> None:
        """Leave the record of an attempt, as one does that ends."""
        path = self.logs / record_name(job_id)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(result.to_text())

    def ray_version(self) -> str:
        self._answer()
        return "2.60.0"

    def find(self, job_id: str) -> Job | None:
        self._answer()
        return self.known.get(job_id)

    def submit(self, request: JobRequest) -> bool:
        self._answer()
        if request.id in self.known:
            return False
        self.requests.append(request)
        self.known[request.id] = Job(
            id=request.id, state=JobState.PENDING, metadata=request.metadata
        )
        self.on_submit(request, self)
        return True

    def stop(self, job_id: str) -> None:
        self._answer()
        self.stopped.append(job_id)
        self.set(job_id, JobState.STOPPED)

    def delete(self, job_id: str) -> None:
        self._answer()
        del self.known[job_id]

    def log(self, job_id: str) -> str:
        self._answer()
        return self.printed.get(job_id, "")

    def upload(self, package: str, data: bytes) -> None:
        self._answer()
        self.uploads[package] = data

    def read_file(self, node_id: str, name: str) -> bytes:
        self._answer()
        self.read.append(name)
        if name in self.files:
            return self.files[name]
        path = self.logs / name
        if node_id not in self.nodes or not path.is_file():
            raise InfrastructureError(f"{self.url}: HTTP 500: a file is not found at: {path}.")
        return path.read_bytes()

    def read_blocks(self, node_id: str, name: str) -> Generator[bytes]:
        content = self.read_file(node_id, name)
        for start in range(0, len(content), BLOCK_BYTES):
            yield content[start : start + BLOCK_BYTES]

    def has_node(self, node_id: str) -> bool:
        self._answer()
        return node_id in self.nodes
