"""The two tables: declared columns, stable order, no number that is not finite, inert CSV."""

import csv
import io
import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stability_search.columns import COLUMNS, as_markdown
from stability_search.errors import UsageError
from stability_search.inert import inert
from stability_search.records.trial import Outcome, Stage, TrialRow, TrialSummary
from stability_search.run_tables import read_run
from stability_search.settings.study import StudySettings
from stability_search.standing import score_trial
from stability_search.table import (
    Tables,
    build_tables,
    check_setting_names,
    records,
    study_yardsticks,
    to_csv,
    write_tables,
)
from tests.study_rows import (
    SPACE_SETTINGS,
    StudyCase,
    empty_study,
    hopeless_study,
    interrupted_study,
    pilot_rows,
    stable_study,
    trial_row,
)
from tests.study_rows import settings as configuration

README = Path(__file__).parents[1] / "stability_search" / "report" / "README.md"


def tables_of(case: StudyCase, names: tuple[str, ...] = SPACE_SETTINGS) -> Tables:
    return build_tables(
        case.rows,
        space_settings=names,
        study=case.study,
        yardsticks=study_yardsticks(case.rows, case.study),
        verdict=case.verdict,
    )


@pytest.mark.parametrize(
    "make",
    [stable_study, hopeless_study, interrupted_study, empty_study],
    ids=lambda f: f.__name__,
)
def test_every_table_has_exactly_the_declared_columns_then_settings_then_metrics(
    make: Callable[[], StudyCase],
) -> None:
    tables = tables_of(make())
    for name in ("trials", "configurations"):
        declared = [column for column in COLUMNS if column.table == name]
        frame = getattr(tables, name)
        assert list(frame.columns)[: len(declared)] == [column.name for column in declared]
        rest = list(frame.columns)[len(declared) :]
        assert tuple(rest[: len(SPACE_SETTINGS)]) == SPACE_SETTINGS
        assert all(column.startswith("metric_") for column in rest[len(SPACE_SETTINGS) :])
        for column in declared:
            assert str(frame[column.name].dtype) == column.dtype, column.name


def test_a_trial_that_says_nothing_about_stability_has_no_score() -> None:
    frame = tables_of(stable_study()).trials
    for row in records(frame):
        is_result = Outcome(row["outcome"]).is_result
        assert (row["q"] is not None) == is_result
        assert (row["is_stable"] is not None) == is_result
        assert row["is_stable"] in (None, row["outcome"] == "completed" and row["q"] >= 0.5)


def test_scores_are_those_of_the_standing_at_the_horizon_of_the_stage() -> None:
    case = stable_study()
    yardsticks = study_yardsticks(case.rows, case.study)
    by_id = {row.trial_id: row for row in case.rows}
    for row in records(tables_of(case).trials):
        horizon = 400 if row["stage"] == "confirm" else 200
        score = score_trial(by_id[row["trial_id"]], yardsticks[horizon])
        assert row["horizon"] == horizon
        assert row["q"] == (None if score is None else score.q)


def test_a_loss_stop_under_another_delta_than_the_final_one_is_marked() -> None:
    case = stable_study()
    delta = study_yardsticks(case.rows, case.study)[200].delta
    assert delta is not None
    index = next(i for i, row in enumerate(case.rows) if is_diverged_in_search(row))
    rows = list(case.rows)
    for used, is_marked in ((delta, False), (delta * 0.9, True)):
        rows[index] = replace(rows[index], delta=used)
        trials = records(tables_of(replace(case, rows=tuple(rows))).trials)
        (shown,) = [t for t in trials if t["trial_id"] == rows[index].trial_id]
        assert shown["stopped_before_refit"] is is_marked
        others = [t["stopped_before_refit"] for t in trials if t["outcome"] != "diverged"]
        assert set(others) == {None}


def is_diverged_in_search(row: TrialRow) -> bool:
    return row.stage is Stage.SEARCH and row.summary.outcome is Outcome.DIVERGED


def test_the_order_of_the_rows_changes_nothing_and_bytes_repeat(tmp_path: Path) -> None:
    case = stable_study()
    shuffled = [case.rows[i * 37 % len(case.rows)] for i in range(len(case.rows))]
    assert set(map(id, shuffled)) == set(map(id, case.rows))
    for folder, rows in (("a", case.rows), ("b", tuple(shuffled))):
        (tmp_path / folder).mkdir()
        write_tables(tables_of(replace(case, rows=rows)), tmp_path / folder)
    names = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert names == [
        "configurations.csv",
        "configurations.parquet",
        "trials.csv",
        "trials.parquet",
    ]
    for name in names:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name


def test_trials_stand_by_stage_then_index_then_attempt() -> None:
    rows = pilot_rows()
    again = replace(rows[0], attempt=2)
    case = replace(empty_study(), rows=(again, *reversed(rows)))
    frame = tables_of(case).trials
    assert list(zip(frame["index"], frame["attempt"], strict=True))[:3] == [(0, 1), (0, 2), (1, 1)]


def test_reading_gives_back_what_was_written(tmp_path: Path) -> None:
    tables = tables_of(stable_study())
    write_tables(tables, tmp_path)
    again = read_run(tmp_path)
    for name in ("trials", "configurations"):
        before, after = getattr(tables, name), getattr(again, name)
        assert records(before) == records(after)
        assert list(before.dtypes.astype(str)) == list(after.dtypes.astype(str))


def test_reading_a_folder_without_tables_names_the_command_that_makes_them(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"trials\.parquet.*stability-search report RUN"):
        read_run(tmp_path)


def test_reading_a_damaged_table_says_so(tmp_path: Path) -> None:
    write_tables(tables_of(stable_study()), tmp_path)
    path = tmp_path / "trials.parquet"
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(UsageError, match="could not be read"):
        read_run(tmp_path)


def test_a_setting_that_is_off_survives_grouping() -> None:
    frame = tables_of(stable_study()).trials
    groups = frame.groupby("clip_norm", dropna=False).size()
    assert groups.sum() == len(frame)
    assert groups[groups.index.isna()].sum() > 0


def test_settings_are_typed_by_their_values_and_the_engine() -> None:
    types = tables_of(stable_study()).trials.dtypes.astype(str)
    assert types["learning_rate"] == "Float64"
    assert types["batch_size"] == "Int64"
    assert types["precision"] == "string"
    assert tables_of(empty_study()).trials.dtypes.astype(str)["clip_norm"] == "Float64"


def test_every_configuration_has_one_row_and_the_confirmed_stand_first() -> None:
    case = stable_study()
    frame = tables_of(case).configurations
    assert frame["config_id"].is_unique
    assert set(frame["config_id"]) == {row.config_id for row in case.rows}
    assert tuple(frame["config_id"][:3]) == case.verdict.confirmed
    rows = {row["config_id"]: row for row in records(frame)}
    choice = rows[case.verdict.choice]
    assert choice["role"] == "choice"
    assert (choice["num_seeds"], choice["num_stable_seeds"]) == (5, 5)
    assert choice["bad_rate_bound"] == pytest.approx(3 / 2000)
    assert choice["ceiling"] == pytest.approx(77.3, abs=0.05)
    assert rows[case.verdict.fastest]["is_fastest"] is True
    assert sum(row["is_fastest"] for row in rows.values()) == 1
    unconfirmed = [row for row in rows.values() if row["role"] == "search"]
    assert unconfirmed
    assert all(row["score"] is None for row in unconfirmed)


def test_parquet_carries_unit_and_meaning_of_every_column(tmp_path: Path) -> None:
    write_tables(tables_of(stable_study()), tmp_path)
    schema = pq.read_schema(tmp_path / "trials.parquet")
    assert schema.field("q").metadata[b"unit"] == b"[0, 1]"
    assert b"Run score" in schema.field("q").metadata[b"meaning"]


HOSTILE_CELLS = ["=1+1", "+1", "-1", "@x", "\t=1", " =1", "|cmd", "%x", "\r=1", "\n=1"]


@pytest.mark.parametrize("text", HOSTILE_CELLS)
def test_text_that_starts_like_a_formula_is_inert_in_csv(text: str) -> None:
    rows = pilot_rows()
    spoiled = replace(rows[0], summary=replace(rows[0].summary, reason=text))
    frame = tables_of(replace(empty_study(), rows=(spoiled, *rows[1:]))).trials
    first = next(csv.DictReader(io.StringIO(to_csv(frame), newline="")))
    assert first["reason"] == f"'{inert(text)}"


def test_numbers_stay_numbers_in_csv() -> None:
    first = next(csv.DictReader(io.StringIO(to_csv(tables_of(stable_study()).trials), newline="")))
    assert float(first["learning_rate"]) == 1e-4
    assert first["octave"] == ""


def test_a_setting_named_like_a_column_is_refused() -> None:
    with pytest.raises(UsageError, match=r"named like a column.*but got outcome, q"):
        check_setting_names(["learning_rate", "q", "outcome"])
    check_setting_names(SPACE_SETTINGS)


NUMBERS = st.one_of(
    st.floats(allow_nan=True, allow_infinity=True, allow_subnormal=True),
    st.none(),
    st.sampled_from([1e308, -1e308, 5e-324, 10**400, 2**63, -(2**70)]),
)


@settings(max_examples=60)
@given(loss=NUMBERS, metric=NUMBERS, setting=NUMBERS, memory=NUMBERS, text=st.text(max_size=8))
def test_no_number_breaks_the_tables(
    loss: float | None,
    metric: float | None,
    setting: float | None,
    memory: float | None,
    text: str,
) -> None:
    summary = TrialSummary(
        outcome=Outcome.COMPLETED,
        reason=text,
        num_planned_steps=400,
        num_steps=400,
        num_judged_steps=1,
        judged_losses=(loss if isinstance(loss, float) and math.isfinite(loss) else None,),
        probe_steps=(0,),
        probe_losses=(loss if isinstance(loss, float) and math.isfinite(loss) else None,),
        metrics_first={"wer": metric},
        metrics_last={text: metric},
        peak_memory_mib=memory,
        attention_max=loss,
    )
    row = trial_row(Stage.PILOT, 0, configuration(extra=setting), summary, config_id="x")
    case = replace(empty_study(), rows=(row,), study=StudySettings(name="n"))
    tables = tables_of(case, (*SPACE_SETTINGS, "extra"))
    for frame in (tables.trials, tables.configurations):
        json.dumps(records(frame), allow_nan=False)
        to_csv(frame).encode()


def test_the_columns_in_the_readme_are_the_declared_ones() -> None:
    text = README.read_text(encoding="utf-8")
    begin, end = "<!-- columns: generated -->\n", "<!-- columns: end -->"
    assert text.split(begin)[1].split(end)[0].strip() == as_markdown().strip()
