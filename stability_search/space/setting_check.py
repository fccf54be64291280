"""The settings of a space file: `fixed`, `space` with its `when`, and `start_with`."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from stability_search.records.values import Json, Scalar
from stability_search.settings.trial import SETTING_NAMES
from stability_search.space.parameter import Parameter, same_value
from stability_search.space.ranges import read_parameter
from stability_search.space.setting_values import (
    MODULES_SETTING,
    checked,
    did_you_mean,
    normalised,
)
from stability_search.space.task_check import CheckedTask
from stability_search.space.tree import KeyPath, Node, Problems, shortened

_NO_VALUE = object()


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckedSettings:
    """The settings of a file, as far as they were right.

    Attributes:
        fixed: Settings that do not vary.
        parameters: Settings that vary, each after those its `when` names.
        start_with: Configurations tried first.
        unchecked: Names that only the task itself can judge.
    """

    fixed: Mapping[str, Json] = field(default_factory=dict)
    parameters: tuple[Parameter, ...] = ()
    start_with: tuple[Mapping[str, Scalar], ...] = ()
    unchecked: tuple[str, ...] = ()


def check_settings(tree: Node, task: CheckedTask, problems: Problems) -> CheckedSettings:
    """Check every setting of the file.

    Args:
        tree: The file.
        task: Its task, whose constructor knows some of the names.
        problems: Where problems are noted.
    """
    return _SettingCheck(tree, task, problems).run()


def _entries(tree: Node, block: str) -> Mapping[str, Node]:
    node = tree.child(block)
    return node.entries if node is not None else {}


class _SettingCheck:
    def __init__(self, tree: Node, task: CheckedTask, problems: Problems) -> None:
        self._tree = tree
        self._task = task
        self._problems = problems
        self._fixed_nodes = _entries(tree, "fixed")
        self._space_nodes = _entries(tree, "space")
        self._fixed: dict[str, Json] = {}
        self._parameters: dict[str, Parameter] = {}
        self._unclear: set[str] = set()  # whose `when` was wrong: nobody knows when they apply

    def run(self) -> CheckedSettings:
        self._check_learning_rate()
        for name, node in self._fixed_nodes.items():
            if self._is_known(("fixed", name), name):
                self._fixed[name] = self._fixed_value(name, node)
        for name, node in self._space_nodes.items():
            if self._is_known(("space", name), name):
                parameter = read_parameter(name, node, self._problems)
                if parameter is not None:
                    self._parameters[name] = parameter
            self._check_not_fixed(name)
        for name in list(self._parameters):
            self._check_when(name)
        ordered = self._ordered()
        return CheckedSettings(
            fixed=self._fixed,
            parameters=ordered,
            start_with=self._start_with(ordered),
            unchecked=self._unchecked(),
        )

    def _unchecked(self) -> tuple[str, ...]:
        if self._task.constructor.is_complete:
            return ()
        names = [*self._task.args, *self._fixed_nodes, *self._space_nodes]
        known = {*SETTING_NAMES, *self._task.constructor.parameters}
        return tuple(sorted({name for name in names if name not in known}))

    def _check_learning_rate(self) -> None:
        if "learning_rate" in self._fixed_nodes or "learning_rate" in self._space_nodes:
            return
        message = (
            "`learning_rate` is required in `space` or `fixed`, but it is in neither. "
            "Add `learning_rate: {loguniform: {low: 1e-5, high: 1e-1}}` to `space`."
        )
        self._problems.add(self._tree.place, (), message)

    def _check_not_fixed(self, name: str) -> None:
        if name not in self._fixed_nodes:
            return
        other = self._tree.key_place(("fixed", name))
        where = other.origin or f"line {other.line}"
        message = f"a setting varies or is fixed, but `fixed` has it too ({where}). Remove one."
        self._problems.add(self._tree.key_place(("space", name)), ("space", name), message)

    def _is_known(self, path: KeyPath, name: str) -> bool:
        """Note a name that neither the engine nor the task knows, or that is given twice."""
        own = self._task.constructor
        place = self._tree.key_place(path)
        if name in SETTING_NAMES:
            return True
        if name in self._task.args:
            message = "the value is given in `task_args` too. Remove one."
            self._problems.add(place, path, message)
            return False
        if name in own.parameters or (not own.is_complete and name.isidentifier()):
            return True
        hint = did_you_mean(name, [*SETTING_NAMES, *own.parameters])
        if not hint and own.is_complete:
            hint = f" The task takes {', '.join(own.parameters) or 'none'}; the engine's are in "
            hint += "`stability-search schema`."
        self._problems.add(place, path, f"no such setting.{hint}")
        return False

    def _fixed_value(self, name: str, node: Node) -> Json:
        path: KeyPath = ("fixed", name)
        value: Json = node.plain()
        if name in SETTING_NAMES:
            try:
                return checked(name, value, shown=node.shown())
            except ValueError as error:
                self._problems.add(node.place, path, str(error))
        elif node.kind != "scalar":
            message = f"a setting of the task is one value, but got {node.shown()}. "
            self._problems.add(node.place, path, f"{message}Put it under `task_args`.")
        return value

    def _check_when(self, name: str) -> None:
        when = self._tree.at(("space", name, "when"))
        if when is None:
            return
        if name == "learning_rate":
            message = "the learning rate must always apply. Remove its `when`."
            place = self._tree.key_place(("space", name, "when"))
            self._problems.add(place, ("space", name), message)
        for other, node in when.entries.items():
            if not self._is_condition_right(name, other, node):
                self._unclear.add(name)

    def _is_condition_right(self, name: str, other: str, node: Node) -> bool:
        path: KeyPath = ("space", name)
        place = self._tree.key_place(("space", name, "when", other))
        is_named = other in self._fixed_nodes or other in self._space_nodes
        if not is_named and other not in self._task.defaults:
            known = [*self._fixed_nodes, *self._space_nodes, *self._task.defaults]
            hint = did_you_mean(other, known) or " Name it under `fixed` or `space`."
            self._problems.add(place, path, f"`when`: no setting `{shortened(other)}`.{hint}")
            return False
        if other == MODULES_SETTING:
            message = f"`when`: `{MODULES_SETTING}` is a list and decides nothing. Remove it."
            self._problems.add(place, path, message)
            return False
        items = node.items if node.kind == "list" else (node,)
        are_right = [self._is_condition_value_right(path, other, item) for item in items]
        return all(are_right)

    def _is_condition_value_right(self, path: KeyPath, other: str, item: Node) -> bool:
        if item.kind != "scalar":
            return False  # said by read_parameter
        parameter = self._parameters.get(other)
        if parameter is not None:
            value = normalised(other, item.value)
            may_be_inactive = item.value is None and bool(parameter.when)
            if not parameter.contains(value) and not may_be_inactive:
                message = f"`when`: `{other}` never is {item.shown()}, it is {_reach(parameter)}."
                hint = _choice_hint(parameter, item)
                self._problems.add(item.place, path, message + hint)
                return False
            return True
        if other in SETTING_NAMES:
            try:
                checked(other, item.value, shown=item.shown())
            except ValueError as error:
                self._problems.add(item.place, path, f"`when`: `{other}`: {error}")
                return False
        return True

    def _ordered(self) -> tuple[Parameter, ...]:
        """Put each parameter behind those its `when` names; note circles."""
        left = dict(self._parameters)
        ordered: list[Parameter] = []
        while left:
            ready = [one for one in left.values() if not set(one.when) & set(left)]
            if not ready:
                for name in self._note_circle(left):
                    del left[name]
                continue
            ordered.append(ready[0])
            del left[ready[0].name]
        return tuple(ordered)

    def _note_circle(self, left: Mapping[str, Parameter]) -> frozenset[str]:
        walk = [next(iter(left))]
        while walk.count(walk[-1]) == 1:
            walk.append(next(name for name in left[walk[-1]].when if name in left))
        circle = walk[walk.index(walk[-1]) :]
        place = self._tree.key_place(("space", circle[0], "when"))
        message = f"`when` goes in a circle: {' -> '.join(circle)}. Remove one of them."
        self._problems.add(place, ("space", circle[0]), message)
        return frozenset(circle)

    def _start_with(self, ordered: tuple[Parameter, ...]) -> tuple[Mapping[str, Scalar], ...]:
        block = self._tree.child("start_with")
        starts = []
        for index, item in enumerate(block.items if block is not None else ()):
            start: dict[str, Scalar] = {}
            for name, node in item.entries.items():
                self._check_start_value(("start_with", index, name), name, node)
                if name in self._parameters and node.kind == "scalar":
                    start[name] = normalised(name, node.value)  # type: ignore[assignment]
            starts.append(self._active_start(index, item, start, ordered))
        return tuple(starts)

    def _check_start_value(self, path: KeyPath, name: str, node: Node) -> None:
        parameter = self._parameters.get(name)
        if parameter is not None:
            value = normalised(name, node.plain())
            may_be_inactive = node.kind == "scalar" and node.value is None and parameter.when
            if not parameter.contains(value) and not may_be_inactive:
                message = f"must lie in the space, {_reach(parameter)}, but got {node.shown()}."
                hint = _choice_hint(parameter, node) or f" Change it, or widen `space.{name}`."
                self._problems.add(node.place, path, message + hint)
        elif name in self._fixed:
            fixed = self._fixed[name]
            if not same_value(normalised(name, node.plain()), fixed):
                message = f"is fixed at {_shown(fixed)}, but got {node.shown()}. Leave it out."
                self._problems.add(node.place, path, message)
        elif name not in self._space_nodes and name not in self._fixed_nodes:
            hint = (
                did_you_mean(name, [*self._parameters, *self._fixed])
                or " Add it to `space`, or leave it out."
            )
            message = f"no such setting varies here.{hint}"
            self._problems.add(self._tree.key_place(path), path, message)

    def _active_start(
        self,
        index: int,
        item: Node,
        start: Mapping[str, Scalar],
        ordered: tuple[Parameter, ...],
    ) -> Mapping[str, Scalar]:
        """Note values for settings that do not apply, and leave them out."""
        values: dict[str, Any] = {**self._task.defaults, **self._fixed}
        values |= dict.fromkeys(self._space_nodes, _NO_VALUE)
        inactive = set()
        for parameter in ordered:
            name = parameter.name
            values[name] = start.get(name, _NO_VALUE)
            against = [
                other
                for other, allowed in parameter.when.items()
                if (value := values.get(other)) is not _NO_VALUE
                and not any(same_value(value, one) for one in allowed)
            ]
            if against and name not in self._unclear:
                values[name] = None
                inactive.add(name)
                if start.get(name) is not None:
                    other = against[0]
                    message = (
                        f"does not apply where `{other}` is {_shown(values.get(other))}. "
                        "Leave it out."
                    )
                    path: KeyPath = ("start_with", index, name)
                    self._problems.add(item.key_places[name], path, message)
        return {
            name: value
            for name, value in start.items()
            # Null where null is none of the choices says that the setting is thought inactive.
            if name not in inactive
            and (value is not None or self._parameters[name].contains(None))
        }


def _shown(value: object) -> str:
    return "null" if value is None else shortened(str(value))


def _reach(parameter: Parameter) -> str:
    if parameter.kind == "choice":
        return f"one of {', '.join(_shown(choice) for choice in parameter.choices)}"
    return f"{parameter.low:g} to {parameter.high:g}"


def _choice_hint(parameter: Parameter, node: Node) -> str:
    if not isinstance(node.value, str):
        return ""
    return did_you_mean(node.value, [c for c in parameter.choices if isinstance(c, str)])
