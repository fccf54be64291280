"""From a file's name to a `Space`, or to every problem of the file."""

import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from stability_search.course import CourseRow
from stability_search.errors import Problem, SpaceError
from stability_search.settings.alarms import AlarmSettings, OnAlarm
from stability_search.settings.study import (
    ConfirmSettings,
    Resources,
    SearchSettings,
    StudySettings,
)
from stability_search.settings.trial import KillRule
from stability_search.space.grammar import CourseRowBlock, SpaceFile
from stability_search.space.key_check import parse_file
from stability_search.space.key_types import NAME
from stability_search.space.model import Space
from stability_search.space.overrides import apply_to_tree, read_override, text_with, with_name
from stability_search.space.reading import MAX_BYTES, decode, read_tree
from stability_search.space.setting_check import CheckedSettings, check_settings
from stability_search.space.setting_values import did_you_mean
from stability_search.space.task_check import CheckedTask, check_missing_arguments, check_task
from stability_search.space.tree import KeyPath, Node, Place, Problems, shortened

_PACKAGE = Path(__file__).resolve().parent.parent
_SHIPPED_FOLDERS = (_PACKAGE / "search_spaces", _PACKAGE.parent / "search_spaces")
_START = Place(line=1, column=1)
_RESOURCE = re.compile(r"[A-Za-z]\w{0,62}\Z", re.ASCII)
_LABEL_KEY = re.compile(
    r"([A-Za-z0-9.-]{1,253}/)?[A-Za-z0-9]([\w.-]{0,61}[A-Za-z0-9])?\Z", re.ASCII
)
_RAYS_RESOURCES = frozenset({"cpu", "gpu", "memory", "object_store_memory"})
_DEFAULT = StudySettings(name="default")


def shipped_folder() -> Path:
    """Return the folder of the shipped space files: in the wheel, else in the checkout."""
    return next((folder for folder in _SHIPPED_FOLDERS if folder.is_dir()), _SHIPPED_FOLDERS[0])


def find(name: str | Path) -> Path:
    """Find a space file.

    Args:
        name: A path, or the name of a file in `./search_spaces/` or among the shipped ones,
            with or without `.yaml`.

    Returns:
        The path to read, relative where `name` was.

    Raises:
        SpaceError: There is no such file.
    """
    folders = (Path(), Path("search_spaces"), shipped_folder())
    try:
        for folder in folders:
            for file in (folder / name, folder / f"{name}.yaml"):
                if file.is_file():
                    return file
    except (OSError, ValueError):  # a name no file system takes
        pass
    known = sorted({path.stem for folder in folders[1:] for path in folder.glob("*.yaml")})
    hint = did_you_mean(Path(name).stem, known)
    hint = hint or (f" Known by name: {', '.join(known)}." if known else " Give a path.")
    message = "no such space file: not a path, not in ./search_spaces/ and not shipped."
    where = shortened(str(name)) or "''"
    raise SpaceError((Problem(where=where, key="", message=message + hint),))


def load(
    name_or_path: str | Path, overrides: Sequence[str] = (), *, folder: Path | None = None
) -> Space:
    """Read a space file once, whole, without importing what it names.

    Args:
        name_or_path: See `find`.
        overrides: `key.path=value` of each `--set`, in order.
        folder: Folder that relative paths of the task's arguments start from; None takes the
            file's own. A copy in a run directory keeps the original's.

    Returns:
        The space.

    Raises:
        SpaceError: Every problem of the file and of the overrides.
    """
    path = find(name_or_path)
    text, problems = _read(path)
    tree = None if problems.found else read_tree(text, problems)
    if tree is None:
        raise SpaceError(problems.found)
    options = [read_override(option, problems) for option in overrides]
    applied = [option for option in options if option is not None]
    for override in applied:
        tree = apply_to_tree(tree, override, problems)
    own_folder = path.parent.absolute()
    parts = _checked(tree, path, own_folder, problems)
    if problems.found or parts is None:
        raise SpaceError(problems.found)
    file, task, settings = parts
    if task.reference is None:
        raise AssertionError("a task without a reference is a problem")
    name = file.name or path.stem
    text = text_with(text, tree, applied)
    if not file.name:
        text = with_name(text, name)
    base = folder.absolute() if folder is not None else own_folder
    return Space(
        path=path,
        folder=base,
        text=text,
        study=_study(file, name),
        task=dataclasses.replace(task.reference, folder=str(base)),
        task_name=file.task,
        task_args=file.task_args,
        fixed=settings.fixed,
        parameters=settings.parameters,
        start_with=settings.start_with,
        defaults=task.defaults,
        unchecked=settings.unchecked,
    )


def _read(path: Path) -> tuple[str, Problems]:
    try:
        with path.open("rb") as stream:
            data = stream.read(MAX_BYTES + 1)
    except OSError as error:
        problems = Problems(str(path))
        problems.add(_START, (), f"the file cannot be read: {error.strerror}.")
        raise SpaceError(problems.found) from error
    return decode(data, str(path))


def _checked(
    tree: Node, path: Path, folder: Path, problems: Problems
) -> tuple[SpaceFile, CheckedTask, CheckedSettings] | None:
    if tree.kind != "mapping":
        message = f"a space file is a mapping of keys, but got {tree.shown()}. "
        problems.add(tree.place, (), f"{message}Start with `task: teacher`.")
        return None
    file = parse_file(tree, problems)
    task = check_task(tree, folder, problems)
    settings = check_settings(tree, task, problems)
    fixed, space = tree.child("fixed"), tree.child("space")
    varying = space.entries if space is not None else {}
    check_missing_arguments(
        tree,
        task,
        given=frozenset({*(fixed.entries if fixed is not None else {}), *varying}),
        conditional=frozenset(name for name, node in varying.items() if "when" in node.entries),
        problems=problems,
    )
    _check_horizons(tree, problems)
    _check_margin(tree, problems)
    _check_accelerator(tree, problems)
    _check_resource_names(tree, problems)
    _check_course(tree, problems)
    _check_name(tree, path, problems)
    return None if file is None else (file, task, settings)


def _integer(tree: Node, path: KeyPath, default: int) -> int | None:
    """Return the integer under a path, its default, or None where something else stands."""
    node = tree.at(path)
    if node is None:
        return default
    return node.value if type(node.value) is int else None


def _check_horizons(tree: Node, problems: Problems) -> None:
    trial = _integer(tree, ("trial", "steps"), _DEFAULT.trial_steps)
    confirm = _integer(tree, ("confirm", "steps"), _DEFAULT.confirm.steps)
    if trial is None or confirm is None or confirm >= trial:
        return
    path = _written(tree, ("confirm", "steps"), ("trial", "steps"))
    message = (
        f"`confirm.steps >= trial.steps` must hold, but got confirm.steps={confirm}, "
        f"trial.steps={trial}. Try `confirm.steps: {2 * trial}`."
    )
    problems.add(tree.place_of(path), path, message)


def _check_margin(tree: Node, problems: Problems) -> None:
    margin = _integer(tree, ("confirm", "min_margin"), _DEFAULT.confirm.min_margin)
    octaves = _integer(tree, ("confirm", "octaves"), _DEFAULT.confirm.octaves)
    if margin is None or octaves is None or octaves < 0 or margin <= octaves:
        return
    path = _written(tree, ("confirm", "min_margin"), ("confirm", "octaves"))
    message = (
        f"`confirm.min_margin <= confirm.octaves` must hold, but got min_margin={margin}, "
        f"octaves={octaves}. Try `min_margin: {octaves}`."
    )
    problems.add(tree.place_of(path), path, message)


def _check_accelerator(tree: Node, problems: Problems) -> None:
    path: KeyPath = ("search", "resources", "accelerator")
    model, gpu = tree.at(path), tree.at(("search", "resources", "gpu"))
    if model is None or model.value is None or gpu is None or gpu.value != 0:
        return
    message = f"trials on a GPU model need `gpu > 0`, but got {model.shown()} with gpu=0."
    problems.add(tree.place_of(path), path, f"{message} Remove one of them.")


def _check_resource_names(tree: Node, problems: Problems) -> None:
    for block, pattern, example in (
        ("custom", _RESOURCE, "fast_disk"),
        ("labels", _LABEL_KEY, "pool` or `example.com/pool"),
    ):
        path: KeyPath = ("search", "resources", block)
        node = tree.at(path)
        for key in node.entries if node is not None else ():
            is_rays = block == "custom" and key.lower() in _RAYS_RESOURCES
            if is_rays or not pattern.match(key):
                text = f"a name such as `{example}` is required, but got {shortened(repr(key))}."
                hint = " Cores and GPUs have keys of their own." if is_rays else ""
                problems.add(tree.key_place((*path, key)), (*path, key), f"{text}{hint}")


def _check_course(tree: Node, problems: Problems) -> None:
    rows = tree.at(("report", "course"))
    last = 0
    for position in range(len(rows.items) if rows is not None else 0):
        path: KeyPath = ("report", "course", position, "epoch")
        epoch = _integer(tree, path, 0)
        if not epoch:
            continue  # missing, or no epoch: said by the grammar
        if epoch <= last:
            message = f"epochs must rise, but got {epoch} after {last}. Sort the rows."
            problems.add(tree.place_of(path), path, message)
        last = max(last, epoch)


def _written(tree: Node, first: KeyPath, second: KeyPath) -> KeyPath:
    return first if tree.at(first) is not None else second


def _check_name(tree: Node, path: Path, problems: Problems) -> None:
    if "name" in tree.entries or NAME.match(path.stem):
        return
    message = f"the file's stem {shortened(repr(path.stem))} is no plain name. Add `name: ...`."
    problems.add(tree.place, ("name",), message)


def _course_row(row: CourseRowBlock) -> CourseRow:
    named: dict[str, list[float]] = row.model_extra or {}
    return CourseRow(
        epoch=row.epoch, intervals={name: (ends[0], ends[1]) for name, ends in named.items()}
    )


def _study(file: SpaceFile, name: str) -> StudySettings:
    alarms: dict[str, Any] = file.model_dump()["alarms"]
    search = file.search
    return StudySettings(
        name=name,
        seed=file.seed,
        trial_steps=file.trial.steps,
        timeout_s=file.trial.timeout_s,
        search=SearchSettings(
            trials=search.trials,
            sampler=search.sampler,
            max_concurrent=search.max_concurrent,
            time_budget_s=search.time_budget_s,
            step_budget=search.step_budget,
            resources=Resources(**search.resources.model_dump()),
        ),
        kill_rule=KillRule(bad_rate=file.prune.bad_rate, false_kill=file.prune.false_kill),
        control=file.prune.control,
        confirm=ConfirmSettings(**file.confirm.model_dump()),
        targets=file.report.targets,
        course=tuple(_course_row(row) for row in file.report.course),
        alarms=AlarmSettings(**{**alarms, "on_alarm": OnAlarm(alarms["on_alarm"])}),
    )
