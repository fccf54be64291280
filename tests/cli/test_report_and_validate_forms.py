"""`report` and `validate` in the forms that programs and spreadsheets read."""

import csv
import io
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from stability_search.cli import main
from stability_search.records.verdict import Verdict, VerdictKind
from stability_search.search import closing
from tests.comparison.run_files import edit_table, write_run
from tests.study_rows import stable_study

GOOD = """\
task: teacher
fixed: {batch_size: 2}
space:
  learning_rate: {loguniform: {low: 1e-4, high: 0.3}}
  precision: {choice: [fp32, fp16]}
  init_scale: {choice: [1024, 65536], when: {precision: fp16}}
"""
BAD = "task: teacher\nspace: {learning_rate: {loguniform: {low: -1, high: 1}}, init_scal: 1}\n"

Out = Callable[[], str]


@pytest.fixture
def out(capfd: pytest.CaptureFixture[str]) -> Out:
    return lambda: capfd.readouterr().out


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("runs") / "run"
    run = write_run(path, stable_study(), with_steps=False)
    edit_table(run, "configurations", "precision", lambda cell: f"=\x1b[31m{cell}")
    return run


@pytest.fixture
def run(written: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a run whose report is written already; writing it again is another test's."""
    verdict = Verdict(kind=VerdictKind.STABLE, exit_code=0)
    end = closing.Study(directory=written, verdict=verdict, lines=("the verdict",))
    monkeypatch.setattr(closing, "render_run", lambda _: end)
    return written


def test_report_prints_the_verdict_lines(run: Path, out: Out) -> None:
    assert main(["report", str(run)]) == 0
    assert out().startswith("the verdict\n")


def test_report_as_json_is_what_the_file_holds(run: Path, out: Out) -> None:
    assert main(["report", str(run), "--format", "json"]) == 0
    assert json.loads(out()) == json.loads((run / "report.json").read_text())


def test_report_as_csv_is_the_table_of_configurations(run: Path, out: Out) -> None:
    assert main(["report", str(run), "--format", "csv"]) == 0
    printed = out()
    rows = list(csv.DictReader(io.StringIO(printed)))
    assert rows[0]["role"] == "choice"
    assert float(rows[0]["score"]) == pytest.approx(73.9, abs=0.05)
    assert rows[0]["precision"] == r"'=\x1b[31mbf16"
    assert rows[0]["init_scale"] == ""
    assert len(rows) == len({row.config_id for row in stable_study().rows})


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "good.yaml").write_text(GOOD)
    (tmp_path / "bad.yaml").write_text(BAD)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.usefixtures("files")
def test_a_valid_file_as_json_is_what_it_asks_for(out: Out) -> None:
    assert main(["validate", "--space", "good.yaml", "--format", "json"]) == 0
    assert json.loads(out()) == {
        "schema": "stability-search/validation/1",
        "path": "good.yaml",
        "is_valid": True,
        "num_varying": 3,
        "num_conditional": 1,
        "num_fixed": 1,
        "trials": 48,
        "trial_steps": 200,
        "confirm_steps": 400,
        "confirm_seeds": 5,
        "unchecked": [],
        "notes": [],
        "problems": [],
    }


@pytest.mark.usefixtures("files")
def test_every_problem_is_data_and_a_message_and_exit_2(
    capfd: pytest.CaptureFixture[str],
) -> None:
    words = ["validate", "--space", "bad.yaml", "--format"]
    assert main([*words, "json"]) == 2
    out, err = capfd.readouterr()
    document = json.loads(out)
    assert (document["is_valid"], document["trials"]) == (False, None)
    keys = [problem["key"] for problem in document["problems"]]
    assert len(keys) > 1
    assert all(key in err for key in keys)
    assert f"{len(keys)} problems; nothing was started" in err

    assert main([*words, "csv"]) == 2
    rows = list(csv.DictReader(io.StringIO(capfd.readouterr().out)))
    assert [row["key"] for row in rows] == keys
    assert rows[0]["where"].startswith("bad.yaml:2:")


@pytest.mark.usefixtures("files")
def test_a_valid_file_has_no_rows_of_problems_and_its_line_is_as_ever(out: Out) -> None:
    assert main(["validate", "--space", "good.yaml", "--format", "csv"]) == 0
    assert out() == ""
    assert main(["validate", "--space", "good.yaml"]) == 0
    assert out().startswith("good.yaml: ok. 3 settings vary (1 conditional), 1 fixed; 48 trials")
