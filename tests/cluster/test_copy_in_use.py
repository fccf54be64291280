"""A copy of a study that runs elsewhere: reported on, fetched again, gone on with knowingly."""

import shutil
from pathlib import Path

import pytest

from stability_search import space as spaces
from stability_search.cli import main
from stability_search.cluster.copies import MADE_AGAIN, unfinished_study
from stability_search.errors import UsageError
from stability_search.records.verdict import Verdict, VerdictKind
from stability_search.search import run_directory
from stability_search.search import study as studies
from stability_search.search.closing import keep_verdict, render_run
from stability_search.search.ledger import Ledger
from tests.cluster.fake_jobs import FakeJobs
from tests.cluster.fetched_runs import bring, files_of, put_row
from tests.search.inline_study import write_space

NONE = Verdict(kind=VerdictKind.NONE, exit_code=3)
STOPPED = Verdict(kind=VerdictKind.INCOMPLETE, exit_code=6)
FETCH = "next: stability-search fetch s --address URL  # or submit it again, if it stopped there"


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the directory of a study that no test may change; no trial has ended yet."""
    folder = tmp_path_factory.mktemp("begun")
    space = spaces.load(write_space(folder))
    facts = run_directory.study_facts(space)
    made = run_directory.create(folder / "s", space, facts=facts, environment={})
    Ledger.create(made.ledger, facts).close()
    return made.path


@pytest.fixture
def run(begun: Path, tmp_path: Path) -> Path:
    """Return the directory of a study on a cluster."""
    return shutil.copytree(begun, tmp_path / "runs" / "s")


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Return what was gone on with; nothing runs."""
    found: list[Path] = []

    def resume(path: Path, *_: object, **_options: object) -> None:
        found.append(path)
        raise UsageError("as asked.")

    monkeypatch.setattr(studies, "resume_study", resume)
    return found


def end_with(run: Path, verdict: Verdict) -> None:
    ledger = Ledger(run / "study.db")
    keep_verdict(ledger, verdict)
    ledger.close()


def test_the_names_that_can_be_made_again_are_those_that_a_report_writes(run: Path) -> None:
    before = files_of(run).keys()

    render_run(run)

    assert files_of(run).keys() - before == MADE_AGAIN - {"best.yaml"}  # there is no choice yet
    assert run_directory.RunDirectory(path=run).best.name in MADE_AGAIN


def test_a_copy_that_was_reported_on_here_is_fetched_again_with_the_pages_of_the_cluster(
    jobs: FakeJobs, run: Path, home: Path
) -> None:
    bring(jobs, home)
    render_run(home)
    (home / "best.yaml").write_text("as of a report made here")
    end_with(run, NONE)
    render_run(run)
    (run / "best.yaml").write_text("as the study wrote it")
    pages = MADE_AGAIN & files_of(run).keys()
    assert files_of(home)["report.html"] != files_of(run)["report.html"]

    bring(jobs, home)

    assert len(pages) == 8
    assert {n: files_of(home)[n] for n in pages} == {n: files_of(run)[n] for n in pages}


def test_a_link_or_a_folder_is_no_page_of_ours_whatever_its_name(
    jobs: FakeJobs, run: Path, home: Path, tmp_path: Path
) -> None:
    bring(jobs, home)
    (tmp_path / "mine.html").write_text("mine")
    (home / "report.html").symlink_to(tmp_path / "mine.html")
    (home / "trials.csv").mkdir()
    for name in ("report.html", "trials.csv"):
        (run / name).write_text("the study's")

    with pytest.raises(UsageError, match=r"report\.html, trials\.csv: not fetched, and would be"):
        bring(jobs, home)
    assert (home / "report.html").is_symlink()


@pytest.mark.parametrize("verdict", [None, STOPPED])
def test_a_report_of_a_copy_whose_study_had_not_ended_names_fetch_as_its_status_does(
    verdict: Verdict | None,
    jobs: FakeJobs,
    run: Path,
    home: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    if verdict is not None:
        end_with(run, verdict)
    bring(jobs, home)

    for command in ("report", "status"):
        assert main([command, str(home)]) == 0
        assert capfd.readouterr().out.splitlines()[-1] == FETCH
    put_row(home / "study.db", 7)  # it goes on here
    assert main(["report", str(home)]) == 0
    assert "next: stability-search resume" in capfd.readouterr().out


def test_a_copy_of_a_study_that_had_ended_or_goes_on_here_is_as_any_run(
    jobs: FakeJobs, home: Path
) -> None:
    bring(jobs, home)
    running = Verdict(kind=VerdictKind.INCOMPLETE, exit_code=130, is_running=True)

    found = [unfinished_study(home, one) for one in (None, STOPPED, NONE, running)]
    assert found == ["s", "s", "", ""]


def test_to_go_on_with_a_copy_of_a_study_that_may_run_is_warned_of_in_one_line(
    jobs: FakeJobs, home: Path, asked: list[Path], capfd: pytest.CaptureFixture[str]
) -> None:
    bring(jobs, home)

    main(["resume", str(home)])

    warning, *rest = capfd.readouterr().err.splitlines()
    assert warning.startswith(
        f"warning: {home} is a copy of s, which had not ended on its cluster"
    )
    assert warning.endswith("both must not go on")
    assert not any(line.startswith("warning") for line in rest)
    assert asked == [home]


@pytest.mark.parametrize("case", ["ended", "gone on with here", "no copy"])
def test_the_twin_without_a_study_elsewhere_nobody_is_warned(  # noqa: PLR0913, PLR0917 - a table
    case: str,
    jobs: FakeJobs,
    run: Path,
    home: Path,
    asked: list[Path],
    capfd: pytest.CaptureFixture[str],
) -> None:
    if case == "ended":
        end_with(run, NONE)
    bring(jobs, home)
    if case == "gone on with here":
        put_row(home / "study.db", 7)
    where = run if case == "no copy" else home

    main(["resume", str(where)])

    assert "warning" not in capfd.readouterr().err
    assert asked == [where]
