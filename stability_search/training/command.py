"""The command `train`: begin a long training, or go on with one."""

import contextlib
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

from stability_search import space as spaces
from stability_search.errors import UsageError
from stability_search.files import cannot_write, write_whole
from stability_search.inert import inert
from stability_search.interruption import Signals
from stability_search.records.trial import Outcome
from stability_search.space import Space
from stability_search.space_directory import (
    copy_task_file,
    default_path,
    make_folder,
    only_writer,
    refuse_changed_task,
    task_facts,
    text_beside_task,
)
from stability_search.task_module import refuse_missing_module
from stability_search.training import checkpoint, plans
from stability_search.training.advice import after_stop, resume_command
from stability_search.training.changes import allowed_changes
from stability_search.training.checkpoint import Checkpoint
from stability_search.training.journal import Listener, Log
from stability_search.training.layout import TrainDirectory
from stability_search.training.phase import Clock
from stability_search.training.session import (
    Session,
    Start,
    reload,
    say_phase,
    utc_now,
    with_new_phase,
)
from stability_search.training.standstill import rule_named
from stability_search.training.state import (
    EndKind,
    Pending,
    Phase,
    TrainEnd,
    TrainState,
    read_state,
    sha256_of_text,
    write_state,
)

_TERMINATE_S = 1.5  # SIGKILL follows SIGTERM after 3 s on a Ray cluster; a checkpoint may be large


def ignore(_line: str) -> None:
    """Listen to nothing."""


def begin(
    space: Space,
    *,
    num_steps: int,
    output: Path | None = None,
    listener: Listener = ignore,
    clock: Clock = time.monotonic,
) -> TrainEnd:
    """Train a space's one configuration for long.

    Args:
        space: A space in which nothing varies.
        num_steps: Optimizer steps, >= 1; the schedule ends with them.
        output: Directory to make; None for `reports/<name>-train-<UTC time>`.
        listener: Hears every line of the log.
        clock: Seconds of a clock that does not run backwards.

    Returns:
        How it ended, with exit code and verdict.

    Raises:
        UsageError: Space, model or directory do not allow it.
        StoppedEarlyError: The directory cannot be written.
    """
    if num_steps < 1:
        raise UsageError(f"--steps: 1 or more is required, but got {num_steps}.")
    plans.one_configuration(space)
    device = plans.choose_device(space.study.search.resources)
    epoch_steps = plans.epoch_steps_of(space, num_steps)
    config = plans.config_of(space, num_steps=num_steps, epoch_steps=epoch_steps, device=device)
    path = output or default_path(f"{space.study.name}-train", datetime.now(UTC))
    if path.exists():
        _refuse_used(TrainDirectory(path=path))
    plans.refuse_unfit(config, space.study.course)
    make_folder(path)
    directory = TrainDirectory(path=path)
    with _only_writer(directory), _signals_taken(directory) as signals:
        _refuse_used(directory)
        state = TrainState(
            name=space.study.name,
            epoch_steps=epoch_steps,
            task=task_facts(space),
            phases=(
                Phase(
                    number=1,
                    first_step=1,
                    num_planned_steps=num_steps,
                    from_checkpoint="",
                    changes={},
                    space_sha256=sha256_of_text(text_beside_task(space)),
                    stream_seed=space.study.seed,
                    device=device,
                    started_at=utc_now(),
                ),
            ),
        )
        _make(directory, space, state)
        log = Log(directory, listener)
        log.say(
            f"training {space.study.name} on {plans.device_words(device)}: {num_steps} steps in "
            f"epochs of {config.alarms.epoch_steps}; files in {path}"
        )
        return Session(directory, state, log=log, signals=signals, clock=clock).run(Start())


def go_on(  # noqa: PLR0913 - one argument per option
    path: Path,
    overrides: Sequence[str] = (),
    *,
    num_steps: int | None = None,
    which: str = "last",
    advance_after: int | None = None,
    listener: Listener = ignore,
    clock: Clock = time.monotonic,
) -> TrainEnd:
    """Go on with a long training, as it was or with changed settings.

    Args:
        path: Its directory.
        overrides: `key=value` of settings that change: a new phase begins.
        num_steps: Steps for the whole training; None leaves them. They may only rise.
        which: The checkpoint to go on from: `last`, `best` or the name of its file.
        advance_after: Make the changes only after so many epochs in a row without an alarm.
        listener: Hears every line of the log.
        clock: Seconds of a clock that does not run backwards.

    Returns:
        How it ended, with exit code and verdict.

    Raises:
        UsageError: No training there, another process writes to it, the task changed, or a change
            cannot be followed.
        StoppedEarlyError: The directory cannot be written.
    """
    directory = TrainDirectory(path=path)
    with _only_writer(directory), _signals_taken(directory) as signals:
        state = read_state(directory)
        checkpoint.remove_unbegun(directory.checkpoints, last_phase=state.phase.number)
        refuse_changed_task(path, state.task)
        space = _present_space(directory, state)
        refuse_missing_module(space.task, begun_in=str(state.task.get("import_path", "")))
        asked = _Asked(
            overrides=tuple(overrides),
            num_steps=num_steps,
            which=which,
            advance_after=advance_after,
        )
        log = Log(directory, listener)
        state, start = _taken_up(directory, state, space, asked)
        done = 0 if start.checkpoint is None else start.checkpoint.step
        log.say(
            f"training {state.name} goes on after step {done} of "
            f"{state.phase.num_planned_steps} on {plans.device_words(state.phase.device)}; "
            f"files in {path}"
        )
        if start.is_new_phase:
            say_phase(log, state)
        return Session(directory, state, log=log, signals=signals, clock=clock).run(start)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Asked:
    """The options of `--resume`."""

    overrides: tuple[str, ...]
    num_steps: int | None
    which: str
    advance_after: int | None


def _taken_up(
    directory: TrainDirectory, state: TrainState, space: Space, asked: _Asked
) -> tuple[TrainState, Start]:
    """Decide where to go on and with what; refuse what cannot be followed."""
    number, path = state.phase.number, directory.path
    new = _with_overrides(directory, state, asked.overrides)
    changes = allowed_changes(path, space, new)
    found = checkpoint.found_in(directory.checkpoints, up_to_phase=number)
    if not found and number == 1 and not changes:  # killed before the first one was written
        return replace(state, end=None), Start()
    chosen = checkpoint.choose(directory.checkpoints, asked.which, up_to_phase=number)
    planned = _planned_steps(state, asked.num_steps, chosen)
    device = plans.choose_device(new.study.search.resources)
    if changes:
        config = plans.config_of(
            new, num_steps=planned, epoch_steps=state.epoch_steps, device=device
        )
        plans.refuse_unfit(config, new.study.course)
    pending = _pending(state, asked, changes)
    if asked.advance_after is not None:
        new, changes = space, {}
    _refuse_same_end(directory, state, space, changes, found)
    was = state.phase.num_planned_steps
    if planned != was:
        changes = {**changes, "steps": (str(was), str(planned))}
    state = replace(state, pending=pending, end=None)
    waits_anew = asked.advance_after is not None
    if not changes and chosen == found[-1]:
        present = replace(state.phase, device=device)
        state = replace(state, phases=(*state.phases[:-1], present))
        return state, Start(checkpoint=chosen, waits_anew=waits_anew)
    state = with_new_phase(
        directory,
        state,
        new,
        changes=changes,
        start=chosen,
        num_planned_steps=planned,
        device=device,
    )
    return state, Start(checkpoint=chosen, is_new_phase=True, waits_anew=waits_anew)


def _with_overrides(
    directory: TrainDirectory, state: TrainState, overrides: Sequence[str]
) -> Space:
    folder = Path(str(state.task["original_folder"]))
    new = spaces.load(directory.space(state.phase.number), overrides, folder=folder)
    plans.one_configuration(new)
    return new


def _planned_steps(state: TrainState, asked: int | None, chosen: Checkpoint) -> int:
    planned = state.phase.num_planned_steps
    if asked is not None and asked < planned:
        raise UsageError(
            f"--steps: the length of a training may only rise, but got {asked} after {planned}.",
            hint="Leave it out, or give more.",
        )
    total = asked or planned
    if chosen.step >= total:
        raise UsageError(
            f"--resume: all {total} steps have been taken.",
            hint=f"Train on with --steps {2 * total}, or go back with --from.",
        )
    return total


def _pending(
    state: TrainState, asked: _Asked, changes: dict[str, tuple[str, str]]
) -> Pending | None:
    """Return the changes that wait; those made now replace the ones that waited."""
    if asked.advance_after is None:
        return None if changes else state.pending
    if asked.advance_after < 1 or not changes:
        raise UsageError(
            "--advance-after: 1 or more epochs and a change (--set) that waits for them are "
            f"required, but got {asked.advance_after} and "
            f"{', '.join(asked.overrides) or 'no --set'}.",
            hint="For example --set fixed.learning_rate=1e-4 --advance-after 10.",
        )
    return Pending(overrides=asked.overrides, num_calm_epochs=asked.advance_after)


def _refuse_same_end(
    directory: TrainDirectory,
    state: TrainState,
    space: Space,
    changes: dict[str, tuple[str, str]],
    found: Sequence[Checkpoint],
) -> None:
    """Refuse to run into the same stop again: the same settings give the same steps."""
    end = state.end
    if changes or end is None or end.kind is not EndKind.STOPPED:
        return
    outcome = rule_named(end.outcome)
    if outcome is Outcome.OUT_OF_MEMORY:  # another process may have had the memory
        return
    config = plans.config_of(
        space,
        num_steps=state.phase.num_planned_steps,
        epoch_steps=state.epoch_steps,
        device="cpu",
    )
    advice = after_stop(directory.path, outcome, config, checkpoint.best_of(list(found)))
    raise UsageError(
        f"{directory.path}: stopped at step {end.step} ({end.outcome}); the same settings would "
        f"stop there again. {' '.join(line.strip() for line in advice)}"
    )


def _present_space(directory: TrainDirectory, state: TrainState) -> Space:
    path = directory.space(state.phase.number)
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UsageError(f"{path}: cannot be read: {error.strerror}.") from error
    if sha256_of_text(text) != state.phase.space_sha256:
        raise UsageError(
            f"{path}: changed by hand since the training began.",
            hint="Undo the change; settings are changed by --set, in a new phase.",
        )
    return reload(directory, state)


def _refuse_used(directory: TrainDirectory) -> None:
    if directory.state.exists():
        raise UsageError(
            f"{directory.path}: a training is there already.",
            hint=f"Go on with it by `{resume_command(directory.path)}`.",
        )
    if directory.path.is_dir() and any(directory.path.iterdir()):
        raise UsageError(
            f"{directory.path}: the directory is not empty.", hint="Choose another one."
        )


def _make(directory: TrainDirectory, space: Space, state: TrainState) -> None:
    copy_task_file(directory.path, space)
    write_whole(directory.space(1), text_beside_task(space))
    for folder in (directory.checkpoints, directory.steps, directory.scalars):
        try:
            folder.mkdir()
        except OSError as error:
            raise cannot_write(folder, error) from error
    write_state(directory, state)


def _only_writer(directory: TrainDirectory) -> contextlib.AbstractContextManager[None]:
    return only_writer(directory.path, directory.checkpoints, directory.steps)


@contextlib.contextmanager
def _signals_taken(directory: TrainDirectory) -> Iterator[Signals]:
    """Note signals, to be heeded between steps; SIGTERM ends a long step all the same."""
    signals = Signals(terminate_s=_TERMINATE_S)
    words = f"{inert(f'ended at once; next: {resume_command(directory.path)}')}\n"

    def last_words() -> None:
        os.write(2, words.encode())

    signals.last_words = last_words
    signals.install()
    try:
        yield signals
    finally:
        signals.restore()
