"""The step records of one trial as a Parquet file that carries the trial's whole row.

A worker encodes its records into one blob; the driver adds the row and writes the file before
the trial enters the ledger, so that the ledger can be built again from these files alone. Row
and pages carry checksums: a damaged file is reported, never believed.
"""

import dataclasses
import functools
import hashlib
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import pyarrow as pa
import pyarrow.parquet as pq

from stability_search.errors import UsageError
from stability_search.files import write_whole
from stability_search.records.step import StepLabel, StepRecord
from stability_search.records.trial import TrialRow
from stability_search.records.values import Scalar, finite_or_none

_ROW_KEY = b"stability_search.row"
_ROW_SUM_KEY = b"stability_search.row_sha256"
_STEPS_SUM_KEY = b"stability_search.steps_sha256"  # Parquet's own sums leave out the footer

_COLUMN_TYPES: dict[str, pa.DataType] = {
    "step": pa.int64(),
    "label": pa.string(),
    "reason": pa.string(),
    "is_loss_finite": pa.bool_(),
    "is_grad_finite": pa.bool_(),
    "clipped": pa.bool_(),
    "is_applied": pa.bool_(),
    "batch_index": pa.int64(),
    "first_nonfinite_module": pa.string(),
    "first_nonfinite_phase": pa.string(),
    "is_transient": pa.bool_(),
    "loss_terms": pa.string(),  # JSON: the names differ from task to task
}
_READ_ERRORS = (OSError, ValueError, TypeError, pa.ArrowException)
_FIELD_NAMES = tuple(spec.name for spec in dataclasses.fields(StepRecord))


def step_file_name(trial_id: str, attempt: int = 1) -> str:
    """Return the name of the step file of one attempt of a trial.

    Args:
        trial_id: A plain file name.
        attempt: 1, or more after an `infrastructure` end.
    """
    return f"{trial_id}.parquet" if attempt == 1 else f"{trial_id}-attempt{attempt}.parquet"


class DamagedStepFileError(UsageError):
    """A step file that cannot be read, or whose row does not match its checksum."""


@functools.cache
def step_schema() -> pa.Schema:
    """Return the columns of a step file: one per field of `StepRecord`, in its order."""
    return pa.schema([(name, _COLUMN_TYPES.get(name, pa.float64())) for name in _FIELD_NAMES])


def encode_steps(records: Sequence[StepRecord]) -> bytes:
    """Turn the records of a trial into one Parquet blob.

    Args:
        records: In the order of the steps; may be empty. A number that is not finite is
            written as null.

    Returns:
        A Parquet file in memory: some 40 to 70 bytes a step.
    """
    columns = {name: [_to_cell(record, name) for record in records] for name in _FIELD_NAMES}
    return _to_parquet(pa.table(columns, schema=step_schema()))


def write_steps(path: Path, blob: bytes, row: TrialRow) -> None:
    """Write a trial's records and its row as one file, whole or not at all.

    Args:
        path: The file, `*.parquet`.
        blob: What `encode_steps` returned; empty where the worker died before it could send any.
        row: The trial as it will enter the ledger, told value included.

    Raises:
        StoppedEarlyError: The file could not be written.
        ValueError: The row holds a number that is not finite.
    """
    table = pq.read_table(io.BytesIO(blob)) if blob else step_schema().empty_table()
    text = json.dumps(row.to_json(), allow_nan=False)
    metadata = {
        _ROW_KEY: text,
        _ROW_SUM_KEY: _checksum(text.encode()),
        _STEPS_SUM_KEY: _steps_checksum(table),
    }
    write_whole(path, _to_parquet(table.replace_schema_metadata(metadata)))


def write_records(path: Path, records: Sequence[StepRecord]) -> None:
    """Write step records that belong to no trial as one file, whole or not at all.

    Args:
        path: The file, `*.parquet`; `read_steps` reads it, `read_row` refuses it.
        records: In the order of the steps.

    Raises:
        StoppedEarlyError: The file could not be written.
    """
    table = pq.read_table(io.BytesIO(encode_steps(records)))
    metadata = {_STEPS_SUM_KEY: _steps_checksum(table)}
    write_whole(path, _to_parquet(table.replace_schema_metadata(metadata)))


def read_steps(path: Path) -> list[StepRecord]:
    """Read the step records of one trial, in the order of the steps.

    Raises:
        DamagedStepFileError: The file is missing, damaged, or not a step file.
    """
    return [_from_cells(cells) for cells in read_step_table(path).to_pylist()]


def read_step_table(path: Path) -> pa.Table:
    """Read the same as columns; every value is held to the file's checksum.

    Returns:
        A table of `step_schema()`.

    Raises:
        DamagedStepFileError: The file is missing, damaged, or not a step file.
    """
    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            table = file.read(use_threads=False)  # many small files: threads would only cost
        stored = (table.schema.metadata or {}).get(_STEPS_SUM_KEY, b"")
        is_intact = stored.decode() == _steps_checksum(table)
    except _READ_ERRORS as error:
        raise _damaged(path, error) from error
    if not table.schema.equals(step_schema()):
        raise _damaged(path, "its columns are not those of a step file")
    if not is_intact:
        raise _damaged(path, "the steps do not match their checksum")
    return table


def read_row(path: Path) -> TrialRow:
    """Read the row of the trial that a step file belongs to.

    Raises:
        DamagedStepFileError: The file is missing, damaged, or not a step file.
    """
    try:
        metadata = pq.read_schema(path).metadata or {}
        content = metadata.get(_ROW_KEY, b"")
        is_intact = metadata.get(_ROW_SUM_KEY, b"").decode() == _checksum(content)
    except _READ_ERRORS as error:
        raise _damaged(path, error) from error
    if not is_intact:
        raise _damaged(path, "the trial's row does not match its checksum")
    return TrialRow.from_json(json.loads(content))


def _to_parquet(table: pa.Table) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression="zstd", write_page_checksum=True)
    return buffer.getvalue()


def _to_cell(record: StepRecord, name: str) -> Scalar:
    value = getattr(record, name)
    if name == "loss_terms":
        return json.dumps({key: finite_or_none(term) for key, term in value.items()})
    if name in _COLUMN_TYPES:
        return cast("Scalar", value)
    return finite_or_none(value)


def _from_cells(cells: dict[str, Any]) -> StepRecord:
    terms = json.loads(cells["loss_terms"])
    return StepRecord(**{**cells, "label": StepLabel(cells["label"]), "loss_terms": terms})


def _steps_checksum(table: pa.Table) -> str:
    return _checksum(json.dumps(table.to_pydict()).encode())


def _checksum(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _damaged(path: Path, reason: object) -> DamagedStepFileError:
    first_line = str(reason).partition("\n")[0].rstrip(".")
    return DamagedStepFileError(
        f"{path}: damaged step file: {first_line}.", hint="Move it away to go on without it."
    )
