"""The keys of a space file, their types and ranges, as pydantic models.

What one key alone can get wrong is said here; what keys can get wrong together, in `checking`.
Settings inside `fixed`, `space` and `start_with` are judged in `setting_values`.
"""

import dataclasses
import re
import typing
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    WithJsonSchema,
    create_model,
    model_validator,
)
from pydantic import ValidationError as GrammarError
from pydantic_core import ErrorDetails, PydanticCustomError

from stability_search.records import Json
from stability_search.settings import (
    ALARM_SHARES,
    AlarmSettings,
    OnAlarm,
    SamplerName,
    StudySettings,
)
from stability_search.space.setting_values import attribute_docs, did_you_mean, null_hint
from stability_search.space.tree import KeyPath, Node, Problems, dotted

_DEFAULT = StudySettings(name="default")
_MIN_GPU_SHARE = 0.01  # Ray counts in parts of 10,000, and a smaller share has no memory to use
_NUM_ENDS = 2  # of an interval
_MAX_OCTAVES = 16  # 2**16 times any sensible learning rate is nonsense
NAME = re.compile(r"\w[\w. -]{0,99}\Z")
"""A study's name, which is a plain file name."""
LABEL = re.compile(r"[A-Za-z0-9]([\w.-]{0,61}[A-Za-z0-9])?\Z", re.ASCII)
"""The value of a node's label, as Ray and Kubernetes want it."""


def _number_or_auto(value: object) -> object:
    if value == "auto":
        return None
    if value is None or isinstance(value, str):
        raise PydanticCustomError("auto", "`auto` or a number is required")
    return value


def _scalar(value: object) -> object:
    if isinstance(value, dict | list):
        raise PydanticCustomError(
            "scalar", "a number, a word, `true`, `false` or `null` is required"
        )
    return value


def _whole_or_share(value: float | None) -> float | None:
    if value is None or value.is_integer() or _MIN_GPU_SHARE <= value < 1:
        return value
    rule = f"a whole number, or a share of one GPU from {_MIN_GPU_SHARE:g} on, is required"
    raise PydanticCustomError("gpu", "{rule}", {"rule": rule})


def _whole_or_part(value: float) -> float:
    if value < 1 or value.is_integer():
        return value
    raise PydanticCustomError("custom", "a whole number, or a part of one, is required")


def _label_values(value: object) -> object:
    values = value if isinstance(value, list) else [value]
    if values and all(isinstance(one, str) and LABEL.match(one) for one in values):
        return tuple(values)
    rule = "a word of letters, digits, `_`, `-` and `.`, or a list of such words, is required"
    raise PydanticCustomError("labels", "{rule}", {"rule": rule})


def _model_name(value: object) -> object:
    if isinstance(value, str) and not NAME.match(value):
        rule = "the name of a GPU model, such as H100, is required"
        raise PydanticCustomError("accelerator", "{rule}", {"rule": rule})
    return value


_AUTO = BeforeValidator(_number_or_auto)
_Scalar = Annotated[
    Any,
    BeforeValidator(_scalar),
    WithJsonSchema({"type": ["string", "number", "integer", "boolean", "null"]}),
]
_Conditions = Annotated[
    dict[str, Any],
    WithJsonSchema(
        {
            "type": "object",
            "additionalProperties": {"type": ["string", "number", "boolean", "null", "array"]},
        }
    ),
]


_LabelValues = Annotated[
    tuple[str, ...],
    BeforeValidator(_label_values),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "string"},
                {"type": "array", "items": {"type": "string"}, "minItems": 1},
            ]
        }
    ),
]


def _auto_schema(number: str, **limits: float) -> WithJsonSchema:
    return WithJsonSchema({"anyOf": [{"const": "auto"}, {"type": number, **limits}]})


def _plain_name(value: object) -> object:
    if isinstance(value, str) and not NAME.match(value):
        rule = "a plain file name of letters, digits, `_`, `-`, `.` and blanks is required"
        raise PydanticCustomError("name", "{rule}", {"rule": rule})
    return value


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

    choice: list[_Scalar] = _kind("One of these values.")
    uniform: FloatRange = _kind("A number, every value as likely.")
    loguniform: FloatRange = _kind("A number > 0, every factor as likely.")
    int: IntegerRange = _kind("An integer, every value as likely.")
    logint: IntegerRange = _kind("An integer > 0, every factor as likely.")
    when: _Conditions = _kind(
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
    gpu: Annotated[
        Annotated[float, Field(ge=0)] | None,
        _AUTO,
        AfterValidator(_whole_or_share),
        _auto_schema("number", minimum=0),
    ] = Field(
        default=None,
        description="GPUs, or a share of one and of its memory; `auto` takes one where there is "
        "one, else none.",
    )
    accelerator: Annotated[str, BeforeValidator(_model_name)] | None = Field(
        default=None,
        description="GPU model that trials must run on, as Ray names it; null for any.",
    )
    custom: dict[str, Annotated[float, Field(gt=0), AfterValidator(_whole_or_part)]] = Field(
        default={}, description="Other resources of a node that a trial occupies, by name."
    )
    labels: dict[str, _LabelValues] = Field(
        default={},
        description="Labels a node must have to run trials: each with its value, or one of these.",
    )


class SearchBlock(Block):
    """The search stage and the budgets of all stages together."""

    trials: int = Field(default=_DEFAULT.search.trials, ge=1, description="Trials of the search.")
    sampler: SamplerName = Field(
        default=_DEFAULT.search.sampler, description="`tpe` learns from results."
    )
    max_concurrent: Annotated[
        Annotated[int, Field(ge=1)] | None, _AUTO, _auto_schema("integer", minimum=1)
    ] = Field(default=None, description="Trials at once; `auto` fills the machine.")
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
        description="Fresh seeds of each; fewer than 5 never name a winner.",
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


def _interval(value: list[float]) -> list[float]:
    if len(value) == _NUM_ENDS and value[0] <= value[1]:
        return value
    raise PydanticCustomError("interval", "`[low, high]` with `low <= high` is required")


_Interval = Annotated[
    list[float],
    AfterValidator(_interval),
    WithJsonSchema(
        {
            "type": "array",
            "items": {"type": "number"},
            "minItems": _NUM_ENDS,
            "maxItems": _NUM_ENDS,
        }
    ),
]


class CourseRowBlock(Block):
    """What a long training should have reached at the end of one epoch."""

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, _Interval]

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
    **{  # type: ignore[call-overload]  # one key for each field that settings.py declares
        spec.name: _alarm_field(spec, _ALARM_HINTS[spec.name])
        for spec in dataclasses.fields(AlarmSettings)
    },
)


class SpaceFile(Block):
    """A space file: what is trained, which settings vary, and how hard to look."""

    name: Annotated[str, BeforeValidator(_plain_name)] = Field(
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


_BLOCKS: Mapping[KeyPath, type[Block]] = {
    (): SpaceFile,
    ("trial",): TrialBlock,
    ("search",): SearchBlock,
    ("search", "resources"): ResourcesBlock,
    ("prune",): PruneBlock,
    ("confirm",): ConfirmBlock,
    ("report",): ReportBlock,
    ("alarms",): AlarmsBlock,
    ("space", "*"): ParameterBlock,
    ("space", "*", "*"): FloatRange,
}


def shown_path(path: KeyPath) -> KeyPath:
    """Return the part of a path that a message names: a varying setting is named whole."""
    return path[:2] if path[:1] == ("space",) else path


def parse_file(tree: Node, problems: Problems) -> SpaceFile | None:
    """Check the types and ranges of every key.

    Args:
        tree: The file.
        problems: Where problems are noted.

    Returns:
        The file as typed blocks; None where something was wrong.
    """
    try:
        return SpaceFile.model_validate(tree.plain())
    except GrammarError as error:
        for detail in error.errors(include_url=False):
            _note(detail, tree, problems)
    return None


def _note(detail: ErrorDetails, tree: Node, problems: Problems) -> None:
    path: KeyPath = tuple(detail["loc"])
    kind = detail["type"]
    if kind == "missing":
        message = f"`{path[-1]}` is required, but it is missing. {_missing_hint(path)}"
        problems.add(tree.place_of(path[:-1]), shown_path(path[:-1]), message)
        return
    if kind == "extra_forbidden":
        known = _keys_of(path[:-1])
        word = str(path[-1])
        hint = did_you_mean(word, known) or f" Known here: {', '.join(known)}."
        problems.add(tree.key_place(path), shown_path(path), f"no such key.{hint}")
        return
    node = tree.at(path) or tree
    rule, hint = _rule(detail, node)
    problems.add(tree.place_of(path), shown_path(path), f"{rule}, but got {node.shown()}.{hint}")


def _missing_hint(path: KeyPath) -> str:
    if path == ("task",):
        return "Name what is trained, such as `task: teacher`."
    return f"Add `{dotted(path[-1:])}: ...`."


def _keys_of(path: KeyPath) -> list[str]:
    pattern = tuple("*" if index and path[0] == "space" else key for index, key in enumerate(path))
    return list(_BLOCKS[pattern].model_fields)


_TYPE_RULES: Mapping[str, str] = {
    "int_type": "an integer is required",
    "int_from_float": "an integer is required",
    "float_type": "a number is required",
    "string_type": "a word is required",
    "bool_type": "`true` or `false` is required",
    "list_type": "a list is required",
    "dict_type": "a mapping is required",
    "model_type": "a mapping is required",
    "model_attributes_type": "a mapping is required",
}
_LIMIT_RULES: Mapping[str, tuple[str, str]] = {
    "greater_than": (">", "gt"),
    "greater_than_equal": (">=", "ge"),
    "less_than": ("<", "lt"),
    "less_than_equal": ("<=", "le"),
}


def _rule(detail: ErrorDetails, node: Node) -> tuple[str, str]:
    """Say the rule that was broken, and the way out."""
    kind = detail["type"]
    context = detail.get("ctx", {})
    value: Json = node.value if node.kind == "scalar" else None
    if kind in _TYPE_RULES:
        return _TYPE_RULES[kind], _type_hint(kind, node, detail["loc"])
    if kind in _LIMIT_RULES:
        sign, key = _LIMIT_RULES[kind]
        name = dotted(tuple(detail["loc"])[-1:])
        limit = context[key]
        limit = int(limit) if float(limit).is_integer() else limit
        hint = f" Give {limit} or more." if kind == "greater_than_equal" else ""
        hint = f" Give {limit} or less." if kind == "less_than_equal" else hint
        return f"`{name} {sign} {limit}` must hold", hint
    if kind == "literal_error":
        words = str(context["expected"]).replace("'", "").replace(" or ", ", ")
        return f"one of {words} is required", did_you_mean(str(value), words.split(", "))
    return detail["msg"].rstrip("."), null_hint(value, nullable=False)


_OPTIONAL_KEYS = frozenset({"time_budget_s", "step_budget", "accelerator", "epoch_steps"})


def _type_hint(kind: str, node: Node, path: KeyPath) -> str:
    if tuple(path[:1]) == ("space",) and len(path) == 2:  # noqa: PLR2004  (space.NAME)
        return " Write `{choice: [...]}`, or put one value under `fixed`."
    if node.kind == "scalar" and node.value is None and kind not in {"int_type", "float_type"}:
        return " Fill it or remove the key."
    if isinstance(node.value, float) and node.value.is_integer() and kind.startswith("int"):
        return f" Write {int(node.value)}."
    return null_hint(node.value, nullable=str(path[-1]) in _OPTIONAL_KEYS if path else False)
