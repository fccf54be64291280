"""W&B for real, offline: the tracker in its own process, its files read with W&B's own records."""

import contextlib
import json
import os
import select
import struct
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from stability_search.events import Event, EventName
from stability_search.records.trial import Outcome
from stability_search.search.remains import MARK, kill_marked, new_mark
from stability_search.trackers import listening, tracking
from tests.report.study_steps import steps_of
from tests.trackers.fake_run import (
    NAMES,
    file_name,
    played,
    q_of,
    rows,
    started,
    trial_event,
    write_run,
    write_trial,
)
from tests.trackers.servers import silent_server

pytestmark = [
    pytest.mark.fault,
    pytest.mark.timeout(300),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # of W&B's own imports
]
KEY = "c0ffee" * 6 + "beef"
CANARY = "canary-of-a-secret"
_BLOCK = 32768
_HEADER = 7


@pytest.fixture(name="mark")
def _mark(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Keep what W&B writes for itself in the test's folder, and mark its processes."""
    for name in ("WANDB_CONFIG_DIR", "WANDB_CACHE_DIR", "WANDB_DATA_DIR", "WANDB_ARTIFACT_DIR"):
        monkeypatch.setenv(name, str(tmp_path / name))
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    monkeypatch.setenv("SOME_TOKEN", CANARY)
    for name in ("DRAIN_S", "INTERRUPTED_DRAIN_S"):  # a busy machine is no failure
        monkeypatch.setattr(listening, name, 250.0)
    mark = new_mark()
    monkeypatch.setenv(MARK, mark)
    return mark


def records_in(path: Path) -> Iterator[Any]:
    """Read an offline file: records in blocks of 32 KiB, whole or in parts."""
    from wandb.proto.wandb_internal_pb2 import Record

    data = path.read_bytes()
    assert data.startswith(b":W&B")
    place, parts = _HEADER, b""
    while place < len(data):
        if _BLOCK - place % _BLOCK < _HEADER:  # too little is left for a header
            place += _BLOCK - place % _BLOCK
            continue
        _, length, kind = struct.unpack("<IHB", data[place : place + _HEADER])
        parts += data[place + _HEADER : place + _HEADER + length]
        place += _HEADER + length
        if kind in {1, 4}:  # whole, or its last part
            yield Record.FromString(parts)
            parts = b""


def run_files(directory: Path) -> dict[str, Path]:
    """Return the offline file of every run by its name; no run may have two."""
    found: dict[str, Path] = {}
    for path in directory.glob("wandb/offline-run-*/*.wandb"):
        name = path.stem.split("-", 2)[2]  # run-ID-NAME
        assert name not in found
        found[name] = path
    return found


def items_of(update: Any) -> dict[str, Any]:  # noqa: ANN401 - a record of W&B
    return {one.key or "/".join(one.nested_key): json.loads(one.value_json) for one in update}


def warnings_in(heard: list[Event]) -> list[str]:
    return [one.text("text") for one in heard if one.text("level") == "warning"]


def test_a_study_is_logged_offline_and_gone_on_with(tmp_path: Path, mark: str) -> None:
    run, heard = write_run(tmp_path / "run"), list[Event]()
    with tracking(["wandb"], heard.append) as hear:
        hear(started(run))
        for row in rows()[:4]:
            write_trial(run, row)
            hear(trial_event(row))
        wait_until(lambda: len(run_files(run.path)) == 4)  # before SIGTERM
        hear(Event(name=EventName.TRIAL_PROGRESS, time=""))
        assert warnings_in(heard) == []
    wait_for_the_end(mark)  # W&B's own process sees that ours is gone, and writes no more
    heard.clear()
    logged = (run.path / "wandb" / "logged.txt").read_text().splitlines()
    again = {name for name in NAMES[:4] if name not in logged}  # half logged when it ended
    for name in again:
        run_files(run.path)[name].unlink()

    with tracking(["wandb"], heard.append) as hear:
        for one in played(run, rows()[4:]):
            hear(one)

    assert warnings_in(heard) == []
    wait_for_the_end(mark)
    files = run_files(run.path)
    assert set(files) == {*NAMES, "study"}
    check_trial(files)
    check_end(files)
    check_secrets(tmp_path)


def check_trial(files: dict[str, Path]) -> None:
    row = next(row for row in rows() if row.summary.outcome is Outcome.PRUNED)
    found = list(records_in(files[file_name(row)]))
    (begun,) = (one.run for one in found if one.WhichOneof("record_type") == "run")
    assert (begun.project, begun.display_name, begun.job_type) == (
        "teacher",
        row.trial_id,
        "search",
    )
    assert begun.run_group.startswith("teacher-")
    assert begun.host == "node"
    config = items_of(begun.config.update)
    assert config["precision"] == row.settings["precision"]
    assert config["attention_clamp"] == row.settings["attention_clamp"]
    history = [
        items_of(one.history.item) for one in found if one.WhichOneof("record_type") == "history"
    ]
    assert [(one["_step"], one.get("train/loss")) for one in history] == [
        (record.step, record.loss) for record in steps_of(row)
    ]
    summary: dict[str, Any] = {}
    for one in found:
        if one.WhichOneof("record_type") == "summary":
            summary |= items_of(one.summary.update)
    assert summary["outcome"] == "pruned"
    assert summary["num_bad_steps"] == row.summary.num_bad_steps
    assert summary["q"] == q_of(row)


def check_end(files: dict[str, Path]) -> None:
    found = list(records_in(files["study"]))
    summary: dict[str, Any] = {}
    for one in found:
        if one.WhichOneof("record_type") == "summary":
            summary |= items_of(one.summary.update)
    assert (summary["verdict"], summary["choice"], summary["score"]) == ("stable", "c0ffee", 71.5)
    assert (summary["margin"], summary["progress"]) == ("2", 0.8)
    paths = {
        entry.path
        for one in found
        if one.WhichOneof("record_type") == "request"
        for entry in one.request.log_artifact.artifact.manifest.contents
    } | {
        entry.path
        for one in found
        if one.WhichOneof("record_type") == "artifact"
        for entry in one.artifact.manifest.contents
    }
    assert paths == {"report.html", "report.json", "best.yaml"}


def check_secrets(folder: Path) -> None:
    files = [path for path in folder.rglob("*") if path.is_file()]
    nodes = {row.node.encode() for row in rows()}
    assert len(files) > len(NAMES)
    for path in files:
        content = path.read_bytes()
        for secret in (KEY.encode(), CANARY.encode()):
            assert secret not in content, path
        if path.suffix == ".wandb":
            for private in nodes:
                assert private not in content, path


def test_a_server_that_never_answers_is_left_with_its_processes(
    tmp_path: Path, mark: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "online")
    run, heard = write_run(tmp_path / "run"), list[Event]()

    with silent_server() as uri:
        monkeypatch.setenv("WANDB_BASE_URL", uri)
        with tracking(["wandb"], heard.append) as hear:
            hear(started(run))
            write_trial(run, rows()[0])
            hear(trial_event(rows()[0]))
            wait_until(lambda: bool(marked_cores(mark)))
        wait_for_the_end(mark)

    (said,) = warnings_in(heard)
    assert said.startswith("wandb: 1 entry was not logged in time.")


def test_without_a_key_it_asks_nobody_and_says_so(
    tmp_path: Path, mark: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.delenv("WANDB_API_KEY")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    run, heard = write_run(tmp_path / "run"), list[Event]()

    with silent_server() as uri:
        monkeypatch.setenv("WANDB_BASE_URL", uri)
        with tracking(["wandb"], heard.append) as hear:
            for one in played(run, rows()[:1]):
                hear(one)

    (said,) = warnings_in(heard)
    assert "API key" in said
    wait_for_the_end(mark)


def wait_until(holds: Callable[[], bool]) -> None:
    while not holds():  # the net is pytest's own time-out
        time.sleep(0.1)


def wait_for_the_end(mark: str) -> None:
    """Wait until W&B's own processes have ended by themselves; nothing else may be left."""
    for pid in marked_cores(mark):
        with contextlib.suppress(ProcessLookupError), os.fdopen(os.pidfd_open(pid)) as ended:
            select.select([ended], [], [])
    assert kill_marked(mark) == 0


def marked_cores(mark: str) -> list[int]:
    """Return W&B's own processes of this test, by their mark."""
    entry, found = f"{MARK}={mark}".encode(), []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            is_ours = entry in (folder / "environ").read_bytes().split(b"\0")
            if is_ours and b"wandb-core" in (folder / "cmdline").read_bytes():
                found.append(int(folder.name))
        except OSError:  # it has ended
            continue
    return found
