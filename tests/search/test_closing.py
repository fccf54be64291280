"""What can be made again from a ledger, and what must not be believed."""

import shutil
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from stability_search import space as spaces
from stability_search.cli.next_step import next_step
from stability_search.errors import UsageError
from stability_search.records.trial import TrialRow
from stability_search.records.verdict import Verdict, VerdictKind
from stability_search.search import closing, run_directory
from stability_search.search.closing import (
    Study,
    keep_verdict,
    known_verdict,
    render_run,
    write_all,
)
from stability_search.search.ledger import Ledger
from stability_search.search.plan import StudyPlan
from stability_search.search.reopening import parameters_of
from stability_search.search.run_directory import RunDirectory
from stability_search.search.status import read_status
from stability_search.search.study import resume_study
from stability_search.space import Space
from tests.search.inline_study import run_all, write_space


def finished_run(folder: Path, *overrides: str, file: Path | None = None) -> Path:
    """Run a study without Ray, write it down as a study does, and return its directory."""
    space = spaces.load(file or write_space(folder), overrides)
    directory = run_directory.create(
        folder / "out", space, facts=run_directory.study_facts(space), environment={}
    )
    ledger = Ledger.create(directory.ledger, run_directory.study_facts(space))
    plan = StudyPlan(space, device="cpu")
    for row in run_all(plan):
        ledger.add(row, *parameters_of(space, row))
    assert plan.verdict is not None
    keep_verdict(ledger, plan.verdict)
    write_all(space, directory, ledger.rows(), plan.verdict, "test")
    ledger.close()
    return directory.path


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a run directory that no test may change."""
    return finished_run(tmp_path_factory.mktemp("finished"))


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """Return a copy of a finished run."""
    return shutil.copytree(finished, tmp_path / "out")


def test_the_best_is_trained_from_a_run_of_a_space_that_lay_elsewhere(tmp_path: Path) -> None:
    inside = write_space(tmp_path)
    file = tmp_path / "spaces" / "tiny.yaml"
    file.parent.mkdir()
    file.write_text(inside.read_text().replace("./tiny_task.py", "../tiny_task.py"))
    run = finished_run(tmp_path, file=file)

    best = spaces.load(run / "best.yaml")

    assert best.task.file == str(run / "tiny_task.py")
    assert best.task_name == "./tiny_task.py:Tiny"


def test_a_report_made_again_says_what_the_study_said(run: Path) -> None:
    says_the_same_again(run)


def test_a_report_made_again_says_what_a_study_out_of_budget_said(tmp_path: Path) -> None:
    says_the_same_again(finished_run(tmp_path, "search.step_budget=900", "search.trials=40"))


def says_the_same_again(run: Path) -> None:
    before = known_verdict(Ledger(run / "study.db"))
    assert before is not None
    assert before.kind is VerdictKind.STABLE
    best = (run / "best.yaml").read_text()
    (run / "trials.parquet").unlink()
    again = render_run(run)
    assert again.verdict == before
    assert (run / "best.yaml").read_text() == best
    assert len(again.tables().trials) == len(Ledger(run / "study.db").rows())


def test_a_study_killed_before_its_verdict_is_incomplete(run: Path) -> None:
    ledger = Ledger(run / "study.db")
    ledger.put_facts({k: v for k, v in ledger.facts().items() if k != "end"})
    ledger.close()
    assert render_run(run).verdict.kind is VerdictKind.INCOMPLETE


def test_a_verdict_of_a_later_version_is_read_or_refused_in_one_line(run: Path) -> None:
    ledger = Ledger(run / "study.db")
    facts, verdict = dict(ledger.facts()), known_verdict(ledger)
    end: Any = facts["end"]
    ledger.put_facts({**facts, "end": {**end, "verdict": {**end["verdict"], "mood": ["calm"]}}})
    assert known_verdict(Ledger(run / "study.db")) == verdict
    ledger.put_facts({**facts, "end": {**end, "verdict": {**end["verdict"], "kind": "perhaps"}}})
    ledger.close()
    for reading in (
        lambda: render_run(run),
        lambda: read_status(run, now=datetime.now(UTC)),
        lambda: resume_study(run, (), address=None, command="", on_event=lambda _: None),
    ):
        with pytest.raises(UsageError, match=r"newer version .its verdict cannot") as caught:
            reading()
        assert "\n" not in caught.value.message


def test_a_finished_study_resumed_is_finished_at_once(run: Path) -> None:
    end = resume_study(run, (), address=None, command="test", on_event=lambda _: None)
    assert end.verdict.kind is VerdictKind.STABLE


def test_a_space_changed_by_hand_is_refused_with_the_difference(run: Path) -> None:
    space = run / "space.yaml"
    space.write_text(space.read_text().replace("batch_size: 8", "batch_size: 9"))
    with pytest.raises(
        UsageError, match=r"(?s)space changed.*-.*batch_size: 8.*\+.*batch_size: 9"
    ):
        resume_study(run, (), address=None, command="test", on_event=lambda _: None)
    with pytest.raises(UsageError, match="space changed"):
        render_run(run)


def test_resume_refuses_more_than_a_larger_budget(run: Path) -> None:
    with pytest.raises(UsageError, match=r"resume may only raise budgets.*trial\.steps"):
        resume_study(
            run, ("trial.steps=25",), address=None, command="test", on_event=lambda _: None
        )


def without_verdict(run: Path) -> Verdict:
    """Take the verdict out of a ledger, as it is before the study ends; return it."""
    ledger = Ledger(run / "study.db")
    verdict = known_verdict(ledger)
    assert verdict is not None
    ledger.put_facts({k: v for k, v in ledger.facts().items() if k != "end"})
    ledger.close()
    return verdict


def test_a_run_that_goes_on_is_reported_on_as_far_as_it_is(run: Path) -> None:
    without_verdict(run)
    with run_directory.lock(run_directory.open_run(run)):
        found = render_run(run)
    assert found.verdict.kind is VerdictKind.INCOMPLETE
    assert found.verdict.is_running
    assert "It still runs" in found.verdict.reason
    assert "resume" not in (run / "report.md").read_text()
    assert found.lines[0].startswith("Still running: ")
    assert next_step(run, found.verdict) == f"stability-search status {run}"
    assert not render_run(run).verdict.is_running  # nobody holds it now


def test_a_verdict_that_comes_while_a_report_is_drawn_is_not_covered_by_it(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    verdict = without_verdict(run)
    drawn: list[Verdict] = []

    def write_as_it_ends(
        space: Space,
        directory: RunDirectory,
        rows: Sequence[TrialRow],
        ours: Verdict,
        command: str,
    ) -> Study:
        if not drawn:
            ledger = Ledger(run / "study.db")
            keep_verdict(ledger, verdict)
            ledger.close()
        drawn.append(ours)
        return write_all(space, directory, rows, ours, command)

    monkeypatch.setattr(closing, "write_all", write_as_it_ends)
    with run_directory.lock(run_directory.open_run(run)):
        found = render_run(run)
    assert [one.is_running for one in drawn] == [True, False]
    assert found.verdict == verdict
    assert (run / "best.yaml").is_file()


def test_the_space_of_a_run_knows_where_it_came_from(run: Path, finished: Path) -> None:
    facts = Ledger(run / "study.db").facts()
    space: Space = run_directory.space_of(run_directory.open_run(run), facts)
    assert space.folder == finished.parent
