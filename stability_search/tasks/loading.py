"""From a task's name or file to a task object, kept while its arguments stay equal."""

import contextlib
import difflib
import hashlib
import importlib
import importlib.util
import inspect
import json
import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from stability_search.errors import UsageError
from stability_search.neighbours import COPIES
from stability_search.settings.trial import TaskReference
from stability_search.task_module import no_module
from stability_search.tasks.base import REQUIRED_METHODS, Task

_kept: dict[str, Task] = {}  # one slot: reading a task's data once is enough for a whole study


def load_task(reference: TaskReference, task_args: Mapping[str, Any]) -> Task:
    """Build a task, or return the one built last if nothing changed.

    The folder of a task's file joins the end of `sys.path`, so that what stands beside the file
    can be imported at any time; while the task is built it comes first. So do the copies that a
    run directory keeps of what was imported from elsewhere, which never come first. Relative
    paths are relative to `reference.folder`, else to that folder, while the task is built: it
    becomes the working directory.

    Args:
        reference: Where the class is.
        task_args: Keyword arguments of its constructor.

    Returns:
        The task; it has every required method.

    Raises:
        UsageError: The class cannot be found, the module or file fails to import, the arguments
            do not fit, or the constructor raises. What was raised there is the cause.
    """
    key = repr((reference, json.dumps(dict(task_args), sort_keys=True, default=repr)))
    if key not in _kept:
        with _search_path(reference), _working_directory(reference):
            task = _construct(_task_class(reference), reference, task_args)
        _kept.clear()
        _kept[key] = task
    return _kept[key]


def look_here_too() -> None:
    """Let what a task imports be found in the current folder, after all other places.

    `python -m` does so by itself, a command that was installed does not.
    """
    here = os.getcwd()  # noqa: PTH109 - as it stands in `sys.path`
    if here not in sys.path:
        sys.path.append(here)


def forget_tasks() -> None:
    """Drop the task that is kept, so that the next `load_task` reads everything again."""
    _kept.clear()


def _where(reference: TaskReference) -> str:
    return f"{reference.file or reference.module}:{reference.class_name}"


@contextlib.contextmanager
def _search_path(reference: TaskReference) -> Iterator[None]:
    """Make the folder of a task's file the first place to look, then the last."""
    if not Path(reference.file).is_file():
        yield
        return
    folder = str(Path(reference.file).parent)
    copies = Path(folder) / COPIES
    if copies.is_dir() and str(copies) not in sys.path:
        sys.path.append(str(copies))
    sys.path.insert(0, folder)
    try:
        yield
    finally:
        sys.path.remove(folder)
        if folder not in sys.path:
            sys.path.append(folder)


@contextlib.contextmanager
def _working_directory(reference: TaskReference) -> Iterator[None]:
    folder = Path(reference.folder or Path(reference.file or ".").parent)
    if not folder.is_dir():
        yield  # the missing file is named where it is opened
        return
    with contextlib.chdir(folder):
        yield


def _task_class(reference: TaskReference) -> type[Any]:
    module = _file_module(reference) if reference.file else _module(reference)
    found = getattr(module, reference.class_name, None)
    if inspect.isclass(found):
        return found
    classes = [name for name, value in vars(module).items() if inspect.isclass(value)]
    raise UsageError(
        f"task: {reference.file or reference.module} has no class `{reference.class_name}`.",
        hint=_did_you_mean(reference.class_name, classes)
        or f"Its classes: {', '.join(sorted(classes)) or 'none'}.",
    )


def _module(reference: TaskReference) -> ModuleType:
    try:
        return importlib.import_module(reference.module)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{reference.module}.".startswith(f"{error.name}."):
            raise _import_error(reference, error) from error
        raise no_module(error.name, reference) from error
    except Exception as error:
        raise _import_error(reference, error) from error


def _file_module(reference: TaskReference) -> ModuleType:
    file = Path(reference.file)
    if not file.is_file():
        raise UsageError(
            f"task: a file is needed, but {file} is not there.",
            hint="A path is relative to the space file.",
        )
    # Two files of one name, and a module of that name elsewhere, do not get into each other's way.
    digest = hashlib.sha256(str(file).encode()).hexdigest()[:8]
    name = f"stability_search_task_{file.stem}_{digest}"
    spec = importlib.util.spec_from_file_location(name, file)
    if spec is None or spec.loader is None:
        raise UsageError(f"task: a Python file (.py) is needed, but got {file}.")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickle look their module up there
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        raise _import_error(reference, error) from error
    return module


def _import_error(reference: TaskReference, error: Exception) -> UsageError:
    return UsageError(
        f"task: {reference.file or reference.module} must be importable, but importing it raised "
        f"{type(error).__name__}: {error}.",
        hint=_hint_for(error),
    )


def _hint_for(error: Exception) -> str:
    if isinstance(error, ModuleNotFoundError):
        return (
            "It is looked for beside the task's file, in the folder that you call from and on "
            "Python's path: call from the root of your project."
        )
    if isinstance(error, ImportError) and "relative import" in str(error):
        return (
            "Name the task as a module of its package, package.module:Class, and call from the "
            "folder that holds the package."
        )
    if isinstance(error, FileNotFoundError):
        return (
            "A run directory keeps a copy of a task's code, not of files that it finds from "
            "__file__: name those by absolute paths, or by relative ones in task_args."
        )
    return "Run it with Python alone to see the traceback."


def _construct(
    task_class: type[Any], reference: TaskReference, task_args: Mapping[str, Any]
) -> Task:
    _check_arguments(task_class, reference, task_args)
    try:
        task = task_class(**task_args)
    except UsageError:
        raise
    except MemoryError:
        raise  # the machine's fault, not the file's
    except Exception as error:
        raise UsageError(
            f"task_args: {_where(reference)} must accept {dict(task_args)}, but its constructor "
            f"raised {type(error).__name__}: {error}",
            hint="Correct task_args, or the constructor.",
        ) from error
    missing = [name for name in REQUIRED_METHODS if not callable(getattr(task, name, None))]
    if missing:
        raise UsageError(
            f"task: {_where(reference)} must have the methods {', '.join(REQUIRED_METHODS)}, "
            f"but {', '.join(missing)} {'is' if len(missing) == 1 else 'are'} missing.",
            hint="stability_search/tasks/README.md shows a task in ten lines.",
        )
    return task  # type: ignore[no-any-return]


def _check_arguments(
    task_class: type[Any], reference: TaskReference, task_args: Mapping[str, Any]
) -> None:
    signature = inspect.signature(task_class)
    try:
        signature.bind(**task_args)
    except TypeError as error:
        names = [
            name
            for name, parameter in signature.parameters.items()
            if parameter.kind not in {parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL}
        ]
        unknown = [name for name in task_args if name not in names]
        hint = _did_you_mean(unknown[0], names) if unknown else ""
        raise UsageError(
            f"task_args: {_where(reference)} takes {', '.join(names) or 'no arguments'}, but got "
            f"{', '.join(task_args) or 'none'} ({error}).",
            hint=hint or "Correct task_args, or the constructor.",
        ) from error


def _did_you_mean(name: str, names: "list[str] | tuple[str, ...]") -> str:
    close = difflib.get_close_matches(name, names, n=1)
    return f"Did you mean `{close[0]}`?" if close else ""
