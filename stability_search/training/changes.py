"""What may change when a long training goes on, and what is refused, with the difference."""

from collections.abc import Mapping
from pathlib import Path

from stability_search import space as spaces
from stability_search.errors import UsageError
from stability_search.settings.trial import SETTING_NAMES
from stability_search.space import Space

# Settings of the model, the optimizer's state or the beginning: a checkpoint cannot follow them.
_WHY_FIXED: Mapping[str, str] = {
    "optimizer": "its state is of another kind",
    "precision": "the state of the loss scale, and what the weights were trained for, differ",
    "norm": "the model differs",
    "init_gain": "the weights are no longer the initial ones",
    "init_scale": "the loss scale has been found; growth_interval and max_scale may change",
}
_MAY_CHANGE = frozenset(f"fixed.{name}" for name in SETTING_NAMES if name not in _WHY_FIXED)
_FREE_BLOCKS = ("alarms.", "prune.", "report.")
_HORIZON = "confirm.steps"


def allowed_changes(path: Path, old: Space, new: Space) -> dict[str, tuple[str, str]]:
    """List what changed between two phases.

    Args:
        path: The run, for the message.
        old: The space of the present phase.
        new: The same with `--set` applied.

    Returns:
        By dotted key, the old and the new value as text.

    Raises:
        UsageError: Something changed that a checkpoint cannot follow; every such change is named.
    """
    changed = spaces.changed_values(old, new)
    refused = [
        f"{name}: may not change ({_why(name)}), but got {now!r} after {was!r}."
        for name, (was, now) in changed.items()
        if not (name in _MAY_CHANGE or name == _HORIZON or name.startswith(_FREE_BLOCKS))
    ]
    if refused:
        raise UsageError(
            f"{path}: a training goes on with its task, model and optimizer, but: "
            f"{' '.join(refused)}",
            hint="Start anew with `stability-search train --space`.",
        )
    return {name: (_text(was), _text(now)) for name, (was, now) in changed.items()}


def _why(name: str) -> str:
    if name.startswith("task"):
        return "the task differs"
    head, _, setting = name.partition(".")
    if head != "fixed":
        return "it has no part in `train`" if head in {"search", "confirm", "trial"} else "fixed"
    return _WHY_FIXED.get(setting, "it is a setting of the task")


def _text(value: object) -> str:
    return (
        "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
    )
