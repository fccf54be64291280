"""What a key of a space file may hold: words, numbers and lists that have a rule of their own."""

import re
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, Field, WithJsonSchema
from pydantic_core import PydanticCustomError

NAME = re.compile(r"\w[\w. -]{0,99}\Z")
"""A study's name, which is a plain file name."""
LABEL = re.compile(r"[A-Za-z0-9]([\w.-]{0,61}[A-Za-z0-9])?\Z", re.ASCII)
"""The value of a node's label, as Ray and Kubernetes want it."""
_MIN_GPU_SHARE = 0.01  # Ray counts in parts of 10,000, and a smaller share has no memory to use
_NUM_ENDS = 2  # of an interval


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


def _plain_name(value: object) -> object:
    if isinstance(value, str) and not NAME.match(value):
        rule = "a plain file name of letters, digits, `_`, `-`, `.` and blanks is required"
        raise PydanticCustomError("name", "{rule}", {"rule": rule})
    return value


def _interval(value: list[float]) -> list[float]:
    if len(value) == _NUM_ENDS and value[0] <= value[1]:
        return value
    raise PydanticCustomError("interval", "`[low, high]` with `low <= high` is required")


def _auto_schema(number: str, **limits: float) -> WithJsonSchema:
    return WithJsonSchema({"anyOf": [{"const": "auto"}, {"type": number, **limits}]})


ScalarValue = Annotated[
    Any,
    BeforeValidator(_scalar),
    WithJsonSchema({"type": ["string", "number", "integer", "boolean", "null"]}),
]
Conditions = Annotated[
    dict[str, Any],
    WithJsonSchema(
        {
            "type": "object",
            "additionalProperties": {"type": ["string", "number", "boolean", "null", "array"]},
        }
    ),
]
LabelValues = Annotated[
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
Interval = Annotated[
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

AutoGpu = Annotated[
    Annotated[float, Field(ge=0)] | None,
    BeforeValidator(_number_or_auto),
    AfterValidator(_whole_or_share),
    _auto_schema("number", minimum=0),
]
"""GPUs of a trial; `auto` is None."""
AutoCount = Annotated[
    Annotated[int, Field(ge=1)] | None,
    BeforeValidator(_number_or_auto),
    _auto_schema("integer", minimum=1),
]
"""An integer >= 1; `auto` is None."""
Amount = Annotated[float, Field(gt=0), AfterValidator(_whole_or_part)]
"""So much of a resource that nodes were started with."""
ModelName = Annotated[str, BeforeValidator(_model_name)]
"""A GPU model, as Ray names it."""
StudyName = Annotated[str, BeforeValidator(_plain_name)]
"""A plain file name."""
