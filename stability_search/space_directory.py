"""A directory that keeps a space file and its task's files, with one writer at a time."""

import contextlib
import difflib
import fcntl
import hashlib
import os
import re
import time
from collections.abc import Iterator, Mapping
from datetime import datetime
from pathlib import Path

from stability_search.errors import LockedError, UsageError
from stability_search.files import cannot_write, remove_parts, write_whole
from stability_search.ignoring import Why, as_patterns
from stability_search.neighbours import COPIES, modules_around
from stability_search.records.values import Json
from stability_search.space import Space
from stability_search.task_files import MAX_MIB, files_of_task

DEFAULT_PARENT = Path("reports")
_MAX_DIFFERENCE_LINES = 40
_MAX_COPIED_BYTES = MAX_MIB * 2**20  # of a task's files; of more the modules alone
_NUM_LOCK_TRIES = 20  # `status` holds the lock, too, for as long as it takes to ask for it
_LOCK_PAUSE_S = 0.01


def default_path(name: str, now: datetime) -> Path:
    """Return where files go when nobody says: `reports/<name>-<UTC time>`.

    Args:
        name: Name of the study, or what else the files are of.
        now: The time, in UTC.

    Returns:
        A path at which nothing is yet.
    """
    path = DEFAULT_PARENT / f"{name}-{now:%Y%m%dT%H%M%SZ}"
    candidate, number = path, 1
    while candidate.exists():
        number += 1
        candidate = path.with_name(f"{path.name}-{number}")
    return candidate


def make_folder(path: Path) -> None:
    """Make the directory, with its parents, unless it is there.

    Raises:
        UsageError: It cannot be made.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(
            f"{path}: the run directory cannot be made: {error.strerror}.",
            hint="Choose another with --output.",
        ) from error


@contextlib.contextmanager
def only_writer(path: Path, *folders: Path) -> Iterator[None]:
    """Be the only writer of a directory; killed writers' leftovers are removed.

    The lock is the kernel's: it ends with the process, however that ends, and leaves no file.

    Args:
        path: The directory.
        folders: Folders in it that are written to as well.

    Raises:
        LockedError: Another process holds it.
        UsageError: There is no such directory.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        raise UsageError(f"{path}: no run directory: {error.strerror}.") from error
    try:
        _lock(path, descriptor)
        for folder in (path, *folders):
            with contextlib.suppress(OSError):  # a read-only directory is named when it matters
                remove_parts(folder)
        yield
    finally:
        os.close(descriptor)


def _lock(path: Path, descriptor: int) -> None:
    """Take the writer's lock; somebody who only asks whether it is held lets go at once."""
    for num_left in reversed(range(_NUM_LOCK_TRIES)):
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            if num_left == 0:
                raise LockedError(
                    f"{path}: locked run: another process is writing to it.",
                    hint="Wait until it ends, or stop it.",
                ) from error
            time.sleep(_LOCK_PAUSE_S)
        else:
            return


def task_facts(space: Space) -> dict[str, Json]:
    """Return what must be kept of a task to refuse a changed one later.

    Raises:
        UsageError: The task's file, or a module that it imports, cannot be read.
    """
    modules = {name: path for name, path in _around_task(space).items() if path.suffix == ".py"}
    return {
        "original_folder": str(space.folder),
        "original_task_file": space.task.file,
        "import_path": str(Path.cwd()),
        "task_file": place_beside_space(space),
        "task_sha256": task_sha256(Path(space.task.file)) if space.task.file else "",
        "task_modules": {name: task_sha256(path) for name, path in modules.items()},
    }


def task_sha256(path: Path) -> str:
    """Return the hash of a task's file.

    Raises:
        UsageError: It cannot be read.
    """
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise UsageError(
            f"{path}: the task's file cannot be read: {error.strerror}.",
            hint="Put it back as it was.",
        ) from error


def refuse_changed_task(path: Path, facts: Mapping[str, Json]) -> None:
    """Refuse to go on with another task than was begun with.

    Both the copy beside the space file and, where it still exists, the file it was copied from
    must be as they were; and so must the modules that it imports from around it.

    Args:
        path: The directory.
        facts: What `task_facts` returned then.

    Raises:
        UsageError: A file changed or the copy is gone; shows the difference.
    """
    if not facts["task_sha256"]:
        return
    copy, original = path / str(facts["task_file"]), Path(str(facts["original_task_file"]))
    _refuse_changed_file(copy, original, facts["task_sha256"])
    modules = facts.get("task_modules")  # earlier versions kept none
    begun_in = Path(str(facts.get("import_path", original.parent)))
    for name, sha256 in modules.items() if isinstance(modules, dict) else ():
        beside, kept = copy.parent / name, copy.parent / COPIES / name
        if kept.is_file():
            for folder in (begun_in, Path.cwd()):  # here it would be found before the copy
                _refuse_changed_file(kept, folder / name, sha256)
        else:
            _refuse_changed_file(beside, original.parent / name, sha256)


def _refuse_changed_file(copy: Path, original: Path, sha256: Json) -> None:
    is_copy_intact = task_sha256(copy) == sha256
    if is_copy_intact and (not original.is_file() or task_sha256(original) == sha256):
        return
    changed = original if is_copy_intact else copy
    raise UsageError(
        f"{changed}: the task changed since the study began.\n{_difference(copy, original)}",
        hint="Undo the change, or start anew in another directory.",
    )


def text_beside_task(space: Space) -> str:
    """Return the space's text; a task file from outside its folder is named as its copy."""
    line = re.compile(rf"^(task\s*:\s*[\"']?){re.escape(space.task_name)}", re.MULTILINE)
    name = name_of_copy(space)
    return line.sub(lambda found: f"{found.group(1)}{name}", space.text, count=1)


def name_of_copy(space: Space) -> str:
    """Return what a space file names its task where that is copied beside it."""
    written, _, class_name = space.task_name.rpartition(":")
    name = place_beside_space(space)
    return space.task_name if name in {"", str(Path(written))} else f"./{name}:{class_name}"


def copy_task_file(path: Path, space: Space) -> None:
    """Copy a task's file, and what it imports from around it, into a directory.

    A built-in task has none. The data of a package is left where it is if all of it would be
    more than 50 MiB: a run directory is no place for data sets. What is not to leave this machine
    is ignored by git there, too, and so is still not sent when the copy is.

    Raises:
        UsageError: A folder of the task cannot be read.
        StoppedEarlyError: It cannot be copied.
    """
    if not space.task.file:
        return
    copy = path / place_beside_space(space)
    _copy(Path(space.task.file), copy)
    around = _of_bearable_size(_around_task(space))
    own, private = Path(space.task.file).parent, _private_of(space)
    beside = {name: source for name, source in around.items() if source == own / name}
    elsewhere = {name: source for name, source in around.items() if name not in beside}
    for folder, found in ((copy.parent, beside), (copy.parent / COPIES, elsewhere)):
        for name, source in found.items():
            _copy(source, folder / name)
        kept_back = private.intersection(
            part.as_posix() for name in found for part in (Path(name), *Path(name).parents)
        )
        if kept_back:
            write_whole(folder / ".gitignore", as_patterns(kept_back))


def _private_of(space: Space) -> set[str]:
    """Return what is not to leave this machine, but for what its name alone keeps back."""
    found = files_of_task(space.task, import_path=Path.cwd())
    held_back = {} if found is None else found.held_back
    return {name for name, why in held_back.items() if why is not Why.NAME}


def _copy(source: Path, copy: Path) -> None:
    try:
        copy.parent.mkdir(parents=True, exist_ok=True)
        content = source.read_bytes()
    except OSError as error:
        raise cannot_write(copy, error) from error
    write_whole(copy, content)


def _around_task(space: Space) -> dict[str, Path]:
    """Return what a task's file imports from beside it, or from here, by the path there."""
    return modules_around(Path(space.task.file), Path.cwd()) if space.task.file else {}


def _of_bearable_size(files: Mapping[str, Path]) -> Mapping[str, Path]:
    if sum(path.stat().st_size for path in files.values()) <= _MAX_COPIED_BYTES:
        return files
    return {name: path for name, path in files.items() if path.suffix == ".py"}


def text_difference(before: str, after: str, *, name_before: str, name_after: str) -> str:
    """Return what differs between two texts, as `diff -u` shows it, cut to 40 lines."""
    lines = list(
        difflib.unified_diff(
            before.splitlines(), after.splitlines(), name_before, name_after, lineterm="", n=1
        )
    )
    if len(lines) > _MAX_DIFFERENCE_LINES:
        lines = [*lines[:_MAX_DIFFERENCE_LINES], f"... {len(lines) - _MAX_DIFFERENCE_LINES} more"]
    return "\n".join(lines)


def _difference(copy: Path, original: Path) -> str:
    before, after = (
        path.read_text(errors="replace") if path.is_file() else "" for path in (copy, original)
    )
    return text_difference(before, after, name_before=str(copy), name_after=str(original))


def place_beside_space(space: Space) -> str:
    """Return the place of the task's file from its space file; empty for a task in a module.

    One from outside the space file's folder comes to lie beside it.
    """
    if not space.task.file:
        return ""
    written = Path(space.task_name.rpartition(":")[0])
    is_inside = not written.is_absolute() and ".." not in written.parts
    return str(written) if is_inside else written.name
