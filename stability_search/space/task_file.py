"""What a task's constructor takes, read from the syntax tree of its file: nothing is imported.

A task is somebody's code. `validate` must not run it, and must not spend two seconds on
importing torch either.
"""

import ast
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from stability_search.records.values import Json
from stability_search.settings.trial import TaskReference

_TASKS_FOLDER = Path(__file__).resolve().parent.parent / "tasks"
_TASKS_MODULE = "stability_search.tasks"
_MAX_FILE_BYTES = 4 * 1024 * 1024
_MAX_NAME = 100
_PLAIN_BASES = frozenset({"object", "Protocol", "Task"})


@dataclass(frozen=True, kw_only=True, slots=True)
class ConstructorParameter:
    """One parameter of a task's constructor.

    Attributes:
        line: Line of the task's file it stands on.
        is_required: True where it has no default.
        default: The default where it is written as a JSON scalar, else None.
        is_default_known: True where `default` is the default.
    """

    line: int
    is_required: bool
    default: Json = None
    is_default_known: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Constructor:
    """What could be learned of a constructor.

    Attributes:
        file: The file that was read; empty where none was.
        parameters: By name, `self` left out.
        is_complete: False where more names may be taken than could be read, because of
            `**kwargs`, a base class elsewhere or a module that was not looked for.
    """

    file: str = ""
    parameters: Mapping[str, ConstructorParameter] = field(default_factory=dict)
    is_complete: bool = False


def class_name_of(task: str) -> str:
    """Return the class a built-in task's name stands for.

    Example:
        >>> class_name_of("speech_lora")
        'SpeechLora'
    """
    return "".join(part[:1].upper() + part[1:] for part in task.split("_"))


def builtin_tasks() -> tuple[str, ...]:
    """Return the names of the built-in tasks, found without importing one."""
    files = sorted(_TASKS_FOLDER.glob("*.py"))
    names = (path.stem for path in files if not path.stem.startswith("_"))
    return tuple(name for name in names if _builtin_file(name) is not None)


def _builtin_file(task: str) -> Path | None:
    path = _TASKS_FOLDER / f"{task}.py"
    if len(task) > _MAX_NAME or not path.is_file():  # a longer name is an error to ask for
        return None
    return path if class_name_of(task) in _classes(_parsed(path)) else None


def find_task(task: str, folder: Path) -> TaskReference:
    """Turn the `task` of a space file into a reference; nothing is read but names.

    Args:
        task: A built-in name, `package.module:Class` or `./file.py:Class`.
        folder: Folder that relative files start from.

    Returns:
        Where the class is.

    Raises:
        ValueError: It is none of the three, or no such task is built in.
        LookupError: The same, where a close name may help.
    """
    where, colon, class_name = task.rpartition(":")
    if not colon:
        if task.isidentifier() and _builtin_file(task) is not None:
            return TaskReference(module=f"{_TASKS_MODULE}.{task}", class_name=class_name_of(task))
        raise LookupError(task)
    if not class_name.isidentifier():
        raise ValueError("a class name must follow the colon")
    if where.endswith(".py"):
        return TaskReference(file=str((folder / where).absolute()), class_name=class_name)
    if where and all(part.isidentifier() for part in where.split(".")):
        return TaskReference(module=where, class_name=class_name)
    raise ValueError("a built-in name, `package.module:Class` or `./file.py:Class` is required")


def read_constructor(reference: TaskReference) -> Constructor:
    """Read the constructor a reference points to.

    Args:
        reference: What `find_task` returned.

    Returns:
        Its parameters; incomplete and without any where the reference names a module that is
        not one of ours.

    Raises:
        ValueError: The file cannot be read or parsed, with the reason.
        LookupError: It defines no such class; the argument is the classes it defines.
    """
    if reference.file:
        path = Path(reference.file)
    elif reference.module.startswith(f"{_TASKS_MODULE}."):
        path = _TASKS_FOLDER / f"{reference.module.removeprefix(f'{_TASKS_MODULE}.')}.py"
    else:
        return Constructor()
    classes = _classes(_parsed(path))
    if reference.class_name not in classes:
        raise LookupError(tuple(classes))
    parameters, is_complete = _constructor_of(reference.class_name, classes, depth=0)
    return Constructor(file=str(path), parameters=parameters, is_complete=is_complete)


def _parsed(path: Path) -> ast.Module:
    try:
        if not path.is_file():
            raise ValueError(f"no file {path}")
        if path.stat().st_size > _MAX_FILE_BYTES:
            raise ValueError(f"{path} is larger than 4 MiB")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the file's own escapes are not our business
            return ast.parse(path.read_bytes())
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from error
    except SyntaxError as error:
        raise ValueError(f"{path}:{error.lineno or 1} is not Python: {error.msg}") from error
    except (RecursionError, MemoryError) as error:
        raise ValueError(f"{path} is nested too deep to be read") from error


def _classes(tree: ast.Module) -> dict[str, ast.ClassDef]:
    return {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}


_Found = tuple[dict[str, ConstructorParameter], bool]


def _constructor_of(name: str, classes: Mapping[str, ast.ClassDef], depth: int) -> _Found:
    node = classes[name]
    body = {item.name: item for item in node.body if isinstance(item, ast.FunctionDef)}
    decorators = {_last_name(decorator) for decorator in node.decorator_list}
    if "__new__" in body or node.keywords or decorators - {"final", "dataclass"}:
        return {}, False
    if "__init__" in body:
        return _signature(body["__init__"])
    found: dict[str, ConstructorParameter] = {}
    is_complete = True
    for base in reversed(node.bases):  # nearer bases last, so that theirs win
        if isinstance(base, ast.Name) and base.id in classes and depth < len(classes):
            inherited, is_known = _constructor_of(base.id, classes, depth + 1)
            found |= inherited
            is_complete = is_complete and is_known
        elif _last_name(base) not in _PLAIN_BASES:
            is_complete = False
    if "dataclass" in decorators:
        found |= dict(_dataclass_fields(node))
    return found, is_complete


def _last_name(node: ast.expr) -> str:
    if isinstance(node, ast.Call):
        return _last_name(node.func)
    if isinstance(node, ast.Subscript):
        return _last_name(node.value)
    if isinstance(node, ast.Attribute):
        return node.attr
    return node.id if isinstance(node, ast.Name) else ""


def _signature(function: ast.FunctionDef) -> _Found:
    args = function.args
    positional = [*args.posonlyargs, *args.args]
    missing = [None] * (len(positional) - len(args.defaults))
    pairs: list[tuple[ast.arg, ast.expr | None]] = [
        *list(zip(positional, [*missing, *args.defaults], strict=True))[1:],  # without self
        *zip(args.kwonlyargs, args.kw_defaults, strict=True),
    ]
    # `*args` is never filled, and a decorator may hide another signature.
    is_complete = args.kwarg is None and not function.decorator_list
    return {arg.arg: _parameter(arg.lineno, default) for arg, default in pairs}, is_complete


def _dataclass_fields(node: ast.ClassDef) -> Iterator[tuple[str, ConstructorParameter]]:
    for item in node.body:
        if not isinstance(item, ast.AnnAssign) or not isinstance(item.target, ast.Name):
            continue
        if _last_name(item.annotation) in {"ClassVar", "KW_ONLY"}:
            continue
        value = item.value
        if isinstance(value, ast.Call) and _last_name(value) == "field":
            keywords = {keyword.arg: keyword.value for keyword in value.keywords}
            init = keywords.get("init")
            if isinstance(init, ast.Constant) and init.value is False:
                continue
            value = keywords.get("default", keywords.get("default_factory"))
        yield item.target.id, _parameter(item.lineno, value)


def _parameter(line: int, default: ast.expr | None) -> ConstructorParameter:
    if default is None:
        return ConstructorParameter(line=line, is_required=True)
    try:
        value = ast.literal_eval(default)
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        return ConstructorParameter(line=line, is_required=False)
    is_known = value is None or isinstance(value, str | int | float | bool)
    return ConstructorParameter(
        line=line,
        is_required=False,
        default=value if is_known else None,
        is_default_known=is_known,
    )
