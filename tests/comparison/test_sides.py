"""What one run left behind: read as it is, or refused in one line; nothing it names is run."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from stability_search.comparison.sides import Side, read_side
from stability_search.errors import UsageError
from tests.comparison.run_files import edit_json, edit_space, write_run
from tests.study_rows import empty_study

Copied = Callable[[str], Path]


def refusal(run: Path) -> str:
    with pytest.raises(UsageError, match=r"\S") as caught:
        read_side(run)
    assert caught.value.exit_code == 2
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_what_a_run_says_of_itself(stable_side: Side) -> None:
    side = stable_side
    assert (side.verdict, side.choice_reason, side.horizon) == ("stable", "tied", 400)
    assert side.headline is not None
    assert side.headline["role"] == "choice"
    assert side.score_version == "S-v1"
    assert sum(side.outcomes.values()) == len(side.trials) == 90
    assert side.measure.e0 == 1.84
    assert (side.task_sha256, side.versions["torch"]) == ("", "2.13.0")


def test_a_study_that_ended_before_its_first_trial_can_be_read(tmp_path: Path) -> None:
    side = read_side(write_run(tmp_path / "empty", empty_study()))
    assert (side.verdict, side.headline, side.confirmed) == ("incomplete", None, {})
    assert side.score_version is None


def test_no_directory_is_refused(tmp_path: Path) -> None:
    assert refusal(tmp_path / "nowhere").endswith("Give the directory that `run` printed.")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("report.json", "`stability-search report RUN` makes it from the ledger."),
        ("trials.parquet", "`stability-search report RUN` makes it from the ledger."),
        ("configurations.parquet", "`stability-search report RUN` makes it from the ledger."),
        ("space.yaml", "must hold space.yaml"),
    ],
)
def test_a_missing_file_is_named(copied: Copied, name: str, words: str) -> None:
    run = copied("run")
    (run / name).unlink()
    said = refusal(run)
    assert words in said
    assert name in said


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"\xff\xfe",
        b"[" * 100_000,
        b'{"schema": NaN}',
        b'{"schema": "stability-search/report/2"}',
        b'{"schema": "stability-search/report/1"}',
        b'{"schema": "stability-search/report/1", "verdict": "stable", "best": []}',
    ],
    ids=range(10),
)
def test_a_report_that_is_not_ours_is_refused_in_one_line(copied: Copied, content: bytes) -> None:
    run = copied("run")
    (run / "report.json").write_bytes(content)
    assert "must be a report of ours" in refusal(run)


@pytest.mark.parametrize(
    "changes",
    [
        {"verdict": "splendid"},
        {"verdict": True},
        {"verdict": ...},
        {"choice_reason": "luck"},
        {"reason": 7},
        {"outcomes": []},
        {"outcomes.completed": -1},
        {"outcomes.completed": "many"},
        {"best.config_id": None},
    ],
    ids=str,
)
def test_a_value_that_no_version_of_ours_writes_is_refused(
    copied: Copied, changes: dict[str, object]
) -> None:
    run = copied("run")
    edit_json(run / "report.json", changes)
    assert "must be a report of ours" in refusal(run)


@pytest.mark.parametrize(
    "value", [True, "1", 10**400, [], None], ids=["bool", "text", "huge", "list", "null"]
)
def test_a_yardstick_is_finite_numbers_or_unknown(copied: Copied, value: object) -> None:
    run = copied("run")
    edit_json(run / "report.json", {"study.yardsticks.400.e_star": value})
    assert read_side(run).measure.e_star is None


def test_a_report_without_yardsticks_says_nothing_of_them(copied: Copied) -> None:
    run = copied("run")
    edit_json(run / "report.json", {"study": []})
    measure = read_side(run).measure
    assert (measure.e0, measure.delta, measure.e0_source) == (None, None, "")


def test_a_report_of_another_run_is_refused(copied: Copied) -> None:
    run = copied("run")
    edit_json(run / "report.json", {"best.config_id": "0123456789"})
    assert "must be of one run, but configuration 0123456789 is not" in refusal(run)


def test_a_space_that_cannot_be_read_is_refused_by_its_first_problem(copied: Copied) -> None:
    run = copied("run")
    edit_space(run, "seed: 0", "seed: often\nsearch: {trials: -1}")
    assert "space.yaml must be the space of a run, but could not be read: se" in refusal(run)


@pytest.mark.parametrize("content", [None, "", "[]", '{"study": {"versions": 3}}', "[" * 10_000])
def test_without_an_environment_the_code_is_not_known(copied: Copied, content: str | None) -> None:
    run = copied("run")
    (run / "environment.json").unlink()
    if content is not None:
        (run / "environment.json").write_text(content)
    side = read_side(run)
    assert (side.task_sha256, side.versions) == (None, {})


def test_nothing_that_a_run_names_is_imported(
    copied: Copied, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = copied("run")
    trap = "import pathlib\npathlib.Path(__file__).with_suffix('.sprung').touch()\n"
    (run / "bomb.py").write_text(f"{trap}class Bomb:\n    def __init__(self):\n        pass\n")
    shutil.copy(run / "bomb.py", run / "sitecustomize.py")
    edit_space(run, "task: teacher", "task: ./bomb.py:Bomb")
    monkeypatch.chdir(run)
    assert read_side(run).space.task_name == "./bomb.py:Bomb"
    assert not [name for name in os.listdir(run) if name.endswith(".sprung")]  # noqa: PTH208
