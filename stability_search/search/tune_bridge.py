"""Between Ray Tune's hooks and a `TrialSource`."""

import contextlib
import json
import os
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import ray
from ray.tune import Callback
from ray.tune.schedulers import FIFOScheduler
from ray.tune.search import Searcher

from stability_search.records import Outcome, TrialSummary
from stability_search.search.request import TrialRequest
from stability_search.search.source import Signals, TrialSource
from stability_search.search.trainable import WATCHDOG_GRACE_S

if TYPE_CHECKING:
    from ray.tune.execution.tune_controller import TuneController
    from ray.tune.experiment import Trial

DRIVER_GRACE_S = 15.0  # after a trial's limit, when its own clock and watchdog have failed
_CLOCK_SLACK_S = 1.0  # the driver hears of a start a little late


@dataclass(kw_only=True, slots=True)
class _Running:
    request: TrialRequest
    node: str = ""
    pid: int = 0
    started: float = 0.0
    steps: bytes | None = None
    num_steps: int = 0
    has_ended: bool = False
    was_killed: bool = False
    actor: Any = None


class Leave(BaseException):
    """Leaves Tune's loop at once: its own way out waits seconds for workers to say goodbye.

    Not an `Exception`, or Tune would take that way. Workers end with the driver's connection.
    """


class Bridge(Callback):
    """Hears what Tune's trials report. Tune calls every hook by keyword.

    What the source raises is kept and raised outside of Tune, which would wrap it in errors of
    its own and try to recover.

    Args:
        source: Is told.
        signals: Checked after every event of Tune.
    """

    def __init__(self, source: TrialSource, signals: Signals) -> None:
        self._source = source
        self._signals = signals
        self._running: dict[str, _Running] = {}
        self._problem: Exception | None = None

    def raise_problem(self) -> None:
        """Raise what the source raised, if it did."""
        if self._problem is not None:
            raise self._problem

    @contextlib.contextmanager
    def _keeping_problems(self) -> Iterator[None]:
        try:
            yield
        except Exception as problem:  # noqa: BLE001 - raised again by `raise_problem`
            self._problem = self._problem or problem

    # -- asked by the searcher ---------------------------------------------------------------

    def next_request(self, ray_id: str) -> TrialRequest | None:
        """Return the next trial; None where there is none now."""
        request = None
        if self._problem is None:
            with self._keeping_problems():
                request = self._source.next_trial()
        if request is not None:
            self._running[ray_id] = _Running(request=request)
        return request

    @property
    def is_over(self) -> bool:
        """True once no further trial will come."""
        return self._source.is_over

    # -- Tune's hooks ------------------------------------------------------------------------

    def setup(self, **_: Any) -> None:  # type: ignore[override]  # noqa: ANN401 - by keyword
        """Take the signals back: Tune has just taken them."""
        self._signals.install()

    def on_step_end(self, **_: Any) -> None:  # type: ignore[override]  # noqa: ANN401 - likewise
        """Leave once all is done or somebody asked, and kill what no clock could stop.

        Raises:
            Leave: Nothing more is to be done here.
        """
        is_over = self._source.is_over and not self._running
        if self._signals.received is not None or self._problem is not None or is_over:
            raise Leave
        for running in self._running.values():
            limit = _limit_s(running) + DRIVER_GRACE_S
            if running.started and not running.was_killed and _age_s(running) > limit:
                self._kill(running)

    def on_trial_start(self, *, trial: "Trial", **_: Any) -> None:  # type: ignore[override]  # noqa: ANN401
        """Note when a worker took the trial, and where."""
        running = self._running[trial.trial_id]
        running.started = time.monotonic()
        running.node = str(trial.node_ip or "")
        running.actor = trial.temporary_state.ray_actor
        with self._keeping_problems():
            self._source.trial_started(running.request, running.node)

    def on_trial_result(  # type: ignore[override]
        self,
        *,
        trial: "Trial",
        result: dict[str, Any],
        **_: Any,  # noqa: ANN401
    ) -> None:
        """Take a report; the blob is taken out, or Tune would keep it."""
        running = self._running[trial.trial_id]
        payload = result.pop("payload", None)
        running.node = str(result.get("hostname") or running.node)
        running.pid = int(result.get("pid") or 0)
        kind = result.get("kind")
        if kind == "started":
            running.started = time.monotonic()  # queueing and starting a worker is free
        elif kind == "progress":
            progress = json.loads(payload)
            running.num_steps = progress["step"]
            with self._keeping_problems():
                self._source.trial_progressed(running.request, progress)
        elif kind == "steps":
            running.steps = payload
        elif kind == "summary":
            self._end(running, TrialSummary.from_json(json.loads(payload)))

    def on_trial_complete(self, *, trial: "Trial", **_: Any) -> None:  # type: ignore[override]  # noqa: ANN401
        """Forget the trial."""
        self._running.pop(trial.trial_id, None)

    def on_trial_error(self, *, trial: "Trial", **_: Any) -> None:  # type: ignore[override]  # noqa: ANN401
        """Name the end of a trial whose worker is gone."""
        running = self._running.pop(trial.trial_id)
        if running.has_ended:  # a dirty process gave itself up after its summary
            return
        outcome, reason = self._name_loss(running, trial)
        config = running.request.config
        summary = TrialSummary(
            outcome=outcome,
            reason=reason,
            num_planned_steps=config.num_planned_steps,
            num_steps=running.num_steps,
            wall_s=_age_s(running) if running.started else 0.0,
            device=config.device,
        )
        self._end(running, summary)

    # ----------------------------------------------------------------------------------------

    def _end(self, running: _Running, summary: TrialSummary) -> None:
        running.has_ended = True
        with self._keeping_problems():
            self._source.trial_ended(running.request, summary, running.steps, running.node)

    def _name_loss(self, running: _Running, trial: "Trial") -> tuple[Outcome, str]:
        limit = _limit_s(running)
        is_late = running.started and _age_s(running) >= limit + WATCHDOG_GRACE_S - _CLOCK_SLACK_S
        if running.was_killed or is_late:
            return Outcome.TIMED_OUT, f"over {limit:g} s; its process had to be killed"
        error = trial.get_pickled_error() if hasattr(trial, "get_pickled_error") else None
        if isinstance(error, ray.exceptions.OutOfMemoryError):
            return Outcome.OUT_OF_MEMORY, "ended by Ray's memory monitor"
        text = str(error).strip().splitlines() if error is not None else []
        return Outcome.INFRASTRUCTURE, (text[0] if text else "its worker died")[:300]

    def _kill(self, running: _Running) -> None:
        """Kill the worker's process where it can be reached, else its actor through Ray."""
        running.was_killed = True
        if running.pid and running.node == os.uname().nodename:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(running.pid, signal.SIGKILL)
        elif running.actor is not None:
            ray.kill(running.actor)


def _limit_s(running: _Running) -> float:
    return running.request.config.timeout_s * running.request.allowance


def _age_s(running: _Running) -> float:
    return time.monotonic() - running.started


class KeepWorkers(FIFOScheduler):
    """Keeps every worker that is idle or starting; Tune would drop most of them.

    Tune keeps one idle worker, so that between two stages the others would end and start again;
    and it gives a pending trial to any worker that becomes free, dropping the one that was
    starting for it: with trials shorter than a worker's start, a slot stays empty for good.

    Args:
        num_slots: Trials at once.
    """

    def __init__(self, num_slots: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._num_to_keep = num_slots

    def on_trial_add(self, tune_controller: "TuneController", trial: "Trial") -> None:
        """Let the cache of workers hold all of them, once it is known what one occupies."""
        cache = tune_controller._actor_cache  # noqa: SLF001 - Ray 2.60 offers no setting
        cache.increase_max(trial.placement_group_factory, self._num_to_keep)
        self._num_to_keep = 0

    def choose_trial_to_run(self, tune_controller: "TuneController") -> None:
        """Choose nothing: pending trials are started in order anyway."""


class SourceSearcher(Searcher):
    """Gives Tune the source's trials, one configuration each.

    Args:
        bridge: Asked for the next trial.
        common: What every worker must know.
    """

    def __init__(self, bridge: Bridge, *, common: dict[str, Any]) -> None:
        super().__init__(metric=None, mode="max")
        self._bridge = bridge
        self._common = common

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:  # type: ignore[override]
        """Return the next trial's configuration, None to wait, or that there is no more."""
        request = self._bridge.next_request(trial_id)
        if request is not None:
            return {**self._common, "order": request.to_text()}
        return Searcher.FINISHED if self._bridge.is_over else None

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        """Do nothing: the bridge has heard already."""

    def save(self, checkpoint_path: str) -> None:
        """Do nothing: the ledger is the only truth."""

    def restore(self, checkpoint_path: str) -> None:
        """Do nothing: a study resumes from its ledger."""
