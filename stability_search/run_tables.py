"""The three tables of a run, read from its Parquet files alone: no torch, no Ray, no ledger."""

import contextlib
import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeAlias, final

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from stability_search.columns import COLUMNS, TableName
from stability_search.errors import UsageError
from stability_search.step_files import (
    DamagedStepFileError,
    read_step_table,
    step_file_name,
    step_schema,
)
from stability_search.table import ARROW_TYPES, PANDAS_TYPES, STORED_TABLES

STEPS_FOLDER = "steps"
_Attempt: TypeAlias = tuple[str, int]  # trial_id, attempt
_HINT = "`stability-search report RUN` makes it from the ledger."
_NAMED = 3  # files that a warning names
_JOINED = 256  # files whose steps are joined at a time


class UnreadStepsWarning(UserWarning):
    """Steps of a run are missing from what was read; `Run.unread_steps` says which and why."""


@dataclass(frozen=True, kw_only=True, slots=True)
class UnreadSteps:
    """A trial whose steps could not be read.

    Attributes:
        trial_id: The trial.
        attempt: Its attempt.
        reason: Why, a sentence with the path of the file.
    """

    trial_id: str
    attempt: int
    reason: str


@final
class Run:
    """The three tables of a run.

    Trials and configurations are read at once. The steps, which are many, are read when `steps`
    is first asked for, and then kept; `steps_of` reads those of one trial.

    Args:
        path: The run directory.
        trials: A row per trial, by stage, index and attempt.
        configurations: A row per configuration: the confirmed ones best first, then the others.
    """

    def __init__(self, path: Path, *, trials: pd.DataFrame, configurations: pd.DataFrame) -> None:
        self.path = path
        self.trials = trials
        self.configurations = configurations

    @property
    def steps(self) -> pd.DataFrame:
        """A row per step, in the order of `trials` and then of the steps.

        Every file is held to its checksum. Trials whose file is missing or damaged are left out,
        named by an `UnreadStepsWarning` and listed in `unread_steps`.
        """
        return self._read_steps[0]

    @property
    def unread_steps(self) -> tuple[UnreadSteps, ...]:
        """The trials that `steps` lacks, in the order of `trials`; reads the steps if need be."""
        return self._read_steps[1]

    def steps_of(self, trial_id: str, *, attempt: int | None = None) -> pd.DataFrame:
        """Read the steps of one trial from its own file.

        Args:
            trial_id: A trial of `trials`.
            attempt: One of its attempts; None takes the last.

        Returns:
            The columns of `steps`, a row per step.

        Raises:
            UsageError: There is no such trial, or its file is missing or damaged.
        """
        steps = _Steps()
        steps.add(self._attempt(trial_id, attempt), self.step_file(trial_id, attempt=attempt))
        return steps.frame()

    def step_file(self, trial_id: str, *, attempt: int | None = None) -> Path:
        """Return the path of a trial's step file, which must be there.

        Args:
            trial_id: A trial of `trials`.
            attempt: One of its attempts; None takes the last.

        Raises:
            UsageError: There is no such trial, or no such file.
        """
        chosen = self._attempt(trial_id, attempt)
        return _existing(self.path, chosen, self._step_files)

    def _attempt(self, trial_id: str, attempt: int | None) -> _Attempt:
        known = [number for name, number in self._attempts if name == trial_id]
        if not known or (attempt is not None and attempt not in known):
            asked = trial_id if not known else f"attempt {attempt} of {trial_id}"
            raise UsageError(
                f"A trial of {self.path} must be given, but it has no {asked}.",
                hint="`trials` lists them.",
            )
        return (trial_id, max(known) if attempt is None else attempt)

    @property
    def _attempts(self) -> list[_Attempt]:
        return list(zip(self.trials["trial_id"], self.trials["attempt"], strict=True))

    @cached_property
    def _step_files(self) -> frozenset[str]:
        """Names of the files in `steps/`: a name from a table is never made into a path unseen."""
        with contextlib.suppress(OSError), os.scandir(self.path / STEPS_FOLDER) as entries:
            return frozenset(entry.name for entry in entries if entry.is_file())
        return frozenset()

    @cached_property
    def _read_steps(self) -> tuple[pd.DataFrame, tuple[UnreadSteps, ...]]:
        steps, unread = _Steps(), []
        for attempt in self._attempts:
            try:
                steps.add(attempt, _existing(self.path, attempt, self._step_files))
            except UsageError as error:
                name, number = attempt
                unread.append(UnreadSteps(trial_id=name, attempt=number, reason=error.message))
        if unread:  # to whoever asked for `steps`, past the property and its cache
            warnings.warn(_warning(unread), UnreadStepsWarning, stacklevel=4)
        return steps.frame(), tuple(unread)


class _Steps:
    """The steps of some trials as they are read: columns, never a Python object per cell."""

    def __init__(self) -> None:
        self._attempts: list[_Attempt] = []
        self._lengths: list[int] = []
        self._tables: list[pa.Table] = []
        self._chunks: dict[str, list[pa.Array]] = {name: [] for name in step_schema().names}

    def add(self, attempt: _Attempt, path: Path) -> None:
        """Read one file; DamagedStepFileError where it cannot be believed."""
        table = read_step_table(path)
        self._attempts.append(attempt)
        self._lengths.append(table.num_rows)
        self._tables.append(table.replace_schema_metadata(None))
        if len(self._tables) == _JOINED:
            self._join()

    def _join(self) -> None:
        """Join small arrays to large ones: a thousand small buffers take more than their bytes."""
        joined = pa.concat_tables(self._tables, promote_options="none").combine_chunks()
        for name, chunks in self._chunks.items():
            chunks.extend(joined.column(name).chunks)
        self._tables.clear()

    def frame(self) -> pd.DataFrame:
        """Return all as one table; a column that was read is given back before the next."""
        if self._tables:
            self._join()
        owners = pa.array(np.repeat(np.arange(len(self._attempts)), self._lengths))
        names = pa.array([name for name, _ in self._attempts], type=pa.string())
        numbers = pa.array([number for _, number in self._attempts], type=pa.int64())
        arrays = {
            "trial_id": _to_pandas(names.take(owners)),
            "attempt": _to_pandas(numbers.take(owners)),
        }
        for field in step_schema():
            chunks = self._chunks.pop(field.name)
            arrays[field.name] = _to_pandas(
                pa.chunked_array(chunks, type=field.type).combine_chunks()
            )
        return pd.DataFrame(arrays, copy=False)


def _to_pandas(array: pa.Array) -> Any:  # noqa: ANN401 - one of four pandas arrays
    return PANDAS_TYPES[array.type].__from_arrow__(array)


def read_run(path: str | Path) -> Run:
    """Read the tables of a run from its Parquet files; nothing that they name is imported.

    Args:
        path: The run directory.

    Returns:
        Its tables as DataFrames of nullable types, each column as `columns.COLUMNS` declares it.

    Raises:
        UsageError: `trials.parquet` or `configurations.parquet` is missing or is not one of ours.
    """
    frames = {name: _read_table(Path(path), name) for name in STORED_TABLES}
    return Run(Path(path), trials=frames["trials"], configurations=frames["configurations"])


def _read_table(folder: Path, name: TableName) -> pd.DataFrame:
    path = folder / f"{name}.parquet"
    try:
        with pq.ParquetFile(path) as file:
            table = file.read()
    except FileNotFoundError:
        raise UsageError(
            f"A run directory must hold {path.name}, but {folder} does not.", hint=_HINT
        ) from None
    except (pa.ArrowException, OSError, ValueError) as error:
        reason = str(error).partition("\n")[0].rstrip(".")
        raise UsageError(
            f"{path} must be a Parquet file, but could not be read: {reason}.", hint=_HINT
        ) from None
    frame: pd.DataFrame = _as_declared(path, name, table).to_pandas(
        types_mapper=PANDAS_TYPES.get, ignore_metadata=True
    )
    return frame


def _as_declared(path: Path, name: TableName, table: pa.Table) -> pa.Table:
    """Return the declared columns first; those that an older version did not know are null.

    Raises:
        UsageError: The table is of another program.
    """
    declared = {c.name: ARROW_TYPES[c.dtype] for c in COLUMNS if c.table == name}
    found = dict(zip(table.schema.names, table.schema.types, strict=True))
    key = next(iter(declared))  # the first column says what the row is of
    wrong = [one for one, dtype in declared.items() if found.get(one, dtype) != dtype]
    wrong += [] if key in found else [key]
    if wrong or len(found) != table.num_columns:
        raise UsageError(
            f"{path} must hold the columns of {name}, but {', '.join(wrong) or 'a name'} is "
            "missing, of another type, or there twice.",
            hint=_HINT,
        )
    columns = {
        one: table.column(one) if one in found else pa.nulls(table.num_rows, type=dtype)
        for one, dtype in declared.items()
    }
    columns |= {one: table.column(one) for one in found if one not in declared}
    return pa.table(columns)


def _existing(run: Path, attempt: _Attempt, present: frozenset[str]) -> Path:
    name = step_file_name(*attempt)
    if name not in present:
        raise DamagedStepFileError(f"{run / STEPS_FOLDER / name}: no such step file.")
    return run / STEPS_FOLDER / name


def _warning(unread: Sequence[UnreadSteps]) -> str:
    named = " ".join(one.reason for one in unread[:_NAMED])
    more = f" And {len(unread) - _NAMED} more: see `unread_steps`." if unread[_NAMED:] else ""
    trials = "1 trial" if len(unread) == 1 else f"{len(unread):,} trials"
    return f"The steps of {trials} could not be read. {named}{more}"
