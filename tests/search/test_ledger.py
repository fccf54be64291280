"""The ledger: what is added is there, whatever is killed; damage is detected, never believed."""

import dataclasses
import json
import math
import shutil
import signal
import sqlite3
import subprocess
import sys
import textwrap
from collections.abc import Mapping
from pathlib import Path

import optuna
import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution

from stability_search import space as spaces
from stability_search.errors import StoppedEarlyError, UsageError
from stability_search.records.trial import Outcome, Stage, TrialRow, TrialSummary
from stability_search.search import ledger as ledger_module
from stability_search.search.ledger import DamagedLedgerError, Ledger
from stability_search.search.plan import StudyPlan
from stability_search.search.request import TrialRequest
from stability_search.search.sampler import as_optuna, varying_values
from stability_search.step_files import write_steps
from tests.search.inline_study import pretend, run_all, write_space

FACTS = {"space_text": "task: teacher\n", "seed": 0, "versions": {"torch": "2.13.0"}}
VALUES = {"learning_rate": 1e-3, "clip_norm": None}
DISTRIBUTIONS = {
    "learning_rate": FloatDistribution(1e-5, 1.0, log=True),
    "clip_norm": CategoricalDistribution((None, 0.5)),
}


def trial_row(
    index: int = 0, stage: Stage = Stage.SEARCH, outcome: Outcome = Outcome.COMPLETED
) -> TrialRow:
    is_told = stage is Stage.SEARCH and outcome.is_result
    return TrialRow(
        trial_id=f"{stage.value}-{index:04d}",
        stage=stage,
        index=index,
        config_id="0123456789",
        seed=7,
        settings={"learning_rate": 1e-3, "clip_norm": None, "precision": "fp16"},
        summary=TrialSummary(
            outcome=outcome,
            num_planned_steps=20,
            num_steps=20,
            judged_losses=(1.5, None, 0.1 + 0.2),
            probe_steps=(0, 20),
            probe_losses=(3.0, 2.5) if outcome is Outcome.COMPLETED else (3.0,),
            error_text="caf\u00e9 \ud800 \x00",
        ),
        told_value=0.25 if is_told else None,
        told_constraint=-0.05 if is_told else None,
        started_at=f"2026-01-01T00:00:{index:02d}+00:00",
    )


def add(ledger: Ledger, row: TrialRow) -> None:
    is_search = row.stage is Stage.SEARCH
    ledger.add(row, VALUES if is_search else None, DISTRIBUTIONS if is_search else None)


ROWS = (
    trial_row(0, Stage.PILOT),
    trial_row(1, Stage.PILOT, Outcome.NONFINITE_PARAMETERS),
    trial_row(0, Stage.SEARCH),
    trial_row(1, Stage.SEARCH, Outcome.PRUNED),
    trial_row(2, Stage.SEARCH, Outcome.USER_ERROR),
    trial_row(0, Stage.CONFIRM),
    trial_row(1, Stage.CONFIRM, Outcome.INFRASTRUCTURE),
)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One ledger with every stage, made once; tests copy it."""
    path = tmp_path_factory.mktemp("ledger") / "study.db"
    ledger = Ledger.create(path, FACTS)
    for row in ROWS:
        add(ledger, row)
    ledger.close()
    return path


@pytest.fixture
def path(written: Path, tmp_path: Path) -> Path:
    return shutil.copy(written, tmp_path / "study.db")


def execute(path: Path, statement: str) -> list[tuple[object, ...]]:
    with sqlite3.connect(path) as connection:
        found = connection.execute(statement).fetchall()
    connection.close()
    return found


def parameters_of(row: TrialRow) -> tuple[Mapping[str, object], Mapping[str, object]]:
    assert row.stage is Stage.SEARCH
    return VALUES, DISTRIBUTIONS


class TestAdd:
    def test_rows_come_back_equal_in_the_order_of_finishing(self, path: Path) -> None:
        assert Ledger(path).rows() == ROWS
        assert Ledger(path).facts() == FACTS

    def test_a_row_can_be_added_after_reopening(self, path: Path) -> None:
        ledger = Ledger(path)
        add(ledger, trial_row(9))
        assert ledger.rows() == (*ROWS, trial_row(9))
        ledger.close()
        assert Ledger(path).rows() == (*ROWS, trial_row(9))

    def test_only_finished_trials_stand_in_the_file(self, path: Path) -> None:
        assert execute(path, "SELECT state, count(*) FROM trials GROUP BY state") == [
            ("COMPLETE", 4),
            ("FAIL", 2),
            ("PRUNED", 1),
        ]

    @pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
    @pytest.mark.parametrize("field", ["told_value", "told_constraint", "e0"])
    def test_a_number_that_is_not_finite_is_refused_and_nothing_is_written(
        self, path: Path, field: str, number: float
    ) -> None:
        before = path.read_bytes()
        with pytest.raises(ValueError, match="Out of range float values"):
            add(Ledger(path), dataclasses.replace(trial_row(9), **{field: number}))
        assert path.read_bytes() == before

    def test_a_search_result_needs_what_was_told(self, path: Path) -> None:
        row = dataclasses.replace(trial_row(9), told_constraint=None)
        with pytest.raises(ValueError, match=r"must have a told value and constraint.*None"):
            add(Ledger(path), row)

    def test_a_trial_enters_once_but_another_attempt_is_another_entry(self, path: Path) -> None:
        ledger = Ledger(path)
        with pytest.raises(ValueError, match="search-0000: attempt 1 is in the ledger already"):
            add(ledger, trial_row(0))
        add(ledger, dataclasses.replace(trial_row(0), attempt=2))
        assert len(ledger.rows()) == len(ROWS) + 1
        ledger.close()

    def test_facts_are_replaced_whole(self, path: Path) -> None:
        ledger = Ledger(path)
        ledger.put_facts({"seed": 1})
        ledger.close()
        assert Ledger(path).facts() == {"seed": 1}

    def test_a_second_ledger_is_not_created_over_the_first(self, path: Path) -> None:
        with pytest.raises(FileExistsError, match="a ledger is there already"):
            Ledger.create(path, FACTS)

    def test_one_file_with_a_rollback_journal_and_full_sync(self, path: Path) -> None:
        connection = ledger_module._connect(path)  # noqa: SLF001 - every write goes through it
        assert connection.execute("PRAGMA journal_mode").fetchone() == ("delete",)
        assert connection.execute("PRAGMA synchronous").fetchone() == (2,)
        connection.close()
        assert [entry.name for entry in path.parent.iterdir()] == ["study.db"]

    def test_a_path_may_hold_what_a_url_gives_a_meaning_to(
        self, tmp_path: Path, written: Path
    ) -> None:
        odd = tmp_path / "a b%20{x}?y#z'"
        odd.mkdir()
        shutil.copy(written, odd / "study.db")
        ledger = Ledger(odd / "study.db")
        add(ledger, trial_row(9))
        ledger.close()
        assert len(Ledger(odd / "study.db").rows()) == len(ROWS) + 1
        assert [entry.name for entry in odd.iterdir()] == ["study.db"]


class TestOptuna:
    """What `optuna-dashboard sqlite:///study.db` shows."""

    @staticmethod
    def trials(path: Path, stage: Stage) -> list[optuna.trial.FrozenTrial]:
        storage = optuna.storages.RDBStorage(f"sqlite:///{path}")
        trials = optuna.load_study(study_name=stage.value, storage=storage).trials
        storage.remove_session()
        storage.engine.dispose()
        return trials

    def test_search_has_parameters_values_and_constraints(self, path: Path) -> None:
        completed, pruned, user_error = self.trials(path, Stage.SEARCH)
        for trial in (completed, pruned):
            assert trial.state is optuna.trial.TrialState.COMPLETE
            assert (trial.params, trial.distributions) == (VALUES, DISTRIBUTIONS)
            assert (trial.value, trial.constraints) == (0.25, {"stability": -0.05})
        assert user_error.state is optuna.trial.TrialState.FAIL
        assert user_error.value is None
        assert [trial.user_attrs["outcome"] for trial in (completed, pruned, user_error)] == [
            "completed",
            "pruned",
            "user_error",
        ]

    @pytest.mark.parametrize("stage", [Stage.PILOT, Stage.CONFIRM])
    def test_other_stages_have_settings_as_attributes(self, path: Path, stage: Stage) -> None:
        completed, other = self.trials(path, stage)
        attributes = completed.user_attrs
        assert completed.params == {}
        assert completed.value == 2.5
        assert other.value is None
        assert (attributes["learning_rate"], attributes["precision"]) == (1e-3, "fp16")
        assert (attributes["trial_id"], attributes["config_id"]) == (
            f"{stage.value}-0000",
            "0123456789",
        )


class TestDamage:
    def test_a_cut_at_any_page_is_detected(self, path: Path) -> None:
        whole = path.read_bytes()
        for size in range(0, len(whole), 4096):
            path.write_bytes(whole[:size])
            with pytest.raises(DamagedLedgerError, match=r"study\.db: damaged ledger: .*resume"):
                Ledger(path)

    def test_a_flipped_bit_is_detected_or_changes_nothing(self, path: Path) -> None:
        whole, num_detected = path.read_bytes(), 0
        for at in range(3, len(whole), 997):
            path.write_bytes(whole[:at] + bytes([whole[at] ^ 0x04]) + whole[at + 1 :])
            try:
                ledger = Ledger(path)
            except DamagedLedgerError:
                num_detected += 1
            else:
                assert (ledger.rows(), ledger.facts()) == (ROWS, FACTS)
        assert num_detected > 10

    @pytest.mark.parametrize("content", [b"", b"SQLite format 3\x00", b"not a database" * 400])
    def test_another_file_is_no_ledger(self, path: Path, content: bytes) -> None:
        path.write_bytes(content)
        with pytest.raises(DamagedLedgerError, match="damaged ledger"):
            Ledger(path)

    def test_a_busy_ledger_is_not_called_damaged(
        self, path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(ledger_module, "_BUSY_S", 0.01)
        writer = sqlite3.connect(path)
        writer.execute("BEGIN EXCLUSIVE")
        with pytest.raises(UsageError, match="cannot be read: database is locked") as caught:
            Ledger(path)
        writer.close()
        assert not isinstance(caught.value, DamagedLedgerError)

    def test_a_foreign_database_is_no_ledger(self, tmp_path: Path) -> None:
        execute(tmp_path / "study.db", "CREATE TABLE trials (trial_id INTEGER)")
        with pytest.raises(DamagedLedgerError, match="no such table"):
            Ledger(tmp_path / "study.db")

    def test_a_missing_ledger_is_not_made_by_looking(self, tmp_path: Path) -> None:
        with pytest.raises(DamagedLedgerError, match="it is missing"):
            Ledger(tmp_path / "study.db")
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.parametrize(
        ("statement", "message"),
        [
            (
                """UPDATE trial_user_attributes SET value_json = replace(value_json, '1.5', '1.6')
                WHERE key = 'row' AND trial_id = 3""",
                "row of trial 3 does not match its checksum",
            ),
            ("DELETE FROM trial_user_attributes WHERE key = 'row'", "row of trial 1 cannot"),
            ("UPDATE trial_user_attributes SET value_json = 'x'", "row of trial 1 cannot"),
            ("DELETE FROM trials WHERE trial_id = 2", "trial 2 is missing"),
            ("UPDATE trials SET study_id = 1 WHERE trial_id = 1", "trial 1 does not match"),
            ("DELETE FROM study_user_attributes", "facts of the study are missing"),
            (
                """UPDATE study_user_attributes
                SET value_json = replace(value_json, 'teacher', 'student')""",
                "facts of the study do not match",
            ),
            ("UPDATE study_user_attributes SET value_json = '{}'", "facts of the study cannot"),
        ],
    )
    def test_what_sqlite_cannot_see_is_detected(
        self, path: Path, statement: str, message: str
    ) -> None:
        execute(path, statement)
        with pytest.raises(DamagedLedgerError, match=message):
            Ledger(path)

    def test_a_newer_schema_is_refused_and_not_called_damaged(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        with monkeypatch.context() as newer:
            newer.setattr(ledger_module, "SCHEMA_VERSION", 2)
            Ledger.create(tmp_path / "study.db", FACTS)
        with pytest.raises(UsageError, match=r"newer version .schema 2; this one") as caught:
            Ledger(tmp_path / "study.db")
        assert not isinstance(caught.value, DamagedLedgerError)

    def test_what_a_later_version_added_to_a_row_is_left_out(
        self, path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        row = trial_row(9)
        whole = {**row.to_json(), "summary": {**row.summary.to_json(), "mood": 1}, "colour": "red"}
        add_as(path, row, whole, monkeypatch)
        assert Ledger(path).rows() == (*ROWS, row)

    def test_a_word_of_a_later_version_is_refused_and_not_called_damaged(
        self, path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        row = trial_row(9)
        summary = {**row.summary.to_json(), "outcome": "melted"}
        add_as(path, row, {**row.to_json(), "summary": summary}, monkeypatch)
        with pytest.raises(UsageError, match=r"newer version .the row of trial 8 ") as caught:
            Ledger(path)
        assert not isinstance(caught.value, DamagedLedgerError)


def add_as(
    path: Path, row: TrialRow, written: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Add a row as another version would have written it."""
    ledger = Ledger(path)
    with monkeypatch.context() as other:
        other.setattr(TrialRow, "to_json", lambda _: written)
        add(ledger, row)
    ledger.close()


@pytest.mark.fault
class TestRebuild:
    @pytest.fixture
    def steps(self, path: Path) -> Path:
        folder = path.parent / "steps"
        folder.mkdir()
        for row in ROWS:
            write_steps(folder / f"{row.trial_id}.parquet", b"", row)
        return folder

    def test_a_damaged_ledger_is_kept_aside_and_made_again(self, path: Path, steps: Path) -> None:
        path.write_bytes(path.read_bytes()[:5000])
        damaged = path.read_bytes()
        ledger, aside, unreadable = Ledger.rebuild(
            path, steps, facts=FACTS, parameters_of=parameters_of
        )
        assert set(map(row_key, ledger.rows())) == set(map(row_key, ROWS))
        assert Ledger(path).facts() == FACTS
        assert unreadable == ()
        assert aside is not None
        assert aside.name == "study.db.damaged-1"
        assert aside.read_bytes() == damaged

    def test_a_second_damage_does_not_overwrite_the_first(self, path: Path, steps: Path) -> None:
        for number in (1, 2):
            path.write_bytes(b"damaged")
            _, aside, _ = Ledger.rebuild(path, steps, facts=FACTS, parameters_of=parameters_of)
            assert aside == path.with_name(f"study.db.damaged-{number}")

    def test_a_damaged_step_file_is_left_out_and_named(self, path: Path, steps: Path) -> None:
        (steps / "search-0001.parquet").write_bytes(b"PAR1")
        path.unlink()
        ledger, aside, unreadable = Ledger.rebuild(
            path, steps, facts=FACTS, parameters_of=parameters_of
        )
        assert len(ledger.rows()) == len(ROWS) - 1
        assert aside is None
        assert len(unreadable) == 1
        assert "search-0001.parquet: damaged step file" in unreadable[0]


def row_key(row: TrialRow) -> str:
    return json.dumps(row.to_json(), sort_keys=True)


class TestFullDisk:
    def test_earlier_trials_stay_readable(
        self, path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        real_connect = ledger_module._connect  # noqa: SLF001 - the fault is injected below it

        def connect(target: Path, *_: object) -> sqlite3.Connection:
            connection = real_connect(target)
            connection.execute("PRAGMA max_page_count = 1")  # never below what is there
            return connection

        monkeypatch.setattr(ledger_module, "_connect", connect)
        # Optuna waits up to 2 s before each of 4 further attempts.
        monkeypatch.setattr("optuna.storages._rdb.storage.time.sleep", lambda _: None)
        ledger = Ledger(path)
        row = trial_row(9)
        large = dataclasses.replace(row.summary, error_text="x" * 100_000)
        with pytest.raises(StoppedEarlyError, match="database or disk is full") as caught:
            add(ledger, dataclasses.replace(row, summary=large))
        assert caught.value.exit_code == 6
        assert ledger.rows() == ROWS
        ledger.close()
        monkeypatch.undo()
        assert Ledger(path).rows() == ROWS

    def test_a_ledger_that_cannot_be_created_is_exit_6(self, tmp_path: Path) -> None:
        with pytest.raises(StoppedEarlyError, match="could not be written"):
            Ledger.create(tmp_path / "nowhere" / "study.db", FACTS)


WRITER = """
import sys
from pathlib import Path
sys.path[:0] = [sys.argv[2]]
from test_ledger import add, trial_row
from stability_search.search.ledger import Ledger
ledger = Ledger(Path(sys.argv[1]))
for index in range(100, 10_000):
    add(ledger, trial_row(index))
    print(index, flush=True)
"""


def test_no_trial_is_running_in_the_ledger_while_trials_of_tpe_are_in_flight(
    tmp_path: Path,
) -> None:
    path = tmp_path / "new.db"
    space = spaces.load(write_space(tmp_path, sampler="tpe"), ["search.trials=14"])
    ledger = Ledger.create(path, FACTS)
    plan = StudyPlan(space, device="cpu")
    states: list[set[str]] = []

    def look(request: TrialRequest) -> TrialSummary:
        for row in plan.rows[len(ledger.rows()) :]:
            is_search = row.stage is Stage.SEARCH
            ledger.add(
                row, *(as_optuna(space, varying_values(space, row.settings)) if is_search else ())
            )
        states.append({state for (state,) in execute(path, "SELECT state FROM trials")})
        return pretend(request)

    run_all(plan, look, slots=3)
    assert len(states) > 21
    assert set().union(*states) <= {"COMPLETE", "PRUNED", "FAIL"}


@pytest.mark.fault
def test_sigkill_loses_no_acknowledged_trial_and_leaves_no_running_one(path: Path) -> None:
    command = [
        sys.executable,
        "-c",
        textwrap.dedent(WRITER),
        str(path),
        str(Path(__file__).parent),
    ]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as writer:  # noqa: S603
        assert writer.stdout is not None
        acknowledged = [int(next(writer.stdout)) for _ in range(7)]
        writer.send_signal(signal.SIGKILL)
        acknowledged += [int(line) for line in writer.stdout]
    kept = {row.index for row in Ledger(path).rows()[len(ROWS) :]}
    assert set(acknowledged) <= kept
    assert len(kept) <= len(acknowledged) + 1
    assert execute(path, "SELECT count(*) FROM trials WHERE state = 'RUNNING'") == [(0,)]


def test_reading_loads_nothing_heavy(path: Path) -> None:
    program = (
        "import sys; from pathlib import Path;"
        "from stability_search.search.ledger import Ledger;"
        "assert len(Ledger(Path(sys.argv[1])).rows()) == 7;"
        "heavy = {'optuna', 'torch', 'ray', 'pandas', 'plotly'} & set(sys.modules);"
        "sys.exit(str(heavy) if heavy else 0)"
    )
    command = [sys.executable, "-c", program, str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603
    assert done.returncode == 0, done.stderr
