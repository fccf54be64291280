"""What a study tells while it runs: an event for everything that happens to it."""

import sys
from collections import Counter
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from stability_search.events import Event, EventName, Listener, message, stamp
from stability_search.inert import inert
from stability_search.records.trial import Stage, TrialRow
from stability_search.records.values import Json
from stability_search.records.verdict import Verdict
from stability_search.search.confirm import describe_cost
from stability_search.search.machine import Machine
from stability_search.search.plan import StudyPlan
from stability_search.search.request import TrialRequest
from stability_search.space import Space
from stability_search.standing import score_trial


class News:
    """Tells whoever listens; `events.FIELDS` says what comes with each event.

    Args:
        space: The study's space; of a trial's settings those that vary are told.
        listener: Hears every event.
    """

    def __init__(self, space: Space, listener: Listener) -> None:
        self._space = space
        self._listener = listener

    def message(self, level: str, text: str) -> None:
        """Tell in words.

        Args:
            level: `info`, `warning` or `error`.
            text: What happened.
        """
        self._listener(message(level, text))

    def notice(self, text: str) -> None:
        """Tell what somebody who watches should know; the log has it, too."""
        sys.stdout.write(f"{inert(text)}\n")
        sys.stdout.flush()
        self.message("info", text)

    def study_started(self, directory: Path, machine: Machine, plan: StudyPlan) -> None:
        """Tell what is planned, and what an earlier run has done of it."""
        self._tell(
            EventName.STUDY_STARTED,
            run_directory=str(directory),
            device=machine.device,
            trials=plan.num_planned(Stage.SEARCH) if self._space.has_space else 0,
            slots=machine.num_slots,
            space=str(self._space.path),
            outcomes=dict(Counter(row.summary.outcome.value for row in plan.rows)),
        )

    def stage_started(self, stage: Stage, plan: StudyPlan) -> None:
        """Tell how many trials the stage takes."""
        planned = plan.num_planned(stage)
        self._tell(
            EventName.STAGE_STARTED,
            stage=stage.value,
            planned=planned,
            planned_at_most=describe_cost(self._space).max_trials if planned is None else planned,
            finished=sum(row.stage is stage and not plan.will_retry(row) for row in plan.rows),
        )

    def trial_started(self, request: TrialRequest, node: str) -> None:
        """Tell that a worker has taken a trial."""
        self._tell(
            EventName.TRIAL_STARTED,
            trial_id=request.trial_id,
            stage=request.stage.value,
            config_id=request.config_id,
            seed=request.config.seed,
            attempt=request.attempt,
            node=node,
            num_planned_steps=request.config.num_planned_steps,
            settings=self._varying(request.settings),
        )

    def trial_progressed(self, request: TrialRequest, progress: Mapping[str, Any]) -> None:
        """Tell how far a trial is."""
        self._tell(
            EventName.TRIAL_PROGRESS,
            trial_id=request.trial_id,
            num_planned_steps=request.config.num_planned_steps,
            **progress,
        )

    def trial_finished(self, row: TrialRow, plan: StudyPlan) -> None:
        """Tell how a trial ended, and whether it is tried again."""
        summary = row.summary
        score = score_trial(row, plan.measure_of(row))
        self._tell(
            EventName.TRIAL_FINISHED,
            trial_id=row.trial_id,
            stage=row.stage.value,
            config_id=row.config_id,
            seed=row.seed,
            attempt=row.attempt,
            node=row.node,
            outcome=summary.outcome.value,
            reason=summary.reason,
            q=None if score is None else score.q,
            num_planned_steps=summary.num_planned_steps,
            num_steps=summary.num_steps,
            num_bad_steps=summary.num_bad_steps,
            wall_s=summary.wall_s,
            settings=self._varying(row.settings),
        )
        if plan.will_retry(row):
            self._tell(
                EventName.TRIAL_RETRIED,
                trial_id=row.trial_id,
                attempt=row.attempt + 1,
                reason=summary.reason,
            )

    def node_quarantined(self, node: str, reason: str) -> None:
        """Tell that a node gets no further trials."""
        self._tell(EventName.NODE_QUARANTINED, node=node, reason=reason)

    def study_finished(self, verdict: Verdict, *, report: Path | None) -> None:
        """Tell the verdict.

        Args:
            verdict: How the study ended.
            report: The page; None where there was no time to write it.
        """
        self._tell(
            EventName.STUDY_FINISHED,
            verdict=verdict.kind.value,
            exit_code=verdict.exit_code,
            config_id=verdict.choice or verdict.closest,
            reason=verdict.reason,
            report=None if report is None else str(report),
        )

    def _varying(self, settings: Mapping[str, Json]) -> dict[str, Json]:
        """Return what tells one trial from another: the settings that vary."""
        names = self._space.varying or tuple(settings)
        return {name: settings[name] for name in names}

    def _tell(self, name: EventName, **fields: Json) -> None:
        self._listener(Event(name=name, time=stamp(datetime.now(UTC)), fields=fields))
