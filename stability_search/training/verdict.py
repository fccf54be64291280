"""The verdict on a long training, in the words that are printed and kept."""

from stability_search.course import stand_on_course
from stability_search.errors import StabilitySearchError, UserCodeError
from stability_search.interruption import Interrupted
from stability_search.records.trial import Outcome
from stability_search.settings.study import StudySettings
from stability_search.settings.trial import TrialConfig
from stability_search.training import checkpoint
from stability_search.training.advice import after_stop, resume_command
from stability_search.training.history import History
from stability_search.training.layout import TrainDirectory
from stability_search.training.standstill import Standstill, is_untrained
from stability_search.training.state import EndKind, Pending, TrainEnd
from stability_search.training.wording import WHY_NO_PROBE, number_text, values_text

EXIT_STOPPED = 3


def done(
    directory: TrainDirectory,
    history: History,
    *,
    num_steps: int,
    study: StudySettings,
    pending: Pending | None,
) -> TrainEnd:
    """Say that all planned steps were taken, and what became of them; exit 3 if nothing good did.

    Args:
        directory: The run.
        history: What it showed.
        num_steps: Attempted steps.
        study: Its targets and its expected course.
        pending: Changes that still waited for calm.
    """
    labels, first, last = history.labels, history.epochs[0], history.epochs[-1]
    counts = (
        f"{labels['bad']} bad (NaN or Inf), {labels['data']} of bad data, "
        f"{labels['calibration']} to find the loss scale"
    )
    loss, norm = (
        f"{name} {number_text(was)} -> {number_text(now)}"
        for name, was, now in (
            ("loss", first.loss, last.loss),
            ("grad_norm", first.grad_norm, last.grad_norm),
        )
    )
    start = number_text(history.start_probe)
    probe = f"loss {start} -> {values_text({'': last.probe_loss, **last.metrics}).lstrip()}"
    defects = _defects(history, num_steps)
    epochs = f"{num_steps} steps, {len(history.epochs)} epochs"
    lines = [
        *defects,
        f"{'all' if defects else 'done:'} {epochs}; {counts}",
        f"first to last epoch: {loss}, {norm}; probe: {probe}",
    ]
    lines += [
        f"target {name} {limit:g}: {_against(last.values.get(name), limit)}"
        for name, limit in study.targets.items()
    ]
    if study.course:
        lines.append(
            f"expected course at epoch {last.epoch}: "
            f"{stand_on_course(study.course, epoch=last.epoch, values=last.values)}"
        )
    if pending is not None:
        lines.append(
            f"WARNING the changes {', '.join(pending.overrides)} were never made: epochs in a row "
            f"without an alarm {history.num_calm_epochs}, wanted {pending.num_calm_epochs}"
        )
    lines += _files(directory, history)
    return TrainEnd(
        kind=EndKind.DONE,
        exit_code=EXIT_STOPPED if defects else 0,
        step=num_steps,
        outcome=str(Outcome.COMPLETED),
        lines=tuple(lines),
    )


def stopped(  # noqa: PLR0913 - what is known of a stop
    directory: TrainDirectory,
    history: History,
    *,
    num_steps: int,
    phase: int,
    outcome: Outcome | Standstill | None,
    reason: str,
    config: TrialConfig,
) -> TrainEnd:
    """Say which rule stopped the training, and how to go on.

    Args:
        directory: The run.
        history: What it showed.
        num_steps: Attempted steps.
        phase: The present phase.
        outcome: The rule; None for an alarm.
        reason: Why.
        config: What it was trained with.
    """
    word = "alarm" if outcome is None else str(outcome)
    why = reason if isinstance(outcome, Standstill) else f"{word} ({reason})"
    best = checkpoint.best_of(checkpoint.found_in(directory.checkpoints, up_to_phase=phase))
    return TrainEnd(
        kind=EndKind.STOPPED,
        exit_code=EXIT_STOPPED,
        step=num_steps,
        outcome=word,
        lines=(
            f"CRITICAL stopped at step {num_steps} of {config.num_planned_steps}: {why}",
            *after_stop(directory.path, outcome, config, best),
            *_files(directory, history),
        ),
    )


def interrupted(directory: TrainDirectory, error: Interrupted, *, num_steps: int) -> TrainEnd:
    """Say that a signal ended the training, and how to go on."""
    return TrainEnd(
        kind=EndKind.INTERRUPTED,
        exit_code=error.exit_code,
        step=num_steps,
        outcome="",
        lines=(
            f"{error.message} after step {num_steps}; everything up to there is kept",
            f"next: {resume_command(directory.path)}",
        ),
    )


def failed(directory: TrainDirectory, error: StabilitySearchError, *, num_steps: int) -> TrainEnd:
    """Say what broke, and how to go on from the last checkpoint."""
    lines = [f"CRITICAL {error}", f"next: {resume_command(directory.path)}"]
    if isinstance(error, UserCodeError):
        lines[1] += "  # if the task's file is as it was; else start anew"
    return TrainEnd(
        kind=EndKind.FAILED,
        exit_code=error.exit_code,
        step=num_steps,
        outcome="",
        lines=tuple(lines),
    )


def _defects(history: History, num_steps: int) -> list[str]:
    """Say why a training that took all its steps has still not been done."""
    if is_untrained(history, num_steps):
        words = f"CRITICAL nothing was trained: none of {num_steps} steps changed a parameter. "
        words += "Look at the task's loss and the data; a loss scale may need more steps."
        return [words]
    if history.epochs[-1].probe_loss is None:
        return [f"CRITICAL the last probe loss is NaN or Inf: {WHY_NO_PROBE}"]
    return []


def _against(value: float | None, limit: float) -> str:
    if value is None:
        return "not measured"
    return f"{'met' if value <= limit else 'NOT met'}, {value:.4g}"


def _files(directory: TrainDirectory, history: History) -> list[str]:
    return [f"curves: {directory.curves}"] if history.epochs else []
