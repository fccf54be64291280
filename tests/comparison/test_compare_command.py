"""`compare`: two runs on the command line, in three forms; hostile runs do nothing."""

import csv
import io
import json
import shutil
from pathlib import Path

import pytest

from stability_search.cli import main
from tests.comparison.run_files import edit_space, edit_table

HOSTILE = "=1+1\x1b[31m\r\n\u202eevil"


@pytest.fixture
def run(stable_run: Path) -> Path:
    return stable_run


def test_a_comparison_is_data_and_exit_0(run: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", str(run), str(run)]) == 0
    out, err = capfd.readouterr()
    assert out.splitlines()[:2] == [f"A: {run}", f"B: {run}"]
    assert "sign-flip test p = 1" in out
    assert err == ""


def test_as_json_and_as_csv(run: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", str(run), str(run), "--format", "json"]) == 0
    document = json.loads(capfd.readouterr().out)
    assert (document["is_comparable"], document["test"]["p_value"]) == (True, 1)
    assert main(["compare", str(run), str(run), "--format", "csv"]) == 0
    rows = list(csv.DictReader(io.StringIO(capfd.readouterr().out)))
    assert rows[0] == {"part": "run", "name": "path", "first": str(run), "second": str(run)}


def test_what_cannot_be_read_is_exit_2_in_one_line(
    run: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(["compare", str(run), str(tmp_path / "nowhere")]) == 2
    out, err = capfd.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert "nowhere: no run directory" in err


@pytest.fixture(scope="module")
def evil(stable_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a run that says hostile things wherever it can, its name included."""
    path = tmp_path_factory.mktemp("runs") / f"run {HOSTILE}"
    shutil.copytree(stable_run, path)
    edit_table(path, "configurations", "precision", lambda _: HOSTILE)
    edit_table(path, "trials", "device", lambda _: HOSTILE)
    edit_space(path, "seed: 0", 'seed: 0\nreport: {targets: {"=1+1 evil": 1}}')
    return path


@pytest.mark.parametrize("form", ["table", "json", "csv"])
def test_hostile_names_do_nothing_in_any_form(
    run: Path, evil: Path, capfd: pytest.CaptureFixture[str], form: str
) -> None:
    assert main(["compare", str(evil), str(run), "--format", form]) == 0
    out = capfd.readouterr().out
    assert "evil" in out
    assert all(character.isprintable() or character == "\n" for character in out)
    if form == "csv":
        cells = [cell for row in csv.reader(io.StringIO(out)) for cell in row]
        assert "'=1+1\\x1b[31m\\r\\n\\u202eevil" in cells
        assert not [cell for cell in cells if cell.startswith(("=", "+", "@"))]


def test_nothing_is_written(run: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    assert main(["compare", str(run), str(run)]) == 0
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before
