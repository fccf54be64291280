"""Values to YAML text that reads back as the same values."""

import json
import re
from collections.abc import Mapping

from stability_search.inert import inert
from stability_search.records.values import Json, Scalar
from stability_search.settings.trial import SETTING_NAMES
from stability_search.space.model import Space
from stability_search.space.reading import read_tree, resolve_scalar
from stability_search.space.tree import Problems

_PLAIN_WORD = re.compile(r"[A-Za-z_./][\w./-]*\Z", re.ASCII)
_STUDY_KEYS = ("task_args", "seed", "trial")
_LATER_KEYS = ("search", "prune", "confirm", "report", "alarms")


def to_yaml(data: Mapping[str, Json]) -> str:
    """Write a mapping as YAML 1.2, nested mappings as blocks and lists in brackets.

    Args:
        data: JSON values, all numbers finite.

    Example:
        >>> print(to_yaml({"trial": {"steps": 200}, "fixed": {"eps": 1e-08}}), end="")
        trial:
          steps: 200
        fixed:
          eps: 1.0e-08
    """
    return "".join(f"{line}\n" for line in _block(data, ""))


def _block(data: Mapping[str, Json], indent: str) -> list[str]:
    lines = []
    for key, value in data.items():
        name = _word(key)
        if isinstance(value, Mapping) and value:
            lines += [f"{indent}{name}:", *_block(value, f"{indent}  ")]
        else:
            lines.append(f"{indent}{name}: {flow_text(value)}")
    return lines


def flow_text(value: Json) -> str:
    """Write one JSON value on one line."""
    if isinstance(value, Mapping):
        return (
            "{"
            + ", ".join(f"{_word(key)}: {flow_text(item)}" for key, item in value.items())
            + "}"
        )
    if isinstance(value, list | tuple):
        return "[" + ", ".join(flow_text(item) for item in value) + "]"
    return _scalar(value)


def _scalar(value: Scalar) -> str:
    if isinstance(value, str):
        return _word(value)
    if isinstance(value, float):
        text = repr(value)  # 1e-08; other readers than ours want the point
        mantissa, exponent, power = text.partition("e")
        return text if "." in mantissa else f"{mantissa}.0{exponent}{power}"
    return json.dumps(value, allow_nan=False)


def _word(text: str) -> str:
    if _PLAIN_WORD.match(text) and isinstance(resolve_scalar(text), str):
        return text if text.lower() not in {"yes", "no", "on", "off", "y", "n"} else f'"{text}"'
    return inert(json.dumps(text, ensure_ascii=False))  # YAML reads these escapes, too


def best_yaml(space: Space, settings: Mapping[str, Json], comment: str) -> str:
    """Write one configuration as a space file of its own.

    Args:
        space: The space it was found in.
        settings: What `Space.settings` or `Space.at_learning_rate` returned.
        comment: The verdict; its lines stand on top.

    Returns:
        Name, task, seed and study blocks as given, and every active setting under `fixed`. A
        relative path of the task that exists is made absolute: the text may lie elsewhere.
    """
    tree = read_tree(space.text, Problems(str(space.path), space.text))
    given = {} if tree is None else tree.plain()
    inactive = {
        parameter.name
        for parameter in space.parameters
        if not space.is_active(parameter, settings)
    }
    data: dict[str, Json] = {"name": space.study.name, "task": space.task_name}
    data |= {key: given[key] for key in _STUDY_KEYS if key in given}
    if isinstance(arguments := data.get("task_args"), Mapping):
        data["task_args"] = {name: _found(space, value) for name, value in arguments.items()}
    data["fixed"] = {
        name: value if name in SETTING_NAMES else _found(space, value)
        for name, value in settings.items()
        if name not in inactive
    }
    data |= {key: given[key] for key in _LATER_KEYS if key in given}
    lines = [f"# {inert(line)}".rstrip() for line in comment.splitlines()]
    return "".join(f"{line}\n" for line in lines) + to_yaml(data)


def _found(space: Space, value: Json) -> Json:
    """Return a relative path that exists as an absolute one; any other value as it is."""
    if not isinstance(value, str) or not value:
        return value
    path = space.folder / value
    try:
        return str(path.resolve()) if path.exists() else value
    except (OSError, ValueError):  # no name a file can have
        return value
