"""From a space file to what a long training does, and what is refused before it starts."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import torch

from stability_search.alarms.epochs import NUM_EPOCHS
from stability_search.assembly import build_engine
from stability_search.course import CourseRow
from stability_search.engine.batches import move
from stability_search.errors import UsageError
from stability_search.probe import read_metrics
from stability_search.settings.study import Resources
from stability_search.settings.trial import TrialConfig
from stability_search.space import Space
from stability_search.tasks.base import Task
from stability_search.tasks.loading import load_task
from stability_search.trial import check_settings

_ALWAYS_KNOWN = ("loss", "grad_norm")


def one_configuration(space: Space) -> None:
    """Refuse a space in which settings vary.

    Raises:
        UsageError: With the way out.
    """
    if space.has_space:
        names = ", ".join(space.varying)
        raise UsageError(
            f"{space.path}: `train` takes one configuration, but {names} "
            f"{'varies' if len(space.varying) == 1 else 'vary'}.",
            hint="First `stability-search run --space` it, then train the best.yaml of its run; "
            "or put every setting under `fixed`.",
        )


def choose_device(resources: Resources) -> Literal["cpu", "cuda"]:
    """Return `cuda` where torch has it, unless `search.resources.gpu` says otherwise.

    Raises:
        UsageError: A GPU is asked for and torch has none.
    """
    has_cuda = torch.cuda.is_available()
    if resources.gpu is None:
        return "cuda" if has_cuda else "cpu"
    if resources.gpu > 0 and not has_cuda:
        raise UsageError(
            f"search.resources.gpu: {resources.gpu:g} is asked for, but torch has no GPU here.",
            hint="Set search.resources.gpu=0 to train on the CPU.",
        )
    return "cuda" if resources.gpu > 0 else "cpu"


def device_words(device: str) -> str:
    """Name a device as a reader knows it."""
    return torch.cuda.get_device_name() if device == "cuda" else "cpu"


def epoch_steps_of(space: Space, num_steps: int) -> int:
    """Return the steps called an epoch: as the file says, or a 50th of the training."""
    return space.study.alarms.epoch_steps or max(1, num_steps // NUM_EPOCHS)


def config_of(
    space: Space, *, num_steps: int, epoch_steps: int, device: Literal["cpu", "cuda"]
) -> TrialConfig:
    """Return everything that decides a long training of a space's one configuration.

    Args:
        space: A space in which nothing varies.
        num_steps: Planned optimizer steps, >= 1; the schedule ends with them.
        epoch_steps: Steps called an epoch, >= 1, where the file does not say.
        device: Where it runs.
    """
    config = space.trial_config(
        space.settings({}), seed=space.study.seed, steps=num_steps, device=device
    )
    alarms = replace(config.alarms, epoch_steps=config.alarms.epoch_steps or epoch_steps)
    return replace(config, alarms=alarms)


def refuse_unfit(config: TrialConfig, course: Sequence[CourseRow]) -> None:
    """Refuse what the model cannot honour, before any file is written.

    Raises:
        UsageError: A setting cannot be honoured, or the course names an unknown metric.
    """
    check_settings(config)
    task = load_task(config.task, config.task_args)
    names = {name for row in course for name in row.intervals} - {*_ALWAYS_KNOWN}
    if not names:
        return
    known = _metric_names(task, config)
    unknown = sorted(names - set(known))
    if unknown:
        raise UsageError(
            f"report.course: {', '.join((*_ALWAYS_KNOWN, *known))} can be asked for of this task, "
            f"but got {', '.join(unknown)}.",
            hint="Correct the name, or give the task a `metrics` method that returns it.",
        )


def _metric_names(task: Task, config: TrialConfig) -> tuple[str, ...]:
    device = torch.device(config.device)
    with build_engine(task, config.engine, seed=config.seed, device=device) as engine:
        return tuple(read_metrics(engine, task, [move(task.probe()[0], device)]))
