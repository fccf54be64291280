"""In a job: the study is run or gone on with, and a record says how that ended."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO

import pytest

from stability_search import __version__
from stability_search.cluster import attempt, snapshot
from stability_search.cluster.attempt import AttemptOrder, StopRequest, run_attempt
from stability_search.cluster.result import AttemptResult, own_log_folder, record_name
from stability_search.cluster.snapshot import NO_DIRECTORY, SnapshotOrder
from stability_search.search.scratch import Scratch

SPACE = """\
name: small
task: teacher
space:
  learning_rate: {loguniform: {low: 1e-3, high: 0.1}}
search: {trials: 3}
"""
LOG = "job-driver-s.2.log"
# Stands in for our own command: notes its words, prints, and ends as its environment says.
STAND_IN = """\
import os, pathlib, shutil, sys, time
folder = pathlib.Path(os.environ["STAND_IN"])
with (folder / "words").open("a") as file:
    file.write(" ".join(sys.argv[1:]) + "\\n")
if sys.argv[1] == "report":
    print("Incomplete.")
    sys.exit(0)
if "VANISHES" in os.environ:  # as where another node of this machine unpacks what was sent
    shutil.rmtree(os.environ["VANISHES"])
    print("space.yaml is there:", pathlib.Path("space.yaml").is_file())
print("Verdict.")
print("news", file=sys.stderr)
if "SLEEPS" in os.environ:
    part = folder / "part"
    part.write_text(str(os.getpid()))
    part.rename(folder / "ready")
    time.sleep(60)
sys.stdout.flush()
if "DIES" in os.environ:
    os.kill(os.getpid(), 9)
sys.exit(int(os.environ.get("EXITS", "0")))
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the working directory of a job, in which our command is a stand-in."""
    package = tmp_path / "path" / "stability_search"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "__main__.py").write_text(STAND_IN)
    (tmp_path / "space.yaml").write_text(SPACE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(package.parent))
    monkeypatch.setenv("STAND_IN", str(tmp_path))
    return tmp_path


def order(folder: Path, version: str = __version__) -> AttemptOrder:
    return AttemptOrder(attempt="s.2", name="s", folder=str(folder / "runs"), version=version)


def words(folder: Path) -> list[str]:
    return (folder / "words").read_text().splitlines()


def begin(folder: Path) -> Path:
    """Make the run directory of an earlier attempt."""
    directory = folder / "runs" / "s"
    directory.mkdir(parents=True)
    (directory / "space.yaml").write_text(SPACE)
    return directory


def test_a_study_that_is_not_there_is_run(folder: Path) -> None:
    result = run_attempt(order(folder), address="1.2.3.4:5")

    directory = folder / "runs" / "s"
    assert words(folder) == [f"run --space space.yaml --output {directory} --address 1.2.3.4:5"]
    assert result == AttemptResult(exit_code=0, lines=("Verdict.",), run_directory=str(directory))


def test_a_study_keeps_what_was_sent_although_the_working_directory_goes(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent = folder / "sent"
    sent.mkdir()
    (folder / "space.yaml").rename(sent / "space.yaml")
    monkeypatch.chdir(sent)
    monkeypatch.setenv("VANISHES", str(sent))
    result = run_attempt(order(folder), address="1.2.3.4:5")
    assert result.lines == ("space.yaml is there: True", "Verdict.")


def test_the_copy_of_what_was_sent_goes_also_where_an_attempt_before_was_killed(
    folder: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    temporary = tmp_path_factory.mktemp("temporary")
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    killed = Scratch()
    (killed.path / "sent").mkdir()
    killed._lock.close()  # noqa: SLF001 - as the kernel does
    run_attempt(order(folder), address="a")
    assert words(folder)
    assert list(temporary.iterdir()) == []


def test_a_study_that_is_there_goes_on_with_what_was_raised_since(folder: Path) -> None:
    directory = begin(folder)
    run_attempt(order(folder), address="a")
    (folder / "space.yaml").write_text(
        SPACE.replace("trials: 3}", "trials: 5}\nconfirm: {seeds: 9}")
    )
    run_attempt(order(folder), address="a")

    raised = "--set=search.trials=5 --set=confirm.seeds=9"
    assert words(folder) == [
        f"resume {directory} --address a",
        f"resume {directory} {raised} --address a",
    ]


@pytest.mark.parametrize("value", ["3, sampler: random", "2"])
def test_another_study_under_the_name_of_one_is_refused(folder: Path, value: str) -> None:
    directory = begin(folder)
    (directory / "space.yaml").write_text(SPACE + "fixed: {eps: 1e-7}\n")
    (folder / "space.yaml").write_text(SPACE.replace("trials: 3", f"trials: {value}"))

    result = run_attempt(order(folder), address="a")

    assert result.exit_code == 2
    assert result.problem.startswith("s: a study of that name is there, but: ")
    assert "fixed.eps: may not change, but got nothing after 1e-07." in result.problem
    assert not (folder / "words").exists()


TASK = "import layers\n\n\nclass Mine:\n    def __init__(self, width: int = 4) -> None: ...\n"


def begin_with_task(folder: Path) -> Path:
    directory = begin(folder)
    for place in (folder, directory):
        (place / "space.yaml").write_text(SPACE.replace("teacher", "./mine.py:Mine"))
        (place / "mine.py").write_text(TASK)
        (place / "layers.py").write_text("WIDTH = 4\n")
    return directory


@pytest.mark.parametrize(
    ("name", "text", "line"),
    [("mine.py", TASK.replace("4", "8"), "width: int = 8"), ("layers.py", "W = 8\n", "+W = 8")],
)
def test_a_changed_task_under_the_name_of_a_study_is_refused_with_the_difference(
    folder: Path, name: str, text: str, line: str
) -> None:
    begin_with_task(folder)
    (folder / name).write_text(text)

    result = run_attempt(order(folder), address="a")

    assert result.exit_code == 2
    assert result.problem.startswith("s: a study of that name is there, but: ")
    assert line in result.problem
    assert "another --name" in result.problem
    assert not (folder / "words").exists()


def test_the_twin_a_task_that_is_as_it_was_goes_on(folder: Path) -> None:
    directory = begin_with_task(folder)

    assert run_attempt(order(folder), address="a").exit_code == 0
    assert words(folder) == [f"resume {directory} --address a"]


def test_a_study_goes_on_where_it_is_now_asked_to_run(folder: Path) -> None:
    directory = begin(folder)
    placed = SPACE.replace("trials: 3", "trials: 3, resources: {labels: {pool: spot}}")
    (directory / "space.yaml").write_text(placed)
    run_attempt(order(folder), address="a")
    (folder / "space.yaml").write_text(placed.replace("spot", "[big, spot]"))
    run_attempt(order(folder), address="a")

    assert words(folder) == [
        f"resume {directory} --set=search.resources.labels={labels} --address a"
        for labels in ("{}", '{"pool": ["big", "spot"]}')
    ]


@pytest.mark.parametrize("exit_code", [0, 2, 3, 4, 5, 6])
def test_the_exit_code_is_the_studys_own(
    folder: Path, monkeypatch: pytest.MonkeyPatch, exit_code: int
) -> None:
    monkeypatch.setenv("EXITS", str(exit_code))

    assert run_attempt(order(folder), address="a").exit_code == exit_code


def test_a_study_that_was_killed_is_a_failure_of_machines(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DIES", "1")

    assert run_attempt(order(folder), address="a").exit_code == 4


def test_an_exit_code_that_is_none_of_ours_is_a_failure_of_machines(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EXITS", "120")  # Python's own, where it could not write

    assert run_attempt(order(folder), address="a").exit_code == 4


def test_a_study_that_was_stopped_gets_its_report_while_there_is_time(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EXITS", "143")

    result = run_attempt(order(folder), address="a")

    assert words(folder)[1:] == [f"report {folder / 'runs' / 's'}"]
    assert (result.exit_code, result.lines) == (143, ("Incomplete.",))


def test_another_version_runs_nothing(folder: Path) -> None:
    result = run_attempt(order(folder, version="0.0.1"), address="a")

    assert result.exit_code == 4
    assert f"0.0.1 was submitted, but the cluster has {__version__}" in result.problem
    assert not (folder / "words").exists()


def test_a_space_that_this_version_cannot_read_runs_nothing(folder: Path) -> None:
    begin(folder)
    (folder / "space.yaml").write_text("task: nowhere\n")

    result = run_attempt(order(folder), address="a")

    assert result.exit_code == 2
    assert "space.yaml:1:" in result.problem


def start_job(folder: Path) -> "subprocess.Popen[bytes]":
    """Start a job in a process of its own, and return once its study runs."""
    log, temporary = folder / LOG, folder.with_name(f"{folder.name}-temporary")
    temporary.mkdir()
    # The real code, which the stand-in hides from what it starts.
    start = (
        f"import sys; sys.path[:0] = {sys.path!r}; from stability_search.cluster import attempt"
    )
    code = f"{start}; sys.exit(attempt.main(sys.argv[1:]))"
    with log.open("ab") as output:
        job = subprocess.Popen(  # noqa: S603 - our own code
            [sys.executable, "-P", "-c", code, order(folder).to_text()],
            stdout=output,
            stderr=output,
            start_new_session=True,
            env=os.environ
            | {
                "PYTHONPATH": str(folder / "path"),
                "TMPDIR": str(temporary),  # a job that is killed leaves its copy there
                "SLEEPS": "1",
                "RAY_ADDRESS": "a",
            },
        )
    while not (folder / "ready").exists():
        assert job.poll() is None, log.read_text()
        time.sleep(0.02)
    return job


def has_ended(pid: int) -> bool:
    """Return True if a process is gone, or is only waited for."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].startswith("Z")
    except OSError:
        return True


def test_a_study_ends_with_a_job_that_is_killed(folder: Path) -> None:
    """Else nothing could stop it, and nothing could go on with it."""
    job = start_job(folder)
    study = int((folder / "ready").read_text())
    assert not has_ended(study)
    job.kill()
    job.wait()
    while not has_ended(study):  # the test's own limit ends it
        time.sleep(0.02)


def test_a_stopped_job_leaves_its_record(folder: Path) -> None:
    """SIGTERM reaches the study, which ends; the process around it outlives it."""
    job = start_job(folder)
    os.killpg(job.pid, signal.SIGTERM)

    assert job.wait(60) == 143
    record = AttemptResult.from_text((folder / record_name("s.2")).read_bytes())
    assert (record.exit_code, record.lines) == (143, ("Incomplete.",))
    assert "news" in (folder / LOG).read_text()


def test_a_job_that_is_stopped_before_its_study_begins_never_begins_it(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def be_stopped(*_: object, **__: object) -> None:
        handlers[signal.SIGTERM](signal.SIGTERM, None)

    handlers: dict[int, Callable[[int, None], None]] = {}
    monkeypatch.setattr(attempt, "own_log_folder", lambda: folder)
    monkeypatch.setattr(attempt.signal, "signal", handlers.__setitem__)
    monkeypatch.setattr(attempt.shutil, "copytree", be_stopped)
    monkeypatch.setenv("RAY_ADDRESS", "a")

    assert attempt.main([order(folder).to_text()]) == 143

    record = AttemptResult.from_text((folder / record_name("s.2")).read_bytes())
    assert (record.exit_code, record.lines) == (143, ("Stopped before it began.",))
    assert not (folder / "words").exists()


def test_a_study_that_is_made_while_the_signal_comes_is_ended(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def receive() -> IO[bytes]:
        stop.receive()
        return original()

    stop, original = StopRequest(), attempt.tempfile.TemporaryFile
    monkeypatch.setattr(attempt.tempfile, "TemporaryFile", receive)
    monkeypatch.setenv("SLEEPS", "1")

    result = run_attempt(order(folder), address="a", stop=stop)

    assert (result.exit_code, result.lines) == (143, ("Incomplete.",))


def test_a_study_that_ray_did_not_ask_to_end_is_asked() -> None:
    stop = StopRequest()
    with subprocess.Popen(["/bin/sleep", "60"]) as study:
        stop.reach(study)
        assert study.poll() is None
        stop.receive()
        assert study.wait(30) == -signal.SIGTERM


def test_the_log_folder_is_where_standard_output_is_written(tmp_path: Path) -> None:
    link = tmp_path / "1"
    link.symlink_to(tmp_path / "logs" / "job-driver-s.log")
    assert own_log_folder(link) == tmp_path / "logs"

    with pytest.raises(ValueError, match="must be the log of a Ray job"):
        own_log_folder(tmp_path / "terminal")


def test_a_look_at_a_study_without_files_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(snapshot, "own_log_folder", lambda: tmp_path)

    assert snapshot.main([SnapshotOrder(name="s", folder=str(tmp_path)).to_text()]) == NO_DIRECTORY


def test_a_look_lists_the_files(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begin(folder)
    monkeypatch.setattr(snapshot, "own_log_folder", lambda: folder / "logs")

    words = [SnapshotOrder(name="s", folder=str(folder / "runs")).to_text()]

    assert snapshot.main(words) == 0
    listing = folder / "logs" / "stability-search" / "s" / "listing.json"
    assert [one["path"] for one in json.loads(listing.read_text())] == ["space.yaml"]


def test_a_look_for_a_status_leaves_what_the_command_printed(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = begin(folder)
    monkeypatch.setattr(snapshot, "own_log_folder", lambda: folder)
    look = SnapshotOrder(name="s", folder=str(folder / "runs"), status_format="csv")

    assert snapshot.main([look.to_text()]) == 0
    assert words(folder) == [f"status {directory} --format csv"]
    assert (folder / "stability-search" / "s" / "status.csv").read_text() == "Verdict.\n"


def test_the_record_is_left_and_the_exit_code_handed_on(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attempt, "own_log_folder", lambda: folder)
    monkeypatch.setattr(attempt.signal, "signal", lambda *_: None)
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    monkeypatch.setenv("EXITS", "3")

    assert attempt.main([order(folder).to_text()]) == 3

    record = AttemptResult.from_text((folder / record_name("s.2")).read_bytes())
    assert (record.exit_code, record.lines) == (3, ("Verdict.",))
    assert words(folder)[0].endswith("--address 10.0.0.1:6379")
