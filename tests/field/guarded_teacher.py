"""The guarded engine under the first configuration of a space file, the one that failed."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from stability_search import space as spaces
from stability_search.records.step import StepRecord
from stability_search.records.trial import TrialSummary
from stability_search.settings.trial import TrialConfig, TrialConstants
from stability_search.trial import run_trial


def first_configuration(name: str, *, seed: int = 0, num_steps: int = 25) -> TrialConfig:
    """Return what a study of a shipped space tries first, over so many steps."""
    space = spaces.load(name)
    return space.trial_config(space.today_settings(), seed=seed, steps=num_steps, device="cpu")


def train_guarded(
    config: TrialConfig, *, engine: Mapping[str, Any] | None = None, **task_args: object
) -> tuple[TrialSummary, list[StepRecord]]:
    """Train a configuration and keep every step.

    Args:
        config: What is trained.
        engine: Settings of the engine that are changed first.
        task_args: Arguments of the task that are changed first.
    """
    changed = replace(
        config,
        engine=replace(config.engine, **(engine or {})),
        task_args={**config.task_args, **task_args},
    )
    ends = TrialConstants(probe_steps=(0, config.num_planned_steps))
    trial = run_trial(changed, constants=ends)
    records = []
    while True:
        try:
            records.append(next(trial).record)
        except StopIteration as end:
            return end.value, records
