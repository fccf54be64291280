"""`read_run`: three tables of declared types, read from Parquet files; damage is named."""

import dataclasses
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from stability_search import run_tables
from stability_search.columns import COLUMNS, RESERVED_NAMES, Column
from stability_search.errors import UsageError
from stability_search.records.step import StepRecord
from stability_search.records.trial import TrialRow
from stability_search.run_tables import UnreadStepsWarning, read_run
from stability_search.settings.trial import SETTING_NAMES
from stability_search.step_files import (
    encode_steps,
    read_steps,
    step_file_name,
    step_schema,
    write_steps,
)
from stability_search.table import ARROW_TYPES, records, write_tables
from tests.report.study_steps import steps_of
from tests.study_rows import empty_study, pilot_rows, search_rows
from tests.test_table import tables_of

STEP_COLUMNS = [column for column in COLUMNS if column.table == "steps"]


def write_run(folder: Path, rows: Sequence[TrialRow]) -> list[TrialRow]:
    """Write the tables and the step files of some trials."""
    write_tables(tables_of(replace(empty_study(), rows=tuple(rows))), folder)
    (folder / "steps").mkdir()
    for row in rows:
        write_steps(step_path(folder, row), encode_steps(few_steps(row)), row)
    return list(rows)


def few_steps(row: TrialRow) -> list[StepRecord]:
    return steps_of(row)[:6]


def step_path(folder: Path, row: TrialRow) -> Path:
    return folder / "steps" / step_file_name(row.trial_id, row.attempt)


def declared(column: Column) -> tuple[str, pa.DataType]:
    return column.name, ARROW_TYPES[column.dtype]


def test_the_declared_columns_of_steps_are_those_of_a_step_file_after_the_trial() -> None:
    schema = step_schema()
    assert [column.name for column in STEP_COLUMNS[:2]] == ["trial_id", "attempt"]
    assert [declared(column) for column in STEP_COLUMNS[2:]] == list(
        zip(schema.names, schema.types, strict=True)
    )
    fields = [spec.name for spec in dataclasses.fields(StepRecord)]
    assert [column.name for column in STEP_COLUMNS[2:]] == fields


def test_a_task_may_have_settings_named_like_columns_of_steps_only() -> None:
    assert {"loss", "scale", "label"}.isdisjoint(RESERVED_NAMES)
    assert RESERVED_NAMES.isdisjoint(SETTING_NAMES)
    assert {"q", "score", "outcome"} <= RESERVED_NAMES


def test_steps_hold_every_record_of_every_trial_in_declared_types(tmp_path: Path) -> None:
    rows = write_run(tmp_path, search_rows(7))
    run = read_run(tmp_path)
    frame = run.steps
    assert [(name, str(frame[name].dtype)) for name in frame.columns] == [
        (column.name, column.dtype) for column in STEP_COLUMNS
    ]
    expected = []
    for row in rows:
        for record in read_steps(step_path(tmp_path, row)):
            fields = {**record.to_json(), "label": str(record.label), "loss_terms": "{}"}
            expected.append({"trial_id": row.trial_id, "attempt": row.attempt, **fields})
    assert records(frame) == expected
    assert run.unread_steps == ()
    assert run.steps is frame


def test_a_number_that_is_not_finite_is_null_beside_the_flag_that_says_so(tmp_path: Path) -> None:
    bad = next(row for row in search_rows(24) if row.summary.num_bad_steps > 1)
    write_run(tmp_path, [bad])
    frame = read_run(tmp_path).steps
    broken = frame[~frame["is_loss_finite"]]
    assert len(broken) > 0
    assert broken["loss"].isna().all()


def test_nothing_is_read_of_the_steps_until_they_are_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = write_run(tmp_path, pilot_rows()[:3])
    read: list[Path] = []
    original = run_tables.read_step_table

    def spy(path: Path) -> pa.Table:
        read.append(path)
        return original(path)

    monkeypatch.setattr(run_tables, "read_step_table", spy)
    run = read_run(tmp_path)
    assert len(run.trials) == 3
    assert read == []
    assert len(run.steps_of(rows[1].trial_id)) == 6
    assert read == [step_path(tmp_path, rows[1])]
    assert len(run.steps) == 18
    assert len(run.steps) == 18
    assert len(read) == 4


def test_many_files_are_joined_in_parts_and_stay_in_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = write_run(tmp_path, pilot_rows())
    whole = records(read_run(tmp_path).steps)
    monkeypatch.setattr(run_tables, "_JOINED", 3)
    assert records(read_run(tmp_path).steps) == whole
    assert [row["trial_id"] for row in whole[::6]] == [row.trial_id for row in rows]


def test_each_attempt_has_its_own_steps_and_the_last_is_given(tmp_path: Path) -> None:
    first = pilot_rows()[0]
    again = replace(first, attempt=2)
    write_run(tmp_path, [first, again])
    write_steps(step_path(tmp_path, again), encode_steps(few_steps(again)[:2]), again)
    run = read_run(tmp_path)
    assert run.steps.groupby("attempt").size().to_dict() == {1: 6, 2: 2}
    assert len(run.steps_of(first.trial_id)) == 2
    assert len(run.steps_of(first.trial_id, attempt=1)) == 6
    with pytest.raises(UsageError, match=r"it has no attempt 3 of pilot-000"):
        run.steps_of(first.trial_id, attempt=3)


def test_steps_that_cannot_be_read_are_named_and_the_others_returned(tmp_path: Path) -> None:
    rows = write_run(tmp_path, pilot_rows()[:5])
    damaged, gone, other, swapped = (step_path(tmp_path, row) for row in rows[:4])
    damaged.write_bytes(damaged.read_bytes()[:-30])
    gone.unlink()
    pq.write_table(pa.table({"step": [1]}), other)
    table = pq.read_table(swapped)  # what it holds is changed, its checksum is not
    pq.write_table(table.slice(0, 3), swapped)
    run = read_run(tmp_path)
    with pytest.warns(UnreadStepsWarning, match=r"steps of 4 trials.* And 1 more") as seen:
        frame = run.steps
    assert seen[0].filename == __file__
    assert list(frame["trial_id"].unique()) == [rows[4].trial_id]
    assert [(one.trial_id, one.attempt) for one in run.unread_steps] == [
        (row.trial_id, 1) for row in rows[:4]
    ]
    reasons = [one.reason for one in run.unread_steps]
    assert "no such step file" in reasons[1]
    assert all(
        str(path) in reason
        for path, reason in zip((damaged, gone, other, swapped), reasons, strict=True)
    )
    with pytest.raises(UsageError, match="damaged step file"):
        run.steps_of(rows[0].trial_id)
    with pytest.raises(UsageError, match="no such step file"):
        run.steps_of(rows[1].trial_id)


def test_a_run_without_a_folder_of_steps_has_an_empty_table(tmp_path: Path) -> None:
    write_tables(tables_of(empty_study()), tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        frame = read_run(tmp_path).steps
    assert len(frame) == 0
    assert [str(dtype) for dtype in frame.dtypes] == [column.dtype for column in STEP_COLUMNS]


def test_a_trial_that_is_not_of_the_run_is_refused(tmp_path: Path) -> None:
    write_run(tmp_path, pilot_rows()[:1])
    with pytest.raises(UsageError, match=r"it has no nobody\. `trials` lists them"):
        read_run(tmp_path).steps_of("nobody")


def test_a_name_in_a_table_never_leads_out_of_the_folder(tmp_path: Path) -> None:
    outside = pilot_rows()[0]
    (tmp_path / "elsewhere").mkdir()
    write_steps(tmp_path / "elsewhere" / "x.parquet", encode_steps(few_steps(outside)), outside)
    run_folder = tmp_path / "run"
    run_folder.mkdir()
    trial = replace(outside, trial_id="../../elsewhere/x")
    write_tables(tables_of(replace(empty_study(), rows=(trial,))), run_folder)
    (run_folder / "steps").mkdir()
    assert (run_folder / "steps" / step_file_name(trial.trial_id)).is_file()
    run = read_run(run_folder)
    with pytest.raises(UsageError, match="no such step file"):
        run.steps_of(trial.trial_id)
    with pytest.warns(UnreadStepsWarning):
        assert len(run.steps) == 0


def test_a_column_that_an_older_version_did_not_write_is_null(tmp_path: Path) -> None:
    write_run(tmp_path, pilot_rows()[:2])
    path = tmp_path / "trials.parquet"
    pq.write_table(pq.read_table(path).drop_columns(["overflow_rate", "alarms"]), path)
    frame = read_run(tmp_path).trials
    names = [column.name for column in COLUMNS if column.table == "trials"]
    assert list(frame.columns)[: len(names)] == names
    assert str(frame["overflow_rate"].dtype) == "Float64"
    assert frame["alarms"].isna().all()
    assert "learning_rate" in frame


@pytest.mark.parametrize(
    ("spoil", "named"),
    [
        (lambda table: table.drop_columns(["trial_id"]), "trial_id"),
        (lambda table: table.set_column(0, "trial_id", pa.array([1] * len(table))), "trial_id"),
        (lambda table: table.append_column("seed", table.column("seed")), "a name"),
    ],
    ids=["without its key", "another type", "a name twice"],
)
def test_a_table_of_another_program_is_refused(
    tmp_path: Path, spoil: "object", named: str
) -> None:
    write_run(tmp_path, pilot_rows()[:2])
    path = tmp_path / "trials.parquet"
    pq.write_table(spoil(pq.read_table(path)), path)  # type: ignore[operator]
    with pytest.raises(UsageError, match=f"must hold the columns of trials, but {named} is"):
        read_run(tmp_path)
