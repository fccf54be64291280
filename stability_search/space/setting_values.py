"""Which value a setting may take, and what is known of it from `settings` alone."""

import dataclasses
import difflib
import inspect
import re
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any, Literal

from stability_search.records.values import Json
from stability_search.settings.engine import ENGINE_SETTING_NAMES, EngineSettings
from stability_search.settings.trial import SETTING_NAMES, TaskReference, TrialConfig

MODULES_SETTING = "attention_modules"  # the one setting whose value is a list

# Names other tools use for our settings, too far away for difflib.
_OTHER_NAMES: Mapping[str, str] = {
    "lr": "learning_rate",
    "grad_clip": "clip_norm",
    "max_grad_norm": "clip_norm",
    "gradient_clip_val": "clip_norm",
    "gradient_accumulation_steps": "accumulation_steps",
    "dtype": "precision",
    "amp": "precision",
    "adam_epsilon": "eps",
    "epsilon": "eps",
    "betas": "beta2",
}
_NOTHING_WORDS = frozenset({"none", "null", "off", "no", "nil", "~", "nan", "disabled"})
_TRUE_WORDS = frozenset({"yes", "on", "true"})
_FALSE_WORDS = frozenset({"no", "off", "false"})


def _hints(owner: type) -> Mapping[str, Any]:
    return typing.get_type_hints(owner)


_SETTING_HINTS: Mapping[str, Any] = {
    name: (_hints(EngineSettings) if name in ENGINE_SETTING_NAMES else _hints(TrialConfig))[name]
    for name in SETTING_NAMES
}


def _defaults(owner: type) -> dict[str, Any]:
    return {spec.name: spec.default for spec in dataclasses.fields(owner)}


SETTING_DEFAULTS: Mapping[str, Json] = {
    name: [] if name == MODULES_SETTING else value
    for name, value in {**_defaults(TrialConfig), **_defaults(EngineSettings)}.items()
    if name in SETTING_NAMES and name != "learning_rate"
}
"""Value of every setting the engine or the trial knows, where nobody names it."""


def _members(hint: Any) -> tuple[Any, ...]:  # noqa: ANN401  (a type)
    if typing.get_origin(hint) in {typing.Union, types.UnionType}:
        return typing.get_args(hint)
    return (hint,)


def takes_null(name: str) -> bool:
    """Say whether an engine setting may be null, which turns it off."""
    return type(None) in _members(_SETTING_HINTS[name])


def value_type(name: str) -> Literal["number", "integer", "bool", "word", "list"]:
    """Name the kind of value that an engine or trial setting takes, null aside."""
    members = _members(_SETTING_HINTS[name])
    if float in members:
        return "number"
    if bool in members:
        return "bool"
    if int in members:
        return "integer"
    return "list" if name == MODULES_SETTING else "word"


_TYPE_RULES: Mapping[str, str] = {
    "number": "a number is required",
    "integer": "an integer is required",
    "bool": "`true` or `false` is required",
    "word": "a word is required",
    "list": "a list of patterns is required",
}


def null_hint(value: object, *, nullable: bool) -> str:
    """Say what to write instead of a word that other languages read as null or bool."""
    if not isinstance(value, str):
        return ""
    if nullable and value.lower() in _NOTHING_WORDS:
        return " Write `null` to turn it off."
    return ""


def _bool_hint(value: object) -> str:
    if isinstance(value, str) and value.lower() in _TRUE_WORDS | _FALSE_WORDS:
        return f" Write `{'true' if value.lower() in _TRUE_WORDS else 'false'}`."
    return ""


def _has_type(name: str, value: Json) -> bool:
    if value is None:
        return takes_null(name)
    kind = value_type(name)
    if kind == "number":
        return isinstance(value, int | float) and not isinstance(value, bool)
    if kind == "integer":
        return isinstance(value, int) and not isinstance(value, bool)
    if kind == "bool":
        return isinstance(value, bool)
    if kind == "list":
        return isinstance(value, list) and all(isinstance(item, str) for item in value)
    return isinstance(value, str)


def normalised(name: str, value: Json) -> Json:
    """Return a setting's value in the one form it is stored in.

    Args:
        name: Any setting.
        value: A value it may take.

    Returns:
        A float for an engine setting that is one, so that 1 and 1.0 are one configuration;
        every other value unchanged.

    Example:
        >>> normalised("clip_norm", 1), normalised("batch_size", 1), normalised("hidden", 1)
        (1.0, 1, 1)
    """
    is_integer = isinstance(value, int) and not isinstance(value, bool)
    if name in _SETTING_HINTS and is_integer and value_type(name) == "number":
        return float(typing.cast("int", value))
    return value


def checked(name: str, value: Json, *, shown: str) -> Json:
    """Check a value of a setting that the engine or the trial knows.

    Args:
        name: One of `settings.SETTING_NAMES`.
        value: The candidate.
        shown: The candidate as the message quotes it.

    Returns:
        The value in its stored form.

    Raises:
        ValueError: Rule, value received, way out; without the setting's name.
    """
    if not _has_type(name, value):
        kind = value_type(name)
        rule = _TYPE_RULES[kind]
        if kind == "word":
            rule = f"one of {', '.join(typing.get_args(_SETTING_HINTS[name]))} is required"
        hint = null_hint(value, nullable=takes_null(name))
        hint = hint or (_bool_hint(value) if kind == "bool" else "")
        raise ValueError(f"{rule}, but got {shown}.{hint}")
    try:
        _build(name, value)
    except ValueError as error:
        rule = str(error).removeprefix(f"{name}: ").rpartition(", but got ")[0]
        hint = null_hint(value, nullable=takes_null(name)) or _range_hint(name, value)
        raise ValueError(f"{rule}, but got {shown}.{hint}") from error
    return normalised(name, value)


def _range_hint(name: str, value: Json) -> str:
    if isinstance(value, str):
        return did_you_mean(value, typing.get_args(_SETTING_HINTS[name]))
    if value == 0 and takes_null(name):
        return " Write `null` to turn it off."
    return ""


def _build(name: str, value: Json) -> None:
    """Let the dataclass that will hold the value judge it."""
    if name in ENGINE_SETTING_NAMES:
        held: Any = tuple(value) if isinstance(value, list) else value
        EngineSettings(**{"learning_rate": 1.0, name: held})
        return
    arguments: dict[str, Any] = {name: value}
    TrialConfig(
        task=TaskReference(module="any", class_name="Any"),
        engine=EngineSettings(learning_rate=1.0, num_planned_steps=1),
        num_planned_steps=1,
        **arguments,
    )


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return ` Did you mean ...?` for the closest known name, or nothing."""
    names = list(known)
    if _OTHER_NAMES.get(word) in names:
        return f" Did you mean `{_OTHER_NAMES[word]}`?"
    close = difflib.get_close_matches(word[:80], names, n=1)
    return f" Did you mean `{close[0]}`?" if close else ""


def attribute_docs(owner: type) -> Mapping[str, str]:
    """Read the Attributes section of a class's docstring.

    Args:
        owner: A documented dataclass.

    Returns:
        One line of text for each attribute.

    Example:
        >>> attribute_docs(EngineSettings)["norm"]
        '`keep`, or `group` to turn BatchNorm into GroupNorm.'
    """
    docs: dict[str, str] = {}
    section = inspect.cleandoc(owner.__doc__ or "").partition("Attributes:\n")[2]
    name = ""
    for line in section.splitlines():
        if line and not line.startswith(" "):
            break
        start = re.match(r" {4}(\w+): (.*)", line)
        if start:
            name = start[1]
            docs[name] = start[2]
        elif name and line.strip():
            docs[name] += f" {line.strip()}"
    return docs
