"""The ledger: every finished trial of a study, in one SQLite file that Optuna's tools can open.

`study.db` holds three Optuna studies, `search`, `pilot` and `confirm`, and only finished trials.
A trial's whole `TrialRow` stands in one attribute with a checksum beside it; what Optuna's own
tables hold (parameters, value, constraint, `outcome`) is for `optuna-dashboard` and is never read
back. So reading needs no Optuna, and damage that SQLite cannot see is still detected.

A trial is finished when its row is committed: one transaction, with a rollback journal and
`synchronous=FULL`. Before, it does not exist; there is no RUNNING row at any time.
"""

import contextlib
import hashlib
import json
import sqlite3
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from stability_search.errors import StoppedEarlyError, UsageError
from stability_search.files import PART_SUFFIX, cannot_write, put_in_place
from stability_search.records.trial import Outcome, Stage, TrialRow
from stability_search.records.values import Json

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution
    from optuna.storages import RDBStorage
    from optuna.trial import FrozenTrial

SCHEMA_VERSION = 1  # of the row and of the facts; raised when an older program cannot read them

_ROW = "row"
_ROW_SUM = "row_sha256"
_FACTS = "facts"
_CONSTRAINT = "stability"
_BUSY_S = 30.0  # a reader waits for the writer's commit, and the writer for a reader
_NOT_DAMAGE = frozenset(
    {
        sqlite3.SQLITE_BUSY,
        sqlite3.SQLITE_LOCKED,
        sqlite3.SQLITE_CANTOPEN,
        sqlite3.SQLITE_PERM,
        sqlite3.SQLITE_READONLY,
        sqlite3.SQLITE_IOERR,
        sqlite3.SQLITE_FULL,
    }
)
_DIRECTIONS = {Stage.SEARCH: "maximize", Stage.PILOT: "minimize", Stage.CONFIRM: "minimize"}

Distributions = Mapping[str, "BaseDistribution"]
ParametersOf = Callable[[TrialRow], tuple[Mapping[str, Any], Distributions]]


class DamagedLedgerError(UsageError):
    """A ledger that is missing, cut, altered or no ledger at all; `rebuild` makes it again."""


class Ledger:
    """The finished trials of one study.

    Opening reads and checks every row, so a `Ledger` in hand is whole. Only one process may
    write (`run_directory.lock`); others see the trials there were when they opened it.

    Args:
        path: `study.db` of a run directory.
        patience_s: Seconds to wait for a writer's commit, >= 0; None for 30.

    Raises:
        DamagedLedgerError: Names the damage and the way out.
        UsageError: A newer version of the program wrote the ledger, or it cannot be read now.
    """

    def __init__(self, path: Path, *, patience_s: float | None = None) -> None:
        """Read the ledger and check all of it."""
        self._path = path
        self._storage: RDBStorage | None = None
        with _reading(path, patience_s) as connection:
            self._facts = _read_facts(path, connection)
            self._rows = list(_read_rows(path, connection))
        self._keys = {(row.trial_id, row.attempt) for row in self._rows}

    @classmethod
    def create(cls, path: Path, facts: Mapping[str, Json]) -> Self:
        """Write an empty ledger; it appears whole, its facts included.

        Args:
            path: Where; nothing may be there.
            facts: What holds for the whole study: the text of the space, the hash of the task's
                file, the original folder, versions. Plain JSON.

        Raises:
            FileExistsError: There is a file already.
            StoppedEarlyError: The file could not be written.
        """
        if path.exists():
            raise FileExistsError(f"{path}: a ledger is there already.")
        put_in_place(_begin(path, facts), path)
        return cls(path)

    @classmethod
    def rebuild(
        cls,
        path: Path,
        steps_folder: Path,
        *,
        facts: Mapping[str, Json],
        parameters_of: ParametersOf,
    ) -> tuple[Self, Path | None, tuple[str, ...]]:
        """Make a damaged or missing ledger again from the step files.

        Args:
            path: The ledger; a damaged one is moved aside and kept.
            steps_folder: The step files, each with its trial's row; a damaged one is left out.
            facts: As for `create`.
            parameters_of: Parameter values and distributions of a search trial, as for `add`.

        Returns:
            The ledger, the name the damaged file now has (None if there was none), and one
            sentence for each step file that could not be read.

        Raises:
            StoppedEarlyError: The new ledger could not be written. The old file is untouched.
        """
        rows, unreadable = _rows_of_step_files(steps_folder)
        part = _begin(path, facts)
        rebuilt = cls(part)
        for row in rows:
            is_search = row.stage is Stage.SEARCH
            rebuilt.add(row, *(parameters_of(row) if is_search else ({}, {})))
        rebuilt.close()
        aside = _free_name(path) if path.exists() else None
        if aside is not None:
            put_in_place(path, aside)
        put_in_place(part, path)
        # A journal of the damaged file must not be rolled into the new one.
        path.with_name(f"{path.name}-journal").unlink(missing_ok=True)
        return cls(path), aside, unreadable

    @property
    def path(self) -> Path:
        """Its file."""
        return self._path

    def rows(self) -> tuple[TrialRow, ...]:
        """Return the finished trials in the order of finishing."""
        return tuple(self._rows)

    def facts(self) -> Mapping[str, Json]:
        """Return what holds for the whole study, as it was last put."""
        return dict(self._facts)

    def put_facts(self, facts: Mapping[str, Json]) -> None:
        """Replace the facts of the study in one transaction.

        Raises:
            ValueError: A number is not finite.
            StoppedEarlyError: The ledger could not be written.
        """
        value = _sealed(facts)
        with _write_errors(self._path):
            storage = self._open_storage()
            storage.set_study_user_attr(
                storage.get_study_id_from_name(Stage.SEARCH.value), _FACTS, value
            )
        self._facts = dict(facts)

    def add(
        self,
        row: TrialRow,
        parameter_values: Mapping[str, Any] | None = None,
        distributions: Distributions | None = None,
    ) -> None:
        """Commit one finished trial; when this returns, it is on the disk.

        Args:
            row: The trial. A search trial that is a result needs a told value and constraint.
            parameter_values: Values of its active parameters; for search trials only.
            distributions: Optuna distribution of each of them, see `sampler.as_optuna`.

        Raises:
            ValueError: A number is not finite, a told value is missing, or the ledger already
                has this attempt of this trial. Nothing was written.
            StoppedEarlyError: The ledger could not be written; earlier trials are intact.
        """
        key = (row.trial_id, row.attempt)
        if key in self._keys:
            raise ValueError(f"{row.trial_id}: attempt {row.attempt} is in the ledger already.")
        trial = _frozen_trial(row, dict(parameter_values or {}), dict(distributions or {}))
        with _write_errors(self._path):
            storage = self._open_storage()
            storage.create_new_trial(storage.get_study_id_from_name(row.stage.value), trial)
        self._keys.add(key)
        self._rows.append(row)

    def close(self) -> None:
        """Let go of the file; a later `add` opens it again."""
        if self._storage is not None:
            self._storage.remove_session()
            self._storage.engine.dispose()
            self._storage = None

    def _open_storage(self) -> "RDBStorage":
        if self._storage is None:
            self._storage = _open_storage(self._path)
        return self._storage


# Reading: sqlite3 only, nothing of Optuna is imported.


@contextlib.contextmanager
def _reading(path: Path, patience_s: float | None) -> Iterator[sqlite3.Connection]:
    if not path.is_file():
        raise _damaged(path, "it is missing")
    try:
        with contextlib.closing(_connect(path, patience_s)) as connection:
            found = [text for (text,) in connection.execute("PRAGMA integrity_check(1)")]
            if found != ["ok"]:
                raise _damaged(path, found[0].partition("\n")[0])
            yield connection
    except (sqlite3.Error, UnicodeDecodeError) as error:
        # A busy or forbidden file may be whole: nobody must rebuild over it.
        if getattr(error, "sqlite_errorcode", 0) & 0xFF in _NOT_DAMAGE:
            raise UsageError(f"{path}: cannot be read: {error}.") from error
        raise _damaged(path, error) from error


def _connect(path: Path, patience_s: float | None = None) -> sqlite3.Connection:
    # mode=rw: never create a file, but do roll back what a killed writer left in its journal.
    # SQLAlchemy hands a connection from thread to thread, hence check_same_thread.
    uri = f"{path.absolute().as_uri()}?mode=rw"
    timeout = _BUSY_S if patience_s is None else patience_s
    connection = sqlite3.connect(uri, uri=True, timeout=timeout, check_same_thread=False)
    connection.execute("PRAGMA synchronous=FULL")
    return connection


def _read_facts(path: Path, connection: sqlite3.Connection) -> Mapping[str, Json]:
    found = connection.execute(
        "SELECT a.value_json FROM study_user_attributes a JOIN studies s USING (study_id)"
        " WHERE s.study_name = ? AND a.key = ?",
        (Stage.SEARCH.value, _FACTS),
    ).fetchall()
    if len(found) != 1:
        raise _damaged(path, "the facts of the study are missing")
    try:
        sealed = json.loads(found[0][0])
        facts: dict[str, Json] = json.loads(sealed["text"])
        version, checksum = sealed["schema_version"], sealed["sha256"]
    except (ValueError, TypeError, KeyError) as error:
        raise _damaged(path, "the facts of the study cannot be read") from error
    if checksum != _facts_checksum(version, sealed["text"]):
        raise _damaged(path, "the facts of the study do not match their checksum")
    if version > SCHEMA_VERSION:
        raise newer_version(path, f"schema {version}; this one reads up to {SCHEMA_VERSION}")
    return facts


def newer_version(path: Path, why: str) -> UsageError:
    """Return what refuses a ledger that is whole, but holds what only a later version can read.

    Args:
        path: The ledger.
        why: What shows it, in a few words.
    """
    return UsageError(
        f"{path}: written by a newer version ({why}).",
        hint="Use that version of stability-search, or a newer one.",
    )


def _read_rows(path: Path, connection: sqlite3.Connection) -> Iterator[TrialRow]:
    found = connection.execute(
        "SELECT t.trial_id, s.study_name, r.value_json, c.value_json FROM trials t"
        " LEFT JOIN studies s ON s.study_id = t.study_id"
        " LEFT JOIN trial_user_attributes r ON r.trial_id = t.trial_id AND r.key = ?"
        " LEFT JOIN trial_user_attributes c ON c.trial_id = t.trial_id AND c.key = ?"
        " ORDER BY t.trial_id",
        (_ROW, _ROW_SUM),
    )
    for number, (trial, study, text_json, sum_json) in enumerate(found, start=1):
        if trial != number:  # ids count up without a gap: a trial is never deleted
            raise _damaged(path, f"trial {number} is missing")
        try:
            text, checksum = json.loads(text_json), json.loads(sum_json)
            data = json.loads(text)
            is_intact = _checksum(text) == checksum and data["stage"] == study
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise _damaged(path, f"the row of trial {number} cannot be read") from error
        if not is_intact:
            raise _damaged(path, f"the row of trial {number} does not match its checksum")
        try:
            row = TrialRow.from_json(data)
        except (ValueError, TypeError, KeyError, AttributeError) as error:  # whole: not damaged
            raise newer_version(path, f"the row of trial {number} cannot be read here") from error
        yield row


# Writing: through Optuna, so that the schema is Optuna's own.


def _open_storage(path: Path) -> "RDBStorage":
    import optuna
    from sqlalchemy.pool import NullPool

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    # Our own connections: a path may hold what a URL gives a meaning to (%, ?, braces).
    engine = {"creator": lambda: _connect(path), "poolclass": NullPool}
    try:
        return optuna.storages.RDBStorage("sqlite:///study.db", engine_kwargs=engine)
    except RuntimeError as error:
        raise UsageError(f"{path}: {error}") from error


def _begin(path: Path, facts: Mapping[str, Json]) -> Path:
    """Write an empty ledger beside its target and return where."""
    import optuna

    part = path.with_name(f".{path.name}{PART_SUFFIX}")
    value = _sealed(facts)
    with _write_errors(path):
        for leftover in (part, part.with_name(f"{part.name}-journal")):
            leftover.unlink(missing_ok=True)
        part.touch()
        storage = _open_storage(part)
        for stage, direction in _DIRECTIONS.items():
            wanted = optuna.study.StudyDirection[direction.upper()]
            storage.create_new_study([wanted], stage.value)
        storage.set_study_user_attr(
            storage.get_study_id_from_name(Stage.SEARCH.value), _FACTS, value
        )
        storage.remove_session()
        storage.engine.dispose()
    return part


def _frozen_trial(
    row: TrialRow, parameter_values: dict[str, Any], distributions: dict[str, Any]
) -> "FrozenTrial":
    from optuna.trial import TrialState, create_trial

    text = json.dumps(row.to_json(), allow_nan=False)
    value, constraints = _value_and_constraints(row)
    state = TrialState.COMPLETE if value is not None else TrialState.FAIL
    if value is None and row.stage is not Stage.SEARCH and row.summary.outcome.is_result:
        state = TrialState.PRUNED  # a result, but without a number that Optuna could show
    settings = {} if row.stage is Stage.SEARCH else dict(row.settings)
    return create_trial(
        state=state,
        value=value,
        params=parameter_values,
        distributions=distributions,
        constraints=constraints,
        user_attrs={
            **settings,
            "outcome": row.summary.outcome.value,
            "trial_id": row.trial_id,
            "config_id": row.config_id,
            "attempt": row.attempt,
            _ROW: text,
            _ROW_SUM: _checksum(text),
        },
    )


def _value_and_constraints(row: TrialRow) -> tuple[float | None, dict[str, float] | None]:
    """Return what Optuna shows: the told value; outside search, the last probe loss."""
    summary = row.summary
    if row.stage is not Stage.SEARCH:
        is_finished = summary.outcome is Outcome.COMPLETED and summary.probe_losses
        return (summary.probe_losses[-1] if is_finished else None), None
    if not summary.outcome.is_result:
        return None, None
    if row.told_value is None or row.told_constraint is None:
        raise ValueError(
            f"{row.trial_id}: a search trial that ended {summary.outcome.value} must have a told "
            f"value and constraint, but got {row.told_value!r} and {row.told_constraint!r}."
        )
    return row.told_value, {_CONSTRAINT: row.told_constraint}


@contextlib.contextmanager
def _write_errors(path: Path) -> Iterator[None]:
    from optuna.exceptions import StorageInternalError
    from sqlalchemy.exc import DatabaseError

    try:
        yield
    except OSError as error:
        raise cannot_write(path, error) from error
    except (StorageInternalError, DatabaseError, sqlite3.Error) as error:
        reason = error.__cause__ or error
        raise StoppedEarlyError(
            f"{path}: could not be written: {getattr(reason, 'orig', None) or reason}.",
            hint="Free some space or restore access; every finished trial is kept.",
        ) from error


def _rows_of_step_files(folder: Path) -> tuple[list[TrialRow], tuple[str, ...]]:
    from stability_search.step_files import DamagedStepFileError, read_row

    rows, unreadable = [], []
    for path in sorted(folder.glob("*.parquet")):
        try:
            rows.append(read_row(path))
        except DamagedStepFileError as error:
            unreadable.append(str(error))
    rows.sort(key=lambda row: (row.started_at, row.trial_id, row.attempt))
    return rows, tuple(unreadable)


def _free_name(path: Path) -> Path:
    number = 1
    while (aside := path.with_name(f"{path.name}.damaged-{number}")).exists():
        number += 1
    return aside


def _sealed(facts: Mapping[str, Json]) -> dict[str, Json]:
    text = json.dumps(dict(facts), allow_nan=False)
    return {
        "schema_version": SCHEMA_VERSION,
        "text": text,
        "sha256": _facts_checksum(SCHEMA_VERSION, text),
    }


def _facts_checksum(version: int, text: str) -> str:
    return _checksum(f"{version}/{text}")


def _checksum(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _damaged(path: Path, reason: object) -> DamagedLedgerError:
    return DamagedLedgerError(
        f"{path}: damaged ledger: {str(reason).rstrip('.')}.",
        hint=f"`stability-search resume {path.parent}` keeps the file under another name and "
        "rebuilds the ledger from the step files.",
    )
