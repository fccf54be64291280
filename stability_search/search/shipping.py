"""Which of a user's files the nodes of a cluster need to build the task, and no others.

What is installed (a package in `site-packages`) is expected on every node, and its content is
compared there. Anything else travels: a task's file and the modules beside it that it imports, or
the package that it names. Imports are read from the syntax tree; nothing is run. Data does not
travel: a folder that a task reads must be there on every node.
"""

import functools
import hashlib
import importlib.util
import sys
import sysconfig
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path

from stability_search.errors import UsageError
from stability_search.files import cannot_write
from stability_search.neighbours import files_in, files_of_package, with_neighbours
from stability_search.settings import TaskReference

MAX_BYTES = 50 * 2**20
_PREFIX = "stability_search_task_"  # of the folder they travel in
_OURS = "stability_search"
_NUM_NAMED = 3
_MIB = 2.0**20


@dataclass(frozen=True, kw_only=True, slots=True)
class Cargo:
    """The files of a task.

    Attributes:
        files: Where each is on this machine, by its path in the folder that travels.
        folder: What that folder is a copy of: the task's file or package lies in it. Empty where
            nothing travels.
        module: An installed package that the task is in; empty for none. It does not travel.
        digest: Hash of the Python files among them, or of the installed package; empty for a
            built-in task.
    """

    files: Mapping[str, Path] = field(default_factory=dict)
    folder: str = ""
    module: str = ""
    digest: str = ""

    @property
    def name(self) -> str:
        """Name of the folder that travels; empty where none does."""
        return f"{_PREFIX}{self.digest}" if self.files else ""

    def refuse_large(self) -> None:
        """Refuse what should not travel to every node.

        Raises:
            UsageError: The files are larger than `MAX_BYTES` together.
        """
        sizes = {path: path.stat().st_size for path in self.files.values()}
        total = sum(sizes.values())
        if total <= MAX_BYTES:
            return
        largest = sorted(sizes, key=lambda path: sizes[path], reverse=True)[:_NUM_NAMED]
        named = ", ".join(f"{path} ({sizes[path] / _MIB:.1f} MiB)" for path in largest)
        raise UsageError(
            f"task: at most {MAX_BYTES / _MIB:g} MiB of a task's files travel to the nodes, but "
            f"its {len(sizes)} files have {total / _MIB:.1f} MiB; the largest: {named}.",
            hint="Move data out of the package, or install the package on every node.",
        )

    def __str__(self) -> str:
        """Say how much it is."""
        num_bytes = sum(path.stat().st_size for path in self.files.values())
        count = "1 file" if len(self.files) == 1 else f"{len(self.files)} files"
        return f"{count} ({num_bytes / 2**10:.1f} KiB)"

    def write(self, parent: Path) -> Path:
        """Copy the files into a folder of that name and return it.

        Raises:
            StoppedEarlyError: It cannot be written.
        """
        root = parent / self.name
        for name, source in self.files.items():
            copy = root / name
            try:
                copy.parent.mkdir(parents=True, exist_ok=True)
                copy.write_bytes(source.read_bytes())
            except OSError as error:
                raise cannot_write(copy, error) from error
        return root


def pack(task: TaskReference, *, import_path: Path) -> Cargo:
    """Find the files of a task.

    Args:
        task: Where its class is.
        import_path: Folder in which modules are looked for first, as workers do.

    """
    if task.file:
        return _cargo(with_neighbours(Path(task.file)), Path(task.file).parent)
    top = task.module.partition(".")[0]
    if top == _OURS:
        return Cargo()
    found = _find(top, import_path)
    if found is None:  # the trial says so
        return Cargo()
    files = _module_files(found)
    if not files:
        return Cargo()
    path = next(iter(files.values()))
    if _is_installed(path):
        return Cargo(module=top, digest=digest_of(files))
    parent = path.parents[len(Path(next(iter(files))).parts) - 1]
    return _cargo(files, parent)


def _cargo(files: Mapping[str, Path], folder: Path) -> Cargo:
    return Cargo(files=files, folder=str(folder), digest=digest_of(files))


def installed_digest(module: str) -> str:
    """Return the hash of an installed package's code as `Cargo.digest` has it; empty for none."""
    found = _find(module, None)
    return digest_of(_module_files(found)) if found is not None else ""


@functools.cache
def own_digest() -> str:
    """Return the hash of this package's code: a checkout may differ under one version."""
    root = Path(__file__).resolve().parents[1]
    return digest_of(files_of_package(root))


def digest_of(files: Mapping[str, Path]) -> str:
    """Return a short hash of the Python files among some: of their names and what they hold."""
    whole = hashlib.sha256()
    for name, path in sorted(files.items()):
        if path.suffix == ".py":
            try:
                content = hashlib.sha256(path.read_bytes()).hexdigest()
            except OSError:  # whoever imports it says so
                content = "unreadable"
            whole.update(f"{name}\0{content}\n".encode(errors="surrogateescape"))
    return whole.hexdigest()[:10]


def folder_files(root: Path) -> dict[str, Path]:
    """Return the files of a folder that travelled, by their path in it."""
    return {path.relative_to(root).as_posix(): path for path in files_in(root)}


def travelled(name: str) -> Path | None:
    """Return the folder that travelled to this node; None where it has not arrived."""
    found = (Path(place) / name for place in sys.path)
    return next((root for root in found if root.is_dir()), None)


# -- a module by its name -----------------------------------------------------------------------


def _find(top: str, import_path: Path | None) -> ModuleSpec | None:
    """Find a top-level module without running it."""
    if import_path is not None:
        found = PathFinder.find_spec(top, [str(import_path)])
        if found is not None:
            return found
    try:
        return importlib.util.find_spec(top)
    except (ImportError, ValueError):
        return None


def _module_files(found: ModuleSpec) -> dict[str, Path]:
    if found.submodule_search_locations is not None:
        folders = [Path(where) for where in found.submodule_search_locations]
        return files_of_package(folders[0]) if len(folders) == 1 else {}
    file = Path(found.origin or "")
    return {file.name: file} if file.is_file() else {}


def _is_installed(path: Path) -> bool:
    known = (sysconfig.get_path(name) for name in ("purelib", "platlib", "stdlib", "platstdlib"))
    return any(path.resolve().is_relative_to(Path(place).resolve()) for place in known if place)
