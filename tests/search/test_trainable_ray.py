"""What a worker of Tune reports: with an order of Tune's, and with what it is offered."""

from dataclasses import asdict
from typing import Any

import pytest

from stability_search.search import trainable
from stability_search.search.trainable import WARM, DirtyProcessError, TrialTrainable
from stability_search.search.worker import Report, ReportKind, WorkerSettings

pytestmark = pytest.mark.ray


class Worker:
    """Says of every trial that it goes on, and then that it has ended."""

    def __init__(self) -> None:
        self.taken: list[str] = []
        self.is_clean = True

    def take(self, order: str) -> None:
        self.taken.append(order)
        self._left = [ReportKind.PROGRESS, ReportKind.ENDED]

    def next_report(self) -> Report:
        return Report(kind=self._left.pop(0), payload=self.taken[-1])


@pytest.fixture
def slept(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Return how long it paused each time, without pausing."""
    pauses: list[float] = []
    monkeypatch.setattr(trainable.time, "sleep", pauses.append)
    return pauses


def made(order: str) -> tuple[TrialTrainable, Worker]:
    one, worker = TrialTrainable.__new__(TrialTrainable), Worker()
    fake: Any = worker
    one._worker, one._longest_pause_s = fake, 1.0  # noqa: SLF001 - `setup` loads torch
    one.reset_config({"order": order})
    return one, worker


def test_an_order_of_tunes_ends_with_its_trial(slept: list[float]) -> None:
    one, worker = made("a")
    assert [one.step()["done"] for _ in range(2)] == [False, True]
    one.reset_config({"order": "b"})
    assert one.step() == {"kind": "progress", "payload": "b", "done": False}
    assert worker.taken == ["a", "b"]
    assert slept == []


def test_what_is_offered_runs_and_then_it_waits_again(slept: list[float]) -> None:
    one, worker = made("")
    assert [one.step() for _ in range(3)] == [{"kind": WARM}] * 3
    one.offer("a")
    assert [one.step()["kind"] for _ in range(2)] == ["progress", "ended"]
    assert one.step() == {"kind": WARM}
    one.offer("b")
    assert [(r["payload"], r["done"]) for r in (one.step(), one.step())] == [("b", False)] * 2
    one.reset_config({"order": "c"})
    assert [one.step()["done"] for _ in range(2)] == [False, True]
    assert worker.taken == ["a", "b", "c"]
    assert slept == [0.0, 0.1, 0.2, 0.0]  # after a trial it says at once that it is free


@pytest.mark.parametrize(("report_s", "longest_s"), [(1.0, 1.0), (40.0, 4.0)])
def test_however_seldom_many_workers_report_one_that_waits_looks_often(
    report_s: float, longest_s: float, slept: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trainable, "Worker", lambda _settings: Worker())
    settings = WorkerSettings(folder="", import_path="", num_threads=1, report_s=report_s)
    one = TrialTrainable.__new__(TrialTrainable)
    one.setup({"worker": asdict(settings), "order": ""})
    for _ in range(20):
        one.step()
    assert max(slept) == longest_s


def test_a_dirty_process_gives_itself_up_after_a_trial_that_was_offered() -> None:
    one, worker = made("")
    one.offer("a")
    one.step()
    worker.is_clean = False
    with pytest.raises(DirtyProcessError):
        one.step()
