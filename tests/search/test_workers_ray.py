"""Early workers as real processes: whom they serve, how they end, and who takes over."""

import json
import os
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from stability_search import read_run
from stability_search.interruption import Signals
from stability_search.records.trial import Outcome, Stage, TrialSummary
from stability_search.search.desk import Desk
from stability_search.search.early import EarlyWorkers
from stability_search.search.request import TrialRequest
from stability_search.search.source import Place
from stability_search.search.worker import WorkerSettings
from stability_search.settings.engine import EngineSettings
from stability_search.settings.trial import TaskReference, TrialConfig, TrialConstants
from tests.search.inline_study import TINY, write_space

pytestmark = [pytest.mark.ray, pytest.mark.timeout(240)]

ROOT = Path(__file__).resolve().parents[2]

TELLING = """\
import json
import os
import signal
from pathlib import Path

import torch
from torch import nn

class Telling:
    def model(self):
        return nn.Linear(1, 1)

    def batches(self, batch_size, generator):
        while True:
            yield torch.ones(batch_size, 1)

    def probe(self):
        return [torch.ones(2, 1)]

    def loss(self, model, batch):
        return model(batch).square().mean()

    def metrics(self, model, batch):
        return {
            "pid": float(os.getpid()),
            "threads": float(torch.get_num_threads()),
            "omp": float(os.environ["OMP_NUM_THREADS"]),
            "ignores": float(signal.getsignal(signal.SIGINT) is signal.SIG_IGN),
        }
"""


def request(number: int, task: TaskReference, **arguments: str) -> TrialRequest:
    config = TrialConfig(
        task=task,
        task_args=arguments,
        engine=EngineSettings(learning_rate=0.01, num_planned_steps=20),
        num_planned_steps=20,
        timeout_s=60,
    )
    return TrialRequest(
        trial_id=f"search-{number:04d}",
        stage=Stage.SEARCH,
        index=number,
        config_id="c",
        settings={},
        config=config,
        constants=TrialConstants(probe_steps=(0, 20)),
    )


class Given:
    """Gives the trials it was made with, and keeps what became of them."""

    def __init__(self, *requests: TrialRequest) -> None:
        self.waiting = deque(requests)
        self.ends: dict[str, TrialSummary] = {}
        self.num_started = 0
        self._num_running = 0

    @property
    def is_over(self) -> bool:
        return not self.waiting and not self._num_running

    def next_trial(self) -> TrialRequest | None:
        if not self.waiting:
            return None
        self._num_running += 1
        return self.waiting.popleft()

    def trial_started(self, request: TrialRequest, node: str) -> None:  # noqa: ARG002
        self.num_started += 1

    def trial_progressed(self, request: TrialRequest, progress: Mapping[str, Any]) -> None:
        """Hear nothing."""

    def trial_ended(
        self,
        request: TrialRequest,
        summary: TrialSummary,
        steps: bytes | None,  # noqa: ARG002 - the protocol's
        place: Place,  # noqa: ARG002 - the protocol's
    ) -> None:
        self._num_running -= 1
        self.ends[request.trial_id] = summary

    def noticed(self, text: str) -> None:
        raise AssertionError(text)

    def node_quarantined(self, node: str, reason: str) -> None:
        raise AssertionError(f"{node}: {reason}")

    def settle(self) -> None:
        """Write nothing."""


@pytest.fixture
def early(tmp_path: Path) -> Iterator[EarlyWorkers]:
    settings = WorkerSettings(
        folder=str(tmp_path), import_path=str(ROOT), num_threads=1, report_s=1.0
    )
    workers = EarlyWorkers(1, settings, tmp_path / "run.log")
    yield workers
    workers.close()


def train(early: EarlyWorkers, source: Given, until: Callable[[], bool] | None = None) -> Desk:
    desk = Desk(source, Signals())
    early.feed(desk)
    deadline = time.monotonic() + 120
    while not (until() if until else source.is_over) and time.monotonic() < deadline:
        early.turn(desk)
    desk.raise_problem()
    return desk


def outcomes(source: Given) -> list[Outcome]:
    return [source.ends[name].outcome for name in sorted(source.ends)]


def wait_until(holds: Callable[[], bool], seconds: float = 20.0) -> bool:
    deadline = time.monotonic() + seconds
    while not holds() and time.monotonic() < deadline:
        time.sleep(0.05)
    return holds()


def is_empty(early: EarlyWorkers, desk: Desk) -> bool:
    early.turn(desk)
    return early.num_workers == 0


def is_alive(pid: int) -> bool:
    """Return False for a zombie too: nobody may be there to ask how it ended."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return stat.rpartition(")")[2].split()[0] != "Z"


def test_a_worker_is_used_again_pinned_to_its_slot_and_deaf_to_an_interrupt(
    early: EarlyWorkers, tmp_path: Path
) -> None:
    (tmp_path / "telling.py").write_text(TELLING)
    task = TaskReference(file=str(tmp_path / "telling.py"), class_name="Telling")
    source = Given(request(0, task), request(1, task))
    train(early, source)
    assert outcomes(source) == [Outcome.COMPLETED] * 2
    first, second = (source.ends[name].metrics_last for name in sorted(source.ends))
    assert first == second
    assert (first["threads"], first["omp"], first["ignores"]) == (1.0, 1.0, 1.0)


@pytest.mark.parametrize(
    ("behaviour", "outcome"),
    [
        ("kill", Outcome.INFRASTRUCTURE),
        ("dirty", Outcome.COMPLETED),
        ("raise", Outcome.USER_ERROR),
    ],
)
def test_a_worker_that_is_not_as_before_is_replaced(
    early: EarlyWorkers, behaviour: str, outcome: Outcome
) -> None:
    task = TaskReference(file=str(TINY), class_name="Tiny")
    source = Given(request(0, task, behaviour=behaviour), request(1, task), request(2, task))
    train(early, source)
    assert outcomes(source) == [outcome, Outcome.COMPLETED, Outcome.COMPLETED]


def test_a_hung_worker_is_killed_and_its_trial_timed_out(early: EarlyWorkers) -> None:
    task = TaskReference(file=str(TINY), class_name="Tiny")
    hung = request(0, task, behaviour="stop")
    hung = replace(hung, config=replace(hung.config, timeout_s=1))
    source = Given(hung, request(1, task))
    train(early, source)
    assert outcomes(source) == [Outcome.TIMED_OUT, Outcome.COMPLETED]


def test_a_nursery_that_dies_hands_its_trials_back(early: EarlyWorkers) -> None:
    task = TaskReference(file=str(TINY), class_name="Tiny")
    source = Given(request(0, task))
    desk = Desk(source, Signals())
    early.feed(desk)
    early._nursery.kill()  # noqa: SLF001 - the fault
    early._nursery.wait()  # noqa: SLF001 - as above
    assert wait_until(lambda: is_empty(early, desk))
    assert source.ends == {}
    again = desk.next_trial()
    assert again is not None
    assert again.request.trial_id == "search-0000"


def test_a_retired_worker_ends_after_its_trial(early: EarlyWorkers) -> None:
    task = TaskReference(file=str(TINY), class_name="Tiny")
    source = Given(request(0, task), request(1, task))
    desk = train(early, source, until=lambda: source.num_started > 0)
    early.retire()
    assert wait_until(lambda: is_empty(early, desk))
    assert outcomes(source) == [Outcome.COMPLETED]
    assert len(source.waiting) == 1


def test_nothing_is_left_of_a_driver_that_was_killed(tmp_path: Path) -> None:
    space = write_space(tmp_path)
    space.write_text(space.read_text() + "task_args: {behaviour: hang}\n")
    words = ("run", "--space", str(space), "--output", "out")
    driver = subprocess.Popen(  # noqa: S603 - our own command
        [sys.executable, "-m", "stability_search", *words],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stderr=subprocess.PIPE,
        text=True,
    )
    assert driver.stderr is not None
    assert any("pilot-01 started" in line for line in driver.stderr)
    started = descendants(driver.pid)
    assert len(started) >= 3  # the nursery and two workers at least
    driver.send_signal(signal.SIGKILL)
    driver.communicate()
    assert wait_until(lambda: not any(map(is_alive, started)))


def descendants(pid: int) -> set[int]:
    listing = subprocess.run(
        ["/bin/ps", "-e", "-o", "pid=,ppid="], capture_output=True, text=True, check=True
    ).stdout
    parents = {int(child): int(parent) for child, parent in map(str.split, listing.splitlines())}
    found, grown = {pid}, True
    while grown:
        more = {child for child, parent in parents.items() if parent in found} - found
        found |= more
        grown = bool(more)
    return found - {pid}


def test_rays_workers_take_over_and_never_run_more_trials_than_there_are_slots(
    tmp_path: Path,
) -> None:
    space = write_space(tmp_path)
    task = tmp_path / TINY.name
    line = "            yield inputs, targets\n"
    assert line in task.read_text()
    task.write_text(task.read_text().replace(line, f"            time.sleep(0.05)\n{line}"))
    finished = subprocess.run(  # noqa: S603 - our own command
        [sys.executable, "-m", "stability_search", "run", "--space", str(space), "--output",
         "out", "--json-events", "--set", "search.trials=60"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert finished.returncode in {0, 3}, finished.stderr
    assert "Ray's workers are ready" in (tmp_path / "out" / "run.log").read_text()
    events = [json.loads(line) for line in finished.stdout.splitlines()]
    running: set[str] = set()
    most = 0
    for event in events:
        if event["event"] == "trial_started":
            running.add(event["trial_id"])
        elif event["event"] == "trial_finished":
            running.discard(event["trial_id"])
        most = max(most, len(running))
    assert most == next(event["slots"] for event in events if "slots" in event)
    trials = read_run(tmp_path / "out").trials
    assert set(trials["outcome"]) <= {"completed", "pruned", "diverged"}
    assert trials["trial_id"].is_unique
