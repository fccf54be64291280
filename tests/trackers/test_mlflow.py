"""MLflow for real: a server of the test's own, and the tracker in its own process."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from stability_search.events import Event, EventName
from stability_search.records.trial import Outcome, Stage
from stability_search.search.remains import MARK, kill_marked, new_mark
from stability_search.trackers import listening, tracking
from tests.report.study_steps import steps_of
from tests.trackers.fake_run import (
    NAMES,
    file_name,
    finished,
    played,
    rows,
    started,
    trial_event,
    write_run,
    write_trial,
)
from tests.trackers.servers import SERVER_VARIABLES, MlflowServer, silent_server

pytestmark = [
    pytest.mark.fault,
    pytest.mark.timeout(300),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:mlflow.*"),
]
CANARY = "canary-of-a-secret"


@pytest.fixture(name="server")
def _server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[MlflowServer]:
    for name, value in SERVER_VARIABLES.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("SOME_TOKEN", CANARY)
    server = MlflowServer(tmp_path / "server")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.uri)
    yield server
    server.stop()


def warnings_in(heard: list[Event]) -> list[str]:
    return [one.text("text") for one in heard if one.text("level") == "warning"]


def runs_on(server: MlflowServer) -> tuple[Any, dict[str, Any]]:
    """Return the parent run and the nested ones by their trial."""
    from mlflow import MlflowClient

    client = MlflowClient(server.uri)
    experiment = client.get_experiment_by_name("teacher")
    found = client.search_runs([experiment.experiment_id])
    nested = {run.info.run_name: run for run in found if "mlflow.parentRunId" in run.data.tags}
    (parent,) = (run for run in found if "mlflow.parentRunId" not in run.data.tags)
    assert len(found) == len(nested) + 1
    return parent, nested


def test_a_study_is_logged_gone_on_with_and_survives_its_server(
    tmp_path: Path, server: MlflowServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One story, since a server takes seconds to start."""
    for name in ("DRAIN_S", "INTERRUPTED_DRAIN_S", "_LEAVE_S"):  # a busy machine is no failure
        monkeypatch.setattr(listening, name, 250.0)
    run, heard = write_run(tmp_path / "run"), list[Event]()
    end = finished(run)
    for exit_code, some in ((143, rows()[:2]), (130, rows()[2:4])):  # told to end, and resumed
        with tracking(["mlflow"], heard.append) as hear:
            hear(started(run))
            for row in some:
                write_trial(run, row)
                hear(trial_event(row))
            how = {"verdict": "incomplete", "exit_code": exit_code}
            hear(Event(name=end.name, time=end.time, fields={**end.fields, **how}))
        assert warnings_in(heard) == []
        parent, nested = runs_on(server)
        assert parent.info.status == "KILLED"
        assert ("stability_search.verdict" in parent.data.tags) == (exit_code == 130)
    assert set(nested) == set(NAMES[:4])

    with tracking(["mlflow"], heard.append) as hear:  # resumed
        for one in played(run, rows()[4:]):
            hear(one)
    assert warnings_in(heard) == []
    check_what_was_logged(server, parent.info.run_id)
    assert not any(CANARY in path.read_text("latin-1") for path in files_below(tmp_path))

    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    other = write_run(tmp_path / "other")
    with tracking(["mlflow"], heard.append) as hear:
        for one in played(other):
            hear(one)
            if one.name == EventName.STUDY_STARTED:
                server.stop()
    (said,) = warnings_in(heard)
    assert said.startswith("mlflow: MlflowException: ")
    assert [one.name for one in heard if one.name == EventName.STUDY_FINISHED] == [
        EventName.STUDY_FINISHED
    ] * 4


def files_below(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def check_what_was_logged(server: MlflowServer, parent_id: str) -> None:
    from mlflow import MlflowClient

    client = MlflowClient(server.uri)
    parent, nested = runs_on(server)
    assert parent.info.run_id == parent_id
    assert parent.info.status == "FINISHED"
    assert parent.data.tags["stability_search.verdict"] == "stable"
    assert parent.data.tags["stability_search.choice.precision"] == "bf16"
    assert parent.data.tags["stability_search.margin"] == "2"
    assert parent.data.metrics["score"] == 71.5
    assert parent.data.params["task"] == "teacher"
    artifacts = {one.path for one in client.list_artifacts(parent_id)}
    assert artifacts == {"report.html", "report.json", "best.yaml"}

    assert set(nested) == set(NAMES)
    for row in rows():
        one = nested[file_name(row)]
        assert one.data.tags["mlflow.parentRunId"] == parent_id
        assert one.data.tags["stability_search.outcome"] == row.summary.outcome.value
        assert one.data.metrics["num_bad_steps"] == row.summary.num_bad_steps
        assert one.data.params["precision"] == row.settings["precision"]
        assert one.info.user_id == "unknown"
        assert row.node not in str(one.to_dictionary())
    row = next(row for row in rows() if row.summary.outcome is Outcome.PRUNED)
    assert row.stage is Stage.SEARCH
    pruned = nested[row.trial_id]
    assert pruned.info.status == "KILLED"
    history = client.get_metric_history(pruned.info.run_id, "train/loss")
    assert sorted((one.step, one.value) for one in history) == [
        (one.step, one.loss) for one in steps_of(row) if one.loss is not None
    ]
    assert not any(str(Path.home()) in str(one.to_dictionary()) for one in nested.values())


def test_a_server_that_never_answers_holds_nothing_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mark = new_mark()
    monkeypatch.setenv(MARK, mark)
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    heard: list[Event] = []
    run = write_run(tmp_path / "run")

    with silent_server() as uri:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
        with tracking(["mlflow"], heard.append) as hear:
            for one in played(run):
                if one.name != EventName.STUDY_FINISHED:  # as after SIGTERM
                    hear(one)

    (said,) = warnings_in(heard)
    assert said.startswith(f"mlflow: {len(NAMES)} entries were not logged in time.")
    assert kill_marked(mark) == 0, f"left behind by {os.getpid()}"
