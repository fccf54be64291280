"""A run directory comes home: all of it, checked, and nothing twice."""

import contextlib
import dataclasses
import json
import shlex
import sqlite3
from pathlib import Path

import pytest

from stability_search.cluster import snapshot
from stability_search.cluster.copies import copied_study
from stability_search.cluster.fetching import fetch
from stability_search.cluster.jobs import JobRequest, JobState
from stability_search.cluster.listing import read_listing
from stability_search.cluster.looking import remote_status
from stability_search.cluster.result import NOT_INSTALLED, record_name
from stability_search.cluster.snapshot import NO_DIRECTORY, SnapshotOrder, take_snapshot
from stability_search.errors import (
    InfrastructureError,
    UsageError,
)
from tests.cluster.fake_jobs import FakeJobs
from tests.cluster.fetched_runs import bring, files_of, num_read, put_row, rows_of


def test_the_whole_directory_comes_home_byte_for_byte(
    jobs: FakeJobs, run: Path, home: Path
) -> None:
    done = bring(jobs, home)

    assert files_of(home).keys() == files_of(run).keys()
    ledger = files_of(home).pop("study.db")
    assert {**files_of(home), "study.db": b""} == {**files_of(run), "study.db": b""}
    assert ledger
    assert rows_of(home / "study.db") == [1]
    assert (done.num_files, done.num_new) == (4, 4)
    assert done.num_bytes == sum(map(len, files_of(home).values()))


def test_the_job_that_looks_takes_no_cpu_runs_on_that_node_and_is_forgotten(
    jobs: FakeJobs, home: Path
) -> None:
    bring(jobs, home)

    (request,) = jobs.requests
    assert (request.num_cpus, request.node_id) == (0, jobs.known["s"].node_id)
    assert list(jobs.known) == ["s"]


def test_what_is_there_and_right_is_not_read_again(jobs: FakeJobs, home: Path) -> None:
    bring(jobs, home)
    (home / "space.yaml").write_text("name: x\n")  # as long, but another
    jobs.read.clear()

    done = bring(jobs, home)

    assert (done.num_files, done.num_new, num_read(jobs)) == (4, 1, 1)
    assert (home / "space.yaml").read_text() == "name: s\n"


def test_a_fetch_that_broke_off_goes_on(jobs: FakeJobs, home: Path) -> None:
    original = jobs.read_file

    def break_off(node_id: str, name: str) -> bytes:
        if name.endswith("study.db"):
            raise InfrastructureError("the cluster does not answer: planted.")
        return original(node_id, name)

    jobs.read_file = break_off  # type: ignore[method-assign]
    with pytest.raises(InfrastructureError, match=r"planted\. Call fetch again"):
        bring(jobs, home)
    assert sorted(files_of(home)) == ["run.log", "space.yaml", "steps/a.parquet"]
    jobs.read_file = original  # type: ignore[method-assign]
    jobs.read.clear()

    assert bring(jobs, home).num_new == num_read(jobs) == 1
    assert rows_of(home / "study.db") == [1]


def test_a_running_study_is_fetched_again_with_what_is_new(
    jobs: FakeJobs, run: Path, home: Path
) -> None:
    bring(jobs, home)
    put_row(run / "study.db", 2)
    (run / "steps" / "c.parquet").write_bytes(b"new")

    done = bring(jobs, home)

    assert done.num_new == 2
    assert rows_of(home / "study.db") == [1, 2]


def test_a_ledger_that_is_being_written_to_comes_whole(
    jobs: FakeJobs, run: Path, home: Path
) -> None:
    with contextlib.closing(sqlite3.connect(run / "study.db")) as writer:
        writer.execute("INSERT INTO rows VALUES (2)")  # and no commit yet
        bring(jobs, home)
        writer.commit()

    assert rows_of(home / "study.db") == [1]
    assert rows_of(run / "study.db") == [1, 2]


def test_half_of_a_commit_is_never_copied(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(snapshot, "_BUSY_S", 0.02)
    with contextlib.closing(sqlite3.connect(run / "study.db")) as writer:
        writer.execute("BEGIN EXCLUSIVE")  # as while a commit is written to the file

        with pytest.raises(sqlite3.OperationalError, match="database is locked"):
            take_snapshot(run, tmp_path / "elsewhere")
    assert not (tmp_path / "elsewhere" / "study.db").exists()


def test_a_log_that_grows_meanwhile_is_cut_where_it_was_listed(
    jobs: FakeJobs, run: Path, home: Path
) -> None:
    before = (run / "run.log").read_bytes()
    jobs.files = {record_name("s", "run/run.log"): before + b"later\n"}

    bring(jobs, home)

    assert (home / "run.log").read_bytes() == before


def test_a_file_that_does_not_match_its_hash_is_never_kept(jobs: FakeJobs, home: Path) -> None:
    jobs.files = {record_name("s", "run/space.yaml"): b"evil: s\n"}

    with pytest.raises(InfrastructureError, match="2 of 4 files did not come as they were listed"):
        bring(jobs, home)
    assert not (home / "space.yaml").exists()
    assert not (home / "study.db").exists()  # it speaks of the others


def test_a_file_that_is_replaced_meanwhile_comes_in_the_next_round(
    jobs: FakeJobs, run: Path, home: Path
) -> None:
    original = jobs.read_file

    def replace_once(node_id: str, name: str) -> bytes:
        content = original(node_id, name)
        if name.endswith("listing.json") and not (run / "report.md").exists():
            (run / "space.yaml").write_text("name: s2\n")
            (run / "report.md").write_text("new")
        return content

    jobs.read_file = replace_once  # type: ignore[method-assign]

    bring(jobs, home)

    assert (home / "space.yaml").read_text() == "name: s2\n"
    assert (home / "report.md").read_text() == "new"


def test_a_choice_that_the_study_took_back_goes_here_too(
    jobs: FakeJobs, run: Path, home: Path
) -> None:
    (run / "best.yaml").write_text("choice")
    bring(jobs, home)
    (home / "mine.txt").write_text("a note of the user's")
    (run / "best.yaml").unlink()

    bring(jobs, home)

    assert not (home / "best.yaml").exists()
    assert (home / "mine.txt").exists()


def test_a_directory_with_anything_else_is_not_written_over(jobs: FakeJobs, home: Path) -> None:
    home.mkdir(parents=True)
    (home / "study.db").write_text("another study's")

    with pytest.raises(UsageError, match="it is not empty, and would be written over"):
        bring(jobs, home)
    assert (home / "study.db").read_text() == "another study's"


@pytest.mark.parametrize("text", ["mine", ""])
@pytest.mark.parametrize("name", ["notes.md", "steps/report.md"])
def test_a_file_of_the_users_own_in_a_copy_is_not_written_over(
    jobs: FakeJobs, run: Path, home: Path, name: str, text: str
) -> None:
    bring(jobs, home)
    (run / name).write_text("the study's")
    (home / name).write_text(text)

    with pytest.raises(UsageError, match=f"{name}: not fetched, and would be written over"):
        bring(jobs, home)
    assert (home / name).read_text() == text
    (home / name).write_text("the study's")
    bring(jobs, home)


def test_a_copy_that_somebody_went_on_with_is_not_written_over(jobs: FakeJobs, home: Path) -> None:
    bring(jobs, home)
    put_row(home / "study.db", 7)

    with pytest.raises(UsageError, match=r"its study\.db changed since it was fetched"):
        bring(jobs, home)
    assert rows_of(home / "study.db") == [1, 7]


def test_a_copy_of_another_study_is_not_written_over(jobs: FakeJobs, home: Path) -> None:
    bring(jobs, home)
    mark = home / ".fetched"
    mark.write_text(mark.read_text().replace('"name": "s"', '"name": "t"'))

    with pytest.raises(UsageError, match="it is not empty"):
        bring(jobs, home)


def test_a_folder_that_is_no_copy_is_not_touched_at_all(jobs: FakeJobs, home: Path) -> None:
    home.mkdir(parents=True)
    (home / ".download.part").write_text("somebody else's")

    with pytest.raises(UsageError, match="it is not empty"):
        bring(jobs, home)
    assert (home / ".download.part").exists()


def test_what_a_fetch_that_was_killed_left_behind_is_removed(jobs: FakeJobs, home: Path) -> None:
    bring(jobs, home)
    (home / ".0123.part").write_text("half")

    bring(jobs, home)

    assert sorted(path.name for path in home.glob(".*")) == [".fetched"]


def test_a_listing_is_read_as_it_was_written(run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "elsewhere"
    (run / "odd\nname").write_text("no file of ours")
    take_snapshot(run, folder)
    (run / "odd\nname").unlink()

    text = (folder / "listing.json").read_bytes()
    found = read_listing(text)
    assert [dataclasses.asdict(one) for one in found] == json.loads(text)
    assert {one.path for one in found} == files_of(run).keys()
    assert folder.stat().st_mode & 0o077 == 0


def test_a_damaged_ledger_is_brought_as_it_is(jobs: FakeJobs, run: Path, home: Path) -> None:
    (run / "study.db").write_bytes(b"no database, but evidence")

    bring(jobs, home)

    assert (home / "study.db").read_bytes() == b"no database, but evidence"


# What can be in the way


def test_a_node_that_died_is_named(jobs: FakeJobs, home: Path) -> None:
    jobs.nodes.clear()

    with pytest.raises(InfrastructureError, match="the node that its driver runs on has died"):
        bring(jobs, home)


def ending_with(exit_code: int | None) -> FakeJobs:
    def end(request: JobRequest, jobs: FakeJobs) -> None:
        jobs.set(request.id, JobState.FAILED, exit_code=exit_code)

    found = FakeJobs(logs=Path("/nonexistent"), on_submit=end)
    found.set("s", JobState.RUNNING)
    return found


@pytest.mark.parametrize(
    ("exit_code", "kind", "message"),
    [
        (NO_DIRECTORY, UsageError, "it has no files yet"),
        (NOT_INSTALLED, InfrastructureError, "no stability-search that python finds"),
        (1, InfrastructureError, "its files could not be listed"),
        (None, InfrastructureError, "its files could not be listed"),
    ],
)
def test_a_look_that_fails_is_one_line(
    home: Path, exit_code: int | None, kind: type[Exception], message: str
) -> None:
    jobs = ending_with(exit_code)

    with pytest.raises(kind, match=message):
        bring(jobs, home)
    assert list(jobs.known) == ["s"]


def test_a_look_that_does_not_end_is_stopped(tmp_path: Path, home: Path) -> None:
    jobs = FakeJobs(logs=tmp_path)
    jobs.set("s", JobState.RUNNING)
    waits: list[float] = []

    with pytest.raises(InfrastructureError, match="did not end within 180 s"):
        fetch(jobs, "s", home, sleep=waits.append)
    assert len(jobs.stopped) == 1
    assert list(jobs.known) == ["s"]
    assert sum(waits) == pytest.approx(180 + 0.5)


def test_a_look_survives_a_few_dropped_connections(jobs: FakeJobs, home: Path) -> None:
    drop_after_submission(jobs, 5)

    assert bring(jobs, home).num_files == 4
    assert list(jobs.known) == ["s"]


def test_a_look_that_is_given_up_is_forgotten_all_the_same(jobs: FakeJobs, home: Path) -> None:
    drop_after_submission(jobs, 6)

    with pytest.raises(InfrastructureError, match="the cluster does not answer: planted"):
        bring(jobs, home)
    assert list(jobs.known) == ["s"]


def drop_after_submission(jobs: FakeJobs, num_dropped: int) -> None:
    def look(request: JobRequest, jobs: FakeJobs) -> None:
        original(request, jobs)
        jobs.failures = num_dropped

    original = jobs.on_submit
    jobs.on_submit = look


def test_a_study_that_waits_for_a_cpu_has_no_node_yet(jobs: FakeJobs, home: Path) -> None:
    jobs.known["s"] = dataclasses.replace(jobs.known["s"], state=JobState.PENDING, node_id="")

    with pytest.raises(InfrastructureError, match="waits for a free CPU"):
        bring(jobs, home)


def test_a_status_is_what_the_node_says(tmp_path: Path) -> None:
    def tell(request: JobRequest, jobs: FakeJobs) -> None:
        order = SnapshotOrder(**json.loads(shlex.split(request.command)[-1]))
        jobs.files = {record_name("s", f"status.{order.status_format}"): b"s: running\n"}
        jobs.set(request.id, JobState.SUCCEEDED, exit_code=0)

    jobs = FakeJobs(logs=tmp_path, on_submit=tell)
    jobs.set("s", JobState.RUNNING)

    assert remote_status(jobs, "s", "csv") == "s: running\n"


def test_a_status_that_is_no_text_is_shown_all_the_same(tmp_path: Path) -> None:
    def tell(request: JobRequest, jobs: FakeJobs) -> None:
        jobs.files = {record_name("s", "status.csv"): b"s: \xff\n"}
        jobs.set(request.id, JobState.SUCCEEDED, exit_code=0)

    jobs = FakeJobs(logs=tmp_path, on_submit=tell)
    jobs.set("s", JobState.RUNNING)

    assert remote_status(jobs, "s", "csv") == "s: \ufffd\n"


def test_a_fetch_that_brought_nothing_leaves_no_folder(jobs: FakeJobs, home: Path) -> None:
    jobs.nodes.clear()

    with pytest.raises(InfrastructureError, match="has died"):
        bring(jobs, home)
    assert not home.exists()


def test_the_twin_an_empty_folder_of_somebody_elses_stays(jobs: FakeJobs, home: Path) -> None:
    home.mkdir(parents=True)
    jobs.nodes.clear()

    with pytest.raises(InfrastructureError, match="has died"):
        bring(jobs, home)
    assert home.is_dir()


def test_a_copy_knows_of_which_study_until_somebody_goes_on_with_it(
    jobs: FakeJobs, run: Path, home: Path
) -> None:
    bring(jobs, home)

    assert (copied_study(home), copied_study(run), copied_study(run / "no")) == ("s", "", "")
    put_row(home / "study.db", 2)
    assert copied_study(home) == ""
