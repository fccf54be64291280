"""The task of a space file, and which names its constructor and the engine know."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from stability_search.columns import RESERVED_NAMES
from stability_search.records.values import Json
from stability_search.settings.trial import SETTING_NAMES, TaskReference
from stability_search.space.setting_values import SETTING_DEFAULTS, did_you_mean
from stability_search.space.task_file import (
    Constructor,
    builtin_tasks,
    find_task,
    read_constructor,
)
from stability_search.space.tree import KeyPath, Node, Problems

RESERVED_COLUMNS: tuple[str, ...] = tuple(sorted(RESERVED_NAMES))
"""Names of table columns, which no parameter of a task's constructor may have."""

_METRIC_PREFIX = "metric_"  # columns of a task's own metrics


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckedTask:
    """What is known of the task before anything is imported.

    Attributes:
        reference: Where its class is; None where that was not found.
        constructor: What its constructor takes.
        args: Names given in `task_args`.
        defaults: Value of every setting the file need not name, where it is known.
    """

    reference: TaskReference | None = None
    constructor: Constructor = field(default_factory=Constructor)
    args: frozenset[str] = frozenset()
    defaults: Mapping[str, Json] = field(default_factory=dict)


def check_task(tree: Node, folder: Path, problems: Problems) -> CheckedTask:
    """Find the task and read its constructor from its file's syntax tree.

    Args:
        tree: The file.
        folder: Folder that `./file.py` starts from.
        problems: Where problems are noted.
    """
    node = tree.child("task")
    if node is None or not isinstance(node.value, str):
        return CheckedTask(defaults=SETTING_DEFAULTS)  # the grammar has said so
    reference = _reference(node, node.value, folder, problems)
    constructor = Constructor()
    if reference is not None:
        constructor = _constructor(node, reference, problems)
        _check_reserved(node, constructor, problems)
    args = tree.child("task_args")
    names = frozenset(args.entries) if args is not None else frozenset()
    task = CheckedTask(
        reference=reference,
        constructor=constructor,
        args=names,
        defaults=_defaults(constructor, args),
    )
    _check_args(tree, task, problems)
    return task


def _reference(node: Node, task: str, folder: Path, problems: Problems) -> TaskReference | None:
    try:
        return find_task(task, folder)
    except LookupError:
        known = builtin_tasks()
        hint = did_you_mean(task, known)
        if not hint:
            hint = f" Built in: {', '.join(known)}." if known else ""
            hint += " Your own is `./file.py:Class` or `package.module:Class`."
        problems.add(node.place, ("task",), f"no such task, but got {node.shown()}.{hint}")
    except ValueError as error:
        hint = " Write `./file.py:Class` or `package.module:Class`."
        problems.add(node.place, ("task",), f"{error}, but got {node.shown()}.{hint}")
    return None


def _constructor(node: Node, reference: TaskReference, problems: Problems) -> Constructor:
    try:
        return read_constructor(reference)
    except LookupError as error:
        classes = error.args[0]
        hint = did_you_mean(reference.class_name, classes)
        hint = hint or (f" It defines {', '.join(classes[:8])}." if classes else " It has none.")
        message = f"the file defines no class `{reference.class_name}`.{hint}"
        problems.add(node.place, ("task",), message)
    except ValueError as error:
        hint = "Relative files start from the space file's folder."
        problems.add(node.place, ("task",), f"the task cannot be read: {error}. {hint}")
    return Constructor()


def _check_reserved(node: Node, constructor: Constructor, problems: Problems) -> None:
    for name, parameter in constructor.parameters.items():
        owner = ""
        if name in SETTING_NAMES:
            owner = "a setting of the engine"
        elif name in RESERVED_NAMES or name.startswith(_METRIC_PREFIX):
            owner = "a column of the tables"
        if owner:
            message = (
                f"the constructor's parameter `{name}` has the name of {owner}. "
                f"Rename it in {constructor.file}:{parameter.line}."
            )
            problems.add(node.place, ("task",), message)


def _check_args(tree: Node, task: CheckedTask, problems: Problems) -> None:
    if not task.constructor.is_complete:
        return
    known = task.constructor.parameters
    for name in sorted(task.args - set(known)):
        path: KeyPath = ("task_args", name)
        hint = did_you_mean(name, known) or f" It takes {', '.join(known) or 'nothing'}."
        if name in SETTING_NAMES:
            hint = " It is a setting of the engine: put it under `fixed` or `space`."
        message = f"the task's constructor takes no such argument.{hint}"
        problems.add(tree.key_place(path), path, message)


def _defaults(constructor: Constructor, args: Node | None) -> Mapping[str, Json]:
    own = {
        name: parameter.default
        for name, parameter in constructor.parameters.items()
        if parameter.is_default_known
    }
    given = args.entries if args is not None else {}
    return {
        **SETTING_DEFAULTS,
        **own,
        **{name: node.value for name, node in given.items() if node.kind == "scalar"},
    }


def check_missing_arguments(
    tree: Node,
    task: CheckedTask,
    *,
    given: frozenset[str],
    conditional: frozenset[str],
    problems: Problems,
) -> None:
    """Note constructor parameters without a default that nobody gives.

    Args:
        tree: The file.
        task: Its task.
        given: Settings under `fixed` and `space`.
        conditional: Those of them with a `when`.
        problems: Where problems are noted.
    """
    node = tree.child("task")
    if node is None:
        return
    for name, parameter in task.constructor.parameters.items():
        if not parameter.is_required or name in task.args:
            continue
        rule = f"the constructor's parameter `{name}` has no default, "
        if name not in given:
            message = f"{rule}but it is given nowhere. Add it to `task_args`."
            problems.add(node.place, ("task",), message)
        elif name in conditional:
            place = tree.key_place(("space", name, "when"))
            message = f"{rule}so it must always apply. Remove its `when`."
            problems.add(place, ("space", name), message)
