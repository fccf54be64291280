"""A task's file and the modules beside it that it imports: what it needs to be built elsewhere.

Imports are read from the syntax tree; nothing is run.
"""

import ast
import warnings
from collections.abc import Iterator
from pathlib import Path

_OURS = "stability_search"
_SKIPPED = ("__pycache__", "node_modules")


def with_neighbours(file: Path) -> dict[str, Path]:
    """Return a Python file and what it imports from its own folder, directly or not.

    A package that lies there counts whole, with its data; what is hidden or made by Python is
    left out.

    Args:
        file: The file; one that is no Python has no neighbours.

    Returns:
        Where each is, by its path in that folder.
    """
    folder, files = file.parent, {file.name: file}
    waiting = [file]
    while waiting:
        for name in _imported(waiting.pop()):
            found = _local_module(folder, name) if name != _OURS else {}
            for relative, path in found.items():
                if relative not in files:
                    files[relative] = path
                    waiting.append(path)
    return files


def files_of_package(package: Path) -> dict[str, Path]:
    """Return the files of a package's folder, by their path in the folder that it lies in."""
    return {path.relative_to(package.parent).as_posix(): path for path in files_in(package)}


def files_in(folder: Path) -> Iterator[Path]:
    """Go through the files of a folder; what is hidden or made by Python is left out."""
    for path in sorted(folder.iterdir()):
        if path.name.startswith(".") or path.name in _SKIPPED:
            continue
        if path.is_dir() and not path.is_symlink():
            yield from files_in(path)
        elif path.is_file():
            yield path


def _imported(path: Path) -> set[str]:
    """Return the top names that a Python file imports absolutely; none where it is no Python."""
    if path.suffix != ".py":
        return set()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the file's own escapes are not our business
            tree = ast.parse(path.read_bytes())
    except (OSError, SyntaxError, ValueError, RecursionError, MemoryError):
        return set()  # whoever loads it says so
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module.partition(".")[0])
    return names


def _local_module(folder: Path, name: str) -> dict[str, Path]:
    file, package = folder / f"{name}.py", folder / name
    if package.is_dir() and any(package.glob("*.py")):
        return files_of_package(package)
    return {file.name: file} if file.is_file() else {}
