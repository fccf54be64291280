"""A cluster on which a study runs, and the folder its files are brought to."""

import json
import shlex
from pathlib import Path

import pytest

from stability_search.cluster.jobs import JobRequest, JobState
from stability_search.cluster.result import record_name
from stability_search.cluster.snapshot import SnapshotOrder, take_snapshot
from tests.cluster.fake_jobs import FakeJobs
from tests.cluster.fetched_runs import write_run


@pytest.fixture
def run(tmp_path: Path) -> Path:
    directory = tmp_path / "runs" / "s"
    write_run(directory)
    return directory


@pytest.fixture
def jobs(tmp_path: Path, run: Path) -> FakeJobs:
    """Return a cluster on which `s` runs; a job that looks at it really does."""

    def look(request: JobRequest, jobs: FakeJobs) -> None:
        order = SnapshotOrder(**json.loads(shlex.split(request.command)[-1]))
        take_snapshot(run, jobs.logs / Path(record_name(order.name)).parent)
        jobs.set(request.id, JobState.SUCCEEDED, exit_code=0)

    found = FakeJobs(logs=tmp_path / "logs", on_submit=look)
    found.set("s", JobState.RUNNING)
    return found


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return tmp_path / "home" / "s"
