"""A run directory on a cluster, and what came home of it."""

import contextlib
import sqlite3
from pathlib import Path

from stability_search.cluster.fetching import Fetched, fetch
from tests.cluster.fake_jobs import FakeJobs


def put_row(ledger: Path, number: int) -> None:
    with contextlib.closing(sqlite3.connect(ledger)) as connection:
        connection.execute("CREATE TABLE IF NOT EXISTS rows (number)")
        connection.execute("INSERT INTO rows VALUES (?)", (number,))
        connection.commit()


def rows_of(ledger: Path) -> list[int]:
    with contextlib.closing(sqlite3.connect(ledger)) as connection:
        return [number for (number,) in connection.execute("SELECT number FROM rows")]


def write_run(directory: Path) -> None:
    (directory / "steps").mkdir(parents=True)
    (directory / "space.yaml").write_text("name: s\n")
    (directory / "run.log").write_bytes(b"\x00\xff\r\n words\n")
    (directory / "steps" / "a.parquet").write_bytes(bytes(range(256)) * 300)
    (directory / "steps" / ".b.parquet.7.part").write_bytes(b"half")
    put_row(directory / "study.db", 1)


def files_of(directory: Path) -> dict[str, bytes]:
    return {
        path.relative_to(directory).as_posix(): path.read_bytes()
        for path in directory.rglob("*")
        if path.is_file() and not path.name.startswith(".")
    }


def bring(jobs: FakeJobs, home: Path) -> Fetched:
    return fetch(jobs, "s", home, sleep=lambda _seconds: None)


def num_read(jobs: FakeJobs) -> int:
    return sum(not name.endswith("listing.json") for name in jobs.read)
