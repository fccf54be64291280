import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path

import pytest

from stability_search.errors import StoppedEarlyError
from stability_search.inert import is_in_sight
from stability_search.records.step import StepLabel, StepRecord
from stability_search.records.trial import Outcome, TrialRow
from stability_search.report.document import json_schema
from stability_search.search.run_directory import RunDirectory
from stability_search.step_files import DamagedStepFileError
from stability_search.trackers import run_files
from stability_search.trackers.base import TrialLog
from stability_search.trackers.run_files import RunFiles, curve, newest_attempt, study_id
from tests.hostile_strings import HOSTILE_STRINGS
from tests.trackers.fake_run import BEST, file_name, rows, write_end, write_run, write_trial


def logged(tmp_path: Path, row: TrialRow, *, q: float | None = 0.75) -> TrialLog:
    run = write_run(tmp_path / "run")
    write_trial(run, row)
    return RunFiles(run.path).trial(file_name(row), q)


def row_of(outcome: Outcome) -> TrialRow:
    return next(row for row in rows() if row.summary.outcome is outcome)


def steps(count: int, *, bad: Sequence[int] = ()) -> list[StepRecord]:
    return [
        StepRecord(
            step=step,
            label=StepLabel.BAD if step in bad else StepLabel.OK,
            loss=None if step in bad else 1.0,
            is_loss_finite=step not in bad,
            grad_norm=1.0,
            is_grad_finite=True,
            clipped=False,
            is_applied=True,
            learning_rate=0.1,
            scale=None,
            step_s=0.5,
        )
        for step in range(1, count + 1)
    ]


def test_the_names_of_files_are_those_of_a_run_directory() -> None:
    run = RunDirectory(path=Path("run"))

    assert run.path / run_files.SPACE_FILE == run.space
    assert run.path / run_files.STEPS_FOLDER == run.steps
    assert run.path / run_files.TRIALS_FILE == run.trials_parquet
    assert run.path / run_files.REPORT_DOCUMENT == run.report_json
    assert [run.path / name for name in run_files.ARTIFACTS] == [
        run.report_html,
        run.report_json,
        run.best,
    ]


def test_the_keys_read_of_the_report_are_those_of_its_schema() -> None:
    text, known = json.dumps(json_schema()), run_files._CHOICE_NUMBERS  # noqa: SLF001

    for key in ("verdict", "reason", "best", "config_id", "settings", "margin_is_capped", *known):
        assert f'"{key}"' in text, key


def test_a_trial_has_settings_final_numbers_and_its_curve(tmp_path: Path) -> None:
    row = row_of(Outcome.COMPLETED)

    trial = logged(tmp_path, row)

    assert trial.settings == row.settings
    assert trial.numbers["q"] == 0.75
    assert trial.numbers["num_steps"] == row.summary.num_steps == len(trial.curve)
    assert (
        trial.numbers["metric_word_error_rate_last"] == row.summary.metrics_last["word_error_rate"]
    )
    assert trial.texts["outcome"] == "completed"
    assert trial.texts["config_id"] == row.config_id
    assert trial.texts["seed"] == str(row.seed)
    assert trial.ended_s - trial.started_s == pytest.approx(row.summary.wall_s)


def test_numbers_that_are_missing_are_left_out_and_none_is_nan(tmp_path: Path) -> None:
    row = next(row for row in rows() if row.summary.num_bad_steps > 1)

    trial = logged(tmp_path, row, q=None)

    assert "q" not in trial.numbers
    assert "probe_last" not in trial.numbers  # infinite: the probe was never read at the end
    values = [value for point in trial.curve for value in point.values.values()]
    assert all(math.isfinite(value) for value in (*values, *trial.numbers.values()))
    bad = [point for point in trial.curve if point.values["train/is_bad"]]
    assert len(bad) == row.summary.num_bad_steps
    assert all("train/loss" not in point.values for point in bad)


def test_no_host_and_no_home_directory_is_told(tmp_path: Path) -> None:
    lost = row_of(Outcome.INFRASTRUCTURE)
    assert lost.node in lost.summary.reason
    assert str(Path.home()) in lost.summary.reason

    trial = logged(tmp_path, lost)

    assert trial.texts["reason"] == "node went away with ~/data"
    assert lost.node not in repr(trial)


def test_a_text_is_one_line_without_control_characters(tmp_path: Path) -> None:
    row = row_of(Outcome.DIVERGED)
    hostile = dataclasses.replace(
        row,
        summary=dataclasses.replace(
            row.summary, reason="a\n\x1b[31mb\u202ec\u061cd\xad\ufff9" + "e" * 999
        ),
    )

    reason = logged(tmp_path, hostile).texts["reason"]

    assert reason.startswith(r"a \x1b[31mb\u202ec\u061cd\xad\ufff9e")
    assert len(reason) == 500


def test_no_name_or_value_of_a_setting_keeps_what_cannot_be_seen(tmp_path: Path) -> None:
    texts = [text for text in HOSTILE_STRINGS if text.encode(errors="replace").decode() == text]
    row = row_of(Outcome.COMPLETED)
    row = dataclasses.replace(row, settings={**row.settings, **{one: one for one in texts}})

    found = logged(tmp_path, row).settings

    assert len(found) > len(texts) / 2
    assert all(map(is_in_sight, (*found, *map(str, found.values()))))


def test_a_search_trial_beyond_the_thousandth_has_numbers_but_no_curve(tmp_path: Path) -> None:
    row = row_of(Outcome.PRUNED)

    early = logged(tmp_path / "early", dataclasses.replace(row, index=999))
    late = logged(tmp_path / "late", dataclasses.replace(row, index=1000))

    assert early.curve
    assert not late.curve
    assert late.numbers == early.numbers


def test_a_long_curve_is_thinned_evenly_but_keeps_every_bad_step_and_the_last() -> None:
    points = curve(steps(4000, bad=(2, 3, 1999)), 100.0)

    kept = [point.step for point in points]
    assert kept[:4] == [1, 2, 3, 5]
    assert {1999, 4000} <= set(kept)
    assert len(kept) == 1004
    assert points[0].time_s == 100.5
    assert points[-1].time_s == 2100.0


def test_a_short_curve_is_kept_whole() -> None:
    assert [point.step for point in curve(steps(1000), 0.0)] == list(range(1, 1001))


def test_the_newest_attempt_is_the_last_step_file(tmp_path: Path) -> None:
    run = write_run(tmp_path)
    lost = row_of(Outcome.INFRASTRUCTURE)
    write_trial(run, lost)
    assert newest_attempt(tmp_path, lost.trial_id) == lost.trial_id

    write_trial(run, dataclasses.replace(lost, attempt=2))
    write_trial(run, dataclasses.replace(lost, attempt=3))

    assert newest_attempt(tmp_path, lost.trial_id) == f"{lost.trial_id}-attempt3"


def test_a_study_keeps_its_id_and_no_other_has_it(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()

    first = study_id(tmp_path)

    assert study_id(tmp_path) == first
    assert study_id(tmp_path / "other") != first


def test_a_damaged_id_is_made_again(tmp_path: Path) -> None:
    (tmp_path / run_files.ID_FILE).write_text('{"study_id": "../../x"}')

    assert len(study_id(tmp_path)) == 32


def test_an_id_that_cannot_be_kept_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(StoppedEarlyError, match="could not be written"):
        study_id(tmp_path / "missing")


def test_a_damaged_step_file_is_an_error(tmp_path: Path) -> None:
    run = write_run(tmp_path)
    (run.steps / "search-000.parquet").write_bytes(b"PAR1")

    with pytest.raises(DamagedStepFileError, match="damaged step file"):
        RunFiles(run.path).trial("search-000", None)


def test_the_end_holds_the_choice_and_the_files_that_are_there(tmp_path: Path) -> None:
    run = write_run(tmp_path)
    write_end(run)
    run.best.unlink()

    end = RunFiles(run.path).end("stable", 0)

    assert end.choice == "c0ffee"
    assert end.settings == BEST["settings"]
    factors = {"ceiling": 90.0, "calm": 1.0, "smooth": 0.9, "kept": 1.0, "progress": 0.8}
    numbers = {"score": 71.5, "q_lower": 0.6, "margin_octaves": 2.0, "num_seeds": 5}
    assert end.numbers == {**numbers, **factors}
    assert end.files == (run.report_html, run.report_json)


@pytest.mark.parametrize(
    ("changes", "margin"),
    [
        ({"margin_is_capped": True}, "at least 2"),
        ({}, "2"),
        ({"margin_octaves": None, "margin_is_capped": None}, ""),
    ],
)
def test_a_margin_that_was_not_tried_further_is_a_lower_bound(
    changes: dict[str, object], margin: str, tmp_path: Path
) -> None:
    run = write_run(tmp_path)
    write_end(run)
    document = json.loads(run.report_json.read_text())
    document["best"] |= changes
    run.report_json.write_text(json.dumps(document))

    assert RunFiles(run.path).end("stable", 0).margin == margin


def test_an_end_without_a_report_is_still_an_end(tmp_path: Path) -> None:
    run = write_run(tmp_path)

    end = RunFiles(run.path).end("incomplete", 6)

    assert (end.verdict, end.exit_code, end.choice, end.files) == ("incomplete", 6, "", ())
