"""Whole studies on a real Ray: faults, signals, kills and resumes."""

import contextlib
import json
import os
import re
import signal
import sqlite3
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest

from stability_search import read_run
from stability_search.search.ledger import Ledger
from stability_search.step_files import read_steps
from tests.search.inline_study import write_space

pytestmark = [pytest.mark.ray, pytest.mark.timeout(240)]

ROOT = Path(__file__).resolve().parents[2]
TIMINGS = ["started_at", "wall_s", "train_s", "peak_memory_mib", "node"]

FAULTY = """\
name: faulty
task: {task}:Tiny
trial: {{steps: 20, timeout_s: {timeout_s}}}
fixed: {{batch_size: 8}}
space:
  learning_rate: {{loguniform: {{low: 1e-3, high: 0.1}}}}
  behaviour: {{choice: [fine, {behaviour}]}}
start_with:
  - {{learning_rate: 0.01, behaviour: fine}}
  - {{learning_rate: 0.01, behaviour: {behaviour}}}
search: {{trials: 2, sampler: random}}
confirm: {{top: 1, seeds: 1, steps: 20, octaves: 0, min_margin: 0}}
"""


def command(*words: str) -> list[str]:
    return [sys.executable, "-m", "stability_search", *words]


def environment() -> dict[str, str]:
    # A study must not depend on the test's own settings.
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "TUNE_"))}
    return {**kept, "PYTHONPATH": str(ROOT)}


def start(folder: Path, *words: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(  # noqa: S603 - our own command
        command(*words),
        cwd=folder,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def finish(process: "subprocess.Popen[str]") -> tuple[int, str, str]:
    out, err = process.communicate(timeout=200)
    return process.returncode, out, err


def run(folder: Path, *words: str) -> tuple[int, str, str]:
    return finish(start(folder, *words))


def write_faulty(folder: Path, behaviour: str, timeout_s: float = 60) -> Path:
    text = FAULTY.replace("{behaviour}", behaviour).replace("{timeout_s}", str(timeout_s))
    return write_space(folder, text=text)


def outcomes(run_directory: Path) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for row in Ledger(run_directory / "study.db").rows():
        found.setdefault(row.trial_id, []).append(row.summary.outcome.value)
    return found


def count_rows(ledger: Path) -> int:
    """Count committed trials while another process writes."""
    if not ledger.exists():
        return 0
    with contextlib.closing(sqlite3.connect(f"file:{ledger}?mode=ro", uri=True)) as connection:
        try:
            return int(connection.execute("SELECT COUNT(*) FROM trials").fetchone()[0])
        except sqlite3.OperationalError:  # not written yet, or being written
            return 0


def leftovers(session: int) -> list[list[str]]:
    """Return the commands of processes that descend from a finished command.

    What has ended and only waits to be forgotten by the system's first process is no process.
    """
    listing = subprocess.run(
        ["/bin/ps", "-e", "-o", "sid=,stat=,args="], capture_output=True, text=True, check=True
    ).stdout
    rows = [line.split(maxsplit=2) for line in listing.splitlines()]
    return [args for sid, state, *args in rows if sid == str(session) and state[0] != "Z"]


def test_a_study_runs_to_a_verdict_and_leaves_whole_files_and_no_process(tmp_path: Path) -> None:
    space = write_space(tmp_path)
    process = start(tmp_path, "run", "--space", str(space), "--output", "out")
    code, out, err = finish(process)
    assert code == 0, err
    assert out.startswith("Stable over 30 steps")
    assert "next: " in out
    assert re.search(r"search-0000 completed, q \d\.\d{3}", err)
    directory = tmp_path / "out"
    for name in (
        "space.yaml", "study.db", "trials.parquet", "trials.csv", "configurations.parquet",
        "configurations.csv", "report.html", "report.md", "report.json", "best.yaml",
        "environment.json", "run.log", "tiny_task.py",
    ):  # fmt: skip
        assert (directory / name).is_file(), name
    document = json.loads((directory / "report.json").read_text())
    assert (document["verdict"], document["exit_code"]) == ("stable", 0)
    tables = read_run(directory)
    steps = {path.stem for path in (directory / "steps").iterdir()}
    assert steps == set(tables.trials["trial_id"])
    assert leftovers(process.pid) == []
    assert "a word of the task's" in (directory / "run.log").read_text()
    with sqlite3.connect(directory / "study.db") as ledger:
        states = {state for (state,) in ledger.execute("SELECT DISTINCT state FROM trials")}
    assert "RUNNING" not in states
    again, _, message = run(tmp_path, "run", "--space", str(space), "--output", "out")
    assert again == 2
    assert "resume out" in message


def test_the_same_seed_gives_the_same_rows_bit_for_bit(tmp_path: Path) -> None:
    space = write_space(tmp_path)
    frames = []
    for name in ("first", "second"):
        code, _, err = run(
            tmp_path, "run", "--space", str(space), "--output", name,
            "--set", "search.max_concurrent=1", "--set", "search.trials=12",
        )  # fmt: skip
        assert code == 0, err
        frames.append(read_run(tmp_path / name).trials.drop(columns=TIMINGS))
    pd.testing.assert_frame_equal(*frames, check_exact=True)
    for path in sorted((tmp_path / "first" / "steps").iterdir()):
        first, second = (
            [replace(record, step_s=0.0) for record in read_steps(steps / path.name)]
            for steps in (path.parent, tmp_path / "second" / "steps")
        )
        assert first == second
        assert first


@pytest.mark.parametrize("num_written", [1, 12, 40])
def test_a_study_killed_after_a_write_resumes_with_nothing_lost_and_nothing_run_twice(
    tmp_path: Path, num_written: int
) -> None:
    space = write_space(tmp_path)
    words = ("--set", "search.trials=40", "--set", "search.max_concurrent=1")
    process = start(tmp_path, "run", "--space", str(space), "--output", "out", *words)
    ledger = tmp_path / "out" / "study.db"
    while count_rows(ledger) < num_written:
        assert process.poll() is None, "the study ended before it could be killed"
        time.sleep(0.01)
    process.kill()
    process.communicate()
    before = Ledger(ledger).rows()
    assert num_written <= len(before) < 47
    code, _, err = run(tmp_path, "resume", "out")
    assert code == 0, err
    after = Ledger(ledger).rows()
    assert after[: len(before)] == before
    ids = [(row.trial_id, row.attempt) for row in after]
    assert len(ids) == len(set(ids))
    assert sum(row.stage == "search" for row in after) == 40
    print(f"kills 1, finished before {len(before)}, after {len(after)}, lost 0, repeated 0")


def test_a_killed_worker_is_tried_again_and_blames_no_configuration(tmp_path: Path) -> None:
    space = write_faulty(tmp_path, "kill")
    code, _, err = run(tmp_path, "run", "--space", str(space), "--output", "out")
    assert code == 0, err
    assert outcomes(tmp_path / "out")["search-0001"] == ["infrastructure"] * 3
    assert err.count("search-0001") >= 6
    rows = read_run(tmp_path / "out").trials
    lost = rows[rows["outcome"] == "infrastructure"]
    assert lost["q"].isna().all()
    assert lost["is_stable"].isna().all()


@pytest.mark.parametrize("behaviour", ["hang", "stop"])
def test_a_hung_trial_is_timed_out_within_its_limit_and_20_s(
    tmp_path: Path, behaviour: str
) -> None:
    space = write_faulty(tmp_path, behaviour, timeout_s=3)
    code, _, err = run(tmp_path, "run", "--space", str(space), "--output", "out")
    assert code == 0, err
    assert outcomes(tmp_path / "out")["search-0001"] == ["timed_out"]
    rows = read_run(tmp_path / "out").trials
    wall_s = float(rows.loc[rows["trial_id"] == "search-0001", "wall_s"].iloc[0])
    print(f"{behaviour}: over its limit by {wall_s - 3:.1f} s")
    assert wall_s < 3 + 20


@pytest.mark.parametrize(
    ("behaviour", "outcome"),
    [("out_of_memory", "out_of_memory"), ("raise", "user_error"), ("dirty", "completed")],
)
def test_every_end_of_a_trial_has_its_name_and_the_search_goes_on(
    tmp_path: Path, behaviour: str, outcome: str
) -> None:
    space = write_faulty(tmp_path, behaviour)
    code, _, err = run(tmp_path, "run", "--space", str(space), "--output", "out")
    assert code == 0, err
    assert outcomes(tmp_path / "out")["search-0001"] == [outcome]


def test_a_task_that_fails_everywhere_is_exit_5_with_its_traceback_once(tmp_path: Path) -> None:
    space = write_space(tmp_path)
    space.write_text(space.read_text() + "task_args: {behaviour: raise}\n")
    code, out, err = run(tmp_path, "run", "--space", str(space), "--output", "out")
    assert code == 5
    assert err.count("Traceback (most recent call last)") == 1
    assert "\\n" not in err
    assert "resume" not in out
    assert json.loads((tmp_path / "out" / "report.json").read_text())["verdict"] == "incomplete"


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_keeps_what_is_finished_and_prints_how_to_go_on(
    tmp_path: Path, signum: signal.Signals, code: int
) -> None:
    space = write_space(tmp_path)
    process = start(
        tmp_path, "run", "--space", str(space), "--output", "out", "--set", "search.trials=400"
    )
    assert process.stderr is not None
    for line in process.stderr:
        if "search-0003 completed" in line:
            break
    process.send_signal(signum)
    sent = time.monotonic()
    out, _ = process.communicate(timeout=60)
    took_s = time.monotonic() - sent
    print(f"{signum.name}: gone after {took_s:.1f} s")
    assert process.returncode == code
    assert "resume out" in out
    assert took_s < 4 * 2  # four times the promise for SIGTERM; a wait for Ray takes 10 s
    assert leftovers(process.pid) == []
    assert len(Ledger(tmp_path / "out" / "study.db").rows()) >= 7 + 3
    if code == 143:  # no time for a report; it can be made later
        assert run(tmp_path, "report", "out")[0] == 0
    document = json.loads((tmp_path / "out" / "report.json").read_text())
    assert document["verdict"] == "incomplete"
