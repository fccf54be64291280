"""A task's file or package and what is imported around it: what the task needs to be built.

Imports are read from the syntax tree: nothing is run. A module is looked for beside the task,
then in the folder that a command is called from, at last among the copies that a run directory
keeps of what was there. A package counts whole, with its data; what is hidden or made by Python is
never needed.
"""

import ast
import functools
import sys
import warnings
from collections.abc import Callable, Container, Iterator, Sequence
from functools import partial
from importlib.machinery import (
    EXTENSION_SUFFIXES,
    SOURCE_SUFFIXES,
    ExtensionFileLoader,
    FileFinder,
    ModuleSpec,
    PathFinder,
    SourceFileLoader,
)
from itertools import product
from pathlib import Path

from stability_search.errors import UsageError

COPIES = "imported"  # folder beside a copied task, for what was imported from elsewhere
_OURS = "stability_search"
_MAX_SOURCE_BYTES = 20 * 2**20  # more was not written by hand
_SKIPPED = ("__pycache__", "node_modules")
_OF_RUNS = ("study.db", "train.json", "environment.json")  # a folder with one of them is a run's

Keep = Callable[[Path], bool]
"""Says of a file or folder whether it is wanted."""

_Module = tuple[str, ...]  # its dotted name in parts


def folders_around(file: Path, import_path: Path) -> list[Path]:
    """Return where a task's modules are looked for, the first place first.

    Args:
        file: The task's file, or its package.
        import_path: The folder that a command is called from.
    """
    return [file.parent, import_path, file.parent / COPIES]


def modules_around(file: Path, import_path: Path) -> dict[str, Path]:
    """Return what a Python file imports from its own folder or another, directly or not.

    Args:
        file: The file; one that is no Python imports nothing.
        import_path: Folder in which modules are looked for that are not beside the file.

    Returns:
        Where each is, by its path in the folder that it was found in; the file itself is not
        among them.

    Raises:
        UsageError: A folder cannot be read.
    """
    found = Gathering(folders_around(file, import_path), lambda *_: True)
    found.add(file)
    return {name: path for name, path in found.files.items() if name != file.name}


def files_in(folder: Path, keep: Keep = lambda _: True) -> dict[str, Path]:
    """Return the files of a folder by their path in it, but for what is hidden or made by Python.

    Args:
        folder: The folder. Links to folders are not followed.
        keep: Says of a file or folder whether it is wanted.

    Raises:
        UsageError: A folder cannot be read.
    """
    return {path.relative_to(folder).as_posix(): path for path in _walk(folder, keep)}


class Gathering:
    """The files that a task needs, by their paths in the folder that each was found in.

    Args:
        folders: Folders in which modules are looked for, the first one first.
        keep: Says of a file or folder, and the one of these that it was found in, whether it is
            wanted.
    """

    def __init__(self, folders: Sequence[Path], keep: Callable[[Path, Path], bool]) -> None:
        self._folders, self._keep = tuple(dict.fromkeys(folders)), keep
        self._finders: dict[Path, FileFinder] = {}
        self._seen = {_OURS}
        self._imported: set[_Module] = set()
        self.files: dict[str, Path] = {}

    def add(self, place: Path) -> None:
        """Add a file, or a package with all that is in it, and what is imported there.

        Args:
            place: It, in the first of the folders.
        """
        self._seen.add(place.name.removesuffix(".py"))
        waiting = [(self._folders[0], place)]
        while waiting:
            folder, place = waiting.pop()
            keep = partial(self._keep, folder)
            for path in _walk(place, keep) if place.is_dir() else (place,):
                name = path.relative_to(folder)
                self.files.setdefault(name.as_posix(), path)
                imported = _imports_of(path, name.parent.parts)
                self._imported |= imported
                waiting += self._around(imported)

    def _around(self, imported: frozenset[_Module]) -> Iterator[tuple[Path, Path]]:
        """Yield where the top-level ones of modules lie, each only once, with the folder."""
        for top in sorted({module[0] for module in imported} - self._seen):
            below = [module for module in imported if module[0] == top]
            ways = [(folder, self._first_of(folder, below)) for folder in self._folders]
            found = [(folder, place) for folder, place in ways if place is not None]
            regular = [one for one in found if _is_regular(one[1])]
            if found:
                self._seen.add(top)
            if regular or not self._is_installed(top):  # else without `__init__.py` it yields
                yield from (one for one in regular[:1] or found if self._keep(*one))

    @property
    def from_elsewhere(self) -> list[str]:
        """Top-level modules that are imported and lie in none of the folders, but for Python's."""
        tops = {module[0] for module in self._imported}
        return sorted(tops - self._seen - sys.stdlib_module_names)

    def imported_of(self, paths: Container[str]) -> list[str]:
        """Return which of these files and folders are imported by the files, or hold such ones."""
        found: set[str] = set()
        for module, folder in product(self._imported, self._folders):
            place = folder
            for level in range(len(module)):
                beyond = self._first_of(place, [module[level:]])
                if beyond is None:  # it is no module, but something in one
                    break
                place = beyond
                name = place.relative_to(folder)
                ways = (*reversed(name.parents), name, name / "__init__.py")
                found.update(way.as_posix() for way in ways if way.as_posix() in paths)
        return sorted(found)

    def _first_of(self, folder: Path, modules: Sequence[_Module]) -> Path | None:
        """Return what lies in a folder for the first part, which they share, of dotted names."""
        place = self._find(folder, modules[0][0])
        if place is None or _is_regular(place) or any(place.glob("*.py")):
            return place
        # A folder of data may be called like a module.
        has_code = any(place.glob("*/__init__.py")) or any(self._ends(place, m) for m in modules)
        return place if has_code else None

    def _is_installed(self, top: str) -> bool:
        """Return True if Python finds a module of that name that lies in none of the folders."""
        others = [place for place in sys.path if Path(place or ".") not in self._folders]
        found = PathFinder.find_spec(top, others)
        return found is not None and found.has_location

    def _ends(self, place: Path, module: _Module) -> bool:
        """Return True if folders without `__init__.py` lead to a module."""
        for part in module[1:]:
            beyond = self._find(place, part)
            if beyond is None or _is_regular(beyond):
                return beyond is not None
            place = beyond
        return False

    def _find(self, folder: Path, name: str) -> Path | None:
        """Return the file of a module, or the folder of a package, that lies in a folder."""
        if folder not in self._finders:  # those of Python may be behind what was just written
            loaders = (
                (ExtensionFileLoader, EXTENSION_SUFFIXES),
                (SourceFileLoader, SOURCE_SUFFIXES),
            )
            self._finders[folder] = FileFinder(str(folder), *loaders)
        return place_of(self._finders[folder].find_spec(name))


def _is_regular(place: Path) -> bool:
    return place.is_file() or (place / "__init__.py").is_file()


def _imports_of(path: Path, package: tuple[str, ...]) -> frozenset[_Module]:
    """Return the modules that a Python file may import; none where it is no Python.

    Args:
        path: The file.
        package: The package that it is in; empty for none.
    """
    if path.suffix != ".py":
        return frozenset()
    try:
        found = path.stat()
    except OSError:
        return frozenset()  # whoever loads it says so
    if found.st_size > _MAX_SOURCE_BYTES:
        return frozenset()
    return _imports_in(path, package, (found.st_mtime_ns, found.st_size))


@functools.cache  # a study asks several times
def _imports_in(
    path: Path, package: tuple[str, ...], _state: tuple[int, int]
) -> frozenset[_Module]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the file's own escapes are not our business
            tree = ast.parse(path.read_bytes())
    except (OSError, SyntaxError, ValueError, RecursionError, MemoryError):
        return frozenset()  # whoever loads it says so
    found: set[_Module] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {tuple(alias.name.split(".")) for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level <= len(package):
            above = package[: len(package) - node.level + 1] if node.level else ()
            module = (*above, *(node.module.split(".") if node.module else ()))
            found |= {(*module, alias.name) for alias in node.names}
    return frozenset(found)


def _walk(folder: Path, keep: Keep) -> Iterator[Path]:
    try:
        inside = sorted(folder.iterdir())
    except OSError as error:
        raise cannot_read(folder, error) from error
    for path in inside:
        if path.name in _SKIPPED or not keep(path) or path.name.startswith("."):
            continue
        if path.is_dir() and not path.is_symlink():
            if _is_run(path):
                continue
            yield from _walk(path, keep)
        elif path.is_file():
            yield path


def _is_run(folder: Path) -> bool:
    """Return True for a run directory, which is no part of a package that it lies in."""
    return not _is_regular(folder) and any((folder / name).is_file() for name in _OF_RUNS)


def place_of(found: ModuleSpec | None) -> Path | None:
    """Return the folder of a package, the file of a module; None for what is in no file."""
    if found is None:
        return None
    if found.submodule_search_locations is not None:
        return next(map(Path, found.submodule_search_locations), None)
    return Path(found.origin) if found.has_location and found.origin else None


def cannot_read(path: Path, error: OSError) -> UsageError:
    """Return what to say of a file or folder of a task that cannot be read."""
    return UsageError(
        f"{path}: the task needs it, and it cannot be read: {error.strerror}.",
        hint="Mend that, or name it in .gitignore if the task does without it.",
    )
