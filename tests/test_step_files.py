"""Step files: every record and the whole row come back, and damage is noticed."""

import dataclasses
import math
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from stability_search.records.step import StepLabel, StepRecord
from stability_search.records.trial import Outcome, Stage, TrialRow, TrialSummary
from stability_search.step_files import (
    DamagedStepFileError,
    encode_steps,
    read_row,
    read_steps,
    step_schema,
    write_records,
    write_steps,
)

finite = st.none() | st.floats(allow_nan=False, allow_infinity=False)
words = st.text(max_size=8)
step_records = st.builds(
    StepRecord,
    step=st.integers(1, 2**40),
    label=st.sampled_from(StepLabel),
    reason=words,
    loss=finite,
    is_loss_finite=st.booleans(),
    grad_norm=finite,
    is_grad_finite=st.booleans(),
    clipped=st.booleans(),
    is_applied=st.booleans(),
    learning_rate=st.floats(0, 1),
    scale=finite,
    attention_max=finite,
    clamp_frac=finite,
    cap_frac=finite,
    batch_index=st.none() | st.integers(0, 2**40),
    first_nonfinite_module=st.none() | words,
    first_nonfinite_phase=st.none() | words,
    last_finite_max=finite,
    is_transient=st.none() | st.booleans(),
    update_ratio=finite,
    zero_grad_frac=finite,
    grad_rms_over_eps=finite,
    loss_terms=st.dictionaries(words, finite, max_size=3),
    evidence=finite,
    step_s=st.floats(0, 1e3),
)


def step_record(step: int, loss: float | None = 1.5) -> StepRecord:
    return StepRecord(
        step=step,
        label=StepLabel.OK,
        loss=loss,
        is_loss_finite=True,
        grad_norm=2.0,
        is_grad_finite=True,
        clipped=False,
        is_applied=True,
        learning_rate=1e-3,
        scale=None,
    )


def trial_row(trial_id: str = "search-0", *, e0: float | None = 2.0) -> TrialRow:
    return TrialRow(
        trial_id=trial_id,
        stage=Stage.SEARCH,
        index=0,
        config_id="0123456789",
        seed=7,
        settings={"learning_rate": 1e-3, "clip_norm": None, "precision": "fp16"},
        e0=e0,
        summary=TrialSummary(
            outcome=Outcome.USER_ERROR,
            num_planned_steps=20,
            judged_losses=(1.0, None),
            error_text="caf\u00e9 \ud800 \x00 </script>",
        ),
    )


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(records=st.lists(step_records, max_size=4))
def test_records_and_row_come_back_equal(tmp_path: Path, records: list[StepRecord]) -> None:
    path = tmp_path / "a.parquet"
    write_steps(path, encode_steps(records), trial_row())
    assert read_steps(path) == records
    assert read_row(path) == trial_row()


def test_there_is_one_column_for_each_field_in_its_order() -> None:
    assert step_schema().names == [spec.name for spec in dataclasses.fields(StepRecord)]


def test_a_worker_that_sent_nothing_leaves_a_file_without_steps(tmp_path: Path) -> None:
    write_steps(tmp_path / "a.parquet", b"", trial_row())
    assert read_steps(tmp_path / "a.parquet") == []
    assert read_row(tmp_path / "a.parquet") == trial_row()


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_a_number_that_is_not_finite_is_stored_as_missing(tmp_path: Path, number: float) -> None:
    write_steps(tmp_path / "a.parquet", encode_steps([step_record(1, number)]), trial_row())
    assert read_steps(tmp_path / "a.parquet") == [step_record(1, None)]


def test_a_row_with_nan_is_refused_before_a_file_is_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="Out of range float values"):
        write_steps(tmp_path / "a.parquet", b"", trial_row(e0=math.nan))
    assert list(tmp_path.iterdir()) == []


def test_every_cut_and_every_flipped_byte_is_noticed_or_harmless(tmp_path: Path) -> None:
    path, records, row = (
        tmp_path / "a.parquet",
        [step_record(k) for k in range(1, 30)],
        trial_row(),
    )
    write_steps(path, encode_steps(records), row)
    whole = path.read_bytes()
    cuts = [whole[:size] for size in range(0, len(whole), 211)]
    flips = [
        whole[:at] + bytes([whole[at] ^ 0x10]) + whole[at + 1 :] for at in range(0, len(whole), 37)
    ]
    num_row_damaged = num_steps_damaged = 0
    for content in (*cuts, *flips):
        path.write_bytes(content)
        try:
            assert read_row(path) == row
        except DamagedStepFileError:
            num_row_damaged += 1
        try:
            assert len(read_steps(path)) == len(records)
        except DamagedStepFileError:
            num_steps_damaged += 1
    assert num_row_damaged >= len(cuts)
    assert num_steps_damaged >= len(cuts)


@pytest.mark.parametrize("content", [b"", b"PAR1", b"not a Parquet file"])
def test_another_file_under_that_name_is_named(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "a.parquet"
    path.write_bytes(content)
    with pytest.raises(DamagedStepFileError, match=r"a\.parquet: damaged step file"):
        read_row(path)
    with pytest.raises(DamagedStepFileError, match=r"a\.parquet: damaged step file"):
        read_steps(path)


def test_a_parquet_file_of_another_program_is_no_step_file(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(step_schema().empty_table().select(["step"]), path)
    with pytest.raises(DamagedStepFileError, match="not those of a step file"):
        read_steps(path)
    with pytest.raises(DamagedStepFileError, match="does not match its checksum"):
        read_row(path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(DamagedStepFileError, match=r"gone\.parquet"):
        read_row(tmp_path / "gone.parquet")


def test_a_thousand_steps_take_little_room() -> None:
    blob = encode_steps([step_record(k, 1 / k) for k in range(1, 1001)])
    assert len(blob) < 60_000


def test_records_without_a_trial_are_read_back_and_damage_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "part.parquet"
    records = [step_record(1), step_record(2, None)]
    write_records(path, records)
    assert read_steps(path) == records
    with pytest.raises(DamagedStepFileError, match="row does not match"):
        read_row(path)
    pq.write_table(pq.read_table(path).slice(0, 1), path)
    with pytest.raises(DamagedStepFileError, match="do not match their checksum"):
        read_steps(path)
