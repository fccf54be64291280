"""How fast a run directory comes home through a cluster's one HTTP port.

    python -m tests.benchmarks.bench_fetch

A directory as a large study leaves it (many small step files) and one large file, over the
loopback address, from a Ray of its own. Beside each the time of a second fetch, which only
compares hashes.
"""

import os
import secrets
import sys
import tempfile
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from stability_search.cluster.address import ClusterAddress
from stability_search.cluster.connection import Connection
from stability_search.cluster.fetching import Fetched, fetch
from stability_search.cluster.jobs import JobRequest, RayJobs
from stability_search.cluster.submitting import FOLDER_KEY, PYTHON_KEY
from tests.cluster.ray_head import started_ray

_MIB = 2**20


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """A directory to be fetched.

    Attributes:
        name: What it stands for.
        num_files: How many files, all of one size.
        num_bytes: Of each, random.
    """

    name: str
    num_files: int
    num_bytes: int


CASES = (
    Case(name="steps", num_files=1000, num_bytes=30_000),
    Case(name="large", num_files=1, num_bytes=200 * _MIB),
)


def write_case(case: Case, folder: Path) -> None:
    """Write the directory."""
    directory = folder / case.name
    directory.mkdir(parents=True)
    for number in range(case.num_files):
        (directory / f"{number:04}.bin").write_bytes(os.urandom(case.num_bytes))


def begin(jobs: RayJobs, case: Case, folder: Path) -> None:
    """Let the cluster know a study of that name, and wait until its job has ended."""
    metadata = {FOLDER_KEY: str(folder), PYTHON_KEY: sys.executable}
    jobs.submit(JobRequest(id=case.name, command="true", num_cpus=1, metadata=metadata))
    while (job := jobs.find(case.name)) is None or not job.state.is_over:
        time.sleep(0.2)


def line(case: Case, first: Fetched, second: Fetched) -> str:
    """Return what was measured."""
    mib = first.num_bytes / _MIB
    return (
        f"{case.name}: {first.num_files} files, {mib:.0f} MiB in {first.seconds:.1f} s "
        f"({mib / first.seconds:.1f} MiB/s, {first.num_files / first.seconds:.0f} files/s); "
        f"again, {second.num_new} files read in {second.seconds:.1f} s"
    )


def main() -> None:
    """Print a line per case."""
    token = secrets.token_hex(32)
    print(f"{datetime.now(UTC):%Y-%m-%d}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}")
    with tempfile.TemporaryDirectory() as name, started_ray(token) as head:
        address = ClusterAddress(url=head.url, is_loopback=True, token=token)
        jobs = RayJobs(Connection(address))
        for case in CASES:
            write_case(case, Path(name) / "runs")
            begin(jobs, case, Path(name) / "runs")
            first, second = (fetch(jobs, case.name, Path(name) / case.name) for _ in range(2))
            print(line(case, first, second))


if __name__ == "__main__":
    main()
