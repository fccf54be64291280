"""Settings that differ: of the two space files, and of the two configurations."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from stability_search.comparison.sides import Side
from stability_search.records.values import Json
from stability_search.space import Parameter, Space, changed_values
from stability_search.space.parameter import same_value
from stability_search.space.resuming import NOTHING

_NOT_ASKED = frozenset({"name"})  # what a study is called changes nothing


@dataclass(frozen=True, kw_only=True, slots=True)
class Difference:
    """One value that is not the same in both runs.

    Attributes:
        name: Dotted key of the space file, or a setting.
        first: Its value in the first run; None where it is off, inactive or not known.
        second: The same of the second.
        is_in_first: True if the first run names it; else its value is the default, if known.
        is_in_second: True if the second does.
    """

    name: str
    first: Json
    second: Json
    is_in_first: bool = True
    is_in_second: bool = True


def space_differences(first: Space, second: Space) -> tuple[Difference, ...]:
    """List what was asked of one study and not of the other, in the order of the space files.

    A setting is one line, whether it varies or not; a value that is left out counts as its
    default.
    """
    return (*_of_the_study(first, second), *_of_the_settings(first, second))


def _of_the_study(first: Space, second: Space) -> list[Difference]:
    found = []
    for name, (was, now) in changed_values(first, second).items():
        if name.partition(".")[0] in {"space", "fixed"} or name in _NOT_ASKED:
            continue
        found.append(
            Difference(
                name=name,
                first=as_json(was),
                second=as_json(now),
                is_in_first=was is not NOTHING,
                is_in_second=now is not NOTHING,
            )
        )
    return found


def _of_the_settings(first: Space, second: Space) -> list[Difference]:
    ours, theirs = _settings(first), _settings(second)
    found = []
    for name in dict.fromkeys((*ours, *theirs)):
        found += _difference(name, first, second, ours, theirs)
    return found


def _settings(space: Space) -> dict[str, object]:
    """Return every named setting, as the space file writes it."""
    varying = {parameter.name: _written(parameter) for parameter in space.parameters}
    return {**space.fixed, **varying}


def _written(parameter: Parameter) -> dict[str, object]:
    values: object = list(parameter.choices)
    if parameter.kind != "choice":
        values = {"low": parameter.low, "high": parameter.high}
    when = {name: list(allowed) for name, allowed in parameter.when.items()}
    return {parameter.kind: values, **({"when": when} if when else {})}


def setting_differences(first: Side, second: Side) -> tuple[Difference, ...]:
    """List the settings that the two configurations of the verdicts do not share.

    A setting that one space file does not name has the default of the engine or of the task
    there, where that is known.

    Returns:
        One each; empty where a run has no such configuration.
    """
    ours, theirs = first.settings, second.settings
    if not ours or not theirs:
        return ()
    found = []
    for name in dict.fromkeys((*ours, *theirs)):
        found += _difference(name, first.space, second.space, ours, theirs)
    return tuple(found)


def _difference(
    name: str,
    first: Space,
    second: Space,
    ours: Mapping[str, object],
    theirs: Mapping[str, object],
) -> list[Difference]:
    """Return the difference in one setting, none or one."""
    was = ours.get(name, unnamed(first, name))
    now = theirs.get(name, unnamed(second, name))
    if same_value(was, now):
        return []
    difference = Difference(
        name=name,
        first=as_json(was),
        second=as_json(now),
        is_in_first=name in ours,
        is_in_second=name in theirs,
    )
    return [difference]


def unnamed(space: Space, name: str) -> object:
    """Return what holds where no setting is named so: an argument of the task, or a default."""
    return space.task_args.get(name, space.defaults.get(name, NOTHING))


def as_json(value: object) -> Json:
    """Return any value of a space file as JSON; what is not there, or not finite, is None."""
    if value is None or value is NOTHING:
        return None
    if isinstance(value, bool | int):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        items: Mapping[Any, Any] = value
        return {str(key): as_json(item) for key, item in items.items()}
    if isinstance(value, list | tuple):
        return [as_json(item) for item in value]
    return str(value)
