"""Every block of a space file but the task, the settings and their ranges."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from stability_search.course import CourseRow
from stability_search.settings.alarms import AlarmSettings
from stability_search.settings.trial import KillRule

SamplerName = Literal["tpe", "random", "qmc"]

DRIVER_CPUS = "STABILITY_SEARCH_DRIVER_CPUS"
"""Environment variable: how many CPU cores of its node are reserved for a study's driver."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Resources:
    """What one trial occupies.

    Attributes:
        cpu: CPU cores of a trial, > 0.
        gpu: GPUs of a trial, whole or a share of one; None takes one where there is one, or none.
        accelerator: GPU model that trials must run on, as Ray names it; None for any.
        custom: Other resources of a node that a trial occupies, by the name they were given when
            the node was started; > 0 each.
        labels: What a node must be labelled with to run trials: for each label the values it may
            have, at least one.
    """

    cpu: float = 1.0
    gpu: float | None = None
    accelerator: str | None = None
    custom: Mapping[str, float] = field(default_factory=dict)
    labels: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class SearchSettings:
    """The search stage and the budgets of the whole study.

    Attributes:
        trials: Trials of the search stage, killed ones included, >= 1.
        sampler: Who proposes: `tpe` learns from results, `random` and `qmc` do not.
        max_concurrent: Trials at once, >= 1; None fills the machine.
        time_budget_s: Seconds for all stages together; None for no limit.
        step_budget: Optimizer steps for all stages together; None for no limit.
        resources: What one trial occupies.
    """

    trials: int = 48
    sampler: SamplerName = "tpe"
    max_concurrent: int | None = None
    time_budget_s: float | None = None
    step_budget: int | None = None
    resources: Resources = field(default_factory=Resources)


@dataclass(frozen=True, kw_only=True, slots=True)
class ConfirmSettings:
    """The confirmation stage.

    Attributes:
        top: Candidates taken from the search, >= 1.
        seeds: Fresh seeds of each configuration, >= 1; fewer than 5 name no winner at one look.
            Those that meet the bar get as many again, once, where the first look names none.
        steps: Optimizer steps of a confirm trial, >= `trial.steps`.
        octaves: Doublings of the learning rate tried above a configuration, >= 0.
        min_margin: Doublings it must survive to be called stable, <= `octaves`.
    """

    top: int = 3
    seeds: int = 5
    steps: int = 400
    octaves: int = 3
    min_margin: int = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class StudySettings:
    """Every block of a space file but the task, the settings and their ranges.

    Attributes:
        name: Name of the study, a plain file name.
        seed: Seed every other seed is made from, >= 0.
        trial_steps: Horizon of pilot and search trials, >= 20.
        timeout_s: Wall-clock limit of a trial of `trial_steps`; others in proportion.
        search: The search stage and the budgets.
        kill_rule: When bad steps end a trial.
        control: Share of killed search trials that are let run on, in [0, 1].
        confirm: The confirmation stage.
        targets: Upper limits of task metrics, or of `grad_norm`, shown in the report.
        course: What a long training should have reached by which epoch, epochs rising.
        alarms: When an indicator is worth a warning.
    """

    name: str
    seed: int = 0
    trial_steps: int = 200
    timeout_s: float = 300.0
    search: SearchSettings = field(default_factory=SearchSettings)
    kill_rule: KillRule = field(default_factory=KillRule)
    control: float = 0.0
    confirm: ConfirmSettings = field(default_factory=ConfirmSettings)
    targets: Mapping[str, float] = field(default_factory=dict)
    course: tuple[CourseRow, ...] = ()
    alarms: AlarmSettings = field(default_factory=AlarmSettings)
