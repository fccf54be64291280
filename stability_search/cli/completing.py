"""What a shell offers when somebody presses Tab: space files by name, run directories by path.

Only names are looked at: completing loads no space file and nothing heavy.
"""

import os
from collections.abc import Iterator
from pathlib import Path

from stability_search.inert import is_in_sight

_PACKAGE = Path(__file__).resolve().parents[1]
_FOLDERS = ("search_spaces", _PACKAGE / "search_spaces", _PACKAGE.parent / "search_spaces")
_NUM_SHOWN = 50


def complete_space(incomplete: str) -> list[str]:
    """Return the space files that a word may become.

    Args:
        incomplete: What stands there so far.

    Returns:
        Names in ./search_spaces/ and shipped ones, then paths of YAML files and folders.
    """
    names = {path.stem for folder in _FOLDERS for path in Path(folder).glob("*.yaml")}
    matching = sorted(name for name in names if name.startswith(incomplete))
    return [*matching, *_paths(incomplete, (".yaml", ".yml"))][:_NUM_SHOWN]


def complete_run(incomplete: str) -> list[str]:
    """Return the run directories that a word may become.

    Args:
        incomplete: What stands there so far; where it is empty, what is in ./reports/ comes first.

    Returns:
        Paths of folders; one that holds a space file is a run directory, and ends the word.
    """
    recent = sorted(_paths("reports/", ()), reverse=True) if not incomplete else []
    return [*recent, *_paths(incomplete, ())][:_NUM_SHOWN]


def _paths(incomplete: str, suffixes: tuple[str, ...]) -> Iterator[str]:
    """Yield paths that begin so: folders with a slash at the end, runs without, and files."""
    folder, _, start = incomplete.rpartition("/")
    parent = f"{folder}/" if "/" in incomplete else ""
    try:
        entries = sorted(os.scandir(os.path.expanduser(parent) or "."), key=lambda e: e.name)  # noqa: PTH111
    except OSError:
        return
    for entry in entries:
        if not entry.name.startswith(start) or (entry.name.startswith(".") and not start):
            continue
        if not is_in_sight(entry.name):  # it would act on the terminal that shows it
            continue
        if entry.is_dir():
            is_run = not suffixes and Path(entry.path, "space.yaml").is_file()
            yield f"{parent}{entry.name}" + "/" * (not is_run)
        elif entry.name.endswith(suffixes) and suffixes:
            yield f"{parent}{entry.name}"
