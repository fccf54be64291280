"""The command that goes on from a verdict: exact, and the same on the page and in a terminal."""

import shlex
from dataclasses import replace
from pathlib import Path

import pytest

from stability_search import space as spaces
from stability_search.cli.next_step import next_step
from stability_search.errors import StoppedEarlyError, UserCodeError
from stability_search.next_command import next_command
from stability_search.records.verdict import Verdict, VerdictKind
from stability_search.search import run_directory
from stability_search.search.ledger import Ledger
from stability_search.settings.study import SearchSettings, StudySettings
from tests.study_rows import stable_study

SPACE = """\
task: teacher
trial: {steps: 20}
space: {learning_rate: {loguniform: {low: 1e-4, high: 0.3}}}
search: {trials: 4, step_budget: 5000, time_budget_s: 1234567}
confirm: {steps: 20, octaves: 0, min_margin: 0}
"""
MADE = "stability-search run --space '~/my files/a.yaml' --output=there --set seed=1"


def verdict_of(kind: VerdictKind, exit_code: int, *, is_running: bool = False) -> Verdict:
    reason = "Stopped; go on with `stability-search resume reports/budget-1`."
    return Verdict(kind=kind, exit_code=exit_code, is_running=is_running, reason=reason)


ENDS = [
    (None, "resume 'a run'"),
    (verdict_of(VerdictKind.STABLE, 0),
     "train --space 'a run/best.yaml' --steps 10000  # your own length"),
    (verdict_of(VerdictKind.NONE, 3),
     "run --space 'a run/space.yaml'  # change it first, as the report says"),
    (verdict_of(VerdictKind.INCOMPLETE, 130), "resume 'a run'"),
    (verdict_of(VerdictKind.INCOMPLETE, 4), "resume 'a run'"),
    (verdict_of(VerdictKind.INCOMPLETE, 130, is_running=True), "status 'a run'"),
    (verdict_of(VerdictKind.INCOMPLETE, StoppedEarlyError.exit_code),
     "resume 'a run' --set search.step_budget=10000 --set search.time_budget_s=2469134"),
    (verdict_of(VerdictKind.INCOMPLETE, UserCodeError.exit_code),
     "run --space ~/'my files/a.yaml' --set seed=1  # mend the task first"),
]  # fmt: skip


@pytest.mark.parametrize(("verdict", "command"), ENDS)
def test_every_end_has_its_command_and_the_terminal_prints_the_same(
    verdict: Verdict | None, command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    search = SearchSettings(trials=4, step_budget=5000, time_budget_s=1234567)
    study = StudySettings(name="a", search=search)
    found = next_command(verdict, "a run/", study=study, spent=None, made_by=MADE)
    assert found == f"stability-search {command}"

    monkeypatch.chdir(tmp_path)
    run = tmp_path / "a run"
    run.mkdir()
    (run / "space.yaml").write_text(SPACE)
    (run / "environment.json").write_text(f'{{"command": "{MADE}"}}')
    assert next_step(run, verdict) == found


@pytest.mark.parametrize("verdict", [end[0] for end in ENDS])
def test_a_run_without_its_files_has_a_command_too(
    verdict: Verdict | None, tmp_path: Path
) -> None:
    run = tmp_path / "gone"
    words = shlex.split(next_step(run, verdict), comments=True)
    assert words[0] == "stability-search"
    assert any(word.startswith(str(run)) for word in words)


def test_a_budget_that_the_pilot_used_up_is_followed_by_one_that_is_enough(
    tmp_path: Path,
) -> None:
    full = verdict_of(VerdictKind.INCOMPLETE, StoppedEarlyError.exit_code)
    (tmp_path / "space.yaml").write_text(SPACE.replace("1234567", "1"))
    space = spaces.load(tmp_path / "space.yaml", ("search.step_budget=100",))
    (tmp_path / "space.yaml").write_text(space.text)
    ledger = Ledger.create(tmp_path / "study.db", run_directory.study_facts(space))
    for row in stable_study().rows:
        if row.stage == "pilot":
            summary = replace(row.summary, num_steps=30, wall_s=10.0)
            ledger.add(replace(row, summary=summary, started_at=""), None, None)
    rows = ledger.rows()
    ledger.close()

    steps = 2 * (30 * len(rows) + 4 * 20)  # pilot and search
    seconds = 4 * (10 * len(rows) + 15)
    assert next_step(tmp_path, full) == (
        f"stability-search resume {tmp_path} --set search.step_budget={steps} "
        f"--set search.time_budget_s={seconds}"
    )


def test_nothing_is_raised_where_there_was_no_budget() -> None:
    full = verdict_of(VerdictKind.INCOMPLETE, StoppedEarlyError.exit_code)  # the disk
    found = next_command(full, "a", study=StudySettings(name="a"), spent=None, made_by="")
    assert found == "stability-search resume a"


@pytest.mark.parametrize(
    ("made_by", "again"),
    [
        ("stability-search run --space a.yaml --output b", "stability-search run --space a.yaml"),
        ("python -m other", "stability-search run --space a/space.yaml"),
        ("stability-search run '", "stability-search run --space a/space.yaml"),
        ("", "stability-search run --space a/space.yaml"),
    ],
)
def test_after_an_error_of_the_task_the_command_that_made_the_run_is_repeated(
    made_by: str, again: str
) -> None:
    failed = verdict_of(VerdictKind.INCOMPLETE, UserCodeError.exit_code)
    found = next_command(failed, "a", study=None, spent=None, made_by=made_by)
    assert found == f"{again}  # mend the task first"


def test_a_folder_called_tilde_is_not_a_home(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert next_step(tmp_path / "~" / "a", None) == "stability-search resume './~/a'"
