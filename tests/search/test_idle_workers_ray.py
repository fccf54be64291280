"""A worker that nothing is left for gives its place back, and another starts if there is more."""

import contextlib
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from stability_search.interruption import Signals
from stability_search.records.trial import Outcome, TrialSummary
from stability_search.search import driver
from stability_search.search.driver import Cluster, drive
from stability_search.search.machine import Machine
from stability_search.search.request import TrialRequest
from stability_search.search.source import Place
from stability_search.settings.trial import TaskReference
from tests.search.inline_study import TINY
from tests.search.test_cluster_ray import environment_kept
from tests.search.test_workers_ray import request

pytestmark = [pytest.mark.ray, pytest.mark.timeout(240)]

WAIT_S = 90

# A trial says that it has begun, and waits for as many others of its wave; one waits for a file.
TASK = """\
import os
import time
from pathlib import Path

from tiny_task import Tiny

FOLDER = Path("{folder}")


class Held(Tiny):
    def __init__(self, wave, waits_for):
        super().__init__()
        FOLDER.joinpath(f"{{wave}} {{os.getpid()}}").touch()
        while len(list(FOLDER.glob(f"{{waits_for}}*"))) < (1 if wave == "b" else {size}):
            time.sleep(0.02)

    def metrics(self, model, batch):
        return {{"pid": float(os.getpid())}}
"""


class Waves:
    """Gives trials of one wave after the other.

    Wave `a` has as many as there is room for, and `c` one more: one that is bound to a worker for
    which there is no room gets another's place.
    """

    def __init__(self, folder: Path, size: int) -> None:
        (folder / TINY.name).write_text(TINY.read_text())
        (folder / "held.py").write_text(TASK.format(folder=folder, size=size))
        self._folder = folder
        self._task = TaskReference(file=str(folder / "held.py"), class_name="Held")
        self._waves = deque("a" * size + "b" + "c" * (size + 1))
        self._running: list[str] = []
        self.pids: dict[str, set[float]] = {"a": set(), "b": set(), "c": set()}
        self.outcomes: list[Outcome] = []
        self.notices: list[str] = []
        self.groups: list[str] = []

    @property
    def is_over(self) -> bool:
        return not self._waves and not self._running

    def next_trial(self) -> TrialRequest | None:
        if not self._waves or (self._running and self._waves[0] not in self._running):
            return None
        wave = self._waves.popleft()
        self._running.append(wave)
        waits_for = "release" if wave == "b" else wave
        made = request(len(self._waves), self._task, wave=wave, waits_for=waits_for)
        return replace(made, config=replace(made.config, timeout_s=WAIT_S))

    def trial_ended(
        self,
        request: TrialRequest,
        summary: TrialSummary,
        steps: bytes | None,  # noqa: ARG002 - the protocol's
        place: Place,  # noqa: ARG002 - the protocol's
    ) -> None:
        wave = str(request.config.task_args["wave"])
        self._running.remove(wave)
        self.outcomes.append(summary.outcome)
        self.pids[wave].add(summary.metrics_last["pid"])

    def noticed(self, text: str) -> None:
        from ray.util import placement_group_table

        self.notices.append(text)
        self.groups += [group["state"] for group in placement_group_table().values()]
        (self._folder / "release").touch()

    def trial_started(self, request: TrialRequest, node: str) -> None: ...

    def trial_progressed(self, request: TrialRequest, progress: Mapping[str, Any]) -> None: ...

    def node_quarantined(self, node: str, reason: str) -> None:
        raise AssertionError(f"{node}: {reason}")

    def settle(self) -> None: ...


@pytest.fixture
def short_idleness(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(driver, "IDLE_S", 1.0)
    monkeypatch.setattr(driver, "num_cpus", lambda: 2)
    with environment_kept():
        yield


@pytest.mark.usefixtures("short_idleness")
@pytest.mark.parametrize(("cores", "room"), [(0.5, 3), (1.0, 2)], ids=["for all", "for two of 3"])
def test_an_idle_worker_of_a_cluster_ends_and_another_starts_if_there_is_more(
    tmp_path: Path, cores: float, room: int
) -> None:
    source = Waves(tmp_path, room)
    machine = Machine(device="cpu", num_slots=3, cpu_per_trial=cores, gpu_per_trial=0.0)
    inspector: Any = SimpleNamespace(problem_of=lambda _node_id, _look: "")
    signals = Signals()
    with Cluster(None) as cluster, contextlib.closing(SimpleNamespace(close=signals.restore)):
        drive(
            source, cluster=cluster, machine=machine, folder=tmp_path, signals=signals,
            inspector=inspector,
        )  # fmt: skip
    assert source.outcomes == [Outcome.COMPLETED] * (2 * room + 2)
    first, last = source.pids["a"], source.pids["c"]
    assert (len(first), len(last), len(first & last)) == (room, room, 1)
    assert source.pids["b"] < first
    whose = "1 worker" if room == 2 else "2 workers"
    assert source.notices[0] == f"{whose} had nothing to do for 1 s: the place is free"
    assert "PENDING" not in source.groups  # what waits makes a cluster grow
