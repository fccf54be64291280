"""What `run` would do, found out before anything is started: trials, time, disk, files.

No run directory is made, no Ray is started and no cluster contacted. The first configuration is
trained for a few steps in a process of its own, which also shows whether the task works and its
model can honour every setting.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

from stability_search.errors import (
    InfrastructureError,
    StoppedEarlyError,
    UsageError,
    UserCodeError,
)
from stability_search.records.trial import Outcome, Stage, TrialRow
from stability_search.records.values import Json
from stability_search.search import run_directory
from stability_search.search.breakers import refuse_settings
from stability_search.search.confirm import ConfirmCost, describe_cost
from stability_search.search.driver import worker_settings
from stability_search.search.early import is_surely_cpu
from stability_search.search.machine import Machine, choose_machine, this_machine
from stability_search.search.plan import StudyPlan, planned_work
from stability_search.search.request import TrialRequest
from stability_search.search.run_directory import RunDirectory
from stability_search.search.shipping import Cargo, pack
from stability_search.search.timing import Timing, time_steps
from stability_search.space import Space
from stability_search.space_directory import default_path
from stability_search.spending import enough_steps
from stability_search.task_files import size_of
from stability_search.yardstick import probe_steps

_NUM_SHOWN = 5


@dataclass(frozen=True, kw_only=True, slots=True)
class Outlook:
    """What a study would be.

    Attributes:
        machine: What its trials would run on; None where only Ray can say.
        path: The run directory it would make.
        proposals: Settings of its first configurations.
        first: The first of them as a trial, with what is tried before the first trial.
        uploaded: The task's files that would go to every node of a cluster, and their bytes.
        notes: What a user must know about what would not go there, one sentence each.
        pilot_rates: Learning rates of the pilot.
        confirm: Bounds of what confirm costs.
        num_trials: Most trials of all stages.
        num_steps: Most optimizer steps of all stages.
        num_pilot_steps: Those of the pilot among them.
        enough_steps: A step budget with which the search starts; None where it does as it is.
        needed_bytes: What it would write at most, roughly.
        free_bytes: What is free there.
        shortage: What it would stop with, if that is too little.
    """

    machine: Machine | None
    path: Path
    proposals: tuple[Mapping[str, Json], ...]
    first: TrialRequest
    uploaded: Mapping[str, int]
    notes: tuple[str, ...]
    pilot_rates: tuple[float, ...]
    confirm: ConfirmCost
    num_trials: int
    num_steps: int
    num_pilot_steps: int
    enough_steps: int | None
    needed_bytes: int
    free_bytes: int
    shortage: StoppedEarlyError | None

    def seconds(self, timing: Timing) -> tuple[float, float] | None:
        """Estimate how long the study takes if no trial is killed.

        Args:
            timing: What the first steps took.

        Returns:
            With the fewest and with the most confirm trials; None where it cannot be estimated.
        """
        if self.machine is None or timing.step_s is None:
            return None
        config = self.first.config
        probes = len(probe_steps(config.num_planned_steps)) - 1  # beginning reads the first
        each_s = timing.setup_s + probes * timing.probe_s
        spared = self.confirm.max_trials - self.confirm.min_trials
        low, high = (
            (self.num_trials - count) * each_s
            + (self.num_steps - count * self.confirm.steps) * timing.step_s
            for count in (spared, 0)
        )
        return low / self.machine.num_slots, high / self.machine.num_slots


def look_ahead(space: Space, *, output: Path | None, address: str | None) -> Outlook:
    """Find out what `run` would do, without training.

    Args:
        space: What would be searched.
        output: Run directory that would be made; None for `reports/<name>-<UTC time>`.
        address: Ray cluster that would be joined; None for this machine.

    Raises:
        UsageError: `run` would refuse: a trial needs more than this machine has, the directory
            cannot be used, or the task's files cannot be sent.
    """
    study = space.study
    is_known = address is None and is_surely_cpu(study.search.resources)
    path = output or default_path(study.name, datetime.now(UTC))
    there = _existing(path)
    plan = StudyPlan(space, device="cpu")
    proposals = tuple(space.settings(one) for one in plan.first_proposals(_NUM_SHOWN))
    trials, steps = planned_work(space)
    rates = space.pilot_learning_rates()
    pilot_steps = len(rates) * max(study.trial_steps, study.confirm.steps)
    status = os.statvfs(there)
    cargo = Cargo() if address is None else pack(space.task, import_path=Path.cwd())
    cargo.refuse_unsendable()
    return Outlook(
        machine=choose_machine(space, this_machine()) if is_known else None,
        path=path,
        proposals=proposals,
        first=_first_trial(plan, proposals[0]),
        uploaded={name: size_of(path) for name, path in cargo.files.items()},
        notes=cargo.notes,
        pilot_rates=rates,
        confirm=describe_cost(space),
        num_trials=trials,
        num_steps=steps,
        num_pilot_steps=pilot_steps,
        enough_steps=_enough_steps(space, pilot_steps),
        needed_bytes=run_directory.estimated_bytes(num_trials=trials, num_steps=steps),
        free_bytes=status.f_bavail * status.f_frsize,
        shortage=_shortage(there, trials, steps),
    )


def time_first(space: Space, outlook: Outlook) -> Timing:
    """Train the first configuration for a few steps on this machine's CPU.

    Args:
        space: What would be searched.
        outlook: What `look_ahead` returned.
    """
    resources = space.study.search.resources
    machine = outlook.machine or Machine(
        device="cpu", num_slots=1, cpu_per_trial=resources.cpu, gpu_per_trial=0.0
    )
    return time_steps(outlook.first, worker_settings(machine, space.folder))


def refuse(outlook: Outlook, timing: Timing) -> None:
    """Raise what `run` would come to, as far as the first steps and the disk show it.

    Args:
        outlook: What `look_ahead` returned.
        timing: What `time_first` returned.

    Raises:
        UsageError: The model cannot honour a setting.
        UserCodeError: The task failed.
        InfrastructureError: The task took its process with it.
        StoppedEarlyError: The disk cannot hold the study.
    """
    end, first = timing.end, outlook.first
    if end is not None:
        refuse_settings(
            TrialRow(
                trial_id=first.trial_id,
                stage=Stage.PILOT,
                index=first.index,
                config_id=first.config_id,
                seed=first.config.seed,
                settings=first.settings,
                summary=end,
            )
        )
    if end is not None and end.outcome is Outcome.USER_ERROR:
        raise UserCodeError(
            f"the task failed with {end.error_type} at {end.error_place}.\n"
            f"{end.error_text.rstrip()}",
            hint="\nMend the task; configurations have nothing to do with it.",
        )
    if end is not None and end.outcome is Outcome.INFRASTRUCTURE:
        raise InfrastructureError(
            f"the first steps were lost: {end.reason}.",
            hint="The task may crash Python; `stability-search doctor` checks the machine.",
        )
    if outlook.shortage is not None:
        raise outlook.shortage


def _first_trial(plan: StudyPlan, settings: Mapping[str, Json]) -> TrialRequest:
    """Return the study's first trial, but with the settings of its first proposal."""
    pilot, space = plan.next_trial(), plan.space
    assert pilot is not None  # noqa: S101 - for ourselves: a fresh study begins with a pilot
    config = space.trial_config(
        settings, seed=pilot.config.seed, steps=space.study.trial_steps, device="cpu"
    )
    config_id = space.config_id(settings)
    return replace(pilot, config=config, settings=settings, config_id=config_id)


def _enough_steps(space: Space, num_pilot_steps: int) -> int | None:
    """Return a step budget that the pilot does not use up; None where the given one is."""
    budget = space.study.search.step_budget
    if budget is None or not space.has_space or budget > 2 * num_pilot_steps:
        return None
    return enough_steps(space.study, num_pilot_steps, has_search=True)


def _existing(path: Path) -> Path:
    """Return the folder whose disk would be written to.

    Raises:
        UsageError: `run` could not make the directory, or it is used.
    """
    if path.is_dir():
        run_directory.refuse_used(RunDirectory(path=path))
    there = next(one for one in (path, *path.absolute().parents) if one.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        why = "cannot be written" if there.is_dir() else "is no directory"
        raise UsageError(
            f"{path}: the run directory cannot be made: {there} {why}.",
            hint="Choose another with --output.",
        )
    return there


def _shortage(there: Path, num_trials: int, num_steps: int) -> StoppedEarlyError | None:
    run = RunDirectory(path=there)
    try:
        run_directory.require_free_space(run, num_trials=num_trials, num_steps=num_steps)
    except StoppedEarlyError as error:
        return error
    return None
