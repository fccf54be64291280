"""The keys of a space file, their types and ranges, as pydantic models.

What one key alone can get wrong is said in `key_check`; what keys can get wrong together, in
`loading`. Settings inside `fixed`, `space` and `start_with` are judged in `setting_check`.
"""

import dataclasses
import typing
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, create_model, model_validator
from pydantic_core import PydanticCustomError

from stability_search.settings.alarms import ALARM_SHARES, AlarmSettings, OnAlarm
from stability_search.settings.study import SamplerName, StudySettings
from stability_search.space.key_types import (
    Amount,
    AutoCount,
    AutoGpu,
    Conditions,
    Interval,
    LabelValues,
    ModelName,
    ScalarValue,
    StudyName,
)
from stability_search.space.setting_values import attribute_docs

_DEFAULT = StudySettings(name="default")
_MAX_OCTAVES = 16  # 2**16 times any sensible learning rate is nonsense


class Block(BaseModel):
    """A mapping with known keys only."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class FloatRange(Block):
    """A range of numbers, both ends included."""

    low: float
    high: float


class IntegerRange(Block):
    """A range of integers, both ends included."""

    low: int
    high: int


def _kind(description: str) -> Any:  # noqa: ANN401  (pydantic's own type for a field)
    # Without a value, yet not nullable: an explicit `choice: null` is an error.
    return Field(default=None, description=description)


class ParameterBlock(Block):
    """A setting that varies: exactly one kind of range, and when it applies."""

    choice: list[ScalarValue] = _kind("One of these values.")
    uniform: FloatRange = _kind("A number, every value as likely.")
    loguniform: FloatRange = _kind("A number > 0, every factor as likely.")
    int: IntegerRange = _kind("An integer, every value as likely.")
    logint: IntegerRange = _kind("An integer > 0, every factor as likely.")
    when: Conditions = _kind(
        "The setting applies only where each named setting has this value, or one of these."
    )


class TrialBlock(Block):
    """One short training run."""

    steps: int = Field(default=_DEFAULT.trial_steps, ge=20, description="Steps of one trial.")
    timeout_s: float = Field(
        default=_DEFAULT.timeout_s,
        gt=0,
        description="Wall-clock limit of a trial of that many steps, in seconds.",
    )


class ResourcesBlock(Block):
    """What one trial occupies."""

    cpu: float = Field(default=_DEFAULT.search.resources.cpu, gt=0, description="CPU cores.")
    gpu: AutoGpu = Field(
        default=None,
        description="GPUs, or a share of one and of its memory; `auto` takes one where there is "
        "one, else none.",
    )
    accelerator: ModelName | None = Field(
        default=None,
        description="GPU model that trials must run on, as Ray names it; null for any.",
    )
    custom: dict[str, Amount] = Field(
        default={}, description="Other resources of a node that a trial occupies, by name."
    )
    labels: dict[str, LabelValues] = Field(
        default={},
        description="Labels a node must have to run trials: each with its value, or one of these.",
    )


class SearchBlock(Block):
    """The search stage and the budgets of all stages together."""

    trials: int = Field(default=_DEFAULT.search.trials, ge=1, description="Trials of the search.")
    sampler: SamplerName = Field(
        default=_DEFAULT.search.sampler, description="`tpe` learns from results."
    )
    max_concurrent: AutoCount = Field(
        default=None,
        description="Trials at once; `auto` fills the machine, or what nodes a cluster has then.",
    )
    time_budget_s: Annotated[float, Field(gt=0)] | None = Field(
        default=None, description="Seconds for all stages together; null for no limit."
    )
    step_budget: Annotated[int, Field(ge=1)] | None = Field(
        default=None, description="Steps for all stages together; null for no limit."
    )
    resources: ResourcesBlock = Field(default=ResourcesBlock())


class PruneBlock(Block):
    """When bad steps end a trial."""

    bad_rate: float = Field(
        default=_DEFAULT.kill_rule.bad_rate, gt=0, lt=1, description="Rate still accepted."
    )
    false_kill: float = Field(
        default=_DEFAULT.kill_rule.false_kill,
        gt=0,
        lt=1,
        description="Chance of killing a trial whose rate is accepted.",
    )
    control: float = Field(
        default=_DEFAULT.control,
        ge=0,
        le=1,
        description="Share of killed search trials that are let run on, to see what they become.",
    )


class ConfirmBlock(Block):
    """The confirmation stage."""

    top: int = Field(default=_DEFAULT.confirm.top, ge=1, description="Candidates confirmed.")
    seeds: int = Field(
        default=_DEFAULT.confirm.seeds,
        ge=1,
        description="Fresh seeds of each; fewer than 5 name no winner at one look.",
    )
    steps: int = Field(
        default=_DEFAULT.confirm.steps, ge=20, description="Steps of a confirm trial."
    )
    octaves: int = Field(
        default=_DEFAULT.confirm.octaves,
        ge=0,
        le=_MAX_OCTAVES,
        description="Doublings of the learning rate tried above a configuration.",
    )
    min_margin: int = Field(
        default=_DEFAULT.confirm.min_margin,
        ge=0,
        description="Doublings it must survive to be called stable.",
    )


class CourseRowBlock(Block):
    """What a long training should have reached at the end of one epoch."""

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, Interval]

    epoch: int = Field(ge=1, description="The epoch, of `alarms.epoch_steps` steps.")

    @model_validator(mode="after")
    def _says_something(self) -> Self:
        if self.model_extra:
            return self
        rule = (
            "`loss`, `grad_norm` or a metric, such as `loss: [8, 10]`, is required beside `epoch`"
        )
        raise PydanticCustomError("empty_row", "{rule}", {"rule": rule})


class ReportBlock(Block):
    """What the report is asked to judge beside stability."""

    targets: dict[str, float] = Field(
        default={}, description="Upper limit of a task's metric or of `grad_norm`."
    )
    course: list[CourseRowBlock] = Field(
        default=[],
        description="What a long training should have reached by which epoch: best and worst "
        "expected `loss`, `grad_norm` and metrics of the task.",
    )


def _alarm_field(spec: "dataclasses.Field[Any]", hint: Any) -> tuple[Any, Any]:  # noqa: ANN401
    description = attribute_docs(AlarmSettings)[spec.name]
    if hint is OnAlarm:
        words = tuple(str(member) for member in OnAlarm)
        return Literal[words], Field(default=str(spec.default), description=description)
    # The limit belongs to the number: null, where allowed, has none.
    members = typing.get_args(hint) or (hint,)
    largest = 1 if spec.name in ALARM_SHARES else None
    number: Any = Annotated[int if int in members else float, Field(gt=0, le=largest)]
    held = number | None if type(None) in members else number
    return held, Field(default=spec.default, description=description)


_ALARM_HINTS = typing.get_type_hints(AlarmSettings)
AlarmsBlock: type[Block] = create_model(
    "AlarmsBlock",
    __base__=Block,
    __doc__="Beyond which value an indicator is worth a warning.",
    **{  # type: ignore[call-overload]  # one key for each field that it declares
        spec.name: _alarm_field(spec, _ALARM_HINTS[spec.name])
        for spec in dataclasses.fields(AlarmSettings)
    },
)


class SpaceFile(Block):
    """A space file: what is trained, which settings vary, and how hard to look."""

    name: StudyName = Field(
        default="",
        description="Name of the study, a plain file name; default: the file's stem.",
    )
    task: str = Field(
        description="What is trained: a built-in task, `package.module:Class`, or "
        "`./file.py:Class` beside the space file."
    )
    task_args: dict[str, Any] = Field(
        default={}, description="Arguments of the task's constructor."
    )
    seed: int = Field(default=_DEFAULT.seed, ge=0, description="Every other seed comes from it.")
    trial: TrialBlock = Field(default=TrialBlock())
    fixed: dict[str, Any] = Field(default={}, description="Settings that do not vary.")
    space: dict[str, ParameterBlock] = Field(default={}, description="Settings that vary.")
    start_with: list[dict[str, Any]] = Field(
        default=[], description="Configurations tried first, such as today's."
    )
    search: SearchBlock = Field(default=SearchBlock())
    prune: PruneBlock = Field(default=PruneBlock())
    confirm: ConfirmBlock = Field(default=ConfirmBlock())
    report: ReportBlock = Field(default=ReportBlock())
    alarms: AlarmsBlock = Field(default=AlarmsBlock())  # type: ignore[valid-type]
