"""How a run is doing, read from its directory while somebody else may be writing to it."""

import contextlib
import dataclasses
import fcntl
import os
import shutil
import sqlite3
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from stability_search import space as spaces
from stability_search.errors import UsageError
from stability_search.records.trial import Outcome, Stage, TrialRow
from stability_search.records.verdict import VerdictKind
from stability_search.search import run_directory, status
from stability_search.search.closing import keep_verdict
from stability_search.search.ledger import Ledger
from stability_search.search.plan import StudyPlan
from stability_search.search.reopening import parameters_of
from stability_search.search.status import RunState, RunStatus, read_status
from tests.search.inline_study import run_all, write_space

NOW = datetime(2026, 3, 1, 12, tzinfo=UTC)


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the directory of a study that ended with a choice; tests look at copies."""
    folder = tmp_path_factory.mktemp("status")
    small = ("search.trials=3", "confirm.octaves=0")
    space = spaces.load(write_space(folder, sampler="random"), small)
    facts = run_directory.study_facts(space)
    directory = run_directory.create(folder / "out", space, facts=facts, environment={})
    ledger = Ledger.create(directory.ledger, facts)
    plan = StudyPlan(space, device="cpu")
    for second, row in enumerate(run_all(plan)):
        ledger.add(
            _started(row, NOW - timedelta(seconds=100 - second)), *parameters_of(space, row)
        )
    assert plan.verdict is not None
    keep_verdict(ledger, plan.verdict)
    ledger.close()
    return directory.path


def _started(row: TrialRow, at: datetime) -> TrialRow:
    return TrialRow.from_json({**row.to_json(), "started_at": at.isoformat()})


@pytest.fixture
def run(ended: Path, tmp_path: Path) -> Path:
    shutil.copytree(ended, tmp_path / "run")
    shutil.copy(ended.parent / "tiny_task.py", tmp_path)
    return tmp_path / "run"


def without_verdict(run: Path, *, last: int | None = None) -> None:
    """Make it a run that was killed, after so many trials."""
    with contextlib.closing(sqlite3.connect(run / "study.db")) as connection, connection:
        if last is not None:
            for table in ("trial_user_attributes", "trial_values", "trial_params", "trials"):
                connection.execute(f"DELETE FROM {table} WHERE trial_id > ?", (last,))  # noqa: S608
    ledger = Ledger(run / "study.db")
    ledger.put_facts({key: value for key, value in ledger.facts().items() if key != "end"})
    ledger.close()


def seen(run: Path) -> RunStatus:
    return read_status(run, now=NOW)


def files(run: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}


def test_a_finished_run_has_its_verdict_and_its_choice(run: Path) -> None:
    found = seen(run)

    assert found.state is RunState.FINISHED
    assert found.verdict is not None
    assert (found.verdict.kind, found.stage) == (VerdictKind.STABLE, Stage.CONFIRM)
    assert found.best is not None
    assert (found.best.config_id, found.best.num_seeds) == (found.verdict.choice, 4)
    assert sorted(found.best.settings) == ["clip_norm", "learning_rate"]
    assert [(one.stage, one.num_finished, one.num_planned) for one in found.stages[:2]] == [
        (Stage.PILOT, 7, 7),
        (Stage.SEARCH, 3, 3),
    ]
    assert found.stages[2].num_finished <= found.stages[2].num_planned
    assert sum(found.outcomes.values()) == len(Ledger(run / "study.db").rows())
    assert found.outcomes[Outcome.COMPLETED] > found.outcomes[Outcome.PRUNED]


@pytest.mark.parametrize(
    ("last", "stage"),
    [(4, Stage.PILOT), (7, Stage.SEARCH), (9, Stage.SEARCH), (10, Stage.CONFIRM)],
)
def test_an_interrupted_run_names_the_stage_of_its_next_trial(
    last: int, stage: Stage, run: Path
) -> None:
    without_verdict(run, last=last)

    found = seen(run)

    assert (found.state, found.stage, found.verdict) == (RunState.INTERRUPTED, stage, None)
    assert sum(one.num_finished for one in found.stages) == last
    assert (found.best is None) == (last <= 7)
    assert found.started_at == "2026-03-01T11:58:20+00:00"
    assert found.last_finished_at is not None  # a second after its start, unless it was killed
    assert found.last_finished_age_s in (100 - last, 101 - last)


def test_a_run_whose_lock_is_held_is_running(run: Path) -> None:
    without_verdict(run, last=9)

    with run_directory.lock(run_directory.open_run(run)):
        assert seen(run).state is RunState.RUNNING
    assert seen(run).state is RunState.INTERRUPTED  # the twin


def test_somebody_else_who_only_looks_does_not_make_it_running(run: Path) -> None:
    without_verdict(run, last=9)
    descriptor = os.open(run, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH)  # as `status` itself, in another window

        assert seen(run).state is RunState.INTERRUPTED
    finally:
        os.close(descriptor)


def test_what_the_sampler_was_told_counts_while_it_is_measured_as_now(run: Path) -> None:
    space = spaces.load(run / "space.yaml")
    rows = [row for row in Ledger(run / "study.db").rows() if row.stage is not Stage.CONFIRM]
    anew = [dataclasses.replace(row, told_e_star=None, told_value=None) for row in rows]
    stale = [
        row
        if row.told_e_star is None
        else dataclasses.replace(row, told_e_star=-1.0, told_value=9)
        for row in rows
    ]
    others = [
        row if row.told_value is None else dataclasses.replace(row, told_value=9) for row in rows
    ]

    best = status._best(space, rows, None)  # noqa: SLF001

    assert best is not None
    assert best == status._best(space, anew, None) == status._best(space, stale, None)  # noqa: SLF001
    twin = status._best(space, others, None)  # noqa: SLF001
    assert twin is not None
    assert twin.q == 9


def test_a_run_that_has_no_ledger_yet_is_starting(run: Path) -> None:
    (run / "study.db").unlink()

    with run_directory.lock(run_directory.open_run(run)):
        found = seen(run)
    assert (found.state, found.problem) == (
        RunState.RUNNING,
        "It is starting: there is no ledger yet.",
    )
    assert seen(run).state is RunState.DAMAGED  # the twin: nobody is making it


def test_looking_changes_no_file_and_leaves_the_lock(run: Path) -> None:
    before = files(run)

    seen(run)

    assert files(run) == before
    with run_directory.lock(run_directory.open_run(run)):  # the driver may still have it
        pass


def begin(connection: sqlite3.Connection, how: str) -> None:
    connection.isolation_level = None
    connection.execute(f"BEGIN {how}")
    connection.execute("UPDATE studies SET study_name = study_name")


@pytest.mark.parametrize(
    ("how", "is_read"), [("IMMEDIATE", True), ("EXCLUSIVE", False)], ids=["writing", "committing"]
)
def test_a_driver_in_the_middle_of_a_transaction_is_no_error(
    how: str, is_read: bool, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(status, "_PATIENCE_S", 0.01)
    without_verdict(run)

    with (
        run_directory.lock(run_directory.open_run(run)),
        contextlib.closing(sqlite3.connect(run / "study.db")) as driver,
    ):
        begin(driver, how)
        found = seen(run)
        driver.execute("ROLLBACK")

    assert found.state is RunState.RUNNING
    assert bool(found.stages) == is_read
    assert ("database is locked" in found.problem) == (not is_read)


def test_the_twin_a_lock_without_a_driver_is_an_error(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(status, "_PATIENCE_S", 0.01)
    with contextlib.closing(sqlite3.connect(run / "study.db")) as somebody:
        begin(somebody, "EXCLUSIVE")
        with pytest.raises(UsageError, match="cannot be read: database is locked"):
            seen(run)


def _cut(run: Path) -> None:
    path = run / "study.db"
    path.write_bytes(path.read_bytes()[:-4096])


def _swap(run: Path) -> None:
    (run / "study.db").write_text("no database")


@pytest.mark.parametrize("harm", [_cut, _swap])
def test_a_damaged_ledger_is_said_with_the_way_out(
    harm: Callable[[Path], None], run: Path
) -> None:
    harm(run)

    found = seen(run)

    assert (found.state, found.stages, found.best) == (RunState.DAMAGED, (), None)
    assert "damaged ledger" in found.problem
    assert "stability-search resume" in found.problem


@pytest.mark.parametrize("names", [(), ("space.yaml",)], ids=["empty", "a training"])
def test_a_directory_of_something_else_is_refused(names: tuple[str, ...], tmp_path: Path) -> None:
    for name in names:
        (tmp_path / name).write_text("task: teacher\nfixed: {learning_rate: 0.1}\n")

    with pytest.raises(UsageError, match="must hold"):
        seen(tmp_path)
