"""The study as its driver knows it: where trials come from, and where they go when they end.

A trial that ended is taken in by the plan at once, so that the next one can be chosen, and is
written down by `settle`: the ledger is the only truth.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

from stability_search.events import stamp
from stability_search.records.trial import Stage, TrialRow, TrialSummary
from stability_search.search.breakers import Breakers, refuse_settings
from stability_search.search.environment import Environment
from stability_search.search.ledger import Ledger
from stability_search.search.machine import Machine
from stability_search.search.news import News
from stability_search.search.plan import StudyPlan
from stability_search.search.reopening import parameters_of
from stability_search.search.request import TrialRequest
from stability_search.search.run_directory import RunDirectory
from stability_search.search.source import Place
from stability_search.space import Space


@dataclass(frozen=True, kw_only=True, slots=True)
class _Started:
    at: str
    node: str


class StudySource:
    """Hands the plan's trials to the driver; takes what they became to plan, ledger and listener.

    Args:
        space: The study's space.
        directory: Its run directory.
        ledger: What has ended so far; what ends from now on is added.
        machine: What a trial occupies and how many run at once.
        command: The command line, for the record.
        news: Is told what happens.
    """

    def __init__(  # noqa: PLR0913 - what a study is made of
        self,
        space: Space,
        directory: RunDirectory,
        ledger: Ledger,
        *,
        machine: Machine,
        command: str,
        news: News,
    ) -> None:
        self._space = space
        self._directory = directory
        self._ledger = ledger
        self._machine = machine
        self._environment = Environment(directory, space, command)
        self._news = news
        self.plan = StudyPlan(space, device=machine.device, rows=ledger.rows())
        self._breakers = Breakers(self.plan.rows)
        self._stage: Stage | None = None
        self._started: dict[str, _Started] = {}
        self._is_task_known = False  # to be built by what this command has started
        self._unwritten: list[tuple[TrialRow, bytes | None]] = []

    def begin(self) -> None:
        """Write down what the trials run on, and tell that the study starts."""
        self._write_environment()
        self._news.study_started(self._directory.path, self._machine, self.plan)

    @property
    def is_over(self) -> bool:
        """True once the plan has a verdict."""
        return self.plan.verdict is not None

    def next_trial(self) -> TrialRequest | None:
        """Return the plan's next trial."""
        stage = self.plan.stage
        request = self.plan.next_trial()
        if request is not None and stage is not self._stage:
            self._stage = stage
            self._news.stage_started(stage, self.plan)
        return request

    def trial_started(self, request: TrialRequest, node: str) -> None:
        """Note when and where a trial began."""
        self._started[request.trial_id] = _Started(at=stamp(datetime.now(UTC)), node=node)
        self._news.trial_started(request, node)

    def trial_progressed(self, request: TrialRequest, progress: Mapping[str, Any]) -> None:
        """Pass on how far a trial is."""
        self._news.trial_progressed(request, progress)

    def trial_ended(
        self, request: TrialRequest, summary: TrialSummary, steps: bytes | None, place: Place
    ) -> None:
        """Take in how a trial ended, so that the next one can be chosen."""
        now = datetime.now(UTC)
        started = self._started.pop(request.trial_id, _Started(at=stamp(now), node=place.host))
        node = place.host or started.node
        is_known = node and summary.device != "cuda"  # else it was lost before it named the GPU
        fingerprint = place.facts.fingerprint(summary.device) if place.facts and is_known else ""
        started_at = earlier_start(started.at, ended=now, wall_s=summary.wall_s)
        row = self.plan.finish(
            request, summary, started_at=started_at, node=node, fingerprint=fingerprint
        )
        refuse_settings(row, is_first=not self._is_task_known)  # nobody's trial leaves no row
        self._is_task_known |= summary.outcome.is_result
        self._note_node(row, place)
        self._unwritten.append((row, steps))

    def node_quarantined(self, node: str, reason: str) -> None:
        """Pass on that a node gets no further trials."""
        self._news.node_quarantined(node, reason)

    def noticed(self, text: str) -> None:
        """Pass on what somebody who watches should know."""
        self._news.notice(text)

    def settle(self) -> None:
        """Write down what has ended: its steps, then the ledger, then the news."""
        while self._unwritten:
            row, steps = self._unwritten.pop(0)
            self._write_steps(row, steps)
            self._ledger.add(row, *parameters_of(self._space, row))
            self._news.trial_finished(row, self.plan)
            self._breakers.take(row)

    def _write_steps(self, row: TrialRow, steps: bytes | None) -> None:
        from stability_search.step_files import encode_steps, write_steps  # loads pyarrow

        blob = encode_steps(()) if steps is None else steps
        write_steps(self._directory.step_file(row.trial_id, row.attempt), blob, row)

    def _note_node(self, row: TrialRow, place: Place) -> None:
        """Keep what a fingerprint stands for, the first time that it is seen."""
        if place.facts is None or self._environment.knows(row):
            return
        difference = self._environment.note(row, place.facts)
        if difference:
            text = f"trials on {row.node} differ from the first in {difference}"
            self._news.message("warning", text)
        self._write_environment()

    def _write_environment(self) -> None:
        self._environment.write(self._ledger.facts(), device=self._machine.device)


def earlier_start(heard: str, *, ended: datetime, wall_s: float) -> str:
    """Return when a trial started, as well as the study knows.

    It hears late of a start and of an end while it is busy with other trials. A trial began no
    later than either says; of two in one slot the later then starts after the end of the first.

    Args:
        heard: When the study heard of the start, as `stamp` writes it.
        ended: When it heard of the end, in UTC.
        wall_s: What the trial took, by its worker's clock, in seconds.
    """
    return min(heard, stamp(ended - timedelta(seconds=wall_s)))
