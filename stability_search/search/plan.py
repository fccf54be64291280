"""Which trial of a study comes next: pilot, then search, then confirm.

The plan knows neither Ray nor files. It is built from the rows of the ledger, so that a resumed
study goes on exactly where it was, and is told of every trial that ends.
"""

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Literal

from stability_search.errors import (
    InfrastructureError,
    StoppedEarlyError,
    UsageError,
    UserCodeError,
)
from stability_search.records import (
    Json,
    Outcome,
    Stage,
    TrialRow,
    TrialSummary,
    Verdict,
    VerdictKind,
)
from stability_search.search.budget import Budget, Clock
from stability_search.search.confirm import Confirmation, ConfirmTrial, Need, describe_cost
from stability_search.search.preflight import preflight_configs
from stability_search.search.request import MAX_ATTEMPTS, TrialRequest
from stability_search.search.sampler import Sampler, Told, told, varying_values
from stability_search.seeding import derive_seed
from stability_search.settings import SETTING_NAMES, TrialConstants
from stability_search.space import Space
from stability_search.standing import score_trial
from stability_search.yardstick import Yardstick, is_finite_run, probe_steps, yardstick

EARLY_TRIALS = 5  # so many that fail in the same way are the user's code, not bad luck
MIN_LOST_ATTEMPTS = 5
MAX_LOST_SHARE = 0.2
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
        num_slots: Trials at once; time budgets are estimated with it.
        rows: Trials that finished before, in the order of the ledger.
        clock: Seconds from a fixed start, for time budgets.
    """

    def __init__(
        self,
        space: Space,
        *,
        device: Literal["cpu", "cuda"],
        num_slots: int,
        rows: Iterable[TrialRow] = (),
        clock: Clock = time.monotonic,
    ) -> None:
        self.space = space
        self.study = space.study
        self.rows: list[TrialRow] = list(rows)
        self.verdict: Verdict | None = None
        self._device = device
        self._budget = Budget(self.study, num_slots=num_slots, clock=clock, rows=self.rows)
        self._in_flight: dict[str, TrialRequest] = {}
        self._confirmation = Confirmation(space)
        self._sampler = Sampler(space)
        self._measure = yardstick(self.rows, self.study.trial_steps)
        self._attempts: dict[str, int] = {}
        self._last: dict[str, Outcome] = {}
        self._num_resumed = len(self.rows)
        self._need: tuple[int, Need | Verdict] | None = None
        self._confirm_began: tuple[int, Yardstick] | None = None
        for row in self.rows:
            self._note(row)
        self._tell_everything()

    # -- what comes next ---------------------------------------------------------------------

    @property
    def stage(self) -> Stage:
        """The stage the next trial belongs to."""
        if not self._pilot_is_over():
            return Stage.PILOT
        return Stage.CONFIRM if self._search_is_over() else Stage.SEARCH

    def num_planned(self, stage: Stage) -> int | None:
        """Return how many trials a stage plans; None where that is not known ahead."""
        if stage is Stage.PILOT:
            return len(self.space.pilot_learning_rates())
        return self.study.search.trials if stage is Stage.SEARCH else None

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
        self, request: TrialRequest, summary: TrialSummary, *, started_at: str, node: str
    ) -> TrialRow:
        """Take in how a trial ended.

        Args:
            request: What `next_trial` returned.
            summary: How it ended.
            started_at: UTC, ISO 8601.
            node: Host that ran it.

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
        )
        self.rows.append(row)
        self._note(row)
        if request.stage is not Stage.CONFIRM:
            row = self._tell(row)
            self.rows[-1] = row
        return row

    def first_proposals(self, count: int) -> list[dict[str, Json]]:
        """Return the values of the first proposals of a fresh study, for a look ahead."""
        if not self.space.has_space:
            return [{}]
        return [self._sampler.propose(i) for i in range(min(count, self.study.search.trials))]

    def measure_of(self, row: TrialRow) -> Yardstick:
        """Return the yardstick that a trial of this row's stage is measured by, as of now."""
        if row.stage is Stage.CONFIRM:
            return self._confirm_measure()
        return self._measure

    def will_retry(self, row: TrialRow) -> bool:
        """Return True if the trial of a row is going to be attempted again."""
        return row.summary.outcome is Outcome.INFRASTRUCTURE and row.attempt < MAX_ATTEMPTS

    def refuse_settings(self, row: TrialRow) -> None:
        """Stop the study where the first trials show that it cannot be run at all.

        Raises:
            UsageError: The task cannot be built, or its model cannot honour a setting.
        """
        if row.summary.error_type != UsageError.__name__ or row.stage is not Stage.PILOT:
            return
        message = row.summary.reason.removeprefix("UsageError: ")
        is_setting = message.partition(":")[0] in SETTING_NAMES
        hint = "Where only some configurations can, give the setting a `when`."
        raise UsageError(message, hint=hint if is_setting else "")

    def refuse_to_go_on(self, row: TrialRow) -> None:
        """Stop the study where what failed is not a configuration.

        Raises:
            UserCodeError: The task failed in the same way in every early trial.
            InfrastructureError: Too many attempts were lost.
        """
        summary = row.summary
        if not any(row.summary.outcome.is_result for row in self.rows):
            self._refuse_identical_errors(summary)
        new = self.rows[self._num_resumed :]
        num_lost = sum(row.summary.outcome is Outcome.INFRASTRUCTURE for row in new)
        is_lost = summary.outcome is Outcome.INFRASTRUCTURE
        if is_lost and num_lost > max(MIN_LOST_ATTEMPTS, MAX_LOST_SHARE * len(new)):
            raise InfrastructureError(
                f"{num_lost} of {len(new)} attempts lost their worker (last: {summary.reason}).",
                hint="Look into the run's log; `stability-search doctor` checks the machine.",
            )

    def _refuse_identical_errors(self, last: TrialSummary) -> None:
        errors = [r for r in self.rows if r.summary.outcome is Outcome.USER_ERROR]
        kinds = {(r.summary.error_type, r.summary.error_place) for r in errors[-EARLY_TRIALS:]}
        if len(errors) >= EARLY_TRIALS and len(kinds) == 1:
            raise UserCodeError(
                f"the first {len(errors)} trials all failed with {last.error_type} at "
                f"{last.error_place}.\n{last.error_text.rstrip()}",
                hint="\nMend the task; configurations have nothing to do with it.",
            )

    # -- pilot -------------------------------------------------------------------------------

    def _pilot_slots(self) -> list[_Slot]:
        slots = self._pilot_sweep(0, with_stabilisers=False)
        finished = [self._final_row(slot.trial_id) for slot in slots]
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
        return all(self._is_final(slot.trial_id) for slot in self._pilot_slots())

    def _next_pilot(self) -> TrialRequest | None:
        for slot in self._pilot_slots():
            if not self._is_final(slot.trial_id) and slot.trial_id not in self._in_flight:
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
        lost = [
            row.index
            for row in self.rows
            if row.stage is Stage.SEARCH and not self._is_final(row.trial_id)
        ]
        taken = {r.index for r in self._in_flight.values() if r.stage is Stage.SEARCH}
        again = [index for index in lost if index not in taken]
        if again:
            return min(again)
        running = sum(r.config.num_planned_steps for r in self._in_flight.values())
        if self._budget.is_half_spent(self.rows, num_planned_steps=running):
            return None
        taken |= {row.index for row in self.rows if row.stage is Stage.SEARCH}
        free = next(i for i in range(len(taken) + 1) if i not in taken)
        return free if free < self.study.search.trials else None

    def _next_search(self) -> TrialRequest | None:
        index = self._next_index()
        if index is None:
            return None
        trial_id = f"search-{index:04d}"
        earlier = self._last_row(trial_id)
        settings = (
            self.space.settings(self._sampler.propose(index))
            if earlier is None
            else earlier.settings
        )
        slot = _Slot(trial_id=trial_id, stage=Stage.SEARCH, index=index, settings=settings)
        return self._request(slot, self._constants(self._measure), steps=self.study.trial_steps)

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
        if not self.space.has_space or any(row.stage is Stage.SEARCH for row in self.rows):
            return None
        return Verdict(
            kind=VerdictKind.INCOMPLETE,
            exit_code=StoppedEarlyError.exit_code,
            reason="Half of the budget went to the pilot, so no search trial was started.",
        )

    def _needed(self) -> Need | Verdict:
        if self._need is None or self._need[0] != len(self.rows):
            need = self._confirmation.next_need(
                self.rows, can_afford=lambda count: self._budget.can_afford(count, self.rows)
            )
            self._need = (len(self.rows), need)
        return self._need[1]

    def _confirm_request(self, trial_id: str, trial: ConfirmTrial) -> TrialRequest:
        measure = self._confirm_measure()
        earlier = self._last_row(trial_id)
        taken = {row.index for row in self.rows if row.stage is Stage.CONFIRM}
        taken |= {r.index for r in self._in_flight.values() if r.stage is Stage.CONFIRM}
        index = earlier.index if earlier else max(taken, default=-1) + 1
        slot = _Slot(trial_id=trial_id, stage=Stage.CONFIRM, index=index, settings=trial.settings)
        request = self._request(
            slot,
            self._constants(measure),
            steps=self.study.confirm.steps,
            seed_index=trial.seed_index,
        )
        return replace(request, candidate_id=trial.candidate_id, octave=trial.octave)

    def _confirm_measure(self) -> Yardstick:
        """Return E_0 and Delta as they stood when confirm began."""
        before = [row for row in self.rows if row.stage is not Stage.CONFIRM]
        if self._confirm_began is None or self._confirm_began[0] != len(before):
            self._confirm_began = (len(before), yardstick(before, self.study.confirm.steps))
        return self._confirm_began[1]

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
            attempt=self._attempts.get(slot.trial_id, 0) + 1,
        )

    def _constants(self, measure: Yardstick) -> TrialConstants:
        return TrialConstants(
            e0=measure.e0, delta=measure.delta, probe_steps=probe_steps(measure.horizon)
        )

    def _note(self, row: TrialRow) -> None:
        self._attempts[row.trial_id] = row.attempt
        self._last[row.trial_id] = row.summary.outcome

    def _is_final(self, trial_id: str) -> bool:
        outcome = self._last.get(trial_id)
        if outcome is None:
            return False
        return outcome is not Outcome.INFRASTRUCTURE or self._attempts[trial_id] >= MAX_ATTEMPTS

    def _last_row(self, trial_id: str) -> TrialRow | None:
        return next((row for row in reversed(self.rows) if row.trial_id == trial_id), None)

    def _final_row(self, trial_id: str) -> TrialRow | None:
        return self._last_row(trial_id) if self._is_final(trial_id) else None

    # -- telling the sampler -----------------------------------------------------------------

    def _tell(self, row: TrialRow) -> TrialRow:
        """Tell the sampler of one more trial, or of all again where E* has moved."""
        measure = yardstick(self.rows, self.study.trial_steps)
        has_moved = (measure.e0, measure.e_star) != (self._measure.e0, self._measure.e_star)
        self._measure = measure
        if has_moved or row.attempt > 1:  # the sampler may not know a proposal tried again
            self._tell_everything()
        if row.stage is not Stage.SEARCH or not self._is_final(row.trial_id):
            return row
        heard = self._told(row)
        if not has_moved and row.attempt == 1:
            self._sampler.tell(row.index, heard)
        if heard is None:
            return row
        return replace(
            row,
            told_value=heard.value,
            told_constraint=heard.constraint,
            told_e_star=measure.e_star,
        )

    def _tell_everything(self) -> None:
        self._sampler.rebuild(
            (row.index, varying_values(self.space, row.settings), self._told(row))
            for row in self.rows
            if row.stage is Stage.SEARCH and self._is_final(row.trial_id)
        )

    def _told(self, row: TrialRow) -> Told | None:
        score = score_trial(row, self._measure)
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
