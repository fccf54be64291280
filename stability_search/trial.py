"""One trial: a short training run of one configuration with one seed.

run_trial(config):
    build task, model and engine from the seed; read the probe (step 0)
    repeat T times:
        fetch a window of micro-batches; step = engine.step(window)
        feed the step to the kill rule and to the loss stop; yield it as Progress
        read the probe where the study asked for it
        end where a rule, the engine or the clock says so
    where `prune.control` lets a killed trial run on: note how it would have ended, apart
    return a TrialSummary

A diverged trial is a result. Only what says nothing about stability (an error in the user's
code) is told apart, with its traceback as text.
"""

import time
import traceback
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch

from stability_search.alarms.watch import AlarmWatch
from stability_search.assembly import build_engine, initial_model, training_stream
from stability_search.blind import run_blind
from stability_search.engine import GuardedEngine
from stability_search.engine.batches import move
from stability_search.engine.half_weights import keep_no_half_precision
from stability_search.engine.losses import LossFn, is_out_of_memory
from stability_search.errors import UsageError
from stability_search.probe import probe_loss, read_metrics, read_probe
from stability_search.pruning import KillTest, LossStop
from stability_search.records.step import StepLabel, StepRecord
from stability_search.records.trial import ControlEnd, Outcome, TrialSummary
from stability_search.records.values import finite_or_none
from stability_search.seeding import SEED_BITS, derive_seed
from stability_search.settings.alarms import OnAlarm
from stability_search.settings.trial import (
    TRIAL_SETTING_NAMES,
    TrialConfig,
    TrialConstants,
    config_id,
)
from stability_search.tally import Tally, control_end, mean_or_none, summarise
from stability_search.tasks.base import (
    HasBaseline,
    HasProbeLoss,
    Task,
)
from stability_search.tasks.loading import load_task

Clock = Callable[[], float]
_MIB = 2**20
# What CUDA says of a broken card or driver, as opposed to a broken program.
_HARDWARE_ERRORS = (
    "uncorrectable ECC",
    "CUDA error: unspecified launch failure",
    "CUDA error: hardware",
    "CUDA error: the launch timed out",
    "CUDA error: unknown error",
    "GPU is lost",
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Progress:
    """One attempted step, judged.

    Attributes:
        record: The step, with the evidence of the kill rule after it.
        num_planned_steps: The trial's horizon T.
        num_bad_steps: `bad` steps so far.
        is_control: True after the kill of a trial that was let run on: the step is no part of the
            trial, and its record is not kept.
    """

    record: StepRecord
    num_planned_steps: int
    num_bad_steps: int
    is_control: bool = False


class Faults(Protocol):
    """Where a test can plant a fault; see `stability_search.testing.plant`."""

    def before_step(
        self, step: int, engine: GuardedEngine, window: list[Any], loss_fn: LossFn
    ) -> tuple[list[Any], LossFn]:
        """Return window and loss function to train on at attempted step `step`, from 1."""
        ...


class NoFaults:
    """Let every step be as it is."""

    def before_step(
        self,
        step: int,  # noqa: ARG002 - the protocol's
        engine: GuardedEngine,  # noqa: ARG002 - the protocol's
        window: list[Any],
        loss_fn: LossFn,
    ) -> tuple[list[Any], LossFn]:
        """Return window and loss function unchanged."""
        return window, loss_fn


def run_trial(
    config: TrialConfig,
    *,
    constants: TrialConstants,
    clock: Clock = time.perf_counter,
    faults: Faults | None = None,
    preflight: Sequence[TrialConfig] = (),
) -> Generator[Progress, None, TrialSummary]:
    """Train one configuration for its horizon, or until it is stopped.

    Args:
        config: The configuration, its seed and its limits.
        constants: What the study fixes for trials of this horizon.
        clock: Seconds from a fixed start; decides `timed_out`.
        faults: Where a test plants faults; None for a real trial.
        preflight: Configurations tried for one step first; if the model cannot honour one, the
            trial ends as `user_error` with the error type `UsageError`.

    Yields:
        Every attempted step, judged.

    Returns:
        How the trial ended. Never raises on a numerical failure or on an error of the task.
    """
    started = clock()
    tally = Tally()
    try:
        for planned in preflight:
            check_settings(planned)
        started = clock()  # trying settings is the study's work, not this trial's
        trial = _Trial(
            config, constants, tally, clock=clock, started=started, faults=faults or NoFaults()
        )
        with trial.engine:
            outcome, reason = yield from trial.run()
            trial.close(outcome)
            if trial.is_let_run_on:
                killed = _summary(tally, config, outcome, reason, wall_s=0.0)
                control = yield from trial.run_on()
                wall_s = clock() - started
                return replace(killed, control=control, train_s=tally.train_s, wall_s=wall_s)
        error = ("", "", "")
    except (Exception, SystemExit) as caught:  # noqa: BLE001 - the boundary: every end gets a name
        outcome, reason = _outcome_of(caught), _first_line(caught)
        error = (type(caught).__name__, _place(caught), _traceback_text(caught))
        if outcome is Outcome.OUT_OF_MEMORY:
            error = ("", "", "")
    return _summary(tally, config, outcome, reason, error=error, wall_s=clock() - started)


def _summary(  # noqa: PLR0913 - the parts of a summary
    tally: Tally,
    config: TrialConfig,
    outcome: Outcome,
    reason: str,
    *,
    error: tuple[str, str, str] = ("", "", ""),
    wall_s: float,
) -> TrialSummary:
    return summarise(
        tally,
        config,
        outcome=outcome,
        reason=reason,
        error=error,
        wall_s=wall_s,
        device=_device_name(config.device),
    )


def is_drawn_for_control(config: TrialConfig, share: float) -> bool:
    """Say whether a trial is let run on if the kill rule kills it.

    Args:
        config: Its seed and its settings decide, so that a rerun agrees.
        share: Of all configurations, in [0, 1].
    """
    settings = {
        **asdict(config.engine),
        **{name: getattr(config, name) for name in TRIAL_SETTING_NAMES},
        "task_args": dict(config.task_args),
    }
    draw = derive_seed(config.seed, "control", config_id(settings))
    return draw < share * 2.0**SEED_BITS


def check_settings(config: TrialConfig) -> None:
    """Take one step under a configuration, to see that its model can honour every setting.

    Any other failure is for the configuration's own trial to show.

    Raises:
        UsageError: It cannot.
    """
    try:
        trial = _Trial(
            config,
            TrialConstants(probe_steps=(0,)),
            Tally(),
            clock=time.perf_counter,
            started=time.perf_counter(),
            faults=NoFaults(),
        )
        with trial.engine:
            next(trial.run())
    except UsageError:
        raise
    except Exception:  # noqa: BLE001 - as the docstring says
        return


class _Trial:
    """The parts of one running trial.

    Attributes:
        is_control: True while the trial runs on after its kill.
    """

    def __init__(  # noqa: PLR0913 - the arguments of run_trial and what they became
        self,
        config: TrialConfig,
        constants: TrialConstants,
        tally: Tally,
        *,
        clock: Clock,
        started: float,
        faults: Faults,
    ) -> None:
        self.config = config
        self.constants = constants
        self.tally = tally
        self.clock = clock
        self.started = started
        self.faults = faults
        self.device = torch.device(config.device)
        self.task: Task = load_task(config.task, config.task_args)
        tally.has_probe_loss = isinstance(self.task, HasProbeLoss)
        self.probe = [move(batch, self.device) for batch in self.task.probe()]
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        if constants.measures_blind_run:
            began = clock()
            self._measure_blind_run()
            self.started += clock() - began  # the study's work, not this trial's
        self.engine = self._build_engine()
        self.kill_test = KillTest(config.kill_rule, config.num_planned_steps)
        # A second rule that ends trials would void the guarantee of the first.
        warning_only = replace(config.alarms, on_alarm=OnAlarm.WARN)
        self.watch = AlarmWatch(warning_only, num_planned_steps=config.num_planned_steps)
        self.loss_stop: LossStop | None = None
        self.stream: Iterator[Any] = iter(())
        self.last: StepRecord | None = None
        self.is_control = False

    # -- building ----------------------------------------------------------------------------

    def _build_engine(self) -> GuardedEngine:
        config = self.config
        engine = build_engine(self.task, config.engine, seed=config.seed, device=self.device)
        self.tally.note(engine.notes)
        return engine

    def _measure_blind_run(self) -> None:
        if isinstance(self.task, HasBaseline):
            self.tally.baseline = finite_or_none(float(self.task.baseline()))
            return
        model = initial_model(self.task, seed=self.config.seed, device=self.device)
        blind = run_blind(
            keep_no_half_precision(model),
            self.probe,
            lambda model, batch: probe_loss(self.task, model, batch),
        )
        self.tally.has_measured_blind_run = True
        self.tally.blind_loss = blind.loss
        self.tally.blind_batch_losses = blind.batch_losses

    # -- training ----------------------------------------------------------------------------

    def run(self) -> Generator[Progress, None, tuple[Outcome, str]]:
        """Train until the trial ends."""
        self.stream = training_stream(
            self.task, batch_size=self.config.batch_size, seed=self.config.seed, device=self.device
        )
        self._read_probe(0)
        return (yield from self._train_from(1))

    @property
    def is_let_run_on(self) -> bool:
        """True after a kill of the kill rule, in a trial drawn for the control."""
        is_kill = self.kill_test.has_killed and self.engine.ended is None
        return is_kill and is_drawn_for_control(self.config, self.constants.control)

    def run_on(self) -> Generator[Progress, None, ControlEnd]:
        """Train on after the kill as if it had not come; never raises on an error of the task."""
        self.is_control = True
        try:
            outcome, reason = yield from self._go_on()
        except (Exception, SystemExit) as caught:  # noqa: BLE001 - the trial has ended before
            outcome, reason = _outcome_of(caught), _first_line(caught)
        return control_end(self.tally, outcome=outcome, reason=reason)

    def _go_on(self) -> Generator[Progress, None, tuple[Outcome, str]]:
        killed_at = self.last
        assert killed_at is not None  # noqa: S101 - it was killed at a step
        end = self._go_past(killed_at)
        return end or (yield from self._train_from(killed_at.step + 1))

    def _train_from(self, first: int) -> Generator[Progress, None, tuple[Outcome, str]]:
        config = self.config
        for step in range(first, config.num_planned_steps + 1):
            fetched = self.clock()
            window = [next(self.stream) for _ in range(config.accumulation_steps)]
            record = self.engine.step(
                *self.faults.before_step(step, self.engine, window, self.task.loss)
            )
            self.tally.train_s += self.clock() - fetched
            is_killed = self._is_kill(record.label)
            record = replace(record, evidence=self.kill_test.evidence)
            self.last = record
            self.tally.add(record)
            self.tally.evidence = self.kill_test.evidence
            self.tally.note(self.engine.notes)
            self.tally.count(self.watch.see(record))  # no alarm ends a trial
            yield Progress(
                record=record,
                num_planned_steps=config.num_planned_steps,
                num_bad_steps=self.tally.labels[StepLabel.BAD],
                is_control=self.is_control,
            )
            end = self.engine.ended or (self._kill(step) if is_killed else self._go_past(record))
            if end is not None:
                return end
        return Outcome.COMPLETED, ""

    def _is_kill(self, label: StepLabel) -> bool:
        if not label.is_judged or self.kill_test.has_killed:  # killed: it runs on as a control
            return False
        return self.kill_test.update(is_bad=label is StepLabel.BAD)

    def _kill(self, step: int) -> tuple[Outcome, str]:
        num_bad = self.tally.labels[StepLabel.BAD]
        limit = 1 / self.config.kill_rule.false_kill
        evidence = f"evidence {self.kill_test.evidence:.4g} >= {limit:g}"
        return Outcome.PRUNED, f"{num_bad} bad steps of {step}: {evidence}"

    def _go_past(self, record: StepRecord) -> tuple[Outcome, str] | None:
        """Return how a trial ends that the kill rule left alone; else read the probe if due."""
        if self._has_diverged(record):
            return Outcome.DIVERGED, "the loss stays far above where it began"
        is_late = self.clock() - self.started >= self.config.timeout_s
        if is_late and record.step < self.config.num_planned_steps:
            return Outcome.TIMED_OUT, f"over {self.config.timeout_s:g} s at step {record.step}"
        if record.step in self.constants.probe_steps:
            self._read_probe(record.step)
        return None

    def _has_diverged(self, record: StepRecord) -> bool:
        if self.constants.delta is None:
            return False
        if self.loss_stop is None:
            known = (self.constants.e0, self._mean_probe(0), record.loss)
            finite = [value for value in known if value is not None]
            if not finite:
                return False
            self.loss_stop = LossStop(max(finite), self.constants.delta)
        return self.loss_stop.update(record.step, record.loss)

    # -- the probe ---------------------------------------------------------------------------

    def _read_probe(self, step: int) -> None:
        self.tally.probe_steps.append(step)
        self.tally.probe_batch_losses.append(read_probe(self.engine, self.task, self.probe))
        if step == 0:
            self.tally.metrics_first = read_metrics(self.engine, self.task, self.probe)
        self._note_memory()

    def _mean_probe(self, position: int) -> float | None:
        return mean_or_none(self.tally.probe_batch_losses[position])

    def _note_memory(self) -> None:
        if self.device.type == "cuda":
            used = torch.cuda.max_memory_allocated(self.device) / _MIB
        else:
            used = resident_memory_mib()
        self.tally.peak_memory_mib = max(self.tally.peak_memory_mib, used)

    def close(self, outcome: Outcome) -> None:
        """Measure what is measured last."""
        self.tally.are_parameters_finite = outcome is not Outcome.NONFINITE_PARAMETERS
        self._note_memory()
        if not self.tally.are_parameters_finite:
            return
        try:
            self.tally.metrics_last = read_metrics(self.engine, self.task, self.probe)
        except Exception as error:
            if outcome is Outcome.COMPLETED:
                raise
            # The configuration has been judged; what its broken model does to `metrics` is news.
            self.tally.warnings.append(f"metrics failed after the trial was stopped: {error}")


def resident_memory_mib() -> float:
    """Return the resident memory of this process in MiB; 0 where it cannot be read."""
    status = Path("/proc/self/statm")
    if not status.exists():
        return 0.0
    pages = int(status.read_text().split()[1])
    return pages * 4096 / _MIB


def _outcome_of(error: BaseException) -> Outcome:
    if is_out_of_memory(error):
        return Outcome.OUT_OF_MEMORY
    text = str(error)
    if isinstance(error, RuntimeError) and any(word in text for word in _HARDWARE_ERRORS):
        return Outcome.INFRASTRUCTURE
    return Outcome.USER_ERROR


def _first_line(error: BaseException) -> str:
    text = f"{type(error).__name__}: {error}".strip()
    return text.splitlines()[0][:500]


def _place(error: BaseException) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    return f"{frames[-1].filename}:{frames[-1].lineno}" if frames else ""


def _traceback_text(error: BaseException) -> str:
    return "".join(traceback.format_exception(error))[-8000:]


def _device_name(device: str) -> str:
    return torch.cuda.get_device_name() if device == "cuda" else "cpu"
