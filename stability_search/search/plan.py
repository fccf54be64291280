"""Which trial of a study comes next: pilot, then search, then confirm.

The plan knows neither Ray nor files. It is built from the rows of the ledger, so that a resumed
study goes on exactly where it was, and is told of every trial that ends. What it costs to ask and
to tell does not grow with the number of trials, but where E* has moved and the sampler learns:
then all are scored and told again.
"""

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Literal

from stability_search.errors import StoppedEarlyError
from stability_search.records.trial import Stage, TrialRow, TrialSummary
from stability_search.records.values import Json
from stability_search.records.verdict import Verdict, VerdictKind
from stability_search.search.budget import Budget, Clock
from stability_search.search.confirm import Confirmation, ConfirmTrial, Need, describe_cost
from stability_search.search.history import History, must_repeat
from stability_search.search.preflight import preflight_configs
from stability_search.search.reported import ReportedYardsticks
from stability_search.search.request import TrialRequest
from stability_search.search.sampler import Sampler, Told, told, varying_values
from stability_search.seeding import derive_seed
from stability_search.settings.trial import TrialConstants
from stability_search.space import Space
from stability_search.standing import score_trial
from stability_search.yardstick import (
    GrowingYardstick,
    Yardstick,
    is_finite_run,
    probe_steps,
)

_STABILISERS = {"clip_norm", "attention_clamp", "attention_logit_cap"}


@dataclass(frozen=True, kw_only=True, slots=True)
class _Slot:
    """One trial of a stage before its attempt is known."""

    trial_id: str
    stage: Stage
    index: int
    settings: Mapping[str, Json]


class StudyPlan:
    """Says which trial comes next, and how the study ends.

    Args:
        space: The study's space.
        device: Device of every trial.
        rows: Trials that finished before, in the order of the ledger.
        clock: Seconds from a fixed start, for time budgets.
    """

    def __init__(
        self,
        space: Space,
        *,
        device: Literal["cpu", "cuda"],
        rows: Iterable[TrialRow] = (),
        clock: Clock = time.monotonic,
    ) -> None:
        self.space = space
        self.study = space.study
        self.verdict: Verdict | None = None
        self._device = device
        self._history = History(rows)
        self._budget = Budget(self.study, clock=clock, history=self._history)
        self._in_flight: dict[str, TrialRequest] = {}
        self._confirmation = Confirmation(space)
        self._sampler = Sampler(space)
        self._search_measure = GrowingYardstick(self.study.trial_steps)
        self._confirm_measure = GrowingYardstick(self.study.confirm.steps)
        self._reported = ReportedYardsticks(self.study)
        self._need: tuple[int, Need | Verdict] | None = None
        self._is_pilot_over = False
        for row in self.rows:
            self._measure(row)
        self._tell_everything()

    @property
    def rows(self) -> list[TrialRow]:
        """Every finished attempt, in the order of finishing."""
        return self._history.rows

    # -- what comes next ---------------------------------------------------------------------

    @property
    def stage(self) -> Stage:
        """The stage the next trial belongs to."""
        self._is_pilot_over = self._is_pilot_over or self._pilot_is_over()
        if not self._is_pilot_over:
            return Stage.PILOT
        return Stage.CONFIRM if self._search_is_over() else Stage.SEARCH

    def num_planned(self, stage: Stage) -> int | None:
        """Return how many trials a stage plans; None where that is not known ahead."""
        if stage is Stage.PILOT:
            return len(self.space.pilot_learning_rates())
        return self.study.search.trials if stage is Stage.SEARCH else None

    @property
    def num_at_once(self) -> int:
        """How many trials could run at once before there is a result; at least one."""
        if self.stage is Stage.CONFIRM:
            need = self._budget_left_no_search() or self._needed()
            return 1 if isinstance(need, Verdict) else max(1, len(need.trials))
        num_search = self.study.search.trials if self.space.has_space else 0
        left = num_search - self._history.num_of(Stage.SEARCH)
        return max(1, left, len(self._pilot_slots()) if self.stage is Stage.PILOT else 0)

    def next_trial(self) -> TrialRequest | None:
        """Return the next trial, now in flight; None where it depends on one that is running.

        Sets `verdict` once no further trial is needed.
        """
        if self.verdict is not None:
            return None
        stage = self.stage
        if stage is Stage.PILOT:
            request = self._next_pilot()
        elif stage is Stage.SEARCH:
            request = self._next_search()
        else:
            request = self._next_confirm()
        if request is not None:
            self._in_flight[request.trial_id] = request
        return request

    def finish(
        self,
        request: TrialRequest,
        summary: TrialSummary,
        *,
        started_at: str,
        node: str,
        fingerprint: str = "",
    ) -> TrialRow:
        """Take in how a trial ended.

        Args:
            request: What `next_trial` returned.
            summary: How it ended.
            started_at: UTC, ISO 8601.
            node: Host that ran it.
            fingerprint: What that host is like, as a short hash.

        Returns:
            The row for the ledger, with what the sampler was told.

        """
        self._in_flight.pop(request.trial_id, None)
        row = TrialRow(
            trial_id=request.trial_id,
            stage=request.stage,
            index=request.index,
            config_id=request.config_id,
            candidate_id=request.candidate_id,
            octave=request.octave,
            seed=request.config.seed,
            seed_index=request.seed_index,
            settings=request.settings,
            e0=request.constants.e0,
            delta=request.constants.delta,
            summary=summary,
            attempt=request.attempt,
            started_at=started_at,
            node=node,
            fingerprint=fingerprint,
        )
        before = self._search_measure.now
        self._history.add(row)
        self._measure(row)
        if row.stage is Stage.SEARCH:
            row = self._tell(row, before)
            self._history.replace_last(row)
        return row

    def first_proposals(self, count: int) -> list[dict[str, Json]]:
        """Return the values of the first proposals of a fresh study, for a look ahead."""
        if not self.space.has_space:
            return [{}]
        return [self._sampler.propose(i) for i in range(min(count, self.study.search.trials))]

    def measure_of(self, row: TrialRow) -> Yardstick:
        """Return the yardstick that a report made now would measure this row by."""
        return self._reported.of_stage(row.stage)

    def will_retry(self, row: TrialRow) -> bool:
        """Return True if the trial of a row is going to be attempted again."""
        return must_repeat(row)

    # -- pilot -------------------------------------------------------------------------------

    def _pilot_slots(self) -> list[_Slot]:
        slots = self._pilot_sweep(0, with_stabilisers=False)
        finished = [self._history.final(slot.trial_id) for slot in slots]
        if any(row is None or is_finite_run(row.summary) for row in finished):
            return slots
        if not _STABILISERS & set(self.space.varying):
            return slots
        return slots + self._pilot_sweep(len(slots), with_stabilisers=True)

    def _is_blind_run_missing(self) -> bool:
        """Return True unless a pilot trial has measured it or is about to."""
        asked = any(r.constants.measures_blind_run for r in self._in_flight.values())
        return not asked and all(
            row.summary.baseline is None and not row.summary.has_measured_blind_run
            for row in self.rows
        )

    def _pilot_sweep(self, first: int, *, with_stabilisers: bool) -> list[_Slot]:
        base = self.space.pilot_settings(with_stabilisers=with_stabilisers)
        return [
            _Slot(
                trial_id=f"pilot-{first + i:02d}",
                stage=Stage.PILOT,
                index=first + i,
                settings=self.space.at_learning_rate(base, rate),
            )
            for i, rate in enumerate(self.space.pilot_learning_rates())
        ]

    def _pilot_is_over(self) -> bool:
        return all(self._history.final(slot.trial_id) for slot in self._pilot_slots())

    def _next_pilot(self) -> TrialRequest | None:
        for slot in self._pilot_slots():
            is_over = self._history.final(slot.trial_id) is not None
            if not is_over and slot.trial_id not in self._in_flight:
                horizons = (self.study.trial_steps, self.study.confirm.steps)
                constants = TrialConstants(
                    probe_steps=probe_steps(*horizons),
                    measures_blind_run=self._is_blind_run_missing(),
                )
                request = self._request(slot, constants, steps=max(horizons))
                if slot.index > 0:
                    return request
                preflight = preflight_configs(self.space, device=self._device)
                return replace(request, preflight=preflight)
        return None

    # -- search ------------------------------------------------------------------------------

    def _search_is_over(self) -> bool:
        if not self.space.has_space:
            return True
        waiting = [r for r in self._in_flight.values() if r.stage is Stage.SEARCH]
        return not waiting and self._next_index() is None

    def _next_index(self) -> int | None:
        running = self._in_flight.values()
        taken = {request.index for request in running if request.stage is Stage.SEARCH}
        again = self._history.search_index_to_repeat(taken)
        if again is not None:
            return again
        num_planned = sum(request.config.num_planned_steps for request in running)
        if self._budget.is_half_spent(num_planned_steps=num_planned):
            return None
        free = self._history.free_search_index(taken)
        return free if free < self.study.search.trials else None

    def _next_search(self) -> TrialRequest | None:
        index = self._next_index()
        if index is None:
            return None
        trial_id = f"search-{index:04d}"
        earlier = self._history.last(trial_id)
        if earlier is None:
            values = self._sampler.propose(index)
        else:
            values = varying_values(self.space, earlier.settings)
            self._sampler.take_up(index, values)
        settings = self.space.settings(values)
        slot = _Slot(trial_id=trial_id, stage=Stage.SEARCH, index=index, settings=settings)
        constants = replace(self._constants(self._search_measure.now), control=self.study.control)
        return self._request(slot, constants, steps=self.study.trial_steps)

    # -- confirm -----------------------------------------------------------------------------

    def _next_confirm(self) -> TrialRequest | None:
        need = self._budget_left_no_search() or self._needed()
        if isinstance(need, Verdict):
            if not self._in_flight:
                self.verdict = need
            return None
        for trial in need.trials:
            trial_id = f"confirm-{trial.config_id}-s{trial.seed_index}"
            if trial_id not in self._in_flight:
                return self._confirm_request(trial_id, trial)
        return None

    def _budget_left_no_search(self) -> Verdict | None:
        if not self.space.has_space or self._history.num_of(Stage.SEARCH):
            return None
        return Verdict(
            kind=VerdictKind.INCOMPLETE,
            exit_code=StoppedEarlyError.exit_code,
            reason="Half of the budget went to the pilot, so no search trial was started.",
        )

    def _needed(self) -> Need | Verdict:
        if self._need is None or self._need[0] != len(self.rows):
            need = self._confirmation.next_need(self.rows, can_afford=self._budget.can_afford)
            self._need = (len(self.rows), need)
        return self._need[1]

    def _confirm_request(self, trial_id: str, trial: ConfirmTrial) -> TrialRequest:
        earlier = self._history.last(trial_id)
        running = [r.index + 1 for r in self._in_flight.values() if r.stage is Stage.CONFIRM]
        following = max(running, default=0), self._history.next_index(Stage.CONFIRM)
        index = earlier.index if earlier else max(following)
        slot = _Slot(trial_id=trial_id, stage=Stage.CONFIRM, index=index, settings=trial.settings)
        request = self._request(
            slot,
            self._constants(self._confirm_measure.now),
            steps=self.study.confirm.steps,
            seed_index=trial.seed_index,
        )
        return replace(request, candidate_id=trial.candidate_id, octave=trial.octave)

    # -- shared ------------------------------------------------------------------------------

    def _request(
        self, slot: _Slot, constants: TrialConstants, *, steps: int, seed_index: int = 0
    ) -> TrialRequest:
        seed = (
            derive_seed(self.study.seed, "confirm", seed_index)
            if slot.stage is Stage.CONFIRM
            else derive_seed(self.study.seed, "search")
        )
        config = self.space.trial_config(
            slot.settings, seed=seed, steps=steps, device=self._device
        )
        return TrialRequest(
            trial_id=slot.trial_id,
            stage=slot.stage,
            index=slot.index,
            config_id=self.space.config_id(slot.settings),
            seed_index=seed_index,
            settings=slot.settings,
            config=config,
            constants=constants,
            attempt=self._history.num_attempts(slot.trial_id) + 1,
        )

    def _constants(self, measure: Yardstick) -> TrialConstants:
        return TrialConstants(
            e0=measure.e0, delta=measure.delta, probe_steps=probe_steps(measure.horizon)
        )

    def _measure(self, row: TrialRow) -> None:
        """Take a row into the yardsticks; those of confirm are given it as confirm began."""
        self._reported.add(row)
        if row.stage is not Stage.CONFIRM:
            self._search_measure.add(row)
            self._confirm_measure.add(row)

    # -- telling the sampler -----------------------------------------------------------------

    def _tell(self, row: TrialRow, before: Yardstick) -> TrialRow:
        """Tell the sampler of one more search trial, and of all again where E* has moved."""
        if self._history.final(row.trial_id) is None:
            return row
        heard, now = self._told(row), self._search_measure.now
        self._sampler.tell(row.index, heard)
        if self._sampler.learns and (now.e0, now.e_star) != (before.e0, before.e_star):
            self._tell_everything()
        if heard is None:
            return row
        return replace(
            row,
            told_value=heard.value,
            told_constraint=heard.constraint,
            told_e_star=now.e_star,
        )

    def _tell_everything(self) -> None:
        self._sampler.rebuild(
            (
                row.index,
                varying_values(self.space, row.settings),
                self._told(row) if self._sampler.learns else None,
            )
            for row in self.rows
            if row.stage is Stage.SEARCH and self._history.final(row.trial_id) is row
        )

    def _told(self, row: TrialRow) -> Told | None:
        score = score_trial(row, self._search_measure.now)
        q = None if score is None else score.q
        return told(row.summary, q, bad_rate=self.study.kill_rule.bad_rate)


def planned_work(space: Space) -> tuple[int, int]:
    """Return the most trials and optimizer steps that a study may take, roughly."""
    study, cost = space.study, describe_cost(space)
    pilot = len(space.pilot_learning_rates())
    search = study.search.trials if space.has_space else 0
    trials = pilot + search + cost.max_trials
    steps = (
        pilot * max(study.trial_steps, study.confirm.steps)
        + search * study.trial_steps
        + cost.max_trials * cost.steps
    )
    return trials, steps
