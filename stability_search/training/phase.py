"""One phase: a stretch of training with one set of settings.

run():
    repeat until the planned steps are taken:
        heed a signal; draw a window; take a guarded step
        judge it: kill rule, loss stop, alarms; say what is worth a line
        at an epoch's end read the probe, compare with the expected course
        write a checkpoint where one is due
    say how it ended: done, stopped, or calm enough for the next phase
"""

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import torch

from stability_search.alarms.epochs import EpochSummary
from stability_search.alarms.watch import AlarmWatch
from stability_search.assembly import build_engine
from stability_search.course import CourseRow, stand_on_course
from stability_search.engine.batches import move
from stability_search.errors import UsageError
from stability_search.interruption import Signals
from stability_search.probe import read_metrics, read_probe
from stability_search.records.step import StepRecord
from stability_search.records.trial import Outcome
from stability_search.settings.alarms import OnAlarm
from stability_search.settings.trial import TrialConfig
from stability_search.tally import mean_or_none
from stability_search.tasks.base import Task
from stability_search.training import checkpoint
from stability_search.training.first_steps import first_steps_line
from stability_search.training.history import NUM_FIRST_STEPS, EpochPoint, History
from stability_search.training.journal import Journal
from stability_search.training.layout import TrainDirectory
from stability_search.training.standstill import Standstill, standstill
from stability_search.training.stops import Stops
from stability_search.training.stream import DataStream
from stability_search.training.wording import point_line, probe_warning, scale_line, step_line

CHECKPOINT_S = 600.0  # at most so long is lost to a killed process
_MIN_CHECKPOINT_FRAC = 0.01  # short epochs share a checkpoint

Clock = Callable[[], float]


@dataclass(frozen=True, kw_only=True, slots=True)
class PhasePlan:
    """What a phase is asked to do.

    Attributes:
        number: From 1.
        config: Task, settings, planned steps, alarms (with `epoch_steps`), device.
        stream_seed: Seed of its data.
        horizon: T, after which the kill rule starts a fresh test.
        course: The expected course; empty for none.
        num_calm_epochs: Epochs in a row without an alarm after which the next phase begins; None
            where none waits.
    """

    number: int
    config: TrialConfig
    stream_seed: int
    horizon: int
    course: tuple[CourseRow, ...] = ()
    num_calm_epochs: int | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class PhaseEnd:
    """How a phase ended.

    Attributes:
        outcome: `completed`, or the rule that stopped it; None for an alarm or the next phase.
        reason: Why, as a short phrase.
        is_calm: True where the next phase begins.
    """

    outcome: Outcome | Standstill | None
    reason: str = ""
    is_calm: bool = False


class PhaseRun(contextlib.AbstractContextManager["PhaseRun"]):
    """One phase in one process; closes its engine.

    Args:
        plan: What to do.
        task: What is trained.
        directory: Where checkpoints go.
        signals: Heeded between steps.
        clock: Seconds of a clock that does not run backwards.
        stream: The data of the phase before, where it goes on; None draws afresh.

    Raises:
        UsageError: Model or device cannot honour a setting.
    """

    def __init__(  # noqa: PLR0913 - what a process has but once
        self,
        plan: PhasePlan,
        task: Task,
        directory: TrainDirectory,
        *,
        signals: Signals,
        clock: Clock,
        stream: DataStream | None = None,
    ) -> None:
        config = plan.config
        self.plan, self.task = plan, task
        self._directory, self._signals, self._clock = directory, signals, clock
        self._device = torch.device(config.device)
        self._probe = [move(batch, self._device) for batch in task.probe()]
        self.engine = build_engine(task, config.engine, seed=config.seed, device=self._device)
        self.stream = stream or DataStream(
            task, batch_size=config.batch_size, seed=plan.stream_seed, device=self._device
        )
        self.watch = AlarmWatch(config.alarms, num_planned_steps=config.num_planned_steps)
        self.history = History()
        self.stops = Stops(config.kill_rule, plan.horizon, start_probe=None)
        self._num_notes = 0
        self._saved_step, self._saved_at = -1, clock()

    def __enter__(self) -> Self:
        """Use the phase in a `with` block, which closes it."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close the engine."""
        self.engine.close()

    # -- beginning ---------------------------------------------------------------------------

    def begin(self) -> None:
        """Begin with the untrained model: read the probe and write the first checkpoint."""
        start = mean_or_none(read_probe(self.engine, self.task, self._probe))
        self.history.start_probe = start
        config = self.plan.config
        self.stops = Stops(config.kill_rule, self.plan.horizon, start_probe=start)
        self.save(start)

    def restore(self, saved: Mapping[str, Any], *, is_new_phase: bool, num_tests: int = 0) -> bool:
        """Go on from a checkpoint, bit for bit where nothing changed.

        Args:
            saved: What `checkpoint.load` returned.
            is_new_phase: True where settings changed.
            num_tests: Tests of the kill rule that the training has begun so far.

        Returns:
            False if the task did not draw the same data again.

        Raises:
            UsageError: The checkpoint does not go together with the settings.
            Interrupted: A signal arrived while data was drawn.
        """
        is_same_data = True
        if saved["stream"]["seed"] == self.plan.stream_seed:
            is_same_data = self.stream.put_back(saved["stream"], self._signals.check)
        try:
            self.engine.load_state_dict(saved["engine"])
        except ValueError as error:
            raise UsageError(
                f"{self._directory.path}: the checkpoint does not fit these settings: {error}",
                hint="Start anew with `stability-search train --space`.",
            ) from error
        checkpoint.set_random_states(saved["random"])
        self.watch.load_state_dict(saved["watch"])
        self.stops.load_state_dict(
            saved["stops"], with_fresh_test=is_new_phase, num_tests=num_tests
        )
        self.history = History.from_state(saved["history"])
        if is_new_phase:
            self.history.num_idle_steps = 0
        self._saved_step = self.engine.num_steps
        return is_same_data

    # -- training ----------------------------------------------------------------------------

    def run(self, journal: Journal) -> PhaseEnd:
        """Train until the phase ends.

        Raises:
            Interrupted: A signal arrived; there is a checkpoint of the last step.
            StoppedEarlyError: A file could not be written.
            Exception: Whatever the task raises.
        """
        self._say_notes(journal)
        while self.engine.num_steps < self.plan.config.num_planned_steps:
            self._heed_signals(journal)
            end = self._step(journal)
            if end is not None:
                journal.write_steps()
                journal.write_curves(self.history, at_once=True)
                return end
        self._finish(journal)
        return PhaseEnd(outcome=Outcome.COMPLETED)

    def _heed_signals(self, journal: Journal) -> None:
        if self._signals.received is not None:  # no picture now: there are 2 s
            journal.write_steps()
            if self._saved_step < self.engine.num_steps:
                self.save(None)
            self._signals.check()

    def _step(self, journal: Journal) -> PhaseEnd | None:
        window = self.stream.window(self.plan.config.accumulation_steps)
        record = self.engine.step(window, self.task.loss)
        num_tests = self.stops.num_tests
        stopped = self.stops.see(record)
        if self.stops.num_tests > num_tests:
            journal.count_tests(self.stops.num_tests)
        record = replace(record, evidence=self.stops.evidence)
        self.history.add_step(record)
        journal.add_step(record)
        self._say_step(journal, record)
        for alarm in self.watch.see(record):
            self.history.num_alarms_in_epoch += 1
            journal.say(alarm.message)
        if record.step == NUM_FIRST_STEPS:
            journal.say(first_steps_line(self.history))
        ended = self.engine.ended or stopped or standstill(self.history)
        if ended is not None:
            return PhaseEnd(outcome=ended[0], reason=ended[1])
        return self._go_past(journal, record)

    def _go_past(self, journal: Journal, record: StepRecord) -> PhaseEnd | None:
        """End an epoch where one ended, act on its alarms, write a checkpoint where it is due."""
        summary, must_end = self.watch.finished_epoch, self.watch.must_end
        probe = None if summary is None else self._end_epoch(journal, summary, record)
        if must_end is OnAlarm.END_RUN:
            return PhaseEnd(outcome=None, reason="an alarm ended the run")
        if must_end is OnAlarm.END_EPOCH and summary is not None:
            self._leave_out_rest(journal, summary)
        wanted = self.plan.num_calm_epochs
        if summary is not None and wanted is not None and self._is_calm(wanted):
            self._save_all(journal, probe)
            return PhaseEnd(outcome=None, is_calm=True)
        if self._is_due(is_epoch_end=summary is not None):
            self._save_all(journal, probe)
        return None

    def _is_calm(self, wanted: int) -> bool:
        return self.history.num_calm_epochs >= wanted

    def _finish(self, journal: Journal) -> None:
        """End the last epoch early where the steps do not fill it; write the last checkpoint."""
        epochs = self.history.epochs
        for alarm in self.watch.end_epoch():
            journal.say(alarm.message)
        summary = self.watch.finished_epoch
        if summary is not None and (not epochs or summary.epoch > epochs[-1].epoch):
            self._end_epoch(journal, summary, None)
        if self._saved_step < self.engine.num_steps:
            self._save_all(journal, epochs[-1].probe_loss)
        journal.write_curves(self.history, at_once=True)

    def _leave_out_rest(self, journal: Journal, summary: EpochSummary) -> None:
        rest = max(0, self.watch.epoch_steps - summary.num_steps)
        self.stream.skip(rest * self.plan.config.accumulation_steps)
        journal.say(
            f"CRITICAL epoch {summary.epoch} ended after {summary.num_steps} steps "
            f"(alarms.on_alarm: end_epoch): the data of {rest} steps is left out"
        )

    # -- epochs ------------------------------------------------------------------------------

    def _end_epoch(
        self, journal: Journal, summary: EpochSummary, record: StepRecord | None
    ) -> float | None:
        """Read the probe, and say where the training is; returns the mean probe loss."""
        point = EpochPoint(
            epoch=summary.epoch,
            phase=self.plan.number,
            step=self.engine.num_steps,
            num_steps=summary.num_steps,
            num_skipped=summary.num_skipped,
            loss=summary.loss,
            grad_norm=summary.grad_norm,
            probe_loss=mean_or_none(read_probe(self.engine, self.task, self._probe)),
            metrics=read_metrics(self.engine, self.task, self._probe),
            learning_rate=self._rate() if record is None else record.learning_rate,
            scale=self.engine.scale,
        )
        self.history.add_epoch(point)
        journal.add_epoch(point)
        journal.say(point_line(summary, point))
        if point.probe_loss is None:
            journal.say(probe_warning(point))
        if self.plan.course:
            standing = stand_on_course(self.plan.course, epoch=point.epoch, values=point.values)
            journal.say(f"epoch {point.epoch}: expected course: {standing}")
        return point.probe_loss

    def _rate(self) -> float:
        return float(self.engine.optimizer.param_groups[0]["lr"])

    def _say_step(self, journal: Journal, record: StepRecord) -> None:
        for line in (step_line(record), scale_line(record, self.engine.scale)):
            if line is not None:
                journal.say(line)
        self._say_notes(journal)

    def _say_notes(self, journal: Journal) -> None:
        notes: Sequence[str] = self.engine.notes
        for note in notes[self._num_notes :]:
            journal.say(note)
        self._num_notes = len(notes)

    # -- checkpoints -------------------------------------------------------------------------

    def _is_due(self, *, is_epoch_end: bool) -> bool:
        num_new = self.engine.num_steps - self._saved_step
        least = max(1.0, _MIN_CHECKPOINT_FRAC * self.plan.config.num_planned_steps)
        if is_epoch_end and num_new >= least:
            return True
        return self._clock() - self._saved_at >= CHECKPOINT_S

    def _save_all(self, journal: Journal, probe: float | None) -> None:
        """Write step records, checkpoint and curves, in this order."""
        journal.write_steps()
        self.save(probe)
        journal.write_curves(self.history)

    def save(self, probe: float | None, *, keeps_others: bool = False) -> None:
        """Write a checkpoint.

        Args:
            probe: Mean probe loss now; None where not finite or not read.
            keeps_others: True removes no earlier one.

        Raises:
            StoppedEarlyError: It could not be written.
        """
        content = {
            "engine": self.engine.state_dict(),
            "random": checkpoint.random_states(),
            "stream": self.stream.state_dict(),
            "watch": self.watch.state_dict(),
            "stops": self.stops.state_dict(),
            "history": self.history.state_dict(),
        }
        step = self.engine.num_steps
        checkpoint.save(
            self._directory.checkpoints,
            content,
            phase=self.plan.number,
            step=step,
            probe=probe,
            keeps_others=keeps_others,
        )
        self._saved_step, self._saved_at = step, self._clock()
