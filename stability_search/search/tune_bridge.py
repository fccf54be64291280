"""Between Ray Tune's hooks and the desk."""

import contextlib
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray
from ray.tune import Callback
from ray.tune.search import Searcher
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from stability_search.interruption import Signals
from stability_search.search.deaths import Death
from stability_search.search.desk import Desk, RunningTrial
from stability_search.search.early import EarlyWorkers
from stability_search.search.idleness import Idleness
from stability_search.search.nodes import Inspector
from stability_search.search.quarantine import (
    Quarantine,
    free_resources,
    host_of,
    living_nodes,
    node_of,
    node_of_id,
)
from stability_search.search.remains import kill_group
from stability_search.search.trainable import WARM
from stability_search.search.waiting import Waiting
from stability_search.search.worker import ReportKind

if TYPE_CHECKING:
    from ray.tune.experiment import Trial

_TURN_S = 0.5  # Tune is left alone for so long while its workers start


class Leave(BaseException):
    """Leaves Tune's loop at once: its own way out waits seconds for workers to say goodbye.

    Not an `Exception`, or Tune would take that way. Workers end with the driver's connection.
    """


class Bridge(Callback):
    """Hears what Tune's trials report. Tune calls every hook by keyword.

    The first trials of Tune are nobody's: they make its workers load torch. Until all of them
    have, early workers go on taking trials; then each gives its slot up after its trial. Where
    there are none, a worker that is ready takes trials within nobody's: if that ended, Tune would
    give the worker a trial whose own worker is starting, and drop that one. Those that are still
    starting are given up once a worker that is ready has been idle for too long.

    Args:
        desk: Where trials come from and reports go.
        signals: Taken back from Tune.
        num_slots: Trials at once, of Tune and early ones together.
        num_ahead: Workers that start before it is known whether there is a trial for each.
        early: Workers that train already; None where there are none.
        quarantine: Holds sick nodes.
        inspector: Asks nodes that join later; None where all workers are on this machine.
        waiting: Notices that the cluster is busy.
        idleness: Knows how long a worker may be idle before it gives its place back.
    """

    def __init__(  # noqa: PLR0913 - everything that Tune's hooks lead to
        self,
        desk: Desk,
        signals: Signals,
        *,
        num_slots: int,
        num_ahead: int,
        early: EarlyWorkers | None,
        quarantine: Quarantine,
        inspector: Inspector | None,
        waiting: Waiting,
        idleness: Idleness,
    ) -> None:
        self._desk = desk
        self._inspector = inspector
        self._waiting = waiting
        self._idleness = idleness
        self._num_gone = 0
        desk.hold_node = self._hold_node
        desk.this_node_id = ray.get_runtime_context().get_node_id()
        desk.num_slots = num_ahead
        self._quarantine = quarantine
        self._node_ids: dict[Any, str] = {}  # by actor
        self._signals = signals
        self._num_slots = num_slots
        self._num_ahead = num_ahead
        self._early = early
        self._running: dict[str, RunningTrial] = {}
        self._nobodys: set[str] = set()
        self._warming: set[str] = set()
        self._num_warmed = 0
        self._is_warm = False
        self._places: dict[Any, tuple[str, int]] = {}  # host and process by actor
        self._begun: set[Any] = set()  # actors whose process has begun a trial
        self._actors: dict[str, Any] = {}
        self._addresses = _addresses()
        self._is_settling_due = False

    # -- asked by the searcher ---------------------------------------------------------------

    def next_order(self, ray_id: str) -> str | None:
        """Return the next trial as text, empty for one that only warms up; None to wait."""
        if not self._is_warm and self._num_warmed + len(self._warming) < self._num_ahead:
            self._nobodys.add(ray_id)
            self._warming.add(ray_id)
            return ""
        running = self._next_trial()
        # Where Tune has nothing to wait for it would sleep for a second at a time.
        while running is None and self._early_runs_alone():
            self._turn(_TURN_S)
            running = self._next_trial()
        if running is None:
            return None
        self._running[ray_id] = running
        return running.request.to_text()

    def _next_trial(self) -> RunningTrial | None:
        return self._desk.next_trial() if self._has_free_slot else None

    @property
    def _has_free_slot(self) -> bool:
        num_taken = len(self._running) + (self._early.num_workers if self._early else 0)
        return num_taken < self._num_slots

    def _early_runs_alone(self) -> bool:
        return (
            self._early is not None
            and self._early.num_workers > 0
            and not self._running
            and not self._warming
            and not self._desk.must_leave
        )

    def _turn(self, during_s: float) -> None:
        """Look after the early workers for a while: they are served at once, Tune's may wait."""
        end = time.monotonic() + during_s
        while self._early is not None and self._early.num_workers and not self._desk.must_leave:
            self._early.turn(self._desk, timeout_s=max(0.0, end - time.monotonic()))
            if time.monotonic() >= end:
                return

    @property
    def is_over(self) -> bool:
        """True once no further trial will come."""
        return self._desk.is_over

    def note_warm(self, ray_id: str) -> bool:
        """Hear that a worker has loaded torch, or has failed to; return True if all have."""
        if ray_id in self._warming:
            self._warming.discard(ray_id)
            self._num_warmed += 1
            if self._num_warmed == self._num_ahead:
                self._end_warming()
        # A worker that is being ended for its node's sake has a trial still to be given again.
        return self._is_warm and ray_id not in self._running

    def _end_warming(self) -> None:
        self._is_warm = True
        if self._early is not None:
            sys.stdout.write("Ray's workers are ready; the early ones end.\n")  # into run.log
            sys.stdout.flush()
            self._early.retire()

    def is_of_no_use(self, ray_id: str) -> bool:
        """Return True for a trial whose worker is still starting and that nobody waits for."""
        return self._is_warm and ray_id in self._warming

    def may_go(self, actor: Any) -> bool:  # noqa: ANN401 - Ray's handle has no public type
        """Hear that a worker has nothing to do; return True if it should get no further trial."""
        if self.is_on_sick_node(actor):
            return True
        is_over = self._is_idle_too_long(actor)
        self._num_gone += is_over
        return is_over

    def note_work(self, actor: Any) -> None:  # noqa: ANN401 - as above
        """Hear that there may be a trial for an idle worker now."""
        self._idleness.forget(actor)

    def tell_of_the_gone(self) -> None:
        """Say how many workers have been given up because nothing was left for them."""
        if self._num_gone:
            whose = "1 worker" if self._num_gone == 1 else f"{self._num_gone} workers"
            idle_s = self._idleness.limit_s
            self._desk.notice(f"{whose} had nothing to do for {idle_s:.0f} s: the place is free")
            self._num_gone = 0

    def _is_idle_too_long(self, actor: Any) -> bool:  # noqa: ANN401 - as above
        """Return True if nothing is left for a worker; after the pilot there is for all."""
        if self._desk.is_in_pilot or not self._has_free_slot:
            self._idleness.forget(actor)
        return self._idleness.is_over_limit(actor)

    def note_places(self, *, num_placed: int, num_unplaced: int) -> None:
        """Hear how many workers there are, and for how many no node has room."""
        self._waiting.note(num_placed=num_placed, num_unplaced=num_unplaced)

    # -- Tune's hooks ------------------------------------------------------------------------

    def setup(self, **_: Any) -> None:  # type: ignore[override]  # noqa: ANN401 - by keyword
        """Take the signals back: Tune has just taken them."""
        self._signals.install()

    def on_step_end(self, **_: Any) -> None:  # type: ignore[override]  # noqa: ANN401 - likewise
        """Leave once all is done or somebody asked, and kill what no clock could stop.

        Raises:
            Leave: Nothing more is to be done here.
        """
        self._turn(_TURN_S if self._warming else 0.0)
        self._settle()
        self._look_at_waiting()
        if self._desk.must_leave:
            raise Leave
        self._kill_overdue()

    def _kill_overdue(self) -> None:
        for ray_id, running in self._running.items():
            if running.is_overdue and not running.kill() and ray_id in self._actors:
                kill_there(running, self._actors[ray_id])
            elif running.is_given_up and ray_id in self._actors:
                ray.kill(self._actors.pop(ray_id))

    def _look_at_waiting(self) -> None:
        """Say that the cluster is busy; those workers that have a place go on meanwhile."""
        if self._waiting.is_due:
            self._desk.notice(self._waiting.message(living_nodes(), free_resources()))

    def on_trial_start(self, *, trial: "Trial", **_: Any) -> None:  # type: ignore[override]  # noqa: ANN401
        """Note when a worker took the trial, and where.

        A process says once, with its first trial, that it has begun; later trials begin here.
        """
        if trial.trial_id in self._running:  # else it is nobody's
            self._take_place(trial)

    def _take_place(self, trial: "Trial") -> bool:
        """Note where a trial's worker is; return False if the trial must not run there."""
        running = self._running[trial.trial_id]
        actor: Any = trial.temporary_state.ray_actor
        self._idleness.forget(actor)
        self._actors[trial.trial_id] = actor
        running.node_id = self._node_id(actor)
        if self.is_on_sick_node(actor):  # it came by a place that was to be held
            running.refusal = "its node gets no further trials"
            ray.kill(actor)
            return False
        node, pid = self._places.get(actor, (str(trial.node_ip or ""), 0))
        if not self._is_welcome(running, node):
            ray.kill(actor)
            return False
        running.is_elsewhere = self._is_elsewhere(running.node_id)
        if actor in self._begun:
            self._desk.begin(running, node=node, pid=pid)
        return True

    def _offer(self, trial: "Trial") -> None:
        """Give a worker that is ready before others are a trial, if there is one."""
        actor: Any = trial.temporary_state.ray_actor
        if self.is_on_sick_node(actor):
            return
        running = self._next_trial()
        if running is not None:
            self._running[trial.trial_id] = running
            if self._take_place(trial):
                actor.offer.remote(running.request.to_text())
        elif self._is_idle_too_long(actor):
            self._end_warming()

    def _is_welcome(self, running: RunningTrial, node: str) -> bool:
        """Ask a node that joined later; the trial is given again where it must not run there.

        One that does not answer is asked again with its next trial, until it counts as sick.
        """
        if self._inspector is None or not running.node_id:
            return True
        try:
            problem = self._inspector.problem_of(running.node_id, self._look_while_asking)
        except TimeoutError as silence:
            running.refusal = str(silence)
            return False
        if problem:
            running.node = host_of(running.node_id) or node
            self._desk.refuse_node(running, problem)
        return not problem

    def _look_while_asking(self) -> None:
        """Leave if somebody asked: Tune's loop waits; and no other trial gets more time by it."""
        if self._signals.received is not None:
            raise Leave
        self._kill_overdue()

    def _is_elsewhere(self, node_id: str) -> bool:
        if node_id not in self._addresses:
            self._addresses = _addresses()
        here = self._addresses.get(self._desk.this_node_id)
        return self._addresses.get(node_id) != here

    def on_trial_result(  # type: ignore[override]
        self,
        *,
        trial: "Trial",
        result: dict[str, Any],
        **_: Any,  # noqa: ANN401
    ) -> None:
        """Take a report; the blob is taken out, or Tune would keep it."""
        payload = result.pop("payload", None)
        place = str(result.get("hostname") or ""), int(result.get("pid") or 0)
        actor: Any = trial.temporary_state.ray_actor
        running = self._running.get(trial.trial_id)
        if running is not None and running.refusal:  # its worker is being ended
            return
        if actor not in self._places:
            self._desk.note_start(self._node_id(actor))
        self._places[actor] = place
        if result["kind"] == WARM:  # the scheduler has noted it, and ended it if all are ready
            if not result.get("done"):
                self._offer(trial)
            return
        if running is None:
            return
        kind = ReportKind(result["kind"])
        if kind is ReportKind.STARTED:
            self._begun.add(actor)
            self._desk.begin(running, node=place[0], pid=place[1])
        else:
            self._desk.hear(running, kind, payload)
        if kind is ReportKind.ENDED and trial.trial_id in self._nobodys:
            self.on_trial_complete(trial=trial)  # it waits again

    def on_trial_complete(self, *, trial: "Trial", **_: Any) -> None:  # type: ignore[override]  # noqa: ANN401
        """Forget the trial."""
        self._warming.discard(trial.trial_id)
        self._forget(trial.trial_id)
        self._quarantine.hold_more()

    def on_trial_error(self, *, trial: "Trial", **_: Any) -> None:  # type: ignore[override]  # noqa: ANN401
        """Name the end of a trial whose worker is gone, or give it back if it had not begun."""
        is_nobodys = trial.trial_id in self._warming
        if trial.trial_id in self._nobodys and not self._is_warm:
            # The next trial is nobody's, too: one that waited for a worker of its own would have
            # to wait behind those that have no place yet.
            self._num_warmed -= not is_nobodys
            self._warming.discard(trial.trial_id)
        running = self._forget(trial.trial_id)
        death = _death_of(trial)
        if running is not None and running.started:
            self._desk.lose(
                running,
                death.reason,
                is_out_of_memory=death.is_out_of_memory,
                is_node_gone=death.is_node_gone,
            )
        elif running is not None or is_nobodys:
            node_id = (running.node_id if running else "") or node_of_id(death.actor_id)
            self._desk.lose_start(running, death.reason, node=host_of(node_id), node_id=node_id)
        self._quarantine.hold_more()

    # ----------------------------------------------------------------------------------------

    def _hold_node(self, node_id: str) -> bool:
        self._quarantine.hold(node_id)
        return self._quarantine.has_usable_node

    def _node_id(self, actor: Any) -> str:  # noqa: ANN401 - Ray's handle has no public type
        if actor not in self._node_ids:
            self._node_ids[actor] = node_of(actor)
        return self._node_ids[actor]

    def is_on_sick_node(self, actor: Any) -> bool:  # noqa: ANN401 - as above
        """Return True for a worker that should get no further trial."""
        return self._quarantine.is_held(self._node_id(actor))

    def _forget(self, ray_id: str) -> RunningTrial | None:
        self._actors.pop(ray_id, None)
        return self._running.pop(ray_id, None)

    def _settle(self) -> None:
        """Write down what has ended, but first let the slots have their next trials."""
        if self._is_settling_due:
            self._desk.settle()
        self._is_settling_due = self._desk.has_unsettled and not self._is_settling_due


def _death_of(trial: "Trial") -> Death:
    """Return what became of a trial's worker.

    Tune's own way to the error looks where its files are copied to later, and finds none.
    """
    with contextlib.suppress(OSError):
        if trial.error_file is not None:
            text = Path(trial.error_file).read_text(encoding="utf-8", errors="replace")
            return Death.from_text(text.partition("\n")[2])  # the first line is Tune's
    return Death()


def _addresses() -> dict[str, str]:
    """Return the IP address of each node by its id: several may be on this machine."""
    return {node.node_id: node.address for node in living_nodes()}


def kill_there(running: RunningTrial, actor: Any) -> None:  # noqa: ANN401 - as above
    """Kill a worker on another machine, and what it started: it may not listen to Ray.

    That machine does it, and Ray hears of the death from there: one that cannot be reached is to
    be found dead itself, instead of a trial too slow.
    """
    if not running.pid or not running.node_id:
        ray.kill(actor)
        return
    there = NodeAffinitySchedulingStrategy(node_id=running.node_id, soft=False)
    task = ray.remote(num_cpus=0, max_retries=0)(kill_group)
    task.options(scheduling_strategy=there).remote(running.pid)


class SourceSearcher(Searcher):
    """Gives Tune the desk's trials, one configuration each.

    Args:
        bridge: Asked for the next trial.
        worker: What every worker must know, as plain data.
    """

    def __init__(self, bridge: Bridge, *, worker: dict[str, Any]) -> None:
        super().__init__(metric=None, mode="max")
        self._bridge = bridge
        self._worker = worker

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:  # type: ignore[override]
        """Return the next trial's configuration, None to wait, or that there is no more."""
        order = self._bridge.next_order(trial_id)
        if order is not None:
            return {"worker": self._worker, "order": order}
        return Searcher.FINISHED if self._bridge.is_over else None

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        """Do nothing: the bridge has heard already."""

    def save(self, checkpoint_path: str) -> None:
        """Do nothing: the ledger is the only truth."""

    def restore(self, checkpoint_path: str) -> None:
        """Do nothing: a study resumes from its ledger."""
