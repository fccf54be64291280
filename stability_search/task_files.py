"""Which files a task needs on other machines: what is sent, what is kept back, and why.

A task needs its file, or the package that it names, and the modules that are imported there and
lie beside it or in the folder that a command is called from. What git ignores, links, and files
with the names of secrets are kept back; what is built in or installed is expected there.
"""

import importlib.util
import re
import sys
import sysconfig
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.machinery import PathFinder
from pathlib import Path

from stability_search.errors import UsageError
from stability_search.ignoring import Sieve, Why
from stability_search.neighbours import Gathering, cannot_read, files_in, folders_around, place_of
from stability_search.settings.trial import TaskReference

MAX_MIB = 50  # every node gets all of it
_MIB = 2.0**20
_OURS = "stability_search"
_MAX_NAMED = 5
_NUM_LARGEST = 3
_SURROGATE = re.compile("[\ud800-\udfff]")  # of a name that is no UTF-8


@dataclass(frozen=True, kw_only=True, slots=True)
class TaskFiles:
    """The files of a task that are sent to other machines.

    Attributes:
        folder: Folder that the task's file or package lies in. Empty where nothing is sent.
        files: Where each is on this machine, by its path in that folder, or in the one that a
            command is called from.
        module: The installed package that the task is in, which is not sent; empty for none.
        held_back: Why a file or folder is not sent that otherwise would be, by its path.
        imported: Paths among those whose modules are imported by what is sent.
        from_elsewhere: Top-level modules that are imported by it and lie in neither folder.
        sent_anyway: Why the task's own file would not be sent if it were not that, by its path.
    """

    folder: str = ""
    files: Mapping[str, Path] = field(default_factory=dict)
    module: str = ""
    held_back: Mapping[str, Why] = field(default_factory=dict)
    imported: tuple[str, ...] = ()
    from_elsewhere: tuple[str, ...] = ()
    sent_anyway: Mapping[str, Why] = field(default_factory=dict)

    def notes(self, where: Path = Path()) -> tuple[str, ...]:
        """Say what a user must know about what is kept back, one sentence each.

        Args:
            where: What paths are shown in: that of the folder in what is sent.
        """

        def listed(names: Iterable[str]) -> str:
            return _cut([f"{(where / name).as_posix()}{words.get(name, '')}" for name in names])

        words = {name: f" ({self.held_back[name]})" for name in self.imported}
        secrets = sorted(name for name, why in self.held_back.items() if why is Why.NAME)
        others = [name for name in secrets if name not in self.imported]
        notes = [
            f"{listed([name])} is sent although {why}: it is the task's own file."
            for name, why in self.sent_anyway.items()
        ]
        if self.imported:
            notes.append(
                f"imported, but not sent: {listed(self.imported)}. A task that cannot do without "
                "it fails there."
            )
        places = {name: _top_level(name) for name in self.from_elsewhere}
        made_by_hand = sys.modules  # or by what is imported: in no file, and yet there
        nowhere = [n for n, place in places.items() if place is None and n not in made_by_hand]
        loose = [f"{n} ({p.parent})" for n, p in places.items() if p and not _is_installed(p)]
        if nowhere:
            notes.append(
                f"imported, but found neither beside it, in this folder nor installed: "
                f"{_cut(nowhere)}. A task that cannot do without it fails there."
            )
        if loose:
            notes.append(
                f"imported from Python's path, and not sent: {_cut(loose)}. Install it there, "
                "too, or call from the folder that holds it."
            )
        if others:
            notes.append(
                f"not sent, as names of passwords and keys: {listed(others)}. What the task needs "
                "of it must be called otherwise."
            )
        return tuple(notes)


def files_of_task(task: TaskReference, *, import_path: Path) -> TaskFiles | None:
    """Find what of a task is sent.

    Args:
        task: Where its class is. The file that holds it is sent in any case.
        import_path: Folder in which modules are looked for, as workers do: the task's own before
            all others, what it imports after those beside it.

    Returns:
        The files: none for a task that is built in or installed. None where there is no such
        module.

    Raises:
        UsageError: A folder cannot be read.
    """
    if task.file:
        file = Path(task.file)
        return _sent(folders_around(file, import_path), file, file)
    top, *inner = task.module.split(".")
    if top == _OURS:
        return TaskFiles()
    place = _top_level(top, import_path)
    if place is None or _is_installed(place):
        return None if place is None else TaskFiles(module=top)
    return _sent(folders_around(place, import_path), place, _file_of_module(place, inner))


def files_of_installed(module: str) -> dict[str, Path]:
    """Return the files of an installed package by their path; none where there is no such one."""
    place = _top_level(module)
    if place is None:
        return {}
    return files_in(place) if place.is_dir() else {place.name: place}


def refuse_unsendable(files: Mapping[str, Path], *, max_mib: float, way_out: str) -> None:
    """Refuse what cannot or should not be sent; nothing of it is read.

    Args:
        files: Where each is, by the path that it is sent as.
        max_mib: Most that may be sent, MiB.
        way_out: What to do about too much.

    Raises:
        UsageError: A file cannot be found, the name of one is no UTF-8, or all of them are too
            large.
    """
    odd = next((name for name in files if _SURROGATE.search(name)), None)
    if odd is not None:
        raise UsageError(
            f"{odd!r}: a name in UTF-8 is needed of a file that is sent.", hint="Rename it."
        )
    sizes = {name: size_of(path) for name, path in files.items()}
    total = sum(sizes.values())
    if total <= max_mib * _MIB:
        return
    largest = sorted(sizes.items(), key=lambda item: -item[1])[:_NUM_LARGEST]
    named = ", ".join(f"{name} {size / _MIB:.1f} MiB" for name, size in largest)
    raise UsageError(
        f"task: at most {max_mib:g} MiB of a task's files may be sent, but it is "
        f"{total / _MIB:.1f} MiB in {len(sizes)} files (largest: {named}).",
        hint=way_out,
    )


def size_of(path: Path) -> int:
    """Return the size of a file that is to be sent, in bytes.

    Raises:
        UsageError: It cannot be found.
    """
    try:
        return path.stat().st_size
    except OSError as error:
        raise cannot_read(path, error) from error


def content_of(path: Path) -> bytes:
    """Return what is in a file that is to be sent.

    Raises:
        UsageError: It cannot be read.
    """
    try:
        return path.read_bytes()
    except OSError as error:
        raise cannot_read(path, error) from error


def _cut(shown: Sequence[str]) -> str:
    more = f" and {len(shown) - _MAX_NAMED} more" if len(shown) > _MAX_NAMED else ""
    return ", ".join(shown[:_MAX_NAMED]) + more


# -- what is sent of it -------------------------------------------------------------------------


def _sent(folders: Sequence[Path], start: Path, own: Path | None) -> TaskFiles:
    """Return what is sent of some folders.

    Args:
        folders: Where modules are looked for, the first one first.
        start: The file or package in the first of them that the task names.
        own: The file that holds the task's class; it was named, so nothing keeps it back.
    """
    around = {folder: Sieve(folder) for folder in folders}
    within = Sieve(start) if start.is_dir() else around[folders[0]]
    held_back: dict[str, Why] = {}

    def keep(folder: Path, path: Path) -> bool:
        why = (within if path.is_relative_to(start) else around[folder]).why_not(path)
        if why is None or path == own:
            return True
        held_back[path.relative_to(folder).as_posix()] = why
        return False

    found = Gathering(folders, keep)
    found.add(start)
    sent_anyway = {}
    if own is not None:
        found.add(own)  # it may lie in a folder that is kept back
        why = within.why_not(own)
        if why in {Why.IGNORED, Why.NAME}:
            sent_anyway[own.relative_to(folders[0]).as_posix()] = why
    return TaskFiles(
        folder=str(folders[0]),
        files=found.files,
        held_back=held_back,
        imported=tuple(found.imported_of(held_back) if held_back else ()),
        from_elsewhere=tuple(found.from_elsewhere),
        sent_anyway=sent_anyway,
    )


# -- a module by its name -----------------------------------------------------------------------


def _top_level(top: str, import_path: Path | None = None) -> Path | None:
    """Return where a top-level module is; nothing of it is run."""
    first = [] if import_path is None else [str(import_path)]
    found = PathFinder.find_spec(top, [*first, *sys.path])
    try:
        return place_of(found or importlib.util.find_spec(top))  # of an editable installation
    except (ImportError, ValueError):
        return None


def _file_of_module(place: Path, inner: Sequence[str]) -> Path | None:
    """Return the file of a module below the package or module that lies at a place."""
    if place.is_file():
        return place
    below = place.joinpath(*inner)
    ways = (below / "__init__.py", below.with_name(f"{below.name}.py"))
    return next((way for way in ways if way.is_file() and way.is_relative_to(place)), None)


def _is_installed(place: Path) -> bool:
    real = place.resolve()
    own = (sysconfig.get_path(name) for name in ("stdlib", "platstdlib"))
    is_own = any(real.is_relative_to(Path(folder).resolve()) for folder in own)
    return is_own or not {"site-packages", "dist-packages"}.isdisjoint(real.parts)
