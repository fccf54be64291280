"""A node that cannot be reached is no trial's fault, even if one was overdue when Ray saw it."""

from types import SimpleNamespace
from typing import Any

import pytest
import ray

from stability_search.records.trial import Outcome
from stability_search.search import desk, tune_bridge
from stability_search.search.desk import DRIVER_GRACE_S, NODE_GRACE_S, RunningTrial
from stability_search.search.worker import ReportKind
from tests.search.test_tune_bridge_ray import DIED, Tune, tune

pytestmark = pytest.mark.ray

__all__ = ["tune"]  # a fixture
NOW = 1e6
NODE_DIED = f"{DIED}\nThe actor died because its node has died. Node Id: ecc3"


class Killed:
    """Remembers what was killed, and by whom."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.there: list[str] = []
        self.by_ray: list[str] = []
        monkeypatch.setattr(tune_bridge, "kill_there", lambda _, actor: self.there.append(actor))
        monkeypatch.setattr(ray, "kill", self.by_ray.append)
        # However long this process is held back, no trial gets older.
        monkeypatch.setattr(desk, "time", SimpleNamespace(monotonic=lambda: NOW))


def overdue(tune: Tune) -> tuple[Any, RunningTrial]:
    """Return a trial on another node that should have been ended by its own clocks."""
    tune.warm_up("a")
    trial = tune.start("a")
    tune.report(trial, ReportKind.STARTED)
    waiting: Any = SimpleNamespace(is_due=False)
    tune.bridge._waiting = waiting  # noqa: SLF001 - nobody waits
    running = tune.bridge._running[trial.trial_id]  # noqa: SLF001 - as Tune has no handle on it
    running.started = NOW - running.limit_s - DRIVER_GRACE_S - 1
    return trial, running


@pytest.mark.parametrize(
    ("error", "outcome"), [(NODE_DIED, Outcome.INFRASTRUCTURE), (DIED, Outcome.TIMED_OUT)]
)
def test_an_overdue_trial_is_blamed_only_if_its_node_lives(
    tune: Tune, monkeypatch: pytest.MonkeyPatch, error: str, outcome: Outcome
) -> None:
    killed = Killed(monkeypatch)
    trial, _ = overdue(tune)
    tune.bridge.on_step_end()
    tune.bridge.on_step_end()
    assert (killed.there, killed.by_ray) == (["a"], [])  # once, and Ray says what came of it
    tune.lose(trial, error)
    assert [end for end, _, _ in tune.source.ends] == [outcome]


def test_ray_ends_a_worker_of_whose_death_nothing_is_heard(
    tune: Tune, monkeypatch: pytest.MonkeyPatch
) -> None:
    killed = Killed(monkeypatch)
    trial, running = overdue(tune)
    tune.bridge.on_step_end()
    running.started -= NODE_GRACE_S
    for _ in range(3):
        tune.bridge.on_step_end()
    assert (killed.there, killed.by_ray) == (["a"], ["a"])
    tune.lose(trial)
    assert [end for end, _, _ in tune.source.ends] == [Outcome.TIMED_OUT]
