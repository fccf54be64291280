"""Checkpoints: written whole or not at all, the last two and the best are kept."""

import os
import random
import re
import sys
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from stability_search.errors import StoppedEarlyError, UsageError
from stability_search.files import PART_SUFFIX, cannot_write, put_in_place

_NAME = re.compile(r"phase-(\d+)-step-(\d+)-probe-(none|[-+.e\d]+)\.pt\Z")
_NUM_LAST = 2
_VERSION = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class Checkpoint:
    """One checkpoint, as its name says.

    Attributes:
        path: The file.
        phase: The phase it was written in, from 1.
        step: Attempted steps by then.
        probe: Mean probe loss there, rounded to six digits; None where it was not finite or not
            read.
    """

    path: Path
    phase: int
    step: int
    probe: float | None


def found_in(folder: Path, *, up_to_phase: int) -> list[Checkpoint]:
    """List the checkpoints of a folder, oldest first.

    Args:
        folder: Folder `checkpoints` of the run.
        up_to_phase: Later phases never began: a process was killed before it could say so.
    """
    named = [(path, _NAME.match(path.name)) for path in folder.glob("*.pt")]
    found = [
        Checkpoint(
            path=path,
            phase=int(match[1]),
            step=int(match[2]),
            probe=None if match[3] == "none" else float(match[3]),
        )
        for path, match in named
        if match and int(match[1]) <= up_to_phase
    ]
    return sorted(found, key=lambda one: (one.phase, one.step))


def remove_unbegun(folder: Path, *, last_phase: int) -> None:
    """Remove the checkpoints of phases that never began, lest a later one take them for its own.

    Args:
        folder: Folder `checkpoints` of the run, which no other process writes to.
        last_phase: The last phase that began.

    Raises:
        StoppedEarlyError: One could not be removed.
    """
    for path in folder.glob("*.pt"):
        match = _NAME.match(path.name)
        if match and int(match[1]) > last_phase:
            try:
                path.unlink()
            except OSError as error:
                raise cannot_write(path, error) from error


def best_of(checkpoints: list[Checkpoint]) -> Checkpoint | None:
    """Return the one with the lowest probe loss, of several the earliest; None without any."""
    measured = [one for one in checkpoints if one.probe is not None]
    return min(measured, key=lambda one: (one.probe, one.phase, one.step), default=None)


def choose(folder: Path, which: str, *, up_to_phase: int) -> Checkpoint:
    """Find the checkpoint to go on from.

    Args:
        folder: Folder `checkpoints` of the run.
        which: `last`, `best`, or the name of one of its files.
        up_to_phase: See `found_in`.

    Raises:
        UsageError: There is no such checkpoint; the ones there are named.
    """
    checkpoints = found_in(folder, up_to_phase=up_to_phase)
    if which == "best":
        chosen = best_of(checkpoints)
    elif which == "last":
        chosen = checkpoints[-1] if checkpoints else None
    else:
        chosen = next((one for one in checkpoints if one.path.name == Path(which).name), None)
    if chosen is None:
        names = ", ".join(one.path.name for one in checkpoints) or "none"
        raise UsageError(
            f"--from: `last`, `best` or a checkpoint of {folder} must be given, but got "
            f"{which!r}.",
            hint=f"There: {names}.",
        )
    return chosen


def save(  # noqa: PLR0913 - what its name says, and what becomes of the others
    folder: Path,
    content: Mapping[str, Any],
    *,
    phase: int,
    step: int,
    probe: float | None,
    keeps_others: bool = False,
) -> Checkpoint:
    """Write a checkpoint and remove those that need not be kept.

    Args:
        folder: Folder `checkpoints` of the run.
        content: What `torch.load(..., weights_only=True)` can read back.
        phase: The present phase, from 1.
        step: Attempted steps so far.
        probe: Mean probe loss now; None where not finite or not read.
        keeps_others: True removes none: the phase is not known to have begun yet.

    Raises:
        StoppedEarlyError: It could not be written; the earlier ones are as they were.
    """
    word = "none" if probe is None else f"{probe:.6g}"
    path = folder / f"phase-{phase}-step-{step:08d}-probe-{word}.pt"
    part = path.with_name(f".{path.name}.{os.getpid()}{PART_SUFFIX}")
    try:
        with part.open("wb") as file:
            torch.save({"version": _VERSION, **content}, file)
            file.flush()
            os.fsync(file.fileno())
        put_in_place(part, path)
        for other in folder.glob(f"phase-{phase}-step-{step:08d}-probe-*.pt"):
            if other != path:  # the same step, written before its probe was read
                other.unlink()
    except (OSError, RuntimeError) as error:  # torch's own writer wraps what the disk said
        part.unlink(missing_ok=True)
        raise StoppedEarlyError(
            f"{path}: the checkpoint could not be written: {_said(error)}.",
            hint="Free some space or restore access; the checkpoints before it are whole.",
        ) from error
    if not keeps_others:
        _remove_old(folder, phase)
    return Checkpoint(path=path, phase=phase, step=step, probe=probe)


def load(path: Path) -> dict[str, Any]:
    """Read a checkpoint; nothing in it is executed.

    Raises:
        UsageError: It is damaged, or another version wrote it.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        content: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        version = content["version"]
    except Exception as error:
        raise _unreadable(path, _said(error)) from error
    if damaged is not None:
        raise _unreadable(path, f"{damaged} does not match its checksum")
    if version != _VERSION:
        raise _unreadable(path, f"it is of version {version}, not {_VERSION}")
    return content


def _unreadable(path: Path, reason: str) -> UsageError:
    found = found_in(path.parent, up_to_phase=sys.maxsize)
    names = [one.path.name for one in found]
    before = names[: names.index(path.name)] if path.name in names else names
    hint = f"Go on from the one before it: --from {before[-1]}" if before else "Begin anew."
    return UsageError(f"{path}: damaged checkpoint: {reason}.", hint=hint)


def random_states() -> dict[str, Any]:
    """Return the random states of Python and numpy; torch's are in the engine's state."""
    state = np.random.get_state(legacy=False)  # noqa: NPY002 - what a task may use
    if not isinstance(state, dict):
        raise TypeError("numpy's random state is a dict")
    key = torch.from_numpy(state["state"]["key"].astype(np.int64))
    return {
        "python": random.getstate(),
        "numpy": [key, state["state"]["pos"], state["has_gauss"], state["gauss"]],
    }


def set_random_states(states: Mapping[str, Any]) -> None:
    """Set the random states that `random_states` returned."""
    version, numbers, gauss = states["python"]
    random.setstate((version, tuple(numbers), gauss))
    key, *rest = states["numpy"]
    np.random.set_state(("MT19937", key.numpy().astype(np.uint32), *rest))  # noqa: NPY002


def _remove_old(folder: Path, phase: int) -> None:
    checkpoints = found_in(folder, up_to_phase=phase)
    best = best_of(checkpoints)
    for one in checkpoints[:-_NUM_LAST]:
        if one != best:
            one.path.unlink()


def _said(error: BaseException) -> str:
    cause = error.__cause__ or error.__context__
    first = cause if isinstance(cause, OSError) else error
    text = first.strerror if isinstance(first, OSError) and first.strerror else str(first)
    return text.partition("\n")[0].rstrip(".")
