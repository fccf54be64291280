"""The trackers there are, and what each needs."""

from collections.abc import Sequence
from enum import StrEnum
from importlib.util import find_spec

from stability_search.errors import UsageError


class TrackerName(StrEnum):
    """A tool that a study can be logged to."""

    TENSORBOARD = "tensorboard"
    MLFLOW = "mlflow"
    WANDB = "wandb"


_NEEDED = {TrackerName.MLFLOW: "mlflow", TrackerName.WANDB: "wandb"}  # module and extra alike


def named_trackers(names: Sequence[str]) -> tuple[TrackerName, ...]:
    """Return the trackers by their names, each once.

    Raises:
        UsageError: There is no such tracker, or what it needs is not installed.
    """
    unknown = [name for name in names if name not in set(TrackerName)]
    if unknown:
        known = ", ".join(TrackerName)
        raise UsageError(f"tracker: one of {known} must hold, but got {', '.join(unknown)}.")
    chosen = tuple(dict.fromkeys(TrackerName(name) for name in names))
    missing = [extra for name in chosen if (extra := _NEEDED.get(name)) and not is_there(extra)]
    if missing:
        raise UsageError(
            f"tracker: {' and '.join(missing)} must be installed, but cannot be found.",
            hint=f"pip install 'stability-search[{','.join(missing)}]'",
        )
    return chosen


def is_there(module: str) -> bool:
    """Say whether a module could be imported, without importing it."""
    return find_spec(module) is not None
