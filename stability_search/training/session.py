"""Phases, one after the other, in one process and one directory, to a verdict."""

import contextlib
import traceback
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

from stability_search import space as spaces
from stability_search.engine.losses import is_out_of_memory
from stability_search.errors import (
    StabilitySearchError,
    StoppedEarlyError,
    UsageError,
    UserCodeError,
)
from stability_search.files import write_whole
from stability_search.interruption import Interrupted, Signals
from stability_search.records.trial import Outcome
from stability_search.seeding import derive_seed
from stability_search.settings.trial import TrialConfig
from stability_search.space import Space
from stability_search.tasks.loading import load_task
from stability_search.training import checkpoint, plans, verdict
from stability_search.training.changes import allowed_changes
from stability_search.training.checkpoint import Checkpoint
from stability_search.training.history import History
from stability_search.training.journal import Journal, Log
from stability_search.training.layout import TrainDirectory
from stability_search.training.phase import Clock, PhaseEnd, PhasePlan, PhaseRun
from stability_search.training.state import (
    Phase,
    TrainEnd,
    TrainState,
    sha256_of_text,
    write_state,
)
from stability_search.training.stream import DataStream


@dataclass(frozen=True, kw_only=True, slots=True)
class Start:
    """Where a process takes a training up.

    Attributes:
        checkpoint: The checkpoint; None for the untrained model.
        is_new_phase: True where settings changed, or where it goes back.
        waits_anew: True where calm epochs are counted from here.
    """

    checkpoint: Checkpoint | None = None
    is_new_phase: bool = False
    waits_anew: bool = False


class Session:
    """One process's part of a long training.

    Args:
        directory: The run, locked by the caller.
        state: What it is; its last phase is the one to train.
        log: Where lines go.
        signals: Heeded between steps.
        clock: Seconds of a clock that does not run backwards.
    """

    def __init__(
        self,
        directory: TrainDirectory,
        state: TrainState,
        *,
        log: Log,
        signals: Signals,
        clock: Clock,
    ) -> None:
        self._directory = directory
        self._space = reload(directory, state)
        self._state = state
        self._log = log
        self._signals = signals
        self._clock = clock
        self._num_steps = 0
        self._history = History()
        self._stream: DataStream | None = None

    def run(self, start: Start) -> TrainEnd:
        """Train to an end, whatever it is, and keep the verdict in `train.json`.

        Raises:
            UsageError: The checkpoint and the settings do not go together.
        """
        try:
            end = self._train(start)
        except Interrupted as error:
            end = verdict.interrupted(self._directory, error, num_steps=self._num_steps)
        except UsageError:
            raise
        except StabilitySearchError as error:
            end = verdict.failed(self._directory, error, num_steps=self._num_steps)
        except Exception as error:  # noqa: BLE001 - the boundary: every end gets a name
            end = self._broken(error)
        with contextlib.suppress(StoppedEarlyError):  # a full disk has been said
            self._log.write("\n".join(end.lines))
            write_state(self._directory, replace(self._state, end=end))
        return end

    def _broken(self, error: Exception) -> TrainEnd:
        if is_out_of_memory(error):
            return self._stopped(
                PhaseEnd(outcome=Outcome.OUT_OF_MEMORY, reason=_first_line(error))
            )
        with contextlib.suppress(StoppedEarlyError):
            self._log.write("".join(traceback.format_exception(error)).rstrip())
        said = UserCodeError(
            f"the task failed at step {self._num_steps + 1}: {_first_line(error)} "
            f"({_place(error)}).",
            hint=f"Traceback: {self._directory.log}.",
        )
        return verdict.failed(self._directory, said, num_steps=self._num_steps)

    # -- phases ------------------------------------------------------------------------------

    def _train(self, start: Start) -> TrainEnd:
        while True:
            end = self._phase(start)
            if end.is_calm:
                start = self._advance()
            elif end.outcome is Outcome.COMPLETED:
                return verdict.done(
                    self._directory,
                    self._history,
                    num_steps=self._num_steps,
                    study=self._space.study,
                    pending=self._state.pending,
                )
            else:
                return self._stopped(end)

    def _stopped(self, end: PhaseEnd) -> TrainEnd:
        return verdict.stopped(
            self._directory,
            self._history,
            num_steps=self._num_steps,
            phase=self._state.phase.number,
            outcome=end.outcome,
            reason=end.reason,
            config=self._config(),
        )

    def _config(self) -> TrialConfig:
        phase = self._state.phase
        return plans.config_of(
            self._space,
            num_steps=phase.num_planned_steps,
            epoch_steps=self._state.epoch_steps,
            device="cuda" if phase.device == "cuda" else "cpu",
        )

    def _phase(self, start: Start) -> PhaseEnd:
        config, pending = self._config(), self._state.pending
        plan = PhasePlan(
            number=self._state.phase.number,
            config=config,
            stream_seed=self._state.phase.stream_seed,
            horizon=min(self._space.study.confirm.steps, config.num_planned_steps),
            course=self._space.study.course,
            num_calm_epochs=None if pending is None else pending.num_calm_epochs,
        )
        task = load_task(config.task, config.task_args)
        stream, self._stream = self._stream, None
        with PhaseRun(
            plan,
            task,
            self._directory,
            signals=self._signals,
            clock=self._clock,
            stream=stream if stream is not None and stream.seed == plan.stream_seed else None,
        ) as run:
            try:
                self._take_up(run, start)
                self._count_tests(run)
                write_state(self._directory, self._state)
                return self._journalled(run)
            finally:
                self._count_tests(run)
                taken_up = 0 if start.checkpoint is None else start.checkpoint.step
                self._num_steps = max(run.engine.num_steps, taken_up)
                self._history = run.history
                self._stream = run.stream

    def _count_tests(self, run: PhaseRun) -> None:
        most = max(self._state.num_tests, run.stops.num_tests)
        self._state = replace(self._state, num_tests=most)

    def _journalled(self, run: PhaseRun) -> PhaseEnd:
        with Journal(
            self._directory,
            self._state,
            self._log,
            first_step=run.engine.num_steps + 1,
            clock=self._clock,
        ) as journal:
            return run.run(journal)

    def _take_up(self, run: PhaseRun, start: Start) -> None:
        if start.checkpoint is None:
            run.begin()
            return
        saved = checkpoint.load(start.checkpoint.path)
        num_drawn = saved["stream"]["num_drawn"]
        if num_drawn > run.stream.num_drawn:
            self._log.say(f"data: {num_drawn} micro-batches are drawn again, to go on behind them")
        if not run.restore(
            saved, is_new_phase=start.is_new_phase, num_tests=self._state.num_tests
        ):
            self._log.say(
                "WARNING data: drawn again it is not the same. Training goes on, but not bit for "
                "bit as if it had not been interrupted; does the task use its generator alone?"
            )
        if start.is_new_phase or start.waits_anew:
            run.history.num_calm_epochs = 0
            run.history.num_alarms_in_epoch = 0
            run.save(start.checkpoint.probe, keeps_others=True)  # `train.json` comes after it

    def _advance(self) -> Start:
        """Begin the phase that waited for calm, from the checkpoint just written."""
        pending = self._state.pending
        assert pending is not None  # noqa: S101 - only then does a phase end calm
        new = spaces.load(
            self._directory.space(self._state.phase.number),
            pending.overrides,
            folder=self._space.folder,
        )
        changes = allowed_changes(self._directory.path, self._space, new)
        last = checkpoint.choose(
            self._directory.checkpoints, "last", up_to_phase=self._state.phase.number
        )
        self._log.say(
            f"step {last.step}: {pending.num_calm_epochs} epochs in a row without an alarm: phase "
            f"{self._state.phase.number + 1} begins"
        )
        self._state = with_new_phase(
            self._directory,
            replace(self._state, pending=None),
            new,
            changes=changes,
            start=last,
            num_planned_steps=self._state.phase.num_planned_steps,
            device=self._state.phase.device,
        )
        self._space = reload(self._directory, self._state)
        say_phase(self._log, self._state)
        return Start(checkpoint=last, is_new_phase=True)


def with_new_phase(  # noqa: PLR0913 - what makes a phase
    directory: TrainDirectory,
    state: TrainState,
    space: Space,
    *,
    changes: dict[str, tuple[str, str]],
    start: Checkpoint,
    num_planned_steps: int,
    device: str,
) -> TrainState:
    """Write the space file of a new phase and return the state that has it.

    Args:
        directory: The run.
        state: What it is.
        space: The present space with its changes.
        changes: They, as text.
        start: The checkpoint it goes on from.
        num_planned_steps: Steps planned for the whole training.
        device: Where it runs.

    Raises:
        StoppedEarlyError: The file could not be written.
    """
    number = state.phase.number + 1
    write_whole(directory.space(number), space.text)
    stream = checkpoint.load(start.path)["stream"]
    batch_size = plans.config_of(
        space, num_steps=num_planned_steps, epoch_steps=state.epoch_steps, device="cpu"
    ).batch_size
    # Batches of another size are other data: drawn from a seed of their own.
    is_same_stream = batch_size == stream["batch_size"]
    seed = stream["seed"] if is_same_stream else derive_seed(space.study.seed, "phase", number)
    phase = Phase(
        number=number,
        first_step=start.step + 1,
        num_planned_steps=num_planned_steps,
        from_checkpoint=start.path.name,
        changes=changes,
        space_sha256=sha256_of_text(space.text),
        stream_seed=seed,
        device=device,
        started_at=utc_now(),
    )
    return replace(state, phases=(*state.phases, phase))


def reload(directory: TrainDirectory, state: TrainState) -> Space:
    """Load the space file of the present phase."""
    folder = Path(str(state.task["original_folder"]))
    return spaces.load(directory.space(state.phase.number), folder=folder)


def say_phase(log: Log, state: TrainState) -> None:
    """Say what the present phase changes, and where it begins."""
    phase = state.phase
    changed = "; ".join(f"{name} {was} -> {now}" for name, (was, now) in phase.changes.items())
    log.say(
        f"phase {phase.number} from {phase.from_checkpoint}, step {phase.first_step} of "
        f"{phase.num_planned_steps}: {changed or 'nothing changed'}"
    )


def utc_now() -> str:
    """Return the time as `train.json` writes it."""
    return f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}"


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:300]


def _place(error: BaseException) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    return f"{frames[-1].filename}:{frames[-1].lineno}" if frames else "nowhere"
