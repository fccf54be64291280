"""What `status` prints; what it reads is tested beside `search.status`."""

import csv
import io
import json
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

import pytest

from stability_search.cli import main
from stability_search.records.trial import Stage
from stability_search.records.verdict import Verdict, VerdictKind
from stability_search.search import status
from stability_search.search.status import BestSoFar, RunState, RunStatus, StageStatus

HOSTILE = "\x1b[2J=1+1"
BEST = BestSoFar(
    config_id="abc", stage=Stage.CONFIRM, q=0.9, num_seeds=3, settings={"learning_rate": 0.01}
)


def found(**changes: object) -> RunStatus:
    fields: dict[str, object] = {
        "run_directory": "a run",
        "state": RunState.INTERRUPTED,
        "stage": Stage.CONFIRM,
        "stages": (
            StageStatus(stage=Stage.PILOT, num_finished=7, num_planned=7),
            StageStatus(stage=Stage.CONFIRM, num_finished=3, num_planned=40),
        ),
        "outcomes": {"completed": 9, "pruned": 1},
        "best": BEST,
        "started_at": "2026-03-01T11:58:20Z",
        "last_finished_at": "2026-03-01T11:59:20Z",
        "last_finished_age_s": 40.0,
        "last_word_at": "2026-03-01T11:59:30Z",
        "last_word_age_s": 30.0,
        "disk_bytes": 3 * 1024**2,
        **changes,
    }
    return RunStatus(**fields)  # type: ignore[arg-type]


@pytest.fixture
def answer(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[RunStatus]]:
    answers: list[RunStatus] = []

    def read_status(_run: Path, *, now: datetime) -> RunStatus:
        assert now.utcoffset() is not None
        return answers[-1]

    monkeypatch.setattr(status, "read_status", read_status)
    return answers  # type: ignore[return-value]


def test_a_copy_of_a_study_is_not_to_be_gone_on_with(
    answer: list[RunStatus], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    answer.append(found())
    (tmp_path / ".fetched").write_text('{"name": "far", "paths": [], "ledgers": []}')

    assert main(["status", str(tmp_path)]) == 0
    out = capfd.readouterr().out
    assert "problem: a copy, as of its last fetch: the study itself is on a cluster" in out
    assert out.splitlines()[-1].startswith("next: stability-search fetch far --address URL  # ")

    (tmp_path / ".fetched").unlink()
    assert main(["status", str(tmp_path)]) == 0
    assert "next: stability-search resume" in capfd.readouterr().out


def test_line_by_line(answer: list[RunStatus], capfd: pytest.CaptureFixture[str]) -> None:
    answer.append(found())

    assert main(["status", "a run"]) == 0

    assert capfd.readouterr().out.splitlines() == [
        "a run: interrupted, stage confirm",
        "trials: pilot 7 of 7, confirm 3 of at most 40",
        "outcomes: 9 completed, 1 pruned",
        "best so far: abc, q 0.900 (confirm, 3 seeds): learning_rate=0.01",
        "since: 2026-03-01T11:58:20Z",
        "last finished trial: 40 s ago, 2026-03-01T11:59:20Z",
        "last word: 30 s ago, 2026-03-01T11:59:30Z",
        "disk: 3.0 MiB",
        "next: stability-search resume 'a run'",
    ]


def test_ends_that_no_verdict_counts_are_marked(
    answer: list[RunStatus], capfd: pytest.CaptureFixture[str]
) -> None:
    """Of 24 finished trials a verdict may count 22: what makes the difference stands here."""
    answer.append(found(outcomes={"completed": 22, "user_error": 2, "infrastructure": 1}))
    assert main(["status", "a run"]) == 0
    said = "outcomes: 22 completed, 2 user_error (no result), 1 infrastructure (no result)"
    assert said in capfd.readouterr().out.splitlines()


@pytest.mark.parametrize(
    ("changes", "first", "last", "code"),
    [
        (
            {"state": RunState.RUNNING},
            "a run: running, stage confirm",
            "next: wait; `stability-search status` says more later",
            0,
        ),
        (
            {
                "state": RunState.FINISHED,
                "verdict": Verdict(kind=VerdictKind.STABLE, exit_code=0, choice="abc"),
            },
            "a run: finished, reached stage confirm",
            "next: stability-search train --space 'a run/best.yaml'",
            0,
        ),
        (
            {"state": RunState.DAMAGED, "stage": None, "stages": (), "best": None},
            "a run: damaged",
            "next: stability-search resume 'a run'",
            2,
        ),
    ],
)
def test_the_next_command_and_the_exit_code_follow_the_state(  # noqa: PLR0913, PLR0917 - a table
    changes: dict[str, object],
    first: str,
    last: str,
    code: int,
    answer: list[RunStatus],
    capfd: pytest.CaptureFixture[str],
) -> None:
    answer.append(found(**changes))

    assert main(["status", "a run"]) == code

    lines = capfd.readouterr().out.splitlines()
    assert lines[0] == first
    assert lines[-1].startswith(last)
    assert any(line.startswith("choice: abc") for line in lines) == ("verdict" in changes)


def test_json_and_csv_say_the_same(
    answer: list[RunStatus], capfd: pytest.CaptureFixture[str]
) -> None:
    verdict = Verdict(kind=VerdictKind.INCOMPLETE, exit_code=130, reason="Interrupted.")
    answer.append(found(verdict=verdict))

    assert main(["status", "a run", "--format", "json"]) == 0
    document = json.loads(capfd.readouterr().out, parse_constant=pytest.fail)
    assert main(["status", "a run", "--format", "csv"]) == 0
    [row] = csv.DictReader(io.StringIO(capfd.readouterr().out))

    assert document["schema"] == "stability-search/status/1"
    assert document["verdict"]["exit_code"] == 130
    assert document["best"]["settings"] == {"learning_rate": 0.01}
    assert (row["state"], row["verdict_kind"], row["verdict_exit_code"]) == (
        *("interrupted", "incomplete"),
        "130",
    )
    assert (row["pilot_finished"], row["search_planned"], row["num_pruned"]) == ("7", "", "1")
    assert row["next"] == document["next"]


def test_what_a_run_says_is_inert(
    answer: list[RunStatus], capfd: pytest.CaptureFixture[str]
) -> None:
    answer.append(found(run_directory=HOSTILE, problem=HOSTILE, outcomes={HOSTILE: 1}))

    for form in ("table", "csv", "json"):
        main(["status", HOSTILE, "--format", form])
        assert "\x1b" not in capfd.readouterr().out
