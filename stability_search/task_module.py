"""Whether the module of a task is found from here: looked for as in an import, never imported."""

import importlib.util
import os
import shlex
import sys
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path

from stability_search.errors import UsageError
from stability_search.settings.trial import TaskReference


def missing_part(module: str) -> str:
    """Return the first part of a dotted name that is not found; empty where all of them are.

    Args:
        module: The name; its first part is looked for in the current folder, then as Python does.
    """
    found = _found(module)
    return found[-1][0] if found and found[-1][1] is None else ""


def refuse_missing_module(task: TaskReference, *, begun_in: str = "") -> None:
    """Refuse a task whose module is certainly not to be imported from here.

    A package may make modules of its own when it is imported, so one is missed only where there
    is no package, or one without code.

    Args:
        task: Where its class is. A file is not looked for.
        begun_in: Folder that the study was begun in; empty where there is none, or nobody knows.

    Raises:
        UsageError: It says where to call from.
    """
    *packages, (name, spec) = _found(task.module) or [("", None)]
    if name and spec is None and all(one and one.origin is None for _, one in packages):
        raise no_module(name, task, begun_in=begun_in)


def no_module(name: str, task: TaskReference, *, begun_in: str = "") -> UsageError:
    """Return the error that says from where to call for a module that is not found.

    Args:
        name: The part of the module's dotted name that is missing.
        task: The task that is in it.
        begun_in: As in `refuse_missing_module`.
    """
    top = name.partition(".")[0]
    place = next((one for one in _likely(task, begun_in) if _is_in(one, task.module)), None)
    if place is None:
        how = (
            f"Call this from the folder that holds `{top}`, or set PYTHONPATH=that folder (in a "
            "src/ layout it is src); or install its package, or name a file: ./file.py:Class."
        )
    else:
        folder = shlex.quote(str(place.resolve()))
        how = f"Call this from {folder}, which holds `{top}`, or set PYTHONPATH={folder}."
    return UsageError(
        f"task: {task.module}:{task.class_name} must be importable from {Path.cwd()}, but there "
        f"is no module `{name}`.",
        hint=how,
    )


def _found(module: str) -> list[tuple[str, ModuleSpec | None]]:
    """Return what is found of each part, up to the first of which nothing is.

    Nothing at all where nobody can tell: of what was made by hand, or where a finder fails.
    """
    if not module:
        return []
    top, *parts = module.split(".")
    try:
        # The current folder first, as in workers.
        spec = PathFinder.find_spec(top, [str(Path.cwd()), *sys.path])
        spec = spec or importlib.util.find_spec(top)
    except (ImportError, ValueError):
        return []
    found = [(top, spec)]
    for part in parts:
        name, spec = found[-1]
        if spec is None:
            break
        # By its own name: a dotted one wants its packages to be imported.
        inner = PathFinder.find_spec(part, spec.submodule_search_locations or [])
        found.append((f"{name}.{part}", inner))
    return found


def _likely(task: TaskReference, begun_in: str) -> list[Path]:
    """Return where people keep their packages, the likeliest place first."""
    roots = [Path(begun_in)] if begun_in else []
    own = Path(task.folder) if task.folder else None  # of the space file
    roots += [Path.cwd(), *([own, own.parent] if own else [])]
    return [root / inner for root in roots for inner in ("", "src")]


def _is_in(folder: Path, module: str) -> bool:
    """Return True if the code of a module lies in a folder."""
    place = str(folder.joinpath(*module.split(".")))
    return os.path.isfile(f"{place}.py") or os.path.isfile(f"{place}/__init__.py")  # noqa: PTH113 - of any name
