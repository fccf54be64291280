"""What a resumed study asks of its task before it writes a word; whole but for Ray."""

from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from stability_search import space as spaces
from stability_search.errors import InfrastructureError, UsageError, UserCodeError
from stability_search.events import Event, EventName
from stability_search.records.trial import Outcome, Stage, TrialRow, TrialSummary
from stability_search.search import run_directory, study
from stability_search.search.ledger import Ledger
from stability_search.search.machine import Node
from stability_search.search.request import TrialRequest
from stability_search.table import build_tables, study_yardsticks
from tests.search.inline_study import TINY, pretend, write_space
from tests.search.test_events import HERE, NoCluster

pytestmark = pytest.mark.fault

SMALL = ("search.trials=4", "confirm.octaves=0", "search.sampler=random", "search.resources.gpu=0")
NUM_PILOT = 7
Trainer = Callable[[TrialRequest], TrialSummary]


def failing(request: TrialRequest, error_type: str, place: str) -> TrialSummary:
    """Be an exception of the task."""
    reason = "task: ./t.py must be importable." if error_type == "UsageError" else "no."
    return TrialSummary(
        outcome=Outcome.USER_ERROR,
        reason=f"{error_type}: {reason}",
        num_planned_steps=request.config.num_planned_steps,
        error_type=error_type,
        error_place=place,
        error_text=f"Traceback\n{error_type}: {reason}\n",
    )


def gone(request: TrialRequest) -> TrialSummary:
    """Be a task that cannot be imported."""
    return failing(request, "UsageError", "loading.py:1")


def driving(trainers: Iterator[Trainer]) -> Callable[..., None]:
    """Return a driver that makes up a trial with each trainer, and ends with them."""

    def drive(source: Any, **_: object) -> None:  # noqa: ANN401 - what a study is to its driver
        for train in trainers:
            request = source.next_trial()
            if request is None:
                return
            source.trial_started(request, "here")
            source.trial_ended(request, train(request), None, HERE)
            source.settle()

    return drive


class Run:
    """A study in a folder of its own."""

    def __init__(
        self, folder: Path, monkeypatch: pytest.MonkeyPatch, overrides: tuple[str, ...] = ()
    ) -> None:
        self.path, self.heard = folder / "out", list[Event]()
        self.space = spaces.load(write_space(folder), (*SMALL, *overrides))
        self._patch = monkeypatch
        monkeypatch.setattr(study, "Cluster", NoCluster)
        monkeypatch.setattr(study, "is_surely_cpu", lambda _: False)  # no early workers
        monkeypatch.setattr(
            study,
            "write_all",
            lambda _space, directory, _rows, verdict, _command: SimpleNamespace(
                directory=directory.path, verdict=verdict, lines=()
            ),
        )

    def go(self, *trainers: Trainer, overrides: tuple[str, ...] = ()) -> int:
        """Begin or resume, with so many trials at most; return the exit code."""
        self._patch.setattr(study, "drive", driving(iter(trainers)))
        rest: dict[str, Any] = {"address": None, "command": "x", "on_event": self.heard.append}
        ended = (
            study.resume_study(self.path, overrides, **rest)
            if self.path.exists()
            else study.run_study(self.space, output=self.path, **rest)
        )
        return ended.verdict.exit_code

    def rows(self) -> tuple[TrialRow, ...]:
        return Ledger(self.path / "study.db").rows()


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    return Run(tmp_path, monkeypatch)


def test_a_task_that_cannot_be_imported_any_more_writes_nothing(run: Run) -> None:
    stopped = InfrastructureError.exit_code
    assert run.go(*[pretend] * (NUM_PILOT + 1)) == stopped
    before = run.rows()

    with pytest.raises(UsageError, match=r"^task: .* must be importable\. .*then resume\."):
        run.go(*[gone] * 9)
    assert run.rows() == before

    # The twin: once a trial of the resume was built, another one's error is a row as ever.
    assert run.go(pretend, gone) == stopped
    new = run.rows()[len(before) :]
    assert [row.summary.outcome is Outcome.USER_ERROR for row in new] == [False, True]


def test_a_finished_study_stays_so_where_its_module_is_not_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "only_here.py").write_text(TINY.read_text())
    monkeypatch.chdir(tmp_path)
    run = Run(tmp_path, monkeypatch, ("task=only_here:Tiny",))
    assert run.go(*[pretend] * 99) == 0
    files = {path: path.read_bytes() for path in run.path.rglob("*") if path.is_file()}
    more = ("confirm.seeds=3",)

    monkeypatch.chdir(tmp_path / "elsewhere")
    rule = rf"no module `only_here`\. Call this from {tmp_path}, which holds `only_here`"
    with pytest.raises(UsageError, match=rule):
        run.go(*[pretend] * 99, overrides=more)
    assert study.known_verdict(Ledger(run.path / "study.db")) is not None
    assert {path: path.read_bytes() for path in files} == files
    with pytest.raises(UsageError, match=rule):
        study.run(run.space, output=tmp_path / "new")
    assert not (tmp_path / "new").exists()

    monkeypatch.chdir(tmp_path)  # the twin
    before = len(run.rows())
    assert run.go(*[pretend] * 99, overrides=more) == 0
    assert len(run.rows()) > before


def test_a_task_that_failed_early_stops_a_resume_after_its_first_trial(run: Run) -> None:
    code = UserCodeError.exit_code
    assert run.go(*[lambda r: failing(r, "KeyError", "/home/me/t.py:3")] * 9) == code
    assert len(run.rows()) == 5

    assert run.go(*[lambda r: failing(r, "KeyError", f"{run.path}/t.py:3")] * 9) == code
    assert len(run.rows()) == 6
    assert run.go(pretend) == InfrastructureError.exit_code  # the twin: it was the machine


def test_a_study_goes_on_where_no_node_has_its_labels_once_it_asks_for_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nodes = [Node(node_id="a", resources={"CPU": 8.0}, labels={"pool": "spot"})]
    monkeypatch.setattr(NoCluster, "nodes", lambda _: nodes)
    run = Run(tmp_path, monkeypatch, ("search.resources.labels.pool=spot",))
    assert run.go(pretend) == InfrastructureError.exit_code
    before = run.rows()
    nodes[:] = [Node(node_id="b", resources={"CPU": 8.0}, labels={"pool": "big"})]

    rule = (
        r"labels: a node must have pool: spot, but there is pool: big\. .*--set [a-z.]*labels={}"
    )
    with pytest.raises(UsageError, match=rule):
        run.go(pretend)
    assert run.rows() == before

    run.go(pretend, overrides=("search.resources.labels={}",))
    assert run.rows()[:-1] == before


def test_the_last_news_of_a_study_is_what_its_tables_say(run: Run) -> None:
    assert run.go(*[pretend] * 99) == 0

    space = run_directory.space_of(
        run_directory.open_run(run.path), Ledger(run.path / "study.db").facts()
    )
    news = {
        event.fields["trial_id"]: event.fields["q"]
        for event in run.heard
        if event.name is EventName.TRIAL_FINISHED
    }
    verdict = study.known_verdict(Ledger(run.path / "study.db"))
    assert verdict is not None
    trials = build_tables(
        run.rows(),
        space_settings=space.varying,
        study=space.study,
        yardsticks=study_yardsticks(run.rows(), space.study),
        verdict=verdict,
    ).trials
    confirmed = trials[trials["stage"] == Stage.CONFIRM.value]
    table = dict(zip(confirmed["trial_id"], confirmed["q"], strict=True))
    last = next(reversed(news))
    assert news[last] == table[last]
    assert table[last] > 0.5
