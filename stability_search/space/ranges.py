"""One entry of the `space` block: from its tree to a `Parameter`."""

from collections.abc import Mapping
from typing import cast

from stability_search.records.values import Scalar
from stability_search.settings.trial import SETTING_NAMES
from stability_search.space.parameter import KINDS, Parameter, ParameterKind
from stability_search.space.setting_values import (
    MODULES_SETTING,
    checked,
    normalised,
    value_type,
)
from stability_search.space.tree import Node, Problems

_KNOWN_KEYS = frozenset({*KINDS, "when"})


def read_parameter(name: str, node: Node, problems: Problems) -> Parameter | None:
    """Read what a setting may be.

    Args:
        name: The setting.
        node: What stands under it in `space`; keys and types were judged by the grammar.
        problems: Where problems are noted.

    Returns:
        The parameter; None where its range is wrong.
    """
    if node.kind != "mapping":
        return None
    if name == MODULES_SETTING:
        problems.add(node.place, ("space", name), "may stand in `fixed` only. Move it there.")
        return None
    kinds = [kind for kind in KINDS if kind in node.entries]
    when = _when(name, node, problems)
    if len(kinds) != 1:
        if set(node.entries) <= _KNOWN_KEYS:
            got = ", ".join(kinds) or "none"
            message = f"exactly one of {', '.join(KINDS)} is required, but got {got}."
            problems.add(node.place, ("space", name), message)
        return None
    kind = kinds[0]
    if kind == "choice":
        choices = _choices(name, node.entries["choice"], problems)
        return Parameter(name=name, kind=kind, choices=choices, when=when) if choices else None
    limits = _limits(name, kind, node, problems)
    if limits is None:
        return None
    return Parameter(name=name, kind=kind, low=limits[0], high=limits[1], when=when)


def _when(name: str, node: Node, problems: Problems) -> Mapping[str, tuple[Scalar, ...]]:
    block = node.entries.get("when")
    if block is None or block.kind != "mapping":
        return {}
    when: dict[str, tuple[Scalar, ...]] = {}
    for other, value in block.entries.items():
        items = value.items if value.kind == "list" else (value,)
        if not items or any(item.kind != "scalar" for item in items):
            message = (
                f"`when`: `{other}` takes one value, or a list of them, but got {_shown(value)}."
            )
            problems.add(value.place, ("space", name), message)
            continue
        when[other] = tuple(cast("Scalar", normalised(other, item.value)) for item in items)
    return when


def _shown(node: Node) -> str:
    return "an empty list" if node.kind == "list" and not node.items else node.shown()


def _choices(name: str, node: Node, problems: Problems) -> tuple[Scalar, ...]:
    if node.kind != "list":
        return ()
    if not node.items:
        problems.add(
            node.place, ("space", name), "`choice` needs one value or more, but got none."
        )
    choices: list[Scalar] = []
    seen: set[tuple[bool, Scalar]] = set()  # true is not 1, but 1 equals 1.0
    is_right = True
    for item in node.items:
        if item.kind != "scalar":
            return ()  # said by the grammar
        value: Scalar = item.value
        if name in SETTING_NAMES:
            try:
                value = cast("Scalar", checked(name, item.value, shown=item.shown()))
            except ValueError as error:
                problems.add(item.place, ("space", name), str(error))
                is_right = False
                continue
        if (isinstance(value, bool), value) in seen:
            message = f"each choice may stand once, but got {item.shown()} twice. Remove one."
            problems.add(item.place, ("space", name), message)
            is_right = False
        seen.add((isinstance(value, bool), value))
        choices.append(value)
    return tuple(choices) if is_right else ()


def _limits(
    name: str, kind: ParameterKind, node: Node, problems: Problems
) -> tuple[float, float] | None:
    if not _takes_range(name, kind, node, problems):
        return None
    limits = node.entries[kind]
    low, high = limits.child("low"), limits.child("high")
    if low is None or high is None or not _is_number(low) or not _is_number(high):
        return None  # said by the grammar
    if kind in {"loguniform", "logint"} and cast("float", low.value) <= 0:
        example = "1e-6" if kind == "loguniform" else "1"
        message = f"`low > 0` must hold, but got low={low.raw}. Try {example}."
        problems.add(low.place, ("space", name), message)
        return None
    if name in SETTING_NAMES and not _are_checked(name, low, high, problems):
        return None
    if not cast("float", low.value) < cast("float", high.value):
        hint = "Put it under `fixed`." if low.value == high.value else "Swap them."
        message = f"`low < high` must hold, but got low={low.raw}, high={high.raw}. {hint}"
        problems.add(node.place, ("space", name), message)
        return None
    is_whole = kind in {"int", "logint"}
    first, last = cast("float", low.value), cast("float", high.value)
    return (first, last) if is_whole else (float(first), float(last))


def _takes_range(name: str, kind: ParameterKind, node: Node, problems: Problems) -> bool:
    if name not in SETTING_NAMES:
        return True
    wanted = value_type(name)
    if wanted == "number" or (wanted == "integer" and kind in {"int", "logint"}):
        return True
    fitting = "choice"
    if wanted == "integer":
        fitting = "int" if kind == "uniform" else "logint"
    message = f"its values are no {kind} range. Use `{fitting}`."
    problems.add(node.key_places[kind], ("space", name), message)
    return False


def _is_number(node: Node) -> bool:
    return isinstance(node.value, int | float) and not isinstance(node.value, bool)


def _are_checked(name: str, low: Node, high: Node, problems: Problems) -> bool:
    are_right = True
    for limit in (low, high):
        try:
            checked(name, limit.value, shown=limit.shown())
        except ValueError as error:
            problems.add(limit.place, ("space", name), str(error))
            are_right = False
    return are_right
