"""A folder of a user's own .npz samples: read one by one, and refused with all its faults."""

import zipfile
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from stability_search.errors import UsageError

Array = npt.NDArray[Any]

_FEWEST_NUMBERS, _MOST_GAPS = 100, 10  # labels up to 100 + 10 times their number may have gaps
MOST_LISTED = 20  # faults that are named; of more, their number
# What numpy raises for a pickle in an archive, a damaged one, or a lone array.
_UNREADABLE = (OSError, ValueError, EOFError, TypeError, zipfile.BadZipFile, zlib.error)


def require_folder(folder: Path) -> None:
    """Refuse what is no folder.

    Raises:
        UsageError: It is a file, or not there.
    """
    if not folder.is_dir():
        raise UsageError(
            f"data_dir: a folder with train/*.npz and test/*.npz is needed, but {folder} is "
            f"{'not a folder' if folder.exists() else 'not there'}."
        )


def read_split(
    folder: Path, what: str, problems: list[str]
) -> Iterator[tuple[str, dict[str, Array]]]:
    """Yield what each readable .npz file of a split holds, in order, with its `split/file.npz`.

    Args:
        folder: The split's folder.
        what: One sample, in a word.
        problems: Where it is noted that there are no files, or that one cannot be read.
    """
    files = sorted(folder.glob("*.npz"))
    if not files:
        problems.append(
            f"{folder.name}/ must hold one .npz file for each {what}, but it "
            f"{'holds none' if folder.is_dir() else 'is not there'}"
        )
    for file in files:
        name = f"{folder.name}/{file.name}"
        arrays = _arrays(file)
        if isinstance(arrays, str):
            problems.append(f"{name} {arrays}")
        else:
            yield name, arrays


def _arrays(file: Path) -> dict[str, Array] | str:
    """Return what a file holds, by name; or what is wrong with it."""
    try:
        with file.open("rb") as opened:  # here: numpy leaves a file open that it cannot read
            if not zipfile.is_zipfile(opened):  # numpy would take it for a pickle to be trusted
                return "must be an .npz archive, as numpy.savez writes it, but is none"
            opened.seek(0)
            with np.load(opened, allow_pickle=False) as archive:
                return {name: archive[name] for name in sorted(archive.files)}
    except _UNREADABLE as error:
        return f"must be readable without pickles, but numpy says: {str(error).rstrip('.')}"


def sparse_labels(labels: Iterable[int]) -> list[str]:
    """Say it if labels are no class numbers: a model has an output for each up to the largest.

    Args:
        labels: Integers, >= 0, of all samples.
    """
    known = set(labels)
    if not known or max(known) < _FEWEST_NUMBERS + _MOST_GAPS * len(known):
        return []
    found = f"{len(known)} different ones reach up to {max(known)}"
    return [
        f"labels must count the classes from 0 on, but {found}: number them 0 to {len(known) - 1}"
    ]


def refuse(folder: Path, problems: Sequence[str]) -> None:
    """Raise if anything is wrong, with a line for each fault.

    Raises:
        UsageError: There are problems; the first 20 are listed, then how many more there are.
    """
    if not problems:
        return
    lines = [f"  {problem}." for problem in problems[:MOST_LISTED]]
    if len(problems) > MOST_LISTED:
        lines.append(f"  And {len(problems) - MOST_LISTED} more.")
    num = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
    raise UsageError(
        "\n".join([f"data_dir: {folder} cannot be trained on, {num}:", *lines]),
        hint="Correct these files, or take them out of the folder.",
    )
