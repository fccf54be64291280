"""The desk and the worker, without Ray and without another process."""

import json
import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from stability_search.interruption import Signals
from stability_search.records.trial import Outcome, Stage, TrialSummary
from stability_search.search import desk as desks
from stability_search.search import early
from stability_search.search.desk import DRIVER_GRACE_S, Desk, RunningTrial
from stability_search.search.driver import worker_settings
from stability_search.search.early import is_surely_cpu
from stability_search.search.machine import Machine
from stability_search.search.request import TrialRequest
from stability_search.search.source import Place
from stability_search.search.worker import WATCHDOG_GRACE_S, ReportKind, Worker, WorkerSettings
from stability_search.settings.engine import EngineSettings
from stability_search.settings.study import Resources
from stability_search.settings.trial import TaskReference, TrialConfig, TrialConstants

COUNTING = """\
from pathlib import Path

import torch
from torch import nn

class Counting:
    def __init__(self, name="one", is_dirty=False):
        with Path(__file__).with_name("built").open("a") as file:
            file.write(f"{name} ")
        self.is_dirty = is_dirty

    def model(self):
        return nn.Linear(1, 1)

    def batches(self, batch_size, generator):
        while True:
            yield torch.ones(batch_size, 1)

    def probe(self):
        return [torch.ones(2, 1)]

    def loss(self, model, batch):
        if self.is_dirty:
            torch.backends.cudnn.benchmark = not torch.backends.cudnn.benchmark
        return model(batch).square().mean()
"""


def request(number: int = 0, **task: Any) -> TrialRequest:  # noqa: ANN401 - arguments of a task
    folder = task.pop("folder", "")
    config = TrialConfig(
        task=TaskReference(file=f"{folder}/counting.py", class_name="Counting"),
        task_args=task,
        engine=EngineSettings(learning_rate=0.1, num_planned_steps=3),
        num_planned_steps=3,
        timeout_s=60,
    )
    return TrialRequest(
        trial_id=f"search-{number:04d}",
        stage=Stage.SEARCH,
        index=number,
        config_id="c",
        settings={},
        config=config,
        constants=TrialConstants(probe_steps=(0, 3)),
    )


class Source:
    """Gives trials without end, and writes down what it is told."""

    def __init__(self, *, fails_at: str = "") -> None:
        self.news: list[str] = []
        self.summaries: list[TrialSummary] = []
        self.is_over = False
        self._fails_at = fails_at
        self._num_asked = 0

    def _note(self, news: str) -> None:
        self.news.append(news)
        if news.startswith(self._fails_at or "-"):
            raise RuntimeError(f"planted at {news}")

    def next_trial(self) -> TrialRequest | None:
        self._num_asked += 1
        return request(self._num_asked)

    def trial_started(self, request: TrialRequest, node: str) -> None:
        self._note(f"started {request.index} on {node}")

    def trial_progressed(self, request: TrialRequest, progress: Mapping[str, Any]) -> None:
        self._note(f"progressed {request.index} to {progress['step']}")

    def trial_ended(
        self,
        request: TrialRequest,
        summary: TrialSummary,
        steps: bytes | None,  # noqa: ARG002 - the protocol's
        place: Place,  # noqa: ARG002 - the protocol's
    ) -> None:
        self.summaries.append(summary)
        self._note(f"ended {request.index}")

    def noticed(self, text: str) -> None:
        raise AssertionError(text)

    def node_quarantined(self, node: str, reason: str) -> None:
        raise AssertionError(f"{node}: {reason}")

    def settle(self) -> None:
        self._note("settled")


def begun(desk: Desk) -> RunningTrial:
    running = desk.next_trial()
    assert running is not None
    desk.begin(running, node="here", pid=1)
    return running


def end(desk: Desk, running: RunningTrial) -> None:
    summary = TrialSummary(outcome=Outcome.COMPLETED, num_planned_steps=3)
    desk.hear(running, ReportKind.ENDED, (json.dumps(summary.to_json()), b""))


def aged(running: RunningTrial, seconds: float) -> RunningTrial:
    running.started -= seconds
    return running


# -- the desk ---------------------------------------------------------------------------------


@pytest.fixture
def _stopped_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let trials grow older only where the test says so."""
    monkeypatch.setattr(desks, "time", SimpleNamespace(monotonic=lambda: 1000.0))


def test_the_next_trial_is_given_out_before_the_last_is_written_and_news_keep_their_order() -> (
    None
):
    source = Source()
    desk = Desk(source, Signals())
    end(desk, begun(desk))
    begun(desk)
    assert source.news == ["started 1 on here", "ended 1"]
    desk.settle()
    assert source.news[2:] == ["settled", "started 2 on here"]
    desk.settle()  # nothing has ended since
    assert source.news[4:] == []


def test_a_second_report_of_a_start_moves_the_clock_and_is_no_news() -> None:
    source = Source()
    desk = Desk(source, Signals())
    running = aged(begun(desk), 30)
    desk.begin(running, node="there", pid=2)
    assert source.news == ["started 1 on here"]
    assert (running.node, running.pid) == ("there", 2)
    assert running.age_s < 30


@pytest.mark.usefixtures("_stopped_clock")
@pytest.mark.parametrize(
    ("age_s", "was_killed", "is_out_of_memory", "outcome"),
    [
        (1, False, False, Outcome.INFRASTRUCTURE),
        (60 + WATCHDOG_GRACE_S, False, False, Outcome.TIMED_OUT),
        (60 + WATCHDOG_GRACE_S - 2, False, False, Outcome.INFRASTRUCTURE),
        (1, True, False, Outcome.TIMED_OUT),
        (1, False, True, Outcome.OUT_OF_MEMORY),
    ],
)
def test_the_end_of_a_trial_whose_worker_is_gone_has_a_name(
    age_s: float, was_killed: bool, is_out_of_memory: bool, outcome: Outcome
) -> None:
    source = Source()
    desk = Desk(source, Signals())
    running = aged(begun(desk), age_s)
    running.was_killed = was_killed
    desk.lose(running, "its worker died", is_out_of_memory=is_out_of_memory)
    (summary,) = source.summaries
    assert summary.outcome is outcome
    is_late = outcome is Outcome.TIMED_OUT
    assert summary.reason == (
        "over 60 s; its process had to be killed" if is_late else "its worker died"
    )
    assert desk._running == []  # noqa: SLF001 - its slot is free


def test_a_worker_that_is_lost_after_the_end_of_its_trial_changes_nothing() -> None:
    source = Source()
    desk = Desk(source, Signals())
    running = begun(desk)
    end(desk, running)
    desk.lose(running, "its worker died")
    assert [summary.outcome for summary in source.summaries] == [Outcome.COMPLETED]


@pytest.mark.usefixtures("_stopped_clock")
def test_a_trial_is_overdue_once_its_own_clocks_have_failed_and_until_it_is_killed() -> None:
    desk = Desk(Source(), Signals())
    running = aged(begun(desk), 60 + DRIVER_GRACE_S - 1)
    assert desk.overdue() == []
    aged(running, 2)
    assert desk.overdue() == [running]
    assert not running.kill()  # its host is another one
    assert desk.overdue() == []


def test_a_trial_that_waits_for_its_worker_is_never_overdue() -> None:
    desk = Desk(Source(), Signals())
    running = desk.next_trial()
    assert running is not None
    assert running.age_s == 0
    assert desk.overdue() == []


def test_a_trial_that_is_handed_back_is_given_out_again_before_any_other() -> None:
    desk = Desk(Source(), Signals())
    first, second = desk.next_trial(), desk.next_trial()
    assert first is not None
    assert second is not None
    desk.hand_back(first)
    again = desk.next_trial()
    assert again is not None
    assert again.request is first.request
    following = desk.next_trial()
    assert following is not None
    assert following.request.index == 3


@pytest.mark.parametrize("fails_at", ["started", "ended", "settled"])
def test_a_problem_of_the_source_is_kept_and_no_trial_is_given_out_after_it(fails_at: str) -> None:
    desk = Desk(Source(fails_at=fails_at), Signals())
    end(desk, begun(desk))
    desk.settle()
    assert desk.must_leave
    assert desk.next_trial() is None
    with pytest.raises(RuntimeError, match=f"planted at {fails_at}"):
        desk.raise_problem()


def test_a_signal_ends_the_giving_out_of_trials() -> None:
    signals = Signals()
    desk = Desk(Source(), signals)
    begun(desk)
    assert not desk.must_leave
    signals.received = 15
    assert desk.must_leave
    assert desk.next_trial() is None


# -- the worker -------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    (tmp_path / "counting.py").write_text(COUNTING)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    flag = torch.backends.cudnn.benchmark
    yield tmp_path
    torch.backends.cudnn.benchmark = flag


def worker_in(folder: Path, **changes: Any) -> Worker:  # noqa: ANN401 - fields of the settings
    settings: dict[str, Any] = {
        "folder": str(folder),
        "import_path": str(folder),
        "num_threads": torch.get_num_threads(),
        "report_s": 60.0,
        **changes,
    }
    return Worker(WorkerSettings(**settings))


def run(worker: Worker, trial: TrialRequest) -> list[str]:
    worker.take(trial.to_text())
    kinds: list[ReportKind] = []
    while not kinds or kinds[-1] != ReportKind.ENDED:
        kinds.append(worker.next_report().kind)
    return [kind.value for kind in kinds]


def constructions(folder: Path) -> list[str]:
    return (folder / "built").read_text().split()


def test_a_worker_builds_its_task_once_for_all_trials_with_the_same_arguments(
    folder: Path,
) -> None:
    worker = worker_in(folder)
    trial = request(folder=folder)
    assert run(worker, trial) == ["started", "ended"]
    assert run(worker, trial) == ["ended"]  # its process is known by now
    assert run(worker, trial) == ["ended"]
    assert worker.is_clean
    assert constructions(folder) == ["one"]
    run(worker, request(folder=folder, name="two"))
    assert constructions(folder) == ["one", "two"]


def test_a_worker_says_that_a_trial_has_begun_before_it_builds_the_task(folder: Path) -> None:
    worker = worker_in(folder)  # what dies in the task's constructor is an attempt
    worker.take(request(folder=folder).to_text())
    assert not (folder / "built").exists()
    assert worker.next_report().kind == ReportKind.STARTED
    assert not (folder / "built").exists()
    assert worker.next_report().kind == ReportKind.ENDED
    assert constructions(folder) == ["one"]


def test_a_worker_reports_by_time(folder: Path) -> None:
    worker = worker_in(folder, report_s=1e-9)
    assert run(worker, request(folder=folder)) == ["started", *["progress"] * 3, "ended"]


def test_a_worker_says_that_its_process_must_not_be_used_again(
    folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    worker = worker_in(folder)
    run(worker, request(folder=folder, is_dirty=True))
    assert not worker.is_clean
    assert f"worker {os.getpid()} ends; changed: " in capfd.readouterr().out


def test_a_worker_pins_the_threads_of_torch_to_its_slot(folder: Path) -> None:
    before = torch.get_num_threads()
    try:
        worker_in(folder, num_threads=before + 1)
        assert torch.get_num_threads() == before + 1
    finally:
        torch.set_num_threads(before)


def test_a_share_of_a_gpu_comes_with_that_share_of_its_memory(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    limits: list[float] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", limits.append)
    worker_in(folder, gpu_memory_fraction=0.25)
    worker_in(folder, gpu_memory_fraction=None)
    assert limits == [0.25]


@pytest.mark.parametrize(("gpus", "fraction"), [(0.0, None), (0.25, 0.25), (1.0, None)])
def test_workers_are_told_of_a_share_of_memory_only_where_they_share_a_gpu(
    gpus: float, fraction: float | None
) -> None:
    machine = Machine(device="cuda", num_slots=4, cpu_per_trial=2.5, gpu_per_trial=gpus)
    settings = worker_settings(machine, Path("/somewhere"))
    assert settings.gpu_memory_fraction == fraction
    assert settings.num_threads == 2


# -- where early workers can train ------------------------------------------------------------


@pytest.mark.parametrize(
    ("resources", "has_device", "expected"),
    [
        (Resources(gpu=0.0), True, True),
        (Resources(), False, True),
        (Resources(), True, False),
        (Resources(gpu=0.5), False, False),
        (Resources(accelerator="H100"), False, False),
    ],
)
def test_early_workers_are_for_studies_that_are_sure_to_run_on_the_cpu(
    resources: Resources,
    has_device: bool,
    expected: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    device = tmp_path / "nvidia0"
    if has_device:
        device.touch()
    monkeypatch.setattr(early, "_GPU_DEVICES", (str(device),))
    monkeypatch.setattr(sys, "platform", "linux")
    assert is_surely_cpu(resources) is expected
