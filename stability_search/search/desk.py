"""What the driver knows of the trials that run, wherever they run, and how each end gets its name.

Workers of Ray Tune and the early ones of the driver report to the same desk.
"""

import contextlib
import json
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from stability_search.errors import InfrastructureError
from stability_search.interruption import Signals
from stability_search.records.trial import Outcome, Stage, TrialSummary
from stability_search.search.breakers import (
    LOSS_HINT,
    MAX_LOST_IN_A_ROW,
    START_HINT,
    NodeWatch,
    StartWatch,
    named,
)
from stability_search.search.nodes import NodeFacts, facts_of_this_machine
from stability_search.search.remains import kill_group
from stability_search.search.request import TrialRequest
from stability_search.search.source import Place, TrialSource
from stability_search.search.worker import WATCHDOG_GRACE_S, ReportKind

DRIVER_GRACE_S = 15.0  # after a trial's limit, when its own clock and watchdog have failed
NODE_GRACE_S = 90.0  # after that; Ray takes a minute to see that a node cannot be reached
_CLOCK_SLACK_S = 1.0  # the driver hears of a start a little late


@dataclass(kw_only=True, slots=True, eq=False)
class RunningTrial:
    """A trial that some worker has, or is about to get.

    Attributes:
        request: What it should train.
        node: Host of its worker; empty until it is known.
        node_id: Ray's id of that node; empty without Ray.
        pid: Process of its worker; 0 until it is known.
        started: When it began, as `time.monotonic`; 0 while it waits for its worker to start.
            If that worker is gone before, no attempt was made.
        num_steps: How far it was at its last report.
        has_ended: True once its end has a name.
        was_killed: True once the driver has ended its process.
        is_elsewhere: True if its process is on another machine.
        refusal: Why it must not run on its node; empty where it may.
    """

    request: TrialRequest
    node: str = ""
    node_id: str = ""
    pid: int = 0
    started: float = 0.0
    num_steps: int = 0
    has_ended: bool = False
    was_killed: bool = False
    is_elsewhere: bool = False
    refusal: str = ""

    @property
    def limit_s(self) -> float:
        """Seconds it may take."""
        return self.request.config.timeout_s * self.request.allowance

    @property
    def age_s(self) -> float:
        """Seconds since it began; 0 before."""
        return time.monotonic() - self.started if self.started else 0.0

    @property
    def is_overdue(self) -> bool:
        """True if its own clocks have failed and nobody has ended its process yet."""
        return not self.was_killed and self.age_s > self.limit_s + DRIVER_GRACE_S

    @property
    def is_given_up(self) -> bool:
        """True if its node was to end its process, and neither has anything to say."""
        return self.was_killed and self.age_s > self.limit_s + DRIVER_GRACE_S + NODE_GRACE_S

    def kill(self) -> bool:
        """Kill its worker and what that started; return False where it cannot be reached."""
        self.was_killed = True
        is_here = not self.is_elsewhere and self.node == os.uname().nodename
        if not self.pid or not is_here:
            return False
        kill_group(self.pid)
        return True


class Desk:
    """Takes trials from a source, and tells it what became of them.

    What the source raises is kept and raised by `raise_problem`, outside of Ray Tune, which would
    wrap it in errors of its own and try to recover. Once there is a problem no trial is given out.

    Args:
        source: Is asked and told.
        signals: Whether somebody asked the study to stop.
        facts_of: What a node is like, by its id, which is empty without Ray; None for one that
            nobody knows.

    Attributes:
        hold_node: Keeps trials off a node, by its id, and returns whether another can run them.
            Without Ray there is no other.
        this_node_id: Ray's id of the driver's node, where early workers are, too.
        num_slots: Trials at once.
    """

    def __init__(
        self,
        source: TrialSource,
        signals: Signals,
        facts_of: Callable[[str], NodeFacts | None] = facts_of_this_machine,
    ) -> None:
        self._source = source
        self._signals = signals
        self._facts_of = facts_of
        self._problem: Exception | None = None
        self._running: list[RunningTrial] = []
        self._handed_back: list[TrialRequest] = []
        self._watch = NodeWatch()
        self._starts = StartWatch()
        self.this_node_id = ""
        self.num_slots = 1
        self.hold_node: Callable[[str], bool] = _has_no_other_node
        self._refused: set[str] = set()
        self._begun: list[RunningTrial] = []
        self.has_unsettled = False

    # -- giving trials out -------------------------------------------------------------------

    def next_trial(self) -> RunningTrial | None:
        """Return the next trial; None where there is none now."""
        if self._problem is not None or self._signals.received is not None:
            return None
        request = self._handed_back.pop(0) if self._handed_back else None
        if request is None:
            with self._keeping_problems():
                request = self._source.next_trial()
        if request is None:
            return None
        running = RunningTrial(request=request)
        self._running.append(running)
        return running

    def hand_back(self, running: RunningTrial) -> None:
        """Take a trial back that no process has begun; it is given out again."""
        self._running.remove(running)
        self._handed_back.append(running.request)

    @property
    def is_over(self) -> bool:
        """True once no further trial will come."""
        return self._source.is_over

    @property
    def is_in_pilot(self) -> bool:
        """True while a trial of the pilot runs: all others wait for it, and then come at once."""
        return any(running.request.stage is Stage.PILOT for running in self._running)

    @property
    def must_leave(self) -> bool:
        """True once all is done, somebody asked to stop, or the source has a problem."""
        is_done = self._source.is_over and not self._running
        return is_done or self._problem is not None or self._signals.received is not None

    def raise_problem(self) -> None:
        """Raise what the source raised, if it did."""
        if self._problem is not None:
            raise self._problem

    # -- hearing of them ---------------------------------------------------------------------

    def begin(self, running: RunningTrial, *, node: str, pid: int) -> None:
        """Hear that a process has begun with a trial: queueing and starting a worker is free."""
        running.node, running.pid = node, pid
        if not running.started:
            self._begun.append(running)
        running.started = time.monotonic()
        self.note_start(running.node_id)
        if not self.has_unsettled:
            self._tell_begun()

    def note_start(self, node_id: str) -> None:
        """Hear that a worker on a node has started, with a trial or without."""
        self._starts.take_start()
        self._watch.take_start(node_id)

    def hear(self, running: RunningTrial, kind: ReportKind, payload: Any) -> None:  # noqa: ANN401
        """Take a worker's report of how far a trial is, or how it ended."""
        if kind is ReportKind.PROGRESS:
            progress = json.loads(payload)
            running.num_steps = progress["step"]
            with self._keeping_problems():
                self._source.trial_progressed(running.request, progress)
        elif kind is ReportKind.ENDED:
            text, steps = payload
            self._end(running, TrialSummary.from_json(json.loads(text)), steps)

    def lose(
        self,
        running: RunningTrial,
        reason: str,
        *,
        is_out_of_memory: bool = False,
        is_node_gone: bool = False,
    ) -> None:
        """Name the end of a trial that has begun and whose worker is gone.

        A node that cannot be reached is noticed late: that its trial was overdue by then says
        nothing about the trial.
        """
        if running.has_ended:  # a dirty process gave itself up after its summary
            return
        reason, limit = running.refusal or reason, running.limit_s
        is_late = running.started and running.age_s >= limit + WATCHDOG_GRACE_S - _CLOCK_SLACK_S
        outcome = Outcome.INFRASTRUCTURE
        if (running.was_killed or is_late) and not running.refusal and not is_node_gone:
            outcome = Outcome.TIMED_OUT
            reason = f"over {limit:g} s; its process had to be killed"
        elif is_out_of_memory:
            outcome = Outcome.OUT_OF_MEMORY
        config = running.request.config
        summary = TrialSummary(
            outcome=outcome,
            reason=reason[:300],
            num_planned_steps=config.num_planned_steps,
            num_steps=running.num_steps,
            wall_s=running.age_s,
            device=config.device,
        )
        self._end(running, summary, None)

    def lose_start(
        self, running: RunningTrial | None, reason: str, *, node: str, node_id: str
    ) -> None:
        """Hear that a worker is gone before a trial had begun: that is no attempt of the trial's.

        Args:
            running: What it was going to run, which is given out again; None for no trial.
            reason: What became of the worker.
            node: Host it was on; empty where nobody knows.
            node_id: Ray's id of that node; empty where nobody knows.
        """
        if running is not None:
            self.hand_back(running)
        if node_id in self._refused or self._watch.is_sick(node_id):
            return  # that node is held: no further worker starts there
        if running is not None:
            reason = running.refusal or reason
        what = "no trial" if running is None else running.request.trial_id
        place = node or "an unknown node"
        self.notice(f"a worker on {place} was gone before {what} had begun there: {reason[:300]}")
        with self._keeping_problems():
            if self._watch.take_lost_start(node_id):
                self._hold_sick(node, node_id, last=reason[:300], hint=START_HINT)
            self._starts.take_lost_start(reason[:300], num_slots=self.num_slots)

    def overdue(self) -> list[RunningTrial]:
        """Return the trials whose process has to be ended now."""
        return [running for running in self._running if running.is_overdue]

    def kill_running(self) -> None:
        """Kill the processes of all trials that run: the study is left."""
        for running in self._running:
            running.kill()

    def settle(self) -> None:
        """Write down what has ended: called once the slots have their next trials."""
        if self.has_unsettled:
            with self._keeping_problems():
                self._source.settle()
                self.has_unsettled = False
        self._tell_begun()

    def _tell_begun(self) -> None:
        """Tell of new trials after the end of those whose slots they have."""
        while self._begun:
            running = self._begun.pop(0)
            with self._keeping_problems():
                self._source.trial_started(running.request, running.node)

    def _end(self, running: RunningTrial, summary: TrialSummary, steps: bytes | None) -> None:
        self._tell_begun()
        running.has_ended = self.has_unsettled = True
        self._running.remove(running)
        with self._keeping_problems():
            place = Place(host=running.node, facts=self._facts_of(running.node_id))
            self._source.trial_ended(running.request, summary, steps, place)
            self._judge_node(running, summary)

    def _judge_node(self, running: RunningTrial, summary: TrialSummary) -> None:
        """Keep further trials off a node where workers only die.

        Raises:
            InfrastructureError: No other node can run them.
        """
        # Without an id it is an early worker's, here; or on a node that Ray has forgotten.
        here = "" if running.is_elsewhere else self.this_node_id or running.node
        node_id = running.node_id or here
        if self._watch.take(node_id, running.request.trial_id, summary.outcome):
            self._hold_sick(running.node, node_id, last=summary.reason, hint=LOSS_HINT)

    def _hold_sick(self, node: str, node_id: str, *, last: str, hint: str) -> None:
        reason = f"{MAX_LOST_IN_A_ROW} workers in a row, or more, were lost there"
        self._source.node_quarantined(node, reason)
        if not self.hold_node(node_id):
            losses = named(self._watch.losses(node_id))
            raise InfrastructureError(
                f"no usable node is left: {node} lost {MAX_LOST_IN_A_ROW} workers or more "
                f"in a row ({losses}; last: {last}).",
                hint=hint,
            )

    def notice(self, text: str) -> None:
        """Tell whoever watches."""
        with self._keeping_problems():
            self._source.noticed(text)

    def refuse_node(self, running: RunningTrial, reason: str) -> None:
        """Keep this trial and all further ones off its node: it is not like the others.

        The caller ends the trial's worker.
        """
        running.refusal = f"its node is not like the others: {reason}"
        if running.node_id in self._refused:
            return
        self._refused.add(running.node_id)
        with self._keeping_problems():
            self._source.node_quarantined(running.node, running.refusal)
            if not self.hold_node(running.node_id):
                raise InfrastructureError(
                    f"no usable node is left: {running.node} is not like the others: {reason}.",
                    hint="Make the nodes alike.",
                )

    @contextlib.contextmanager
    def _keeping_problems(self) -> Iterator[None]:
        try:
            yield
        except Exception as problem:  # noqa: BLE001 - raised again by `raise_problem`
            self._problem = self._problem or problem


def _has_no_other_node(_node_id: str) -> bool:
    return False
